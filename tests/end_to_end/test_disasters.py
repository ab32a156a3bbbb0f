"""What the disaster table of the handbook says, where no other test does."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.callers import png
from tests.end_to_end.program import HAPROXY, HEAL_LIMIT_S, Program
from tests.serve.harness import until
from tests.serve.oracle import Heads, expected_scores, some_picture

pytestmark = pytest.mark.cluster

TASK = "lasting"


def answer_of(service: Program) -> tuple[int, list[float]]:
    """Version and scores, by the product's client."""
    with service.client() as client:
        prediction = client.predict(TASK, png(some_picture(0)))
    return prediction.version, list(prediction.scores.values())


def test_a_front_door_that_is_killed_is_opened_again(service: Program, heads: Heads) -> None:
    """All of HAProxy's processes at once; nobody helps."""
    with service.client() as client:
        version = client.push(heads(0, TASK))["version"]
    doors = service.named(HAPROXY)
    for door in doors:
        door.kill()

    until(lambda: bool(set(service.named(HAPROXY)) - set(doors)), limit_s=HEAL_LIMIT_S)
    service.wait_whole()

    assert doors
    assert answer_of(service)[0] == version


def test_after_everything_was_killed_a_start_goes_on_where_the_log_ends(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """SIGKILL for every process, as when a machine loses power; versions go on, none again."""
    with Program(tmp_path, trunk_folder) as first:
        with first.client() as client:
            client.push(heads(0, TASK))
            client.push(heads(1, TASK))
        for process in first.tree():
            process.kill()
    with Program(tmp_path, trunk_folder) as second:
        before = answer_of(second)
        with second.client() as client:
            client.push(heads(2, TASK))
        after = answer_of(second)

    assert before == (2, pytest.approx(expected_scores(some_picture(0), 1), abs=1e-5))
    assert after == (3, pytest.approx(expected_scores(some_picture(0), 2), abs=1e-5))
