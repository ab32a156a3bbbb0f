"""An adapter as a file, and what the adapted graph makes of pictures with it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from export.adapted import LOW_RANK, SCALE_SHIFT
from export.bundle import AdapterEntry
from export.parity import open_session, run
from models.adapters import AdapterKind

FAMILY_OF: Mapping[AdapterKind, str] = {
    "lora": LOW_RANK,
    "adapter": LOW_RANK,
    "ssf": SCALE_SHIFT,
    "bias": SCALE_SHIFT,
}


@dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    Args:
        weights: "SITE/PART" -> float32, as `models.adapters.AdaptedSuffix.weights` gives them.
    """

    kind: AdapterKind
    weights: Mapping[str, Tensor]

    @property
    def entry(self) -> AdapterEntry:
        """What the manifest says of it."""
        width = next((len(w) for name, w in self.weights.items() if name.endswith("/down")), 0)
        return AdapterEntry(kind=self.kind, width=width)

    def to_bytes(self) -> bytes:
        """`adapter.safetensors`."""
        return save({name: weight.contiguous() for name, weight in self.weights.items()})


def adapted_features(
    trunk_graph: bytes,
    adapted_graph: bytes,
    adapter: Adapter,
    pictures: UInt8[np.ndarray, "pictures height width 3"],
) -> Float[np.ndarray, "pictures num_features"]:
    """Features with the adapter, as serving computes them.

    Raises:
        ParityError: ONNX Runtime cannot run the graphs, or the adapter is not one for them.
    """
    family = FAMILY_OF[adapter.kind]
    session = open_session(adapted_graph)
    maps = run(open_session(trunk_graph), ("prefix",), pictures)["prefix"]
    rows = np.arange(len(pictures))
    feeds = {"prefix": maps, "image_of": rows, "slot_of": np.ones_like(rows)}
    banks = banks_of([adapter])
    for given in session.get_inputs():
        if given.name not in feeds and given.name not in banks:
            # Of the other family, whose output is not asked for.
            banks[given.name] = np.zeros([2 if isinstance(d, str) else d for d in given.shape], "f")
    return np.asarray(session.run([family], {**feeds, **banks})[0])


def banks_of(adapters: list[Adapter]) -> dict[str, NDArray[np.float32]]:
    """Banks with the identity in slot 0 and the adapters in the slots after it."""
    num_slots = len(adapters) + 1
    banks: dict[str, NDArray[np.float32]] = {}
    for slot, adapter in enumerate(adapters, start=1):
        for name, weight in adapter.weights.items():
            identity = float(name.endswith("/scale"))
            bank = banks.setdefault(name, np.full((num_slots, *weight.shape), identity, np.float32))
            bank[slot] = weight.numpy()
        if FAMILY_OF[adapter.kind] == LOW_RANK:
            slopes = banks.setdefault("slope", np.ones((num_slots, 1), np.float32))
            slopes[slot] = float(adapter.kind == "lora")
    return banks
