"""A fleet without a replica: who looks on lets it sleep, who asks or pushes wakes it."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from tests.end_to_end.callers import Callers
from tests.end_to_end.program import Program
from tests.serve.harness import until
from tests.serve.oracle import Heads

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

KEEP_S = 2
ASLEEP_WITHIN_S = 180.0  # half a minute is what a jump is told from; no report is older than 6 s
STAYS_S = 8.0  # Ray asks the policy ten times a second


def is_asleep(program: Program) -> bool:
    """No process is left, and the front door says so."""
    return not program.replicas() and program.counts("headstock_replicas") == {"": 0.0}


@pytest.mark.timeout(900)
def test_the_last_replica_goes_and_requests_and_pushes_wake_one(
    tmp_path: Path, trunk_folder: Path, heads: Heads
) -> None:
    """Nothing is dropped on the way down or up, and the log says what is live as ever."""
    flags = ("--min-replicas", "0", "--max-replicas", "2")
    with Program(tmp_path, trunk_folder, replicas=flags, keep_replicas_s=KEEP_S) as program:
        with program.client() as client:
            client.push(heads(0, "colours"))
        with Callers(program, heads, (("colours",),), clients=1) as callers:
            callers.wait_for(20)
        assert callers.judge() == []
        until(lambda: is_asleep(program), limit_s=ASLEEP_WITHIN_S)

        looked = time.monotonic()
        while time.monotonic() < looked + STAYS_S:
            assert httpx.get(f"{program.url}/v2/health/ready", timeout=5).is_success
            assert is_asleep(program)
            time.sleep(0.2)

        with Callers(program, heads, (("colours",),), clients=4) as callers:
            callers.push(1, "colours")
            callers.wait_for(20)
        assert callers.judge() == []
        assert program.counts("headstock_live_version") == {'{task="colours"}': 2.0}
