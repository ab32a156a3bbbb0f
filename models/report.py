"""`report.json`: all that a run found out, as records; page and card are made of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from models.advice import advice
from models.data import Picture, PictureData
from models.evaluate import Estimate
from models.learning_curve import CurvePoint
from models.logbook import Curve, Phase
from models.metrics import CalibrationBin, ClassScore, judge
from models.record import DataRecord
from models.rivals import Gap, gaps, verdict

MAX_MISTAKES = 24


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Mistake(_Strict):
    """A test picture that got the wrong label, and how sure the model was."""

    place: int  # in the test split
    name: str
    right: str
    named: str
    probability: float
    probability_of_right: float


class StrategyRow(_Strict):
    """One strategy that was trained beside the others."""

    strategy: str
    cross_validated: Estimate | None
    test: Estimate
    against_head: Estimate
    num_bytes: int
    seconds: float


class TaskReport(_Strict):
    """One task on its data: how good, against what, and what to do next.

    Args:
        metrics: Accuracies by name, as the record and the manifest have them.
        scores: On test; see `models.metrics.SCORES`.
        confusion: Row: the right label, column: the one that was named.
        learning_curve: Of a linear head on the features that training started from.
        mistakes: The surest first.
    """

    name: str
    labels: tuple[str, ...]
    data: DataRecord
    num_skipped: int
    metrics: dict[str, Estimate]
    scores: dict[str, Estimate]
    classes: tuple[ClassScore, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration: tuple[CalibrationBin, ...]
    learning_curve: tuple[CurvePoint, ...]
    gaps: tuple[Gap, ...]
    is_fit_to_ship: bool
    verdict: str
    strategies: tuple[StrategyRow, ...]
    mistakes: tuple[Mistake, ...]
    notes: tuple[str, ...]
    next_steps: tuple[str, ...]

    @property
    def test_scores(self) -> dict[str, Estimate]:
        """The scores but accuracy, named as metrics of the test split."""
        return {f"test_{name}": score for name, score in self.scores.items() if name != "accuracy"}


class Report(_Strict):
    """One run of `teach`, `distil` or `head`."""

    schema_version: Literal[1] = 1
    kind: Literal["teacher", "student", "head"]
    title: str
    facts: dict[str, str]
    tasks: tuple[TaskReport, ...]
    phases: tuple[Phase, ...]
    curves: tuple[Curve, ...]
    command: str
    seed: int
    versions: dict[str, str]


def report_task(
    data: PictureData,
    test_logits: Float[Tensor, "pictures num_classes"],
    *,
    metrics: Mapping[str, Estimate],
    rivals: Mapping[str, Float[Tensor, "pictures num_classes"]],
    learning_curve: Sequence[CurvePoint] = (),
    strategies: Sequence[StrategyRow] = (),
    notes: Sequence[str] = (),
    seed: int,
) -> TaskReport:
    """Judge a model's answers on the test split, and say in words what they mean.

    Args:
        metrics: What is known already, test accuracy among it.
        rivals: Logits of models without the source, on the same pictures.
        seed: Of the bootstrap.
    """
    judged = judge(test_logits, data.test.labels, names=data.labels, seed=seed)
    named = test_logits.argmax(dim=-1)
    compared = gaps(
        named == data.test.labels,
        {name: logits.argmax(dim=-1) == data.test.labels for name, logits in rivals.items()},
    )
    is_fit, words = verdict(compared)
    return TaskReport(
        name=data.name,
        labels=data.labels,
        data=data.record(),
        num_skipped=len(data.skipped),
        metrics=dict(metrics),
        scores=judged.scores,
        classes=judged.classes,
        confusion=tuple(tuple(row) for row in judged.confusion.tolist()),
        calibration=judged.calibration,
        learning_curve=tuple(learning_curve),
        gaps=compared,
        is_fit_to_ship=is_fit,
        verdict=words,
        strategies=tuple(strategies),
        mistakes=_mistakes(data, test_logits),
        notes=tuple(notes),
        next_steps=advice(judged, tuple(learning_curve), num_skipped=len(data.skipped)),
    )


def _mistakes(data: PictureData, logits: Tensor) -> tuple[Mistake, ...]:
    """The wrong answers of which the model was surest."""
    probabilities = logits.double().softmax(dim=-1)
    sure, named = probabilities.max(dim=-1)
    wrong = (named != data.test.labels).nonzero().flatten()
    surest = wrong[torch.argsort(sure[wrong], descending=True, stable=True)][:MAX_MISTAKES]
    return tuple(
        Mistake(
            place=place,
            name=_name(data.test.pictures[place]),
            right=data.labels[int(data.test.labels[place])],
            named=data.labels[int(named[place])],
            probability=float(sure[place]),
            probability_of_right=float(probabilities[place, data.test.labels[place]]),
        )
        for place in surest.tolist()
    )


def _name(picture: Picture) -> str:
    """A picture's file with its folder, or where there is none the start of its digest."""
    if isinstance(picture.source, Path):
        return f"{picture.source.parent.name}/{picture.source.name}"
    return picture.key[:12]
