"""Specification of models/svm.py: machines that decide as scikit-learn's do."""

import numpy as np
import pytest
import torch
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.svm import SVC, LinearSVC

from models.heads import MAX_KEPT_BYTES, HeadError, LinearHead, logits_of
from models.svm import linear_svm_head, rbf_svm_head
from tests.models.features import clouds


def over_root_of_width(rows: np.ndarray) -> np.ndarray:
    """Standardised rows, to a norm of about 1."""
    return rows / np.sqrt(rows.shape[1])


def reference(machine: SVC | LinearSVC, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Decision values of scikit-learn's own pipeline for 40 new rows, and those rows."""
    rows, labels = clouds(90, num_classes=num_classes)
    unseen, _ = clouds(40, num_classes=num_classes, seed=1)
    shrink = FunctionTransformer(over_root_of_width)
    pipeline = make_pipeline(StandardScaler(), shrink, OneVsRestClassifier(machine))
    pipeline.fit(rows.double().numpy(), labels.numpy())
    decision = pipeline.decision_function(unseen.double().numpy())
    if num_classes == 2:
        decision = np.stack([-decision, decision], axis=1) / 2
    return decision, unseen.numpy()


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_a_linear_machine_decides_as_scikit_learn_does(num_classes: int) -> None:
    """Folded into one affine map: float32 and the solver's own tolerance of 1e-4 are left."""
    rows, labels = clouds(90, num_classes=num_classes)
    head = linear_svm_head(rows, labels, num_classes=num_classes, c=10.0)
    expected, unseen = reference(LinearSVC(C=10.0, dual=False, tol=1e-8), num_classes)

    assert isinstance(head, LinearHead)
    np.testing.assert_allclose(logits_of(head, torch.from_numpy(unseen)), expected, atol=5e-3)


@pytest.mark.parametrize("num_classes", [2, 3, 5])
def test_a_radial_machine_decides_as_scikit_learn_does(num_classes: int) -> None:
    """Support vectors of all labels together, one product: float32 alone differs."""
    rows, labels = clouds(90, num_classes=num_classes)
    head = rbf_svm_head(rows, labels, num_classes=num_classes, c=3.0, gamma=0.5)
    expected, unseen = reference(SVC(C=3.0, gamma=0.5), num_classes)

    np.testing.assert_allclose(logits_of(head, torch.from_numpy(unseen)), expected, atol=2e-3)


def test_rows_that_no_machine_needs_are_not_kept() -> None:
    """Far from every margin a row has no coefficient."""
    rows, labels = clouds(90, num_classes=2)
    rows[labels == 1] += 50 * rows.std(dim=0)
    head = rbf_svm_head(rows, labels, num_classes=2, c=1.0, gamma=0.2)

    assert 2 <= len(head.vectors) < 90


def test_more_pictures_than_a_head_may_keep_are_refused_before_anything_is_fitted() -> None:
    """With what to train instead."""
    rows = torch.rand(MAX_KEPT_BYTES // 4096 + 1, 1024)
    labels = torch.arange(len(rows)) % 2

    with pytest.raises(HeadError, match=r"at most 16 are allowed. Train a linear, linear_svm or"):
        rbf_svm_head(rows, labels, num_classes=2, c=1.0, gamma=1.0)


@pytest.mark.parametrize("fit", [linear_svm_head, rbf_svm_head])
def test_a_class_without_a_picture_is_refused(fit: object) -> None:
    """Before scikit-learn would say it in its own words."""
    rows, labels = clouds(20, num_classes=2)
    more = {"gamma": 1.0} if fit is rbf_svm_head else {}

    with pytest.raises(HeadError, match="Class 2 has no picture"):
        fit(rows, labels, num_classes=3, c=1.0, **more)  # pyrefly: ignore
