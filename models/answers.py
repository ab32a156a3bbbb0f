"""What a network makes of pictures; and a teacher that remembers what it was asked."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from models.backbones import Backbone
from models.heads import Head

# Answers are kept up to this size and asked for again beyond it.
MAX_KEPT_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Answer:
    """What a backbone with a head makes of pictures.

    Args:
        maps: At the cut, float32 [batch, ...]; None unless asked for.
    """

    logits: Float[Tensor, "batch num_classes"]
    features: Float[Tensor, "batch num_features"]
    maps: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Of the values."""
        parts = (self.logits, self.features, *(() if self.maps is None else (self.maps,)))
        return sum(part.numel() * part.element_size() for part in parts)


def features_and_maps(
    backbone: Backbone, images: UInt8[Tensor, "batch height width 3"], *, with_maps: bool
) -> tuple[Float[Tensor, "batch num_features"], Tensor | None]:
    """Run a backbone, in the mode that it is in and on its own device."""
    maps = backbone.prefix(backbone.normalise(images.to(backbone.mean.device)))
    # A suffix may begin with an operation in place, and the maps are compared later.
    features = backbone.suffix(maps.clone() if with_maps else maps)
    return features, maps if with_maps else None


class Memory:
    """What a teacher said of pictures: it does not change, so it is asked only once about each."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Answer] = {}
        self._kept_bytes = 0

    def ask(
        self,
        backbone: Backbone,
        head: Head,
        images: UInt8[Tensor, "batch height width 3"],
        *,
        with_maps: bool,
        keep: bool,
    ) -> Answer:
        """The teacher's answer, in evaluation mode, without gradients, on its own device.

        Args:
            keep: Whether these very pixels may come again; see `MAX_KEPT_BYTES`.
        """
        if not keep:
            return _ask(backbone, head, images, with_maps=with_maps)
        keys = [hashlib.blake2b(image.numpy().tobytes()).digest() for image in images]
        found = [self._kept[key] for key in keys if key in self._kept]
        if len(found) == len(keys) and all(one.maps is not None or not with_maps for one in found):
            return _joined(found, with_maps=with_maps)
        fresh = _ask(backbone, head, images, with_maps=with_maps)
        for key, one in zip(keys, _apart(fresh), strict=True):
            self._keep(key, one)
        return fresh

    def _keep(self, key: bytes, one: Answer) -> None:
        before = self._kept[key].num_bytes if key in self._kept else 0
        if self._kept_bytes - before + one.num_bytes <= MAX_KEPT_BYTES:
            self._kept[key] = one
            self._kept_bytes += one.num_bytes - before


def _ask(backbone: Backbone, head: Head, images: Tensor, *, with_maps: bool) -> Answer:
    with torch.no_grad():
        features, maps = features_and_maps(backbone.eval(), images, with_maps=with_maps)
        return Answer(head(features), features, maps)


def _apart(joined: Answer) -> Iterable[Answer]:
    """One answer for each picture."""
    for row in range(len(joined.logits)):
        maps = None if joined.maps is None else joined.maps[row : row + 1]
        yield Answer(joined.logits[row : row + 1], joined.features[row : row + 1], maps)


def _joined(answers: Iterable[Answer], *, with_maps: bool) -> Answer:
    parts = list(answers)
    maps = [part.maps for part in parts if part.maps is not None]
    return Answer(
        torch.cat([part.logits for part in parts]),
        torch.cat([part.features for part in parts]),
        torch.cat(maps) if with_maps else None,
    )
