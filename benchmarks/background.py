"""What goes on beside a block of code until the block ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self


class Background:
    """Threads that each do the same over and over; use as a context manager.

    Args:
        once: Given the number of its thread, so that each may have its own state.
    """

    def __init__(self, once: Callable[[int], object], *, threads: int = 1) -> None:
        self._once, self._is_over = once, threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True)
            for number in range(threads)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        while not self._is_over.is_set():
            self._once(number)
