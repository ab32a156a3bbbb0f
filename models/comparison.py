"""Which size of specialisation is worth its bytes: all of them, judged by cross-validation."""

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from models.backbones import Backbone
from models.errors import LearningError
from models.logistic import choose_logistic_head, logistic_head
from models.paired import difference
from models.prefix_maps import PrefixMaps, outputs_of
from models.progress import Progress, ProgressCallback, unheard
from models.specialise import NUM_EPOCHS, WIDTH, SpecialKind, specialise

Strategy = Literal["head", "bias", "ssf", "lora", "adapter", "tail"]
# By what they cost to hold and to run, the least first.
STRATEGIES: tuple[Strategy, ...] = ("head", "bias", "ssf", "lora", "adapter", "tail")
NUM_FOLDS = 3
STOP_SHARE = 5  # one in so many of the pictures learned from decides when to stop
SIGNIFICANT = 0.05


class ComparisonError(LearningError):
    """There are too few pictures to compare strategies on."""


def cross_validate(
    backbone: Backbone,
    known: PrefixMaps,
    *,
    kinds: tuple[SpecialKind, ...],
    num_classes: int,
    width: int = WIDTH,
    seed: int,
    num_epochs: int = NUM_EPOCHS,
    progress: ProgressCallback = unheard,
) -> dict[Strategy, Tensor]:
    """Train every strategy `NUM_FOLDS` times, each time without a part of the pictures.

    Args:
        known: Every picture that may be learned from, train and validation; never test.
        kinds: What to compare with the head.

    Returns:
        Strategy -> bool [pictures]: whether the model that had not seen a picture, neither in
        training nor in choosing its state, named its label.

    Raises:
        ComparisonError: a class has too few pictures.
        TrainingError: a loss is not finite.
    """
    _check(known.labels, num_classes=num_classes)
    strategies: tuple[Strategy, ...] = ("head", *kinds)
    is_right = {name: torch.zeros(len(known), dtype=torch.bool) for name in strategies}
    for fold, (train, stop, held_out) in enumerate(folds(known.labels, seed=seed), start=1):
        parts = known.take(train), known.take(stop)
        unseen = known.maps[held_out]
        logits: dict[Strategy, Tensor] = {
            "head": _head_logits(backbone, *parts, unseen, num_classes=num_classes)
        }
        for kind in kinds:
            special = specialise(
                backbone, kind, *parts,
                num_classes=num_classes, width=width, seed=seed, num_epochs=num_epochs,
            )  # fmt: skip
            logits[kind] = outputs_of(special.tail, unseen)
            done = (fold - 1) * len(kinds) + kinds.index(kind) + 1
            progress(Progress("compare", done, NUM_FOLDS * len(kinds)))
        for name, values in logits.items():
            is_right[name][held_out] = values.argmax(dim=-1) == known.labels[held_out]
    return is_right


def smallest_that_does_not_lose(is_right: Mapping[Strategy, Bool[Tensor, " pictures"]]) -> Strategy:
    """Propose a strategy.

    The rule: find the strategy with the most pictures right (of equals the smallest). A strategy
    loses if it is significantly below that one on the same pictures, by a one-sided exact McNemar
    test at 5 %. Of those that do not lose, the smallest in the order of `STRATEGIES` is proposed.

    The five tests are not corrected for their number (no Holm): a correction would only make it
    easier for a small strategy not to lose. With few pictures little is significant, so the head
    is proposed unless something is clearly better.
    """
    smallest_first = [name for name in STRATEGIES if name in is_right]
    best = max(smallest_first, key=lambda name: int(is_right[name].sum()))
    return next(
        name
        for name in smallest_first
        if difference(is_right[name], is_right[best]).p_lower >= SIGNIFICANT
    )


def folds(
    labels: Int[Tensor, " pictures"], *, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows to train on, to stop by and to hold out, `NUM_FOLDS` times; every class alike.

    Every row is held out exactly once.
    """
    random = np.random.default_rng(seed)
    places = torch.zeros_like(labels)
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        places[rows[torch.from_numpy(random.permutation(len(rows)))]] = torch.arange(len(rows))
    for fold in range(NUM_FOLDS):
        is_held_out = places % NUM_FOLDS == fold
        is_stop = ~is_held_out & (places // NUM_FOLDS % STOP_SHARE == 1)
        parts = (~is_held_out & ~is_stop, is_stop, is_held_out)
        train, stop, held_out = (part.nonzero().flatten() for part in parts)
        yield train, stop, held_out


def _head_logits(
    backbone: Backbone, train: PrefixMaps, stop: PrefixMaps, unseen: Tensor, *, num_classes: int
) -> Tensor:
    """A head as it would be delivered: its strength chosen, then fitted to both parts."""
    features = [outputs_of(backbone.suffix, part.maps) for part in (train, stop)]
    _, l2 = choose_logistic_head(
        features[0], train.labels, features[1], stop.labels, num_classes=num_classes
    )
    labels = torch.cat([train.labels, stop.labels])
    head = logistic_head(torch.cat(features), labels, num_classes=num_classes, l2=l2)
    return outputs_of(head, outputs_of(backbone.suffix, unseen))


def _check(labels: Int[Tensor, " pictures"], *, num_classes: int) -> None:
    fewest, needed = int(labels.bincount(minlength=num_classes).min()), 2 * NUM_FOLDS
    if fewest < needed:
        raise ComparisonError(
            f"A class has {fewest} pictures in train and validation; comparing strategies needs at "
            f"least {needed}. Add pictures, or name the strategy."
        )
