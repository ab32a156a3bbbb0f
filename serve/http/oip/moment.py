"""The head log and this replica's trunk, of one moment."""

from __future__ import annotations

import asyncio
import time

from export.bundle import TrunkManifest
from serve.jobs import DeadlineError
from serve.record import LogView
from serve.replica import Replica

LOOK_AGAIN_S = 0.02


async def served_view(
    replica: Replica, deadline_s: float, timeout_s: float
) -> tuple[LogView, TrunkManifest]:
    """What the log says now, once this replica serves the trunk that it names.

    When a change of the trunk ends, others may answer by the new one some milliseconds earlier.

    Raises:
        DeadlineError: that took too long.
        StoreError: the log cannot be read.
    """
    while time.monotonic() < deadline_s:
        view, trunk = await asyncio.to_thread(replica.history), replica.engine.manifest
        if view.trunk is not None and view.trunk.trunk == trunk.digest:
            return view, trunk
        await asyncio.sleep(LOOK_AGAIN_S)
    raise DeadlineError(timeout_s)
