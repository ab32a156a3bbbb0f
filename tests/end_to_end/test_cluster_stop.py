"""The end of a service under load: what it has taken it answers."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.callers import png
from tests.end_to_end.program import Program
from tests.serve.oracle import Heads, some_picture

pytestmark = pytest.mark.cluster

CLIENTS = 16


class Askers:
    """Clients that ask one request after the other until nobody takes a connection any more.

    Args:
        answered: Statuses of the answers.
        broken: What went wrong with requests that had been taken.
    """

    def __init__(self, url: str, picture: bytes) -> None:
        self._url, self._picture = url, picture
        self.answered: list[int] = []
        self.broken: list[str] = []
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        # A pool of its own for each: a connection that the service has closed is not used again.
        with httpx.Client(timeout=60) as client:
            while True:
                try:
                    answer = client.post(self._url, content=self._picture)
                except httpx.ConnectError:  # the door is closed, nothing was taken
                    return
                except httpx.TransportError as error:
                    self.broken.append(repr(error))
                    return
                self.answered.append(answer.status_code)

    def wait(self) -> None:
        """Until all have been turned away."""
        for thread in self._threads:
            thread.join(60)


def test_a_service_that_is_told_to_stop_answers_what_it_has_taken(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Sixteen clients while SIGTERM comes; a seventeenth has an idle connection all the time."""
    with Program(tmp_path, trunk_folder) as program:
        with program.client() as client:
            client.push(heads(0, "colours"))
        with httpx.Client() as idle:
            idle.get(f"{program.url}/v2/health/ready")
            askers = Askers(f"{program.url}/predict/colours", png(some_picture(0)))
            time.sleep(3)
            before = len(askers.answered)
            took_s = program.stop()
            askers.wait()

        assert program.exit_code == 0
    assert before > 100
    assert askers.broken == []
    assert set(askers.answered) == {200}
    assert took_s < 20
