"""Answers, compressed for who asks for it.

Only those to inference requests: clients that say they take gzip read everything else as it is.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Mapping

LEVEL = 1  # scores hardly compress, whatever time is spent on it

COMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, LEVEL, mtime=0),
    "deflate": lambda data: zlib.compress(data, LEVEL),
}


def accepted_encoding(header: str) -> str | None:
    """The first encoding of an `Accept-Encoding` that is known here; None for none."""
    for choice in header.lower().split(","):
        name, _, weight = (part.strip() for part in choice.partition(";"))
        if name in COMPRESS and not re.fullmatch(r"q=0(\.0*)?", weight):
            return name
    return None
