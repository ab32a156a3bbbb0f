"""Make a trunk another one for a single task: an adapter or a tail, trained with its head.

The prefix stays, so its maps are computed once and every epoch runs the suffix alone.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from models.adapters import AdaptedSuffix, AdapterKind, adapt
from models.backbones import Backbone
from models.evaluate import accuracy
from models.fitting import Score, TrainingError, fit, parameter_groups
from models.logistic import choose_logistic_head
from models.prefix_maps import PrefixMaps, outputs_of
from models.progress import ProgressCallback, unheard
from models.tails import Tail, own_tail

SpecialKind = Literal["bias", "ssf", "lora", "adapter", "tail"]
WIDTH = 4
NUM_EPOCHS = 30
PATIENCE = 8
BATCH_SIZE = 32
HEAD_RATE = 1e-3
RATES: dict[SpecialKind, float] = {
    "bias": 3e-3, "ssf": 3e-3, "lora": 3e-3, "adapter": 3e-3, "tail": 3e-4,
}  # fmt: skip


@dataclass(frozen=True)
class Special:
    """An adapter or a tail with its head, in the state that was best on validation.

    Args:
        tail: Prefix maps to logits; for an adapter its suffix is an `AdaptedSuffix`.
        best_epoch: 0 if no epoch was better than the head alone.
    """

    kind: SpecialKind
    tail: Tail
    best_epoch: int
    validation: Score
    seconds: float

    @property
    def adapter(self) -> tuple[AdapterKind, dict[str, Tensor]] | None:
        """Kind and weights of an adapter; None for a tail."""
        if self.kind == "tail" or not isinstance(self.tail.suffix, AdaptedSuffix):
            return None
        return self.kind, self.tail.suffix.weights()


def specialise(
    backbone: Backbone,
    kind: SpecialKind,
    train: PrefixMaps,
    validation: PrefixMaps,
    *,
    num_classes: int,
    width: int = WIDTH,
    seed: int,
    num_epochs: int = NUM_EPOCHS,
    patience: int = PATIENCE,
    rate_factor: float = 1.0,
    progress: ProgressCallback = unheard,
) -> Special:
    """Train from the head on frozen features, which is epoch 0, and keep the best on validation.

    So it is never worse on validation than that head.

    Args:
        width: Rank of "lora", channels of "adapter"; the others have none.
        rate_factor: Scales the learning rates.

    Raises:
        TrainingError: validation is empty, or a loss is not finite.
        AdapterError: the suffix has no layer for an adapter of this kind.
        HeadError: a class has no picture, or features are not finite.
    """
    started = time.monotonic()
    if not len(validation):
        raise TrainingError(
            f"There are no validation pictures, which {kind!r} needs to know when to stop. "
            "Expected at least 2 pictures in some class; add pictures, or train a head."
        )
    tail = start(backbone, kind, train, validation, num_classes=num_classes, width=width, seed=seed)
    num_batches = max(1, round(len(train) / BATCH_SIZE))

    def epoch_batches(number: int) -> Iterator[PrefixMaps]:
        order = np.random.default_rng([seed, number]).permutation(len(train))
        for rows in np.array_split(order, num_batches):
            yield train.take(torch.from_numpy(rows))

    def validate() -> Score:
        logits = outputs_of(tail, validation.maps)
        loss = F.cross_entropy(logits, validation.labels)
        return Score(accuracy(logits, validation.labels).value, -float(loss))

    rates = ((tail.suffix, RATES[kind]), (tail.head, HEAD_RATE))
    # Dropout and stochastic depth of a tail draw from the global generator.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fitted = fit(
            tail,
            epoch_batches=epoch_batches,
            num_batches=num_batches,
            loss_of=lambda batch: F.cross_entropy(tail(batch.maps), batch.labels),
            validate=validate,
            before_epoch=lambda _epoch: tail.train(),
            start_is_usable=True,
            optimizer=torch.optim.AdamW(
                [
                    group
                    for module, rate in rates
                    for group in parameter_groups(module, rate=rate * rate_factor)
                ]
            ),
            num_epochs=num_epochs,
            patience=patience,
            stage=kind,
            progress=progress,
        )
    return Special(kind, tail, fitted.best_epoch, fitted.best, time.monotonic() - started)


def start(
    backbone: Backbone,
    kind: SpecialKind,
    train: PrefixMaps,
    validation: PrefixMaps,
    *,
    num_classes: int,
    width: int,
    seed: int,
) -> Tail:
    """What training starts from: the head on frozen features, behind a suffix as it came."""
    suffix = copy.deepcopy(backbone.suffix)
    head, _ = choose_logistic_head(
        outputs_of(suffix, train.maps),
        train.labels,
        outputs_of(suffix, validation.maps),
        validation.labels,
        num_classes=num_classes,
    )
    if kind == "tail":
        return own_tail(backbone, head)
    return Tail(adapt(backbone, kind, width=width, seed=seed), head).eval()
