"""What is possible without any backbone: a linear model on the pixels of a thumbnail."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.data import PictureData, Split
from models.evaluate import Estimate, accuracy
from models.logistic import choose_logistic_head
from models.pictures import Preprocessing
from models.progress import Progress, ProgressCallback, unheard

THUMBNAIL = Preprocessing(size_px=16, resize_px=16, mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0))


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
    pixels = {name: _pixels(split) for name, split in data.splits.items()}
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


def _pixels(split: Split) -> Float[Tensor, "rows values"]:
    batches = [batch.flatten(1) for batch in split.batches(THUMBNAIL, batch_size=1024)]
    if not batches:
        return torch.zeros(0, 3 * THUMBNAIL.size_px**2)
    return torch.cat(batches).float() / 255
