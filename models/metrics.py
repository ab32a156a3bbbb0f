"""What a test split says of a model: scores with intervals, class by class, and which are mixed up.

Every score is a function of weighted pictures, so one pass gives its value (all weights 1) and its
bootstrap interval (weights are how often a resample drew a picture). scikit-learn has most of them
and is what the tests compare with; a thousand resamples by its functions would take 20 s and more.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from models.evaluate import Estimate, accuracy

NUM_RESAMPLES = 1000
NUM_BINS = 15
# Resamples times pictures held at once; 32 MB of float64.
_BLOCK = 2**22

Floats = Float[np.ndarray, " resamples"]

# Name -> whether more of it is better, and how it is read.
SCORES: dict[str, tuple[bool, str]] = {
    "accuracy": (True, "share of pictures whose first label is right"),
    "balanced_accuracy": (True, "mean recall of the classes: every class counts alike"),
    "macro_f1": (True, "mean F1 of the classes: recall and precision in one"),
    "auc_roc": (True, "chance that a picture of a class scores higher for it than one of another"),
    "log_loss": (False, "mean of -log p of the right label, in nats"),
    "calibration_error": (False, "how far confidence and accuracy are apart"),
}


@dataclass(frozen=True)
class ClassScore:
    """One class of the test split. What no picture speaks of is 0.

    Args:
        support: Its pictures.
        num_named: Pictures that were given this label.
    """

    label: str
    precision: float
    recall: float
    f1: float
    support: int
    num_named: int


@dataclass(frozen=True)
class CalibrationBin:
    """Pictures whose first label got a probability in the same bin."""

    confidence: float
    accuracy: float
    num_pictures: int


@dataclass(frozen=True)
class Judgement:
    """What a model did on pictures that it had not seen.

    Args:
        scores: Name out of `SCORES` -> value and 95 % interval: Wilson's for accuracy (a bootstrap
            of a perfect score has no width), for the others by bootstrap over pictures, stratified:
            every class keeps its number of pictures. "auc_roc" is missing where all are of one
            class.
        confusion: Row: the right label, column: the one that was named.
        calibration: The bins that are not empty, by rising confidence.
    """

    scores: dict[str, Estimate]
    classes: tuple[ClassScore, ...]
    confusion: Int[Tensor, "num_classes num_classes"]
    calibration: tuple[CalibrationBin, ...]


def judge(
    logits: Float[Tensor, "pictures num_classes"],
    labels: Int[Tensor, " pictures"],
    *,
    names: tuple[str, ...],
    seed: int = 0,
) -> Judgement:
    """Every score of one model on one split, the largest probability being its answer.

    Balanced accuracy, macro F1 and AUC are means over the classes of which there are pictures. AUC
    is one class against the rest. The calibration error sorts pictures into `NUM_BINS` bins of
    equal width by the probability of their first label. Its interval lies high: resampling adds
    noise, and noise looks like miscalibration.

    Args:
        names: Of the classes.
        seed: Of the resamples.

    Raises:
        ValueError: there are no pictures, or a logit is NaN.

    Source: calibration error: Naeini et al. 2015, AAAI-15; Guo et al. 2017, arXiv:1706.04599,
    equation 3. Bootstrap: Efron & Tibshirani 1993, chapter 13 (percentiles).
    """
    answers = _Answers(logits, labels)
    scores = {"accuracy": accuracy(logits, labels)}
    drawn = _resampled(answers, seed=seed)
    for name, (value,) in answers.scores(np.ones((1, len(labels)))).items():
        low, high = np.quantile(drawn[name], (0.025, 0.975))
        bounds = min(float(value), float(low)), max(float(value), float(high))
        scores[name] = Estimate(float(value), *bounds, len(labels))
    return Judgement(scores, answers.classes(names), answers.confusion, answers.calibration())


class _Answers:
    """Probabilities and answers of a model on every picture, and what follows from them."""

    def __init__(self, logits: Tensor, labels: Tensor) -> None:
        log_probabilities = torch.log_softmax(logits.double(), dim=-1)
        num_classes = logits.shape[1]
        self.labels = labels.numpy()
        self.probabilities = log_probabilities.exp().numpy()
        self.loss = -log_probabilities.numpy()[np.arange(len(labels)), self.labels]
        self.named = logits.argmax(dim=-1).numpy()
        self.confidence = self.probabilities.max(axis=1)
        # A bin holds its upper edge, as in the papers: (0, 1/15], (1/15, 2/15], ...
        self.bin = (np.ceil(self.confidence * NUM_BINS).astype(int) - 1).clip(0, NUM_BINS - 1)
        counts = np.bincount(self.labels * num_classes + self.named, minlength=num_classes**2)
        self.confusion = torch.from_numpy(counts.reshape(num_classes, num_classes))

    def scores(self, weights: Float[np.ndarray, "resamples pictures"]) -> dict[str, Floats]:
        """All scores but accuracy, one value for each row of weights."""
        num_classes = self.probabilities.shape[1]
        is_right = self.named == self.labels
        support, named, hits = (
            weights @ _one_hot(places, num_classes, mask)
            for places, mask in (
                (self.labels, None),
                (self.named, None),
                (self.labels, is_right),
            )
        )
        present = np.bincount(self.labels, minlength=num_classes) > 0
        recall = (hits / np.maximum(support, 1e-12))[:, present]
        f1 = (2 * hits / np.maximum(support + named, 1e-12))[:, present]
        tested = np.flatnonzero(present)
        areas = [self._area(weights, label) for label in tested if len(tested) > 1]
        gaps = weights @ _one_hot(self.bin, NUM_BINS, self.confidence - is_right)
        total = weights.sum(axis=1)
        return {
            "balanced_accuracy": recall.mean(axis=1),
            "macro_f1": f1.mean(axis=1),
            **({"auc_roc": np.mean(areas, axis=0)} if areas else {}),
            "log_loss": weights @ self.loss / total,
            "calibration_error": np.abs(gaps).sum(axis=1) / total,
        }

    def classes(self, names: tuple[str, ...]) -> tuple[ClassScore, ...]:
        """Precision, recall and F1 of every class."""
        rows: list[ClassScore] = []
        for label, name in enumerate(names):
            hits = int(self.confusion[label, label])
            support = int(self.confusion[label].sum())
            named = int(self.confusion[:, label].sum())
            rows.append(
                ClassScore(
                    label=name,
                    precision=hits / max(1, named),
                    recall=hits / max(1, support),
                    f1=2 * hits / max(1, named + support),
                    support=support,
                    num_named=named,
                )
            )
        return tuple(rows)

    def calibration(self) -> tuple[CalibrationBin, ...]:
        """Mean confidence and accuracy of every bin that has pictures."""
        members = [self.bin == place for place in range(NUM_BINS)]
        is_right = self.named == self.labels
        return tuple(
            CalibrationBin(
                float(self.confidence[inside].mean()),
                float(is_right[inside].mean()),
                int(inside.sum()),
            )
            for inside in members
            if inside.any()
        )

    def _area(self, weights: NDArray[np.float64], label: np.intp) -> NDArray[np.float64]:
        """Area under the ROC curve of one class against the rest: pairs in the right order."""
        order = np.argsort(self.probabilities[:, label], kind="stable")
        sorted_scores = self.probabilities[order, label]
        starts = np.flatnonzero(np.r_[True, np.diff(sorted_scores) > 0])
        is_member = (self.labels == label)[order]
        ordered = weights[:, order]
        members = np.add.reduceat(ordered * is_member, starts, axis=1)
        others = np.add.reduceat(ordered * ~is_member, starts, axis=1)
        below = np.cumsum(others, axis=1) - others
        pairs = members.sum(axis=1) * others.sum(axis=1)
        # Pictures of equal score count half.
        return (members * (below + others / 2)).sum(axis=1) / pairs


def _resampled(answers: _Answers, *, seed: int) -> dict[str, NDArray[np.float64]]:
    chance, num = np.random.default_rng(seed), len(answers.labels)
    block = max(1, min(NUM_RESAMPLES, _BLOCK // num))
    sizes = [min(block, NUM_RESAMPLES - start) for start in range(0, NUM_RESAMPLES, block)]
    parts = [answers.scores(_stratified(answers.labels, size, chance)) for size in sizes]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _stratified(
    labels: Int[np.ndarray, " pictures"], num: int, chance: np.random.Generator
) -> Float[np.ndarray, "resamples pictures"]:
    """How often each of `num` resamples drew every picture; each class keeps its size."""
    weights = np.zeros((num, len(labels)))
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        even = np.full(len(rows), 1 / len(rows))
        weights[:, rows] = chance.multinomial(len(rows), even, size=num)
    return weights


def _one_hot(
    places: Int[np.ndarray, " pictures"], num: int, values: NDArray[Any] | None = None
) -> Float[np.ndarray, "pictures places"]:
    """One row a picture, with its value (1 unless given) at its place."""
    rows = np.zeros((len(places), num))
    rows[np.arange(len(places)), places] = 1 if values is None else values
    return rows
