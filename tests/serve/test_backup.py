"""A copy of a head log that is made while heads are pushed, as the handbook says to make it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest

from export.bundle import Bundle
from serve.headlog import HeadLog
from serve.record import LogView
from tests.serve.test_doctor import problems
from tests.serve.test_garbage import push


@pytest.fixture
def copied(
    trunk_log: HeadLog, make_bundle: Callable[..., Bundle], tmp_path: Path
) -> Callable[..., HeadLog]:
    """Copies the log's folders in an order; after each file a head is pushed."""
    versions = count(1)

    def push_and_copy(source: str, target: str) -> None:
        shutil.copy(source, target)
        version = next(versions)
        push(trunk_log, make_bundle(seed=version), version)

    def copy(*folders: str) -> HeadLog:
        for version in (next(versions), next(versions)):
            push(trunk_log, make_bundle(seed=version), version)
        for folder in folders:
            source, target = Path(trunk_log.url) / folder, tmp_path / "copy" / folder
            shutil.copytree(source, target, copy_function=push_and_copy)
        return HeadLog(str(tmp_path / "copy"))

    return copy


def test_a_copy_made_in_the_right_order_is_whole(
    copied: Callable[..., HeadLog], trunk_log: HeadLog
) -> None:
    """It has what was live when the copy began, and every byte of it."""
    copy = copied("log", "blobs")

    assert problems(copy, is_deep=True) == []
    assert copy.follow(LogView()).number == 3
    assert trunk_log.follow(LogView()).number > 3


def test_a_copy_made_in_the_other_order_lacks_blobs_and_is_said_to(
    copied: Callable[..., HeadLog],
) -> None:
    """Why the order matters."""
    said = problems(copied("blobs", "log"))

    assert said
    assert all("is missing" in problem for problem in said)
