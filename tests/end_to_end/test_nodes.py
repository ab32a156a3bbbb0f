"""A fleet over two nodes: one is killed, one told to end, one added, under load and pushes."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.callers import Callers
from tests.end_to_end.nodes import NUM_NODES, REPLICAS, REPLICAS_OF_A_NODE
from tests.end_to_end.program import HEAL_LIMIT_S, Program
from tests.serve.harness import until
from tests.serve.oracle import Heads

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

NODE = "raylet/raylet"
TRIES = 4
PUSH_TRIES = 40


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path) -> Iterator[Program]:
    """Two replicas on each of two nodes."""
    command = (sys.executable, "-m", "tests.end_to_end.nodes")
    with Program(tmp_path_factory.mktemp("nodes"), trunk_folder, command=command) as program:
        yield program


def nodes(fleet: Program) -> list[psutil.Process]:
    """The nodes that replicas run on, the oldest first; the head's has none."""
    return [node for node in fleet.named(NODE) if replicas_on(node)]


def replicas_on(node: psutil.Process) -> list[psutil.Process]:
    """A node's replicas: a Ray node is the parent of its workers."""
    return [child for child in node.children() if "ServeReplica" in child.name()]


def add_node(fleet: Program) -> None:
    """The fleet is whole again, with replicas on both nodes."""
    fleet.send_signal(signal.SIGUSR1)
    until(lambda: fleet.is_whole(REPLICAS), limit_s=HEAL_LIMIT_S)


def test_replicas_are_spread_over_the_nodes(fleet: Program) -> None:
    """As many on each as it has room for."""
    found = [len(replicas_on(node)) for node in nodes(fleet)]

    assert found == [REPLICAS_OF_A_NODE] * NUM_NODES


@pytest.mark.parametrize("how", ["killed", "ended", "a replica of it ended"])
def test_a_node_leaves_under_load_and_another_comes(fleet: Program, heads: Heads, how: str) -> None:
    """Heads go live meanwhile, and no answer is older than one before, torn, or missing."""
    task = how.replace(" ", "-")
    callers = Callers(fleet, heads, ((task,),), tries=TRIES)
    callers.push(0, task)
    with callers:
        callers.wait_for(50)
        node = nodes(fleet)[-1]
        if how == "killed":
            for process in [node, *node.children(recursive=True)]:
                process.kill()
        elif how == "ended":
            node.terminate()
        else:
            replicas_on(node)[0].terminate()
        callers.push(1, task, tries=PUSH_TRIES)
        callers.wait_for(50)
        callers.push(2, task, tries=PUSH_TRIES)
        if how == "a replica of it ended":
            until(lambda: fleet.is_whole(REPLICAS), limit_s=HEAL_LIMIT_S)
        else:
            add_node(fleet)
        callers.push(3, task, tries=PUSH_TRIES)
        callers.wait_for(50)

    assert callers.judge() == []
    assert [len(replicas_on(node)) for node in nodes(fleet)] == [REPLICAS_OF_A_NODE] * NUM_NODES
