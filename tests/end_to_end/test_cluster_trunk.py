"""A new trunk with all its heads, and the way back, on a running service under traffic."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.end_to_end.program import Program
from tests.serve.harness import until
from tests.serve.oracle import some_picture
from tests.serve.tiny import TinyTrunk, png_of

pytestmark = pytest.mark.cluster

TASKS = ("colours", "shapes")


def test_the_trunk_changes_and_goes_back_under_traffic(tmp_path: Path) -> None:
    """Over HTTP through the proxy: no request fails, and each answer is of one trunk, and right."""
    old = TinyTrunk(tmp_path / "old", size_px=8, roll=0, scale=0.01)
    new = TinyTrunk(tmp_path / "new", size_px=12, roll=1, scale=0.02)
    picture, is_over = some_picture(0), threading.Event()
    seen: list[httpx.Response] = []

    def ask(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as client:
            while not is_over.is_set():
                seen.append(client.post("/predict?tasks=colours,shapes", content=png_of(picture)))

    def wait_for(num_more: int) -> None:
        goal = len(seen) + num_more
        until(lambda: len(seen) >= goal, limit_s=60)

    with Program(tmp_path / "service", old.folder) as service, service.client() as client:
        client.push_together([old.bundle(task, place) for place, task in enumerate(TASKS)])
        with ThreadPoolExecutor(4) as pool:
            callers = [pool.submit(ask, service.url) for _ in range(4)]
            wait_for(50)
            there = client.push_trunk(
                new.folder, [new.bundle(task, place) for place, task in enumerate(TASKS)]
            )
            first_new = len(seen)
            wait_for(50)
            client.rollback_trunk()
            wait_for(50)
            is_over.set()
            for caller in callers:
                caller.result(60)
        listed = client.tasks()

    assert [answer.status_code for answer in seen if answer.status_code != 200] == []
    answers: list[list[dict[str, Any]]] = [answer.json()["results"] for answer in seen]
    pairs = [[one["version"] for one in answer] for answer in answers]
    assert {tuple(pair) for pair in pairs} == {(1, 1), (2, 2), (3, 3)}
    # Requests in flight when the push returned may be older; four callers have one each.
    assert [1, 1] not in pairs[first_new + 4 :]
    for answer in answers:
        trunk = new if answer[0]["version"] == 2 else old
        for seed, one in enumerate(answer):
            scores = list(one["scores"].values())
            np.testing.assert_allclose(scores, trunk.scores(picture, seed), atol=1e-4)
    assert there["swap"]["replicas"] == 2
    assert listed["trunk"] == old.manifest.digest
