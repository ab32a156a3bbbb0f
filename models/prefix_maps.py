"""What the frozen prefix makes of pictures: computed once, whatever is trained behind it."""

from dataclasses import dataclass

import torch
from jaxtyping import Int, UInt8
from torch import Tensor, nn

from models.backbones import Backbone
from models.data import Split
from models.errors import LearningError
from models.progress import Progress, ProgressCallback, unheard

BATCH_SIZE = 64
# MobileNetV2 at 224 px makes 75 KB of a picture, so this is about 28,000 of them.
MAX_MAP_BYTES = 2 * 2**30


class MapsError(LearningError):
    """The prefix maps of the pictures do not fit into memory."""


@dataclass(frozen=True)
class PrefixMaps:
    """Prefix maps float32 [rows, ...] of pictures, and the index of each one's label.

    Of the pictures as they are. With eight augmented views of each, drawn from while training,
    validation ended at .53 instead of .57 with low rank and .53 instead of .56 with a tail
    (MobileNetV1-0.25, 240 photographs of garments, one seed, means of the last 4 of 15 epochs).
    """

    maps: Tensor
    labels: Int[Tensor, " rows"]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Int[Tensor, " picked"]) -> "PrefixMaps":
        """Some of the rows, copied."""
        return PrefixMaps(self.maps[rows], self.labels[rows])


def prefix_maps(
    backbone: Backbone, split: Split, *, stage: str, progress: ProgressCallback = unheard
) -> PrefixMaps:
    """Run the prefix, in evaluation mode, over a split's pictures as serving would decode them.

    Raises:
        MapsError: they would take more than `MAX_MAP_BYTES`.
    """
    parts: list[Tensor] = []
    for images in split.batches(backbone.preprocessing, batch_size=BATCH_SIZE):
        parts.append(_run(backbone, images))
        _check_size(parts[0][0], num_pictures=len(split))
        progress(Progress(stage, min(len(split), len(parts) * BATCH_SIZE), len(split)))
    maps = torch.cat(parts) if parts else _run(backbone, _black(backbone))[:0]
    return PrefixMaps(maps, split.labels)


def outputs_of(network: nn.Module, maps: Tensor) -> Tensor:
    """What a network behind the prefix makes of maps, batch by batch and without gradients."""
    network.eval()
    with torch.no_grad():
        # A network may begin with an operation in place; the maps are for the next one too.
        return torch.cat([network(batch.clone()) for batch in maps.split(BATCH_SIZE)])


def _run(backbone: Backbone, images: UInt8[Tensor, "batch height width 3"]) -> Tensor:
    backbone.eval()
    with torch.no_grad():
        return backbone.prefix(backbone.normalise(images.to(backbone.mean.device))).cpu()


def _black(backbone: Backbone) -> UInt8[Tensor, "1 height width 3"]:
    size_px = backbone.preprocessing.size_px
    return torch.zeros(1, size_px, size_px, 3, dtype=torch.uint8)


def _check_size(one: Tensor, *, num_pictures: int) -> None:
    num_bytes = one.numel() * one.element_size() * num_pictures
    if num_bytes > MAX_MAP_BYTES:
        raise MapsError(
            f"The prefix maps of {num_pictures} pictures take {num_bytes / 2**30:.1f} GiB; at most "
            f"{MAX_MAP_BYTES / 2**30:.0f} are kept. Learn from fewer pictures, or train a head."
        )
