"""Specification of models/metrics.py: scores of a test split, checked by scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as truth
from torch import Tensor

from models.evaluate import accuracy
from models.metrics import SCORES, Judgement, _stratified, judge

NAMES = ("a", "b", "c", "d")


def some(num: int = 60, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits that know something of labels of unequal number, with ties among the scores."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.arange(4), (torch.rand(num, generator=random) ** 2 * 4).long()])
    logits = torch.randn(len(labels), 4, generator=random)
    logits[torch.arange(len(labels)), labels] += 1.0
    return (2 * logits).round() / 2, labels


def judged(num: int = 60) -> Judgement:
    return judge(*some(num), names=NAMES)


def test_scores_are_those_of_scikit_learn() -> None:
    """Ties, unequal classes and all."""
    logits, labels = some()
    named, right = logits.argmax(-1).numpy(), labels.numpy()
    probabilities = logits.double().softmax(-1).numpy()

    scores = judge(logits, labels, names=NAMES).scores

    expected = {
        "accuracy": truth.accuracy_score(right, named),
        "balanced_accuracy": truth.balanced_accuracy_score(right, named),
        "macro_f1": truth.f1_score(right, named, average="macro"),
        "auc_roc": truth.roc_auc_score(right, probabilities, multi_class="ovr"),
        "log_loss": truth.log_loss(right, probabilities),
    }
    for name, value in expected.items():
        assert math.isclose(scores[name].value, value, rel_tol=1e-9), name
    assert set(scores) == set(SCORES)


def test_the_class_table_and_the_confusion_are_those_of_scikit_learn() -> None:
    """Class by class, in the order of the labels."""
    logits, labels = some()
    named, right = logits.argmax(-1).numpy(), labels.numpy()
    table = np.array(truth.precision_recall_fscore_support(right, named)).T

    found = judge(logits, labels, names=NAMES)

    assert found.confusion.tolist() == truth.confusion_matrix(right, named).tolist()
    assert [one.label for one in found.classes] == list(NAMES)
    for one, expected in zip(found.classes, table, strict=True):
        row = (one.precision, one.recall, one.f1, one.support)
        assert row == pytest.approx(expected)
        assert one.num_named == (named == NAMES.index(one.label)).sum()


def test_the_calibration_error_is_the_mean_gap_of_fifteen_equal_bins() -> None:
    """Guo et al., equation 3, picture by picture."""
    logits, labels = some()
    sums: dict[int, list[float]] = {}
    for row, label in zip(logits.double().softmax(-1), labels, strict=True):
        confidence, named = row.max(0)
        place = next(m for m in range(1, 16) if float(confidence) <= m / 15)
        sums.setdefault(place, []).append(float(named == label) - float(confidence))
    expected = sum(abs(sum(gaps)) for gaps in sums.values()) / len(labels)

    found = judge(logits, labels, names=NAMES)

    assert math.isclose(found.scores["calibration_error"].value, expected, rel_tol=1e-9)
    assert [one.num_pictures for one in found.calibration] == [len(sums[m]) for m in sorted(sums)]
    again = sum(one.num_pictures * abs(one.accuracy - one.confidence) for one in found.calibration)
    assert math.isclose(again / len(labels), expected, rel_tol=1e-9)


def test_a_class_without_test_pictures_is_left_out_of_means() -> None:
    """A folder test/ may lack a class; a label that only answers name is still a mistake."""
    logits, labels = some()
    labels = labels.where(labels != 3, 0)
    named, right = logits.argmax(-1).numpy(), labels.numpy()

    found = judge(logits, labels, names=NAMES)

    macro = truth.f1_score(right, named, labels=[0, 1, 2], average="macro")
    assert math.isclose(found.scores["macro_f1"].value, macro)
    assert found.classes[3].support == 0
    assert found.classes[3].num_named > 0


def test_one_class_alone_has_no_area() -> None:
    """There is no pair to put into order."""
    logits, _ = some()

    found = judge(logits, torch.zeros(len(logits), dtype=torch.int64), names=NAMES)

    assert "auc_roc" not in found.scores


def test_intervals_are_those_of_a_stratified_bootstrap() -> None:
    """Redrawn picture by picture within each class, and scored by scikit-learn."""
    logits, labels = some(200)
    named, right = logits.argmax(-1).numpy(), labels.numpy()
    random = np.random.default_rng(5)
    groups = [np.flatnonzero(right == label) for label in range(4)]
    drawn: list[float] = []
    for _ in range(1000):
        rows = np.concatenate([random.choice(group, len(group)) for group in groups])
        drawn.append(float(truth.balanced_accuracy_score(right[rows], named[rows])))

    found = judge(logits, labels, names=NAMES).scores["balanced_accuracy"]

    # Such quantiles of 1,000 draws scatter by 0.085 standard deviations, their difference by 0.12.
    low, high = np.quantile(drawn, (0.025, 0.975))
    tolerance = 0.36 * float(np.std(drawn))
    assert (found.low, found.high) == pytest.approx((low, high), abs=tolerance)


def test_a_resample_has_as_many_pictures_of_every_class_as_the_split() -> None:
    """Stratified: else a rare class would be missing from some resamples, and have no recall."""
    _, labels = some(40)

    weights = _stratified(labels.numpy(), 30, np.random.default_rng(0))

    for label in range(4):
        assert set(weights[:, labels.numpy() == label].sum(axis=1)) == {
            int((labels == label).sum())
        }
    assert len(np.unique(weights, axis=0)) == 30


@pytest.mark.parametrize("name", sorted(SCORES))
def test_four_times_the_pictures_halve_the_interval(name: str) -> None:
    """Whatever the score; the bootstrap of a bias leaves some slack."""
    few, many = judged(200).scores[name], judged(800).scores[name]

    assert few.low <= few.value <= few.high
    assert 0.3 < (many.high - many.low) / (few.high - few.low) < 0.75


def test_same_answers_same_judgement() -> None:
    """The resamples follow a seed."""
    assert judged().scores == judged().scores


def test_accuracy_keeps_the_interval_it_has_everywhere() -> None:
    """A bootstrap of ten right answers out of ten would claim certainty."""
    logits, labels = 9 * torch.eye(4), torch.arange(4)

    found = judge(logits, labels, names=NAMES).scores["accuracy"]

    assert found == accuracy(logits, labels)
    assert found.low < 0.6
