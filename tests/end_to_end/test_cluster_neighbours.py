"""Two services on one machine, and the end of one of them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.end_to_end.callers import png
from tests.end_to_end.program import Program, listening
from tests.serve.oracle import Heads, expected_scores, some_picture

pytestmark = pytest.mark.cluster


def assert_answers(service: Program, seed: int, version: int) -> None:
    """The service's own head answers."""
    with service.client() as client:
        prediction = client.predict("shared-name", png(some_picture(0)))
    assert prediction.version == version
    expected = pytest.approx(expected_scores(some_picture(0), seed), abs=1e-5)
    assert list(prediction.scores.values()) == expected


def test_two_services_do_not_notice_each_other_and_one_that_stops_leaves_nothing(
    service: Program, heads: Heads, trunk_folder: Path, tmp_path: Path
) -> None:
    """Own stores, ports, sockets and tokens; SIGTERM ends all of one service, and no more."""
    with service.client() as client:
        client.push(heads(0, "shared-name"))
    with Program(tmp_path, trunk_folder) as neighbour:
        with neighbour.client() as client:
            assert client.tasks()["tasks"] == []
            client.push(heads(1, "shared-name"))
            client.push(heads(2, "shared-name"))
        assert neighbour.ready["url"] == neighbour.url
        assert neighbour.ready["pid"] == neighbour.tree()[0].pid
        assert_answers(neighbour, seed=2, version=2)
        assert_answers(service, seed=0, version=1)
        folder = neighbour.run_folder()
        ports = {port for process in neighbour.tree() for _, port in listening(process)}

        took_s = neighbour.stop()

        assert took_s < 10
        assert neighbour.exit_code == 0
        assert neighbour.left_over() == []
        assert folder.name.startswith("headstock-")
        assert not folder.exists()
        assert [port for port in ports if is_open(port)] == []
        assert len(neighbour.out.splitlines()) == 1
        assert service.is_whole()
        assert_answers(service, seed=0, version=1)


def is_open(port: int) -> bool:
    """Whether somebody listens there."""
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", port)) == 0
