"""The trunk's adapted graph: prefix maps and slots of adapters to features.

Made by `export/adapted.py`. Its two outputs are two families of adapters on the same weights; each
gets a session of its own, because ONNX Runtime runs a graph whole, whichever output is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx.utils import Extractor

from export.bundle import AdapterEntry
from serve.onnx_session import Device, open_session

Family = Literal["low_rank", "scale_shift"]
LOW_RANK_PARTS = frozenset({"down", "up", "slope"})
ROW_INPUTS = ("prefix", "image_of", "slot_of")
WIDTH = "width"  # the axis of a bank whose length is the rank
SLOPE = "slope"


class AdapterError(ValueError):
    """An adapter does not fit the adapted graph of this trunk."""


class AdaptedGraph:
    """What the graph has of one family of adapters.

    Args:
        graph: The bytes of `trunk_adapted.onnx`.
        device: Where it runs, and where banks of it are.
    """

    def __init__(self, graph: bytes, family: Family, device: Device = "cpu") -> None:
        model = onnx.load_model_from_string(graph)
        self.family: Family = family
        self.device: Device = device
        self._shapes = {
            given.name: tuple(d.dim_value or d.dim_param for d in given.type.tensor_type.shape.dim)
            for given in model.graph.input
            if given.name not in ROW_INPUTS and _family_of(given.name) == family
        }
        self._model = Extractor(model).extract_model([*ROW_INPUTS, *self._shapes], [family])

    @cached_property
    def session(self) -> onnxruntime.InferenceSession:
        """Runs the suffix of this family; made with the first adapter."""
        return open_session(self._model.SerializeToString(), self.device)

    def slot_shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """What one slot holds in each bank."""
        return {
            name: tuple(width if isinstance(d, str) else d for d in shape[1:])
            for name, shape in self._shapes.items()
        }

    def identity(self, width: int) -> dict[str, NDArray[np.float32]]:
        """The slot that changes nothing."""
        return {
            name: np.full(shape, float(_part(name) in {"scale", SLOPE}), np.float32)
            for name, shape in self.slot_shapes(width).items()
        }

    def features_with(
        self, slot: Mapping[str, NDArray[np.float32]], maps: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Features of prefix maps with one adapter that is in no bank, float32 [batch, width]."""
        rows = np.arange(len(maps))
        banks = {name: values[None] for name, values in slot.items()}
        feeds = {"prefix": maps, "image_of": rows, "slot_of": np.zeros_like(rows), **banks}
        return np.asarray(self.session.run([self.family], feeds)[0])

    def slot_of(
        self, entry: AdapterEntry, weights: Mapping[str, NDArray[np.float32]], width: int
    ) -> dict[str, NDArray[np.float32]]:
        """An adapter as a slot of banks of this width; what it has not of a rank is zero.

        Raises:
            AdapterError: its sites or shapes are not those of the graph.
        """
        wanted = self.slot_shapes(entry.width)
        wanted.pop(SLOPE, None)
        found = {name: weight.shape for name, weight in weights.items()}
        if found != wanted:
            names = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
            name = names[0]
            raise AdapterError(
                f"The adapter's {name} has shape {found.get(name)}; this trunk takes "
                f"{wanted.get(name)}. Train the adapter on this trunk."
            )
        slot = self.identity(width)
        for name, weight in weights.items():
            slot[name][tuple(slice(length) for length in weight.shape)] = weight
        if SLOPE in slot:
            # 1 keeps the bottleneck linear, 0 makes it a ReLU.
            slot[SLOPE][:] = float(entry.kind == "lora")
        return slot


def family_of(entry: AdapterEntry) -> Family:
    """The family that serves this kind of adapter."""
    return "low_rank" if entry.kind in {"lora", "adapter"} else "scale_shift"


def families_in(graph: bytes, device: Device = "cpu") -> dict[Family, AdaptedGraph]:
    """The families that a trunk's adapted graph has."""
    names = {output.name for output in onnx.load_model_from_string(graph).graph.output}
    families: tuple[Family, ...] = ("low_rank", "scale_shift")
    return {family: AdaptedGraph(graph, family, device) for family in families if family in names}


def _family_of(name: str) -> Family:
    return "low_rank" if _part(name) in LOW_RANK_PARTS else "scale_shift"


def _part(name: str) -> str:
    return name.rpartition("/")[2]
