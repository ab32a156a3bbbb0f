"""The same network without what it learned elsewhere: what transfer is compared with."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.backbones import Backbone, build_backbone
from models.data import PictureData, Split, join, to_batch
from models.heads import features_of, logits_of
from models.logistic import choose_logistic_head, logistic_head
from models.progress import ProgressCallback, unheard

PIXELS = "a linear model on 16 px thumbnails"
UNTRAINED = "a linear head on the same trunk with random weights"
FROM_SCRATCH = "the same network trained from random weights"
NUM_BATCHES, BATCH_SIZE = 8, 32


def untrained_logits(
    backbone: Backbone, data: PictureData, *, seed: int, progress: ProgressCallback = unheard
) -> Float[Tensor, "pictures num_classes"]:
    """Test logits of a linear head on the same architecture with random weights.

    Its batch norms get the statistics of training pictures: with those that they start with, a deep
    network gives every picture nearly the same features, and any source would win.

    Args:
        seed: Of the random weights.
    """
    random, _ = build_backbone(backbone.reference, weights=None, allow_untrained=True, seed=seed)
    _learn_statistics(random, data.train, seed=seed)
    features = {
        name: features_of(random, split, stage="features without source", progress=progress)
        for name, split in data.splits.items()
    }
    num_classes, both = len(data.labels), join(data.train, data.validation)
    _, l2 = choose_logistic_head(
        features["train"], data.train.labels, features["validation"], data.validation.labels,
        num_classes=num_classes,
    )  # fmt: skip
    known = torch.cat([features["train"], features["validation"]])
    head = logistic_head(known, both.labels, num_classes=num_classes, l2=l2)
    return logits_of(head, features["test"])


def _learn_statistics(backbone: Backbone, train: Split, *, seed: int) -> None:
    norms = [
        module
        for module in backbone.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 (base of all three)
    ]
    for norm in norms:
        norm.momentum = None  # the mean over all batches
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    backbone.train()
    # Dropout and stochastic depth draw from the global generator.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        for start in range(0, min(len(order), NUM_BATCHES * BATCH_SIZE), BATCH_SIZE):
            rows = order[start : start + BATCH_SIZE]
            if len(rows) > 1:
                pictures = to_batch([train.pictures[row] for row in rows], backbone.preprocessing)
                backbone(pictures)
    backbone.eval()
