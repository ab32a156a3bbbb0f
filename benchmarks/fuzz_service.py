"""The service that is fuzzed: conductor and one replica in a process of their own, on a real port.

It prints its URL and answers until its standard input ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.channel_means import make_bundle, make_trunk
from tests.serve.harness import LocalFleet
from tests.serve.listening import app_of, listening

TASKS = ("pets", "colours")  # those that the schema's examples name
SETTINGS = {"max_body_bytes": 200_000, "max_bundle_bytes": 200_000, "max_picture_pixels": 1_000_000}


def main() -> None:
    """Serve."""
    folder = Path(sys.argv[1])
    manifest = make_trunk(folder / "trunk")
    with LocalFleet(folder / "store", folder / "trunk", replicas=1, **SETTINGS) as fleet:
        for task in TASKS:
            fleet.must_push(make_bundle(manifest, task, 0))
        with listening(app_of(fleet)) as url:
            sys.stdout.write(f"{url}\n")
            sys.stdout.flush()
            sys.stdin.read()


if __name__ == "__main__":
    main()
