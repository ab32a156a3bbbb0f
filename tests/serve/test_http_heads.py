"""Heads of every kind, from pictures to HTTP answers, against scikit-learn and PyTorch."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from export.recipe import MadeHead, make_head
from models.data import Split, join
from models.digits import load_digit_task
from models.head_kinds import HEAD_KINDS, HeadKind
from models.heads import extract_features
from serve.heads import Head
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.specialised import SpecialisedTrunk

NUM_ASKED = 12
Rows = NDArray[np.float64]


@pytest.fixture(scope="module")
def made(
    small_trunk: SpecialisedTrunk, tmp_path_factory: pytest.TempPathFactory
) -> dict[HeadKind, MadeHead]:
    """A head of each kind for the digits, by the recipe behind the command line."""
    torch.set_num_threads(1)
    cache = tmp_path_factory.mktemp("cache")
    return {
        kind: make_head(
            "digits", small_trunk.folder, task=kind, strategy=kind, seed=0, command="test",
            max_train=200, cache=cache,
        )
        for kind in HEAD_KINDS
    }  # fmt: skip


@pytest.fixture(scope="module")
def client(
    made: dict[HeadKind, MadeHead],
    small_trunk: SpecialisedTrunk,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[HttpClient]:
    """One replica that serves them all: every gate has admitted every one."""
    with LocalFleet(tmp_path_factory.mktemp("store"), small_trunk.folder, replicas=1) as fleet:
        for one in made.values():
            fleet.must_push(one.bundle)
        yield HttpClient(fleet, "replica-1")


def features(trunk: SpecialisedTrunk, split: Split) -> Rows:
    """By PyTorch."""
    preprocessing = trunk.backbone.preprocessing
    pixels = torch.cat(list(split.batches(preprocessing, batch_size=500)))
    return extract_features(trunk.backbone, pixels).double().numpy()


def png(split: Split, place: int) -> bytes:
    """One of its pictures as a file."""
    source = split.pictures[place].source
    assert isinstance(source, np.ndarray)
    buffer = io.BytesIO()
    Image.fromarray(source).save(buffer, "PNG")
    return buffer.getvalue()


def scaled(rows: Rows, unseen: Rows, *, over: float = 1.0) -> tuple[Rows, Rows]:
    """Both standardised by the first."""
    scaler = StandardScaler().fit(rows)
    return scaler.transform(rows) / over, scaler.transform(unseen) / over


def linear(rows: Rows, labels: NDArray[np.int64], unseen: Rows, *, l2: float) -> Rows:
    rows, unseen = scaled(rows, unseen)
    machine = LogisticRegression(C=1 / (l2 * len(rows)), max_iter=2000).fit(rows, labels)
    return machine.decision_function(unseen)


def cosine(rows: Rows, labels: NDArray[np.int64], unseen: Rows, *, scale: float) -> Rows:
    """Straight from the definition; scikit-learn's NearestCentroid has no scores."""
    centre = np.mean([rows[labels == label].mean(axis=0) for label in range(10)], axis=0)
    directions = [r / np.linalg.norm(r, axis=1)[:, None] for r in (rows - centre, unseen - centre)]
    means = np.stack([directions[0][labels == label].mean(axis=0) for label in range(10)])
    return scale * directions[1] @ (means / np.linalg.norm(means, axis=1)[:, None]).T


def linear_svm(rows: Rows, labels: NDArray[np.int64], unseen: Rows, *, c: float) -> Rows:
    rows, unseen = scaled(rows, unseen, over=np.sqrt(rows.shape[1]))
    machine = LinearSVC(C=c, dual=False, tol=1e-8, max_iter=50_000)
    return OneVsRestClassifier(machine).fit(rows, labels).decision_function(unseen)


def rbf_svm(rows: Rows, labels: NDArray[np.int64], unseen: Rows, *, c: float, gamma: float) -> Rows:
    rows, unseen = scaled(rows, unseen, over=np.sqrt(rows.shape[1]))
    return OneVsRestClassifier(SVC(C=c, gamma=gamma)).fit(rows, labels).decision_function(unseen)


def knn(rows: Rows, labels: NDArray[np.int64], unseen: Rows, *, num_neighbours: int) -> Rows:
    centre = np.mean([rows[labels == label].mean(axis=0) for label in range(10)], axis=0)
    machine = KNeighborsClassifier(num_neighbours, metric="cosine", weights=weights)
    return np.asarray(machine.fit(rows - centre, labels).predict_proba(unseen - centre))


def weights(distances: Rows) -> Rows:
    """Of votes, by cosine distance."""
    return np.exp(-distances / 0.07)


REFERENCES: dict[str, Callable[..., Rows]] = {
    "linear": linear,
    "cosine": cosine,
    "linear_svm": linear_svm,
    "rbf_svm": rbf_svm,
    "knn": knn,
}


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_a_head_of_every_kind_is_served_with_the_scores_of_its_reference(
    kind: HeadKind,
    made: dict[HeadKind, MadeHead],
    client: HttpClient,
    small_trunk: SpecialisedTrunk,
) -> None:
    """Fitted anew by scikit-learn on features from PyTorch; an MLP is run by PyTorch."""
    one, test = made[kind], made[kind].data.test
    both = join(one.data.train, one.data.validation)
    rows, unseen = features(small_trunk, both), features(small_trunk, test)[:NUM_ASKED]
    trained = one.trained.head
    if kind == "mlp":
        logits = trained.head(torch.from_numpy(unseen).float()).detach().numpy()
    else:
        logits = REFERENCES[kind](rows, both.labels.numpy(), unseen, **trained.setting)
    exponentials = np.exp(logits / trained.temperature)
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)

    answers = [
        client.post(f"/predict/{kind}", content=png(test, place)).json()
        for place in range(NUM_ASKED)
    ]
    scores = [[answer["scores"][label] for label in one.data.labels] for answer in answers]
    # Solvers stop at gradients of 1e-4, and temperatures of a tenth amplify that.
    np.testing.assert_allclose(scores, expected, atol=0.01)
    assert [answer["label"] for answer in answers] == [
        one.data.labels[place] for place in expected.argmax(axis=1)
    ]


def test_linear_machines_are_served_as_one_product(made: dict[HeadKind, MadeHead]) -> None:
    """Recognised from their graphs; what is no affine map has a session of its own."""
    packed = {kind for kind, one in made.items() if Head.of_bundle(one.bundle).is_packed}

    assert packed == {"linear", "cosine", "linear_svm"}


@pytest.mark.parametrize("kind", HEAD_KINDS)
def test_the_card_says_the_kind_and_its_setting(
    kind: HeadKind, made: dict[HeadKind, MadeHead]
) -> None:
    """So that a reader can fit it again."""
    card = made[kind].bundle.files["card.md"].decode()
    name, value = next(iter(made[kind].trained.head.setting.items()))

    assert f"of the kind {kind}: {name} {value:g}" in card


def test_a_task_of_two_labels_has_machines_with_two_sides(small_trunk: SpecialisedTrunk) -> None:
    """One decision value, half for each label."""
    data = load_digit_task("loop", seed=0)
    one = make_head(
        "loop", small_trunk.folder, task="loop", strategy="rbf_svm", seed=0, command="test",
        max_train=80,
    )  # fmt: skip
    head = Head.of_bundle(one.bundle)
    logits = head.logits(features(small_trunk, data.test)[:8].astype(np.float32))

    np.testing.assert_allclose(logits[:, 0], -logits[:, 1], atol=1e-5)


def test_the_second_head_on_the_same_pictures_finds_their_features(
    small_trunk: SpecialisedTrunk, tmp_path: Path
) -> None:
    """The same bundle but for when it was made, without running the trunk over train."""
    first, again = (
        make_head(
            "loop", small_trunk.folder, task="loop", strategy="linear", seed=0, command="test",
            max_train=80, cache=tmp_path,
        )
        for _ in range(2)
    )  # fmt: skip

    assert len(list(tmp_path.iterdir())) == 1
    assert first.bundle.files["head.onnx"] == again.bundle.files["head.onnx"]
