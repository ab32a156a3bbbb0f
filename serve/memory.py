"""How much memory this process has and takes, and whether a second trunk fits beside the first."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
from pathlib import Path

from export.bundle import PRECISION_GRAPHS, TRUNK_ADAPTED, Precision, TrunkManifest

# Of a cgroup, as seen from inside it: version 2, then version 1.
LIMIT_FILES = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
FOR_REPLICAS = 0.8  # of the machine; the rest is Ray's, HAProxy's and the system's
# A session keeps its weights beside the graph that they are read from, and packs some once more.
BYTES_PER_GRAPH_BYTE = 3
SESSION_BYTES = 16 * 2**20  # of arenas and activations; assumed, for a batch of a small trunk


class MemoryShortError(Exception):
    """A second trunk does not fit into this process beside the first."""

    def __init__(self, *, needed_bytes: int, used_bytes: int, limit_bytes: int) -> None:
        super().__init__(
            f"The new trunk needs about {needed_bytes / 2**20:.0f} MiB beside the one that is "
            f"served; this replica uses {used_bytes / 2**20:.0f} MiB of {limit_bytes / 2**20:.0f} "
            "(memory_bytes). Serve fewer replicas, or more memory, while the trunk changes."
        )


def check_room(needed_bytes: int, limit_bytes: int) -> None:
    """See that so much fits beside what this process uses.

    Raises:
        MemoryShortError: it does not.
    """
    used = used_bytes()
    if used + needed_bytes > limit_bytes:
        raise MemoryShortError(needed_bytes=needed_bytes, used_bytes=used, limit_bytes=limit_bytes)


def trunk_bytes(manifest: TrunkManifest, precision: Precision, *, adapters_bytes: int) -> int:
    """What a trunk is likely to take once it is loaded.

    Args:
        adapters_bytes: What the adapters of its tasks will take.
    """
    graphs = [manifest.files[PRECISION_GRAPHS[precision]]]
    graphs += [manifest.files[TRUNK_ADAPTED]] if TRUNK_ADAPTED in manifest.files else []
    sessions = sum(BYTES_PER_GRAPH_BYTE * entry.size_bytes + SESSION_BYTES for entry in graphs)
    return sessions + adapters_bytes


def replica_bytes(num_replicas: int) -> int:
    """A replica's share of the memory that this machine, or the container, has."""
    return int(FOR_REPLICAS * limit_bytes()) // num_replicas


def limit_bytes() -> int:
    """Memory of the container if it has a limit, else of the machine."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in LIMIT_FILES:
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdecimal():  # "max" where there is no limit
            return min(int(text), physical)
    return physical


def used_bytes() -> int:
    """Resident memory of this process now; where only its peak is known, that."""
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def give_back() -> None:
    """Return what is free to the system: glibc keeps it otherwise."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
