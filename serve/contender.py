"""A bundle that answers for the gates alone, beside what is live and on the same paths."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from export.bundle import ADAPTER, Bundle
from serve.adapted import AdaptedGraph, AdapterError, family_of
from serve.engine import Engine
from serve.graph_gate import GateError
from serve.heads import Head, graph_file
from serve.onnx_session import Device

Takes = Literal["features", "prefix"]


@dataclass(frozen=True)
class Source:
    """What contenders start from: a trunk, and which of its outputs."""

    engine: Engine
    takes: Takes

    def give(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The output for pictures uint8 [batch, size, size, 3]."""
        if self.takes == "features":
            return self.engine.features(pictures)
        return self.engine.prefix(pictures)


class Contender:
    """A head, an adapter with its head, or a tail, loaded for a comparison.

    Its adapter is in no bank: it runs through the adapted graph as the only one in a bank of its
    own, so nothing that is live leaves memory for it.

    Args:
        bundle: One that passed the gates that read.

    Raises:
        GateError: it cannot be loaded.
    """

    def __init__(self, bundle: Bundle, engine: Engine) -> None:
        self.digest = bundle.digest
        self.head, self._engine = load_head(bundle, engine.device), engine
        self._graph: AdaptedGraph | None = None
        self._slot: dict[str, NDArray[np.float32]] = {}
        if entry := bundle.manifest.adapter:
            graph = engine.families.get(family_of(entry))
            if graph is None:
                raise GateError(f"This trunk has no layers for adapters of kind {entry.kind!r}.")
            try:
                self._slot = graph.slot_of(entry, read_adapter(bundle), entry.width)
                self._graph = graph
            except AdapterError as error:
                raise GateError(str(error)) from error

    @property
    def source(self) -> Source:
        """What it starts from; an adapter's layers come after the prefix."""
        return Source(self._engine, self.head.takes if self._graph is None else "prefix")

    def start(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the trunk gives for it, of pictures uint8 [batch, size, size, 3]."""
        return self.source.give(pictures)

    def head_inputs(self, given: NDArray[np.float32]) -> NDArray[np.float32]:
        """What its graph takes, of what `start` gives: features that its adapter has changed."""
        return given if self._graph is None else self._graph.features_with(self._slot, given)

    def logits(self, given: NDArray[np.float32]) -> NDArray[np.float32]:
        """Float32 [batch, labels] of what `start` gives; what ONNX Runtime raises goes on."""
        return self.head.logits(self.head_inputs(given))


def load_head(bundle: Bundle, device: Device = "cpu") -> Head:
    """Make the head's session; a tail's on the device.

    Raises:
        GateError: ONNX Runtime cannot load it.
    """
    try:
        return Head.of_bundle(bundle, device)
    except Exception as error:
        raise GateError(f"{graph_file(bundle.manifest)} cannot be loaded: {error}") from error


def read_adapter(bundle: Bundle) -> dict[str, NDArray[np.float32]]:
    """The weights of a bundle's adapter, by site and part.

    Raises:
        GateError: the file is none.
    """
    try:
        return load(bundle.files[ADAPTER])
    # safetensors raises an error class of its own that is no public name.
    except Exception as error:
        raise GateError(f"{ADAPTER} cannot be read: {error}.") from error
