"""What a push asks of a store: each request takes a while, and rows wait for one of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from serve import conductor as conducting
from tests.serve.faulty import FaultyServer
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads


def test_a_push_asks_of_the_store_what_the_docs_say(
    faulty: FaultyServer,
    s3_url: str,
    trunk_folder: Path,
    heads: Heads,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For a new task and two replicas; the record is the last, and nothing else is held for."""
    monkeypatch.setattr(conducting, "FOLLOW_S", 60.0)  # what is asked at rest does not count
    with LocalFleet(s3_url, trunk_folder, replicas=2) as fleet:
        faulty.seen.clear()
        pushed = HttpClient(fleet, "replica-1").post(
            "/tasks/colours/versions", content=heads(1).to_zip()
        )
        asked = [(method, "blob" if "/blobs/" in path else "log") for method, path in faulty.seen]

    assert pushed.status_code == 200
    assert Counter(asked) == {
        ("GET", "log"): 2 + 2,
        ("PUT", "blob"): 4,
        ("GET", "blob"): 2 * 4,
        ("PUT", "log"): 1,
    }
    assert asked[-1] == ("PUT", "log")
