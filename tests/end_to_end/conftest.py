"""One service for all tests that need one: a cluster takes its time to start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.program import Program
from tests.serve.conftest import engine, heads, make_bundle, trunk_folder, trunk_manifest

__all__ = ["engine", "heads", "make_bundle", "trunk_folder", "trunk_manifest"]


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path) -> Iterator[Program]:
    """`headstock serve` on two replicas of the tiny trunk, behind HAProxy."""
    # A replica that is frozen is given up for dead after this and 5 s more.
    program = Program(tmp_path_factory.mktemp("service"), trunk_folder, swap_stage_s=4)
    with program:
        yield program


@pytest.fixture
def service(running: Program) -> Program:
    """The shared service, with all its replicas."""
    running.wait_whole()
    return running
