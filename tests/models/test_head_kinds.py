"""Specification of models/head_kinds.py: settings are chosen on what a head did not learn from."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier

from models import head_kinds
from models.head_kinds import HEAD_KINDS, HeadKind, Known, choose_temperature, fit_head
from models.heads import logits_of
from models.neighbours import neighbours_head
from models.svm import linear_svm_head, rbf_svm_head
from tests.models.features import clouds


def known(num_train: int = 60, num_validation: int = 24, num_classes: int = 3) -> Known:
    features, labels = clouds(num_train + num_validation, num_classes=num_classes)
    return Known(features, labels, num_train=num_train, num_classes=num_classes, seed=0)


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_every_kind_tells_clouds_apart_and_says_how_it_was_chosen(kind: HeadKind) -> None:
    """New rows of three overlapping clouds; chance is a third."""
    fitted = fit_head(kind, known())
    unseen, labels = clouds(90, seed=1)

    right = logits_of(fitted.head, unseen).argmax(dim=1) == labels
    assert float(right.float().mean()) > 0.55
    assert fitted.setting
    assert fitted.chosen_by


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_the_same_data_and_seed_give_the_same_head(kind: HeadKind) -> None:
    """To the bit, with the same setting and temperature."""
    first, again = (fit_head(kind, known()) for _ in range(2))

    assert (first.setting, first.temperature) == (again.setting, again.temperature)
    for name, tensor in first.head.state_dict().items():
        assert torch.equal(tensor, again.head.state_dict()[name])


FITS = {"linear_svm": linear_svm_head, "rbf_svm": rbf_svm_head, "knn": neighbours_head}


@pytest.mark.parametrize("kind", FITS)
def test_what_validation_judges_has_not_seen_it(kind: HeadKind) -> None:
    """One head learned from train alone, the one to use from both, at the same setting."""
    data = known()
    fitted = fit_head(kind, data)
    on_train = FITS[kind](*data.train, num_classes=3, **fitted.setting)  # pyrefly: ignore
    on_both = FITS[kind](data.features, data.labels, num_classes=3, **fitted.setting)  # pyrefly: ignore

    unseen, _ = clouds(20, seed=1)
    assert torch.equal(logits_of(fitted.on_train, unseen), logits_of(on_train, unseen))
    assert torch.equal(logits_of(fitted.head, unseen), logits_of(on_both, unseen))
    assert not torch.equal(logits_of(on_train, unseen), logits_of(on_both, unseen))


def test_folds_choose_the_setting_that_a_search_by_hand_finds() -> None:
    """Scikit-learn's neighbours in the same folds; the best temperature by scipy's search."""
    data = known()
    rows, labels = data.features.double().numpy(), data.labels.numpy()
    losses: dict[int, float] = {}
    for k in (1, 5, 10, 20, 50):
        shares = np.zeros((len(labels), 3))
        for seen, unseen in StratifiedKFold(5, shuffle=True, random_state=0).split(rows, labels):
            means = [rows[seen][labels[seen] == label].mean(axis=0) for label in range(3)]
            centre = np.mean(means, axis=0)
            machine = KNeighborsClassifier(k, metric="cosine", weights=_weights)
            machine.fit(rows[seen] - centre, labels[seen])
            shares[unseen] = machine.predict_proba(rows[unseen] - centre)
        losses[k] = _best_loss(shares, labels)

    fitted = fit_head("knn", data)
    assert fitted.setting["num_neighbours"] == min(losses, key=lambda k: losses[k])


def _weights(distances: np.ndarray) -> np.ndarray:
    return np.exp(-distances / 0.07)


def _best_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """The least cross-entropy over all temperatures, by scipy's search."""
    return _searched(logits, labels)[1]


def _searched(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Temperature and cross-entropy."""

    def loss(log_temperature: float) -> float:
        scaled = torch.from_numpy(logits / np.exp(log_temperature))
        return float(F.cross_entropy(scaled, torch.from_numpy(labels)))

    found: Any = minimize_scalar(loss, bounds=(-7, 5), method="bounded")
    return float(np.exp(found.x)), float(found.fun)


def test_the_temperature_is_the_one_that_a_search_finds() -> None:
    """Within the grid's step of a tenth, and the loss within 0.002 nats."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (300,), generator=generator)
    logits = 3 * F.one_hot(labels, 4) + 2 * torch.randn(300, 4, generator=generator)
    value, loss = choose_temperature(5 * logits, labels)
    best, least = _searched((5 * logits).double().numpy(), labels.numpy())

    assert value == pytest.approx(best, rel=0.11)
    assert loss == pytest.approx(least, abs=2e-3)


def test_many_pictures_are_judged_by_validation_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds would fit every setting five times."""
    monkeypatch.setattr(head_kinds, "MAX_FOLD_ROWS", 50)

    assert fit_head("linear_svm", known()).chosen_by == "validation"
    monkeypatch.undo()
    assert fit_head("linear_svm", known()).chosen_by == "cross-validation in 5 parts"


@pytest.mark.parametrize("kind", ["linear_svm", "rbf_svm", "knn"])
def test_one_picture_a_class_gets_the_usual_setting(kind: HeadKind) -> None:
    """There is nothing to choose on, and the head is made all the same."""
    fitted = fit_head(kind, known(num_train=3, num_validation=0))
    features, labels = clouds(3)

    assert "it is the usual one" in fitted.chosen_by
    assert logits_of(fitted.head, features).argmax(dim=1).tolist() == labels.tolist()
