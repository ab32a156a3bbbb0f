"""What does a batch cost whose every row has another adapter, one of a thousand in memory?

The engine runs the same pictures with plain rows, and with rows of adapters drawn uniformly from
1,000: LoRA of rank 4 on every pointwise convolution of the last stage, or scale and shift on every
convolution of it. One process with one thread, MobileNetV3-small, random weights. Also: what it
costs to write an adapter into its slot, and to bring one back from disk.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks.fixtures import make_bundle, make_trunk
from benchmarks.report import Figure, arguments, finish, median_of, note, quantile_of
from export.bundle import TRUNK_ADAPTED, TRUNK_GRAPH, AdapterEntry, read_trunk_folder
from serve.adapted import family_of
from serve.bank import PagedAdapter
from serve.engine import Engine, LiveHead, Row
from serve.heads import Head
from serve.paging import AdapterMemory

NUM_ADAPTERS = 1000
BATCHES = (32, 8)
KINDS = {
    "LoRA": (AdapterEntry(kind="lora", width=4), ">= 0.85"),
    "scale-and-shift": (AdapterEntry(kind="ssf"), ">= 0.90"),
}


def main() -> None:
    """Alternate between plain and mixed batches, for each kind and size."""
    chosen = arguments(__doc__ or "")
    rounds, runs = (5, 6) if chosen.quick else (9, 24)
    with tempfile.TemporaryDirectory() as name, threadpool_limits(1):
        folder = Path(name)
        make_trunk(folder)
        manifest, files = read_trunk_folder(folder)
        engine = Engine(files[TRUNK_GRAPH], manifest, adapted=files[TRUNK_ADAPTED])
        head = Head.of_bundle(make_bundle(folder, task="any", seed=0))
        size_px = manifest.preprocessing.size_px
        chance = np.random.default_rng(0)
        pictures = chance.integers(0, 256, (max(BATCHES), size_px, size_px, 3), np.uint8)
        figures: list[Figure] = []
        for kind, (entry, aim) in KINDS.items():
            with _Adapted(engine, head, entry) as adapted:
                note(f"{NUM_ADAPTERS} {kind} adapters, {adapted.slot_bytes} bytes each")
                for batch in BATCHES:
                    ratios = [adapted.ratio(pictures[:batch], chance, runs) for _ in range(rounds)]
                    figures.append(
                        median_of(
                            f"throughput, {NUM_ADAPTERS} {kind} mixed / plain, batches of {batch}",
                            ratios,
                            unit="ratio",
                            aim=aim if batch == BATCHES[0] else "",
                        )
                    )
                    note(f"{kind}, batches of {batch}: {statistics.median(ratios):.3f}")
                figures += adapted.paging(kind)
    finish("mixed_adapters", figures, chosen)


class _Adapted:
    """A thousand adapters of one kind in memory, and one more task without."""

    def __init__(self, engine: Engine, head: Head, entry: AdapterEntry) -> None:
        self._engine, self._entry = engine, entry
        self._graph = engine.families[family_of(entry)]
        shapes = self._graph.slot_shapes(entry.width)
        self.slot_bytes = sum(4 * int(np.prod(shape)) for shape in shapes.values())
        self._memory = AdapterMemory(
            engine.families, budget_bytes=(NUM_ADAPTERS + 1) * self.slot_bytes
        )
        self._plain = LiveHead("plain", 1, "sha256:" + 64 * "0", head)
        self._heads = [
            LiveHead(f"task{seed}", 1, "sha256:" + 64 * "0", head, adapter=self._add(seed))
            for seed in range(NUM_ADAPTERS)
        ]
        if not self._memory.pin(self._heads):
            raise RuntimeError("The adapters do not fit into memory.")

    def __enter__(self) -> _Adapted:  # noqa: PYI034 (nobody inherits)
        """All are in memory."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the memory's thread."""
        self._memory.close()

    def ratio(self, pictures: NDArray[np.uint8], chance: np.random.Generator, runs: int) -> float:
        """Plain seconds by mixed seconds, medians of runs in turn."""
        seconds: tuple[list[float], list[float]] = ([], [])
        plain = [Row(row, self._plain) for row in range(len(pictures))]
        for run in range(runs + 1):
            picked = chance.integers(NUM_ADAPTERS, size=len(pictures))
            mixed = [Row(row, self._heads[place]) for row, place in enumerate(picked)]
            for which in (0, 1) if run % 2 else (1, 0):
                began_s = time.perf_counter()
                self._engine.run(pictures, (plain, mixed)[which])
                if run:  # the first run of a size allocates
                    seconds[which].append(time.perf_counter() - began_s)
        return statistics.median(seconds[0]) / statistics.median(seconds[1])

    def paging(self, kind: str) -> Sequence[Figure]:
        """Time to write a slot, and from asking for an adapter on disk until it is pinned."""
        self._memory.unpin(self._heads)
        late = [
            LiveHead(f"late{seed}", 1, "sha256:" + 64 * "0", self._plain.head, adapter=a)
            for seed, a in ((seed, self._add(NUM_ADAPTERS + seed)) for seed in range(100))
        ]
        brought_ms: list[float] = []
        for head in (*late, *self._heads[:100]):
            began_s = time.perf_counter()
            while not self._memory.pin([head]):
                time.sleep(1e-4)
            brought_ms.append(1000 * (time.perf_counter() - began_s))
            self._memory.unpin([head])
        adapter = self._heads[-1].adapter
        assert adapter is not None
        assert adapter.slot is not None
        slot = self._graph.slot_of(self._entry, self._weights(0), adapter.bank.width)
        written_us: list[float] = []
        for _ in range(200):
            began_s = time.perf_counter()
            adapter.bank.write(adapter.slot, slot)
            written_us.append(1e6 * (time.perf_counter() - began_s))
        return [
            median_of(f"writing a slot, {kind}", written_us, unit="us"),
            median_of(f"back from disk, {kind}, median", brought_ms, unit="ms"),
            quantile_of(f"back from disk, {kind}, p99", brought_ms, 0.99, unit="ms"),
        ]

    def _add(self, seed: int) -> PagedAdapter:
        return self._memory.add(f"task{seed}", self._entry, self._weights(seed))

    def _weights(self, seed: int) -> dict[str, NDArray[np.float32]]:
        chance = np.random.default_rng(seed)
        return {
            name: np.float32(0.01) * chance.standard_normal(shape, np.float32)
            for name, shape in self._graph.slot_shapes(self._entry.width).items()
            if name != "slope"
        }


if __name__ == "__main__":
    main()
