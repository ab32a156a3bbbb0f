"""A small trunk with adapter sites, and tasks of every size of specialisation with their truth."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from export.adapter import Adapter
from export.bundle import TRUNK_ADAPTED, TRUNK_GRAPH, Bundle, TrunkManifest, read_trunk_folder
from export.head import bundle_head
from export.provenance import provenance_of
from export.tail import bundle_tail
from export.trunk import export_trunk
from models.adapters import AdapterKind, adapt
from models.backbones import Backbone, build_backbone
from models.heads import LinearHead
from models.record import DataRecord
from serve.engine import Engine

LABELS = ("red", "green", "blue")
SIZE_PX = 32


@dataclass(frozen=True)
class Specialised:
    """A task's bundle, and what PyTorch gives for pictures: scores float32 [pictures, labels]."""

    bundle: Bundle
    truth: Callable[[NDArray[np.uint8]], NDArray[np.float32]]


class SpecialisedTrunk:
    """A small backbone with random weights, exported, and bundles for it.

    Args:
        folder: Where the trunk is written.
        backbone: None: `small32`.
    """

    def __init__(self, folder: Path, backbone: Backbone | None = None) -> None:
        small, _ = build_backbone("small32", weights=None, allow_untrained=True)
        self.backbone = backbone or small
        pictures = torch.from_numpy(some_pictures(8, seed=0))
        export_trunk(
            self.backbone, pictures, folder, provenance=provenance_of(command="test", seed=0)
        )
        self.folder = folder
        self.manifest: TrunkManifest
        self.files: Mapping[str, bytes]
        self.manifest, self.files = read_trunk_folder(folder)

    def engine(self) -> Engine:
        """The trunk, loaded."""
        return Engine(self.files[TRUNK_GRAPH], self.manifest, adapted=self.files[TRUNK_ADAPTED])

    def with_head(self, task: str, seed: int) -> Specialised:
        """A head alone."""
        head = _random_head(self.backbone.num_features, seed)
        return self._made(task, head, self.backbone.suffix, None)

    def with_adapter(
        self, task: str, kind: AdapterKind, seed: int, *, width: int = 2
    ) -> Specialised:
        """An adapter that changes the features visibly, with its head."""
        suffix = adapt(self.backbone, kind, width=width, seed=seed)
        _shake((p for p in suffix.parameters() if p.requires_grad), seed)
        head = _random_head(self.backbone.num_features, seed)
        return self._made(task, head, suffix, Adapter(kind, suffix.weights()))

    def with_tail(self, task: str, seed: int) -> Specialised:
        """The suffix with changed weights, and a head."""
        suffix = copy.deepcopy(self.backbone.suffix)
        _shake(suffix.parameters(), seed)
        tail = nn.Sequential(suffix, _random_head(self.backbone.num_features, seed)).eval()
        bundle = bundle_tail(tail, **self._about(task))
        return Specialised(bundle, lambda pictures: self._scores(tail, pictures))

    def _made(
        self, task: str, head: LinearHead, suffix: nn.Module, adapter: Adapter | None
    ) -> Specialised:
        graph = self.files[TRUNK_ADAPTED]
        bundle = bundle_head(head, adapter=adapter, adapted_graph=graph, **self._about(task))
        whole = nn.Sequential(suffix, head)
        return Specialised(bundle, lambda pictures: self._scores(whole, pictures))

    def _scores(self, after: nn.Module, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.no_grad():
            maps = self.backbone.prefix(self.backbone.normalise(torch.from_numpy(pictures)))
            return after(maps).softmax(dim=1).numpy()

    def _about(self, task: str) -> dict[str, Any]:
        pictures = torch.from_numpy(some_pictures(4, seed=1))
        return {
            "task": task,
            "labels": LABELS,
            "trunk": self.manifest,
            "trunk_graph": self.files[TRUNK_GRAPH],
            "pictures": pictures,
            "picture_labels": torch.arange(4) % 3,
            "data": DataRecord(name="none", sha256="0" * 64, num_pictures={}),
            "metrics": {},
            "provenance": provenance_of(command="test", seed=0),
        }


def some_pictures(number: int, *, seed: int) -> NDArray[np.uint8]:
    """Noise, uint8 [number, 32, 32, 3]."""
    chance = np.random.default_rng(seed)
    return chance.integers(0, 256, (number, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)


def _random_head(num_features: int, seed: int) -> LinearHead:
    head = LinearHead(num_features, len(LABELS))
    _shake(head.parameters(), seed, scale=1.0)
    return head.eval()


def _shake(parameters: Iterable[nn.Parameter], seed: int, *, scale: float = 0.2) -> None:
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=chance))
