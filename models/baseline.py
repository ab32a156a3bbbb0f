"""What is possible without any backbone: a linear model on the pixels of a thumbnail."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.data import Picture, PictureData, to_batch
from models.evaluate import Estimate, accuracy
from models.logistic import choose_logistic_head
from models.pictures import Preprocessing
from models.progress import Progress, ProgressCallback, unheard

THUMBNAIL = Preprocessing(size_px=16, resize_px=16, mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))
BATCH = 1024


@dataclass(frozen=True)
class PixelBaseline:
    """What a linear model on pixels reaches.

    Args:
        metrics: Accuracies named "baseline_validation" (left out where validation is empty) and
            "baseline_test".
        test_logits: Its answers on the test split.
    """

    metrics: dict[str, Estimate]
    test_logits: Float[Tensor, "pictures num_classes"]


def pixel_baseline(data: PictureData, *, progress: ProgressCallback = unheard) -> PixelBaseline:
    """Logistic regression on 16 x 16 RGB pixels.

    A backbone whose features do worse than this has brought nothing, or harm.
    """
    pixels = {name: thumbnails(split.pictures) for name, split in data.splits.items()}
    head, _ = choose_logistic_head(
        pixels["train"],
        data.train.labels,
        pixels["validation"],
        data.validation.labels,
        num_classes=len(data.labels),
    )
    progress(Progress("baseline", 1, 1))
    with torch.no_grad():
        logits = {name: head(pixels[name]) for name in ("validation", "test")}
    metrics = {
        f"baseline_{name}": accuracy(values, data.splits[name].labels)
        for name, values in logits.items()
        if len(values)
    }
    return PixelBaseline(metrics, logits["test"])


def thumbnails(pictures: Sequence[Picture]) -> Float[Tensor, "rows values"]:
    """Pixels of small copies, 0 to 1."""
    starts = range(0, len(pictures), BATCH)
    batches = [to_batch(pictures[start : start + BATCH], THUMBNAIL) for start in starts]
    pixels = torch.cat([torch.zeros(0, 16, 16, 3, dtype=torch.uint8), *batches])
    return pixels.flatten(1).float() / 255
