"""Close HAProxy's door before Ray Serve stops, which would kill it with requests in flight.

Ray 2.60 kills the proxies in the same moment in which it asks the replicas to finish.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

CHECK_S = 0.02


def close_front_door(folder: Path, *, limit_s: float) -> bool:
    """Take no new connections; those that are open are closed with their next answer.

    Args:
        folder: Where the configuration of this service's HAProxy lies.
        limit_s: Longest wait for the last answer.

    Returns:
        Whether no connection is left. One that is idle stays until its client closes it.
    """
    for pid in _haproxies(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR1)  # HAProxy's soft stop
    deadline_s = time.monotonic() + limit_s
    while _haproxies(folder):
        if time.monotonic() > deadline_s:
            return False
        time.sleep(CHECK_S)
    return True


def _haproxies(folder: Path) -> list[int]:
    """The processes that run by a configuration in this folder; none where there is no /proc."""
    return [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if _is_of(path, folder)
    ]


def _is_of(cmdline: Path, folder: Path) -> bool:
    try:
        arguments = cmdline.read_bytes().decode(errors="replace").split("\0")
    except OSError:  # it has ended
        return False
    return Path(arguments[0]).name == "haproxy" and any(
        Path(argument).is_relative_to(folder) for argument in arguments[1:] if argument
    )
