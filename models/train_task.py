"""Train one task on a trunk in the size that is asked for, or in the size that pays."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.adapters import sites_of
from models.backbones import Backbone
from models.comparison import (
    STRATEGIES,
    Strategy,
    cross_validate,
    smallest_that_does_not_lose,
)
from models.data import PictureData
from models.evaluate import Estimate, accuracy, share
from models.feature_cache import FeatureCache
from models.head_kinds import HeadKind
from models.paired import Difference, difference
from models.prefix_maps import PrefixMaps, outputs_of, prefix_maps
from models.progress import ProgressCallback, unheard
from models.specialise import NUM_EPOCHS, WIDTH, Special, SpecialKind, specialise
from models.train_head import TrainedHead, train_head


@dataclass(frozen=True)
class Row:
    """One trained strategy in the report.

    Args:
        cross_validated: Accuracy on pictures of train and validation that each fold's model had
            not seen, on which the proposal rests; None if strategies were not compared.
        against_best: Cross-validated accuracy less that of the strategy with the highest.
        against_head: Test accuracy less that of the head, on the same pictures.
        num_bytes: Of the learned values, as float32.
        seconds: Of training; the head's with the trunk's run over the pictures, which the others
            share.
    """

    strategy: Strategy
    validation: Estimate | None
    test: Estimate
    cross_validated: Estimate | None
    against_best: Difference | None
    against_head: Difference
    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class TrainedTask:
    """What was trained for a task, and what it was compared with.

    Args:
        head: The head on frozen features, which everything is compared with.
        special: The adapter or tail to use; None where the head is.
        rows: The head and whatever else was trained, the smallest first.
        proposed: The smallest strategy that does not lose, if all were compared.
        test_logits: The answers on the test split of what is used.
    """

    head: TrainedHead
    special: Special | None
    metrics: dict[str, Estimate]
    notes: tuple[str, ...]
    rows: tuple[Row, ...]
    proposed: Strategy | None
    test_logits: Float[Tensor, "pictures num_classes"]

    @property
    def strategy(self) -> Strategy:
        """What was trained."""
        return self.special.kind if self.special else "head"


def train_task(
    backbone: Backbone,
    data: PictureData,
    *,
    strategy: Strategy,
    kind: HeadKind | None = None,
    width: int = WIDTH,
    seed: int,
    cache: FeatureCache | None = None,
    progress: ProgressCallback = unheard,
) -> TrainedTask:
    """Train a head, and the adapter or tail that is asked for, on the same splits.

    Args:
        kind: Of a head alone; None chooses by the number of pictures.
        width: Rank of "lora", channels of "adapter".
        cache: Of features, for the head.

    Raises:
        LearningError: the data is too little, or the backbone has no layer for the strategy.
    """
    head, seconds = _timed_head(
        backbone, data, kind=kind, seed=seed, cache=cache, progress=progress
    )
    if strategy == "head":
        return TrainedTask(head, None, head.metrics, head.notes, (), None, head.test_logits)
    maps = _maps(backbone, data, progress=progress)
    special = specialise(
        backbone, strategy, maps["train"], maps["validation"],
        num_classes=len(data.labels), width=width, seed=seed, progress=progress,
    )  # fmt: skip
    answers = _answers(head, [special], maps["test"])
    rows = _rows(maps, head, seconds, [special], answers, evidence={})
    return _chosen(head, special, rows, answers, proposed=None)


def compare_strategies(
    backbone: Backbone,
    data: PictureData,
    *,
    width: int = WIDTH,
    seed: int,
    num_epochs: int = NUM_EPOCHS,
    cache: FeatureCache | None = None,
    progress: ProgressCallback = unheard,
) -> TrainedTask:
    """Train every strategy that the backbone allows and take the smallest that does not lose.

    It is chosen by cross-validation over train and validation, by the rule of
    `smallest_that_does_not_lose`, before any of them has seen a test picture.

    Args:
        width: Rank of "lora", channels of "adapter".
        cache: Of features, for the head.

    Raises:
        LearningError: the data is too little to compare on.
    """
    maps = _maps(backbone, data, progress=progress)
    kinds = possible_kinds(backbone)
    known = PrefixMaps(
        torch.cat([maps["train"].maps, maps["validation"].maps]),
        torch.cat([maps["train"].labels, maps["validation"].labels]),
    )
    evidence = cross_validate(
        backbone, known, kinds=kinds, num_classes=len(data.labels), width=width, seed=seed,
        num_epochs=num_epochs,
        progress=progress,
    )  # fmt: skip
    proposed = smallest_that_does_not_lose(evidence)
    head, seconds = _timed_head(
        backbone, data, kind="linear", seed=seed, cache=cache, progress=progress
    )
    specials = [
        specialise(
            backbone, kind, maps["train"], maps["validation"],
            num_classes=len(data.labels), width=width, seed=seed,
        num_epochs=num_epochs, progress=progress,
        )
        for kind in kinds
    ]  # fmt: skip
    answers = _answers(head, specials, maps["test"])
    rows = _rows(maps, head, seconds, specials, answers, evidence=evidence)
    special = next((special for special in specials if special.kind == proposed), None)
    return _chosen(head, special, rows, answers, proposed=proposed)


def possible_kinds(backbone: Backbone) -> tuple[SpecialKind, ...]:
    """Every kind but those of low rank where the suffix has no pointwise layer."""
    sites = sites_of(backbone).values()
    has_pointwise = any(site.is_pointwise for site in sites)
    low_rank: tuple[SpecialKind, ...] = ("lora", "adapter") if has_pointwise else ()
    per_channel: tuple[SpecialKind, ...] = ("bias", "ssf") if sites else ()
    return (*per_channel, *low_rank, "tail")


def _timed_head(
    backbone: Backbone,
    data: PictureData,
    *,
    kind: HeadKind | None,
    seed: int,
    cache: FeatureCache | None,
    progress: ProgressCallback,
) -> tuple[TrainedHead, float]:
    started = time.monotonic()
    head = train_head(backbone, data, kind=kind, seed=seed, cache=cache, progress=progress)
    return head, time.monotonic() - started


def _maps(
    backbone: Backbone, data: PictureData, *, progress: ProgressCallback
) -> dict[str, PrefixMaps]:
    return {
        name: prefix_maps(backbone, split, stage=f"{name} maps", progress=progress)
        for name, split in data.splits.items()
    }


def _answers(
    head: TrainedHead, specials: list[Special], test: PrefixMaps
) -> dict[Strategy, Tensor]:
    """Logits of everything that was trained, on the test split: it is run once."""
    answers: dict[Strategy, Tensor] = {"head": head.test_logits}
    return answers | {special.kind: outputs_of(special.tail, test.maps) for special in specials}


def _rows(
    maps: dict[str, PrefixMaps],
    head: TrainedHead,
    head_seconds: float,
    specials: list[Special],
    answers: Mapping[Strategy, Tensor],
    *,
    evidence: dict[Strategy, Tensor],
) -> tuple[Row, ...]:
    """What every strategy reached, on the same pictures."""
    right = {name: logits.argmax(dim=-1) == maps["test"].labels for name, logits in answers.items()}
    validation: dict[Strategy, Estimate | None] = {"head": head.metrics.get("validation")}
    validation |= {special.kind: _validation(special, maps["validation"]) for special in specials}
    sizes: dict[Strategy, int] = {"head": _num_bytes(head.head.state_dict())}
    sizes |= {special.kind: _special_bytes(special) for special in specials}
    seconds: dict[Strategy, float] = {"head": head_seconds}
    seconds |= {special.kind: special.seconds for special in specials}
    best = max(evidence.values(), key=lambda unseen: int(unseen.sum()), default=None)
    return tuple(
        Row(
            name,
            validation[name],
            _share_of(right[name]),
            _share_of(evidence[name]) if name in evidence else None,
            difference(evidence[name], best) if best is not None else None,
            difference(right[name], right["head"]),
            sizes[name],
            seconds[name],
        )
        for name in STRATEGIES
        if name in right
    )


def _chosen(
    head: TrainedHead,
    special: Special | None,
    rows: tuple[Row, ...],
    answers: Mapping[Strategy, Tensor],
    *,
    proposed: Strategy | None,
) -> TrainedTask:
    """The metrics of what is used, and notes that say what it was compared with."""
    metrics, notes = dict(head.metrics), tuple(_note(row) for row in rows)
    if proposed is not None:
        notes += (
            (
                f"{proposed!r} is the smallest strategy that does not lose to the best in "
                "cross-validation (one-sided exact McNemar test at 5 %, not corrected for several "
                "comparisons)."
            ),
        )
    if special is None:
        notes = (*head.notes, *notes)
        return TrainedTask(head, None, metrics, notes, rows, proposed, head.test_logits)
    row = next(row for row in rows if row.strategy == special.kind)
    metrics = {
        **{name: value for name, value in metrics.items() if name.startswith("baseline_")},
        **({"validation": row.validation} if row.validation else {}),
        "test": row.test,
        "head_only_test": head.metrics["test"],
    }
    chosen_by = f"Validation chose the epoch ({special.best_epoch}), so it is optimistic."
    notes = (chosen_by, *notes)
    return TrainedTask(head, special, metrics, notes, rows, proposed, answers[special.kind])


def _note(row: Row) -> str:
    unseen = f"cross-validated {row.cross_validated}, " if row.cross_validated else ""
    versus = "" if row.strategy == "head" else f", {row.against_head.value} against the head"
    return f"{row.strategy}: {unseen}test {row.test}{versus}; {row.num_bytes:,} bytes."


def _share_of(is_right: Tensor) -> Estimate:
    return share(int(is_right.sum()), len(is_right))


def _validation(special: Special, maps: PrefixMaps) -> Estimate:
    return accuracy(outputs_of(special.tail, maps.maps), maps.labels)


def _special_bytes(special: Special) -> int:
    if special.adapter is None:
        return _num_bytes(special.tail.state_dict())
    return _num_bytes(special.adapter[1]) + _num_bytes(special.tail.head.state_dict())


def _num_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
