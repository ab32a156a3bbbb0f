"""Makes a replica take long to decode large pictures, without taking a processor for it.

A test of what follows the load needs more load than a replica can do, on a machine that may be busy
with other things. Python imports this file at its start where `PYTHONPATH` names its folder.
"""

from __future__ import annotations

import sys
import time
from typing import Any

LARGE_BYTES = 50_000
DECODE_S = 0.25


class BeforeReplica:
    """Finds no module; puts another decoder in place before a replica takes it."""

    def find_spec(self, name: str, *_: object) -> None:
        """See `importlib.abc.MetaPathFinder`."""
        if name == "serve.replica":
            finders.remove(self)
            from models import pictures  # noqa: PLC0415 (only where it is needed)

            decode = pictures.load_picture

            def decode_slowly(data: bytes, *args: Any, **options: Any) -> Any:
                if len(data) > LARGE_BYTES:
                    time.sleep(DECODE_S)
                return decode(data, *args, **options)

            pictures.load_picture = decode_slowly


finders: list[Any] = sys.meta_path
finders.insert(0, BeforeReplica())
