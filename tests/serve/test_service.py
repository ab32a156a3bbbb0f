"""How `headstock serve` is told to end."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading

WAITS = """
from serve.service import asked_to_end

wait = asked_to_end()
print("up", flush=True)
wait()
print("over", flush=True)
"""
NUM_SIGNALS, LIMIT_S = 500, 30.0


def test_it_ends_however_often_it_is_asked_to() -> None:
    """A terminal and `uv run` both send a Ctrl-C; one comes while the other is being handled."""
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            for place in range(NUM_SIGNALS):
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal((signal.SIGTERM, signal.SIGINT)[place % 2])
            stuck = threading.Timer(LIMIT_S, process.kill)
            stuck.start()
            # A signal may still end the interpreter itself, once it has begun to end.
            assert process.stdout.readline() == b"over\n"
            stuck.cancel()
