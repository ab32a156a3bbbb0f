"""How long does a start take, and how much of it is not Ray's own?

`headstock serve` with 2 replicas from the command to the first answer, against a bare Ray Serve
application that answers "ok" from 2 replicas, started with the same switches. The difference is
what Headstock adds: its imports, the head log, the conductor, the trunk and the heads.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks.fixtures import free_port, make_bundle, make_trunk, running, serving
from benchmarks.report import Figure, arguments, finish, median_of, note
from serve.client import Client

NUM_HEADS = 20

BARE = """
import json, sys, tempfile, threading, signal, logging, os
from pathlib import Path
from serve import runtime
port = int(sys.argv[1])
folder = Path(tempfile.mkdtemp(prefix="headstock-"))
runtime.prepare(folder, host="127.0.0.1", max_body_bytes=2**24, timeout_s=30, proxy="haproxy")
import ray
from ray import serve
ray.init(address="local", num_cpus=max(os.cpu_count(), 2), include_dashboard=False,
         log_to_driver=False, logging_level=logging.ERROR, object_store_memory=100 * 2**20)
logging.getLogger("ray.serve").setLevel(logging.WARNING)
serve.start(http_options={"host": "127.0.0.1", "port": port})
class Ok:
    async def __call__(self, request):
        return "ok"
serve.run(serve.deployment(name="ok", num_replicas=2)(Ok).bind())
import httpx
while httpx.get(f"http://127.0.0.1:{port}/").status_code != 200:
    pass
over = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: over.set())
print(json.dumps({"ready": True}), flush=True)
over.wait()
serve.shutdown()
ray.shutdown()
"""


def main() -> None:
    """Alternate between the two."""
    chosen = arguments(__doc__ or "")
    rounds = 3 if chosen.quick else 5
    ours: list[float] = []
    bare: list[float] = []
    steps: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        trunk, store = Path(name) / "trunk", Path(name) / "store"
        make_trunk(trunk)
        with serving(store, trunk=trunk) as service, Client(service["url"]) as client:
            for number in range(NUM_HEADS):
                client.push(make_bundle(trunk, task=f"task{number}", seed=number))
        for number in range(rounds):
            began_s = time.monotonic()
            with running("-c", BARE, str(free_port())):
                bare.append(time.monotonic() - began_s)
            began_s = time.monotonic()
            with serving(store, trunk=trunk) as service:
                ours.append(time.monotonic() - began_s)
                for step, seconds in service["start_seconds"].items():
                    steps.setdefault(step, []).append(seconds)
            note(
                f"round {number + 1} of {rounds}: Ray {bare[-1]:.1f} s, Headstock {ours[-1]:.1f} s"
            )
    added = [own - other for own, other in zip(ours, bare, strict=True)]
    figures: list[Figure] = [
        median_of("added to a bare Ray Serve start", added, unit="s", aim="<= 3"),
        median_of(f"headstock serve, {NUM_HEADS} heads", ours, unit="s"),
        median_of("bare Ray Serve", bare, unit="s"),
        *(median_of(f"step: {step}", seconds, unit="s") for step, seconds in steps.items()),
    ]
    finish("cold_start", figures, chosen)


if __name__ == "__main__":
    main()
