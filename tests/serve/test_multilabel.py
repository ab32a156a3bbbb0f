"""Heads that give a picture any number of labels: gates, swaps, answers and clients."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.numpy import save
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from export.bundle import HELDOUT, Bundle, BundleError
from export.recipe import MadeLabels, make_label_head, read_label_data
from models.digits import TRAITS
from models.errors import LearningError
from models.heads import extract_features
from models.multilabel import MultiLabelSplit
from serve.client_calls import Prediction
from serve.contender import Contender
from serve.diff import diff
from serve.engine import Engine
from serve.graph_gate import GateError
from serve.heads import Head
from serve.heldout import HeldoutError, read_heldout
from tests.serve.conftest import BundleMaker
from tests.serve.exams import PERFECT, exam, exam_of, heldout
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.specialised import SpecialisedTrunk

NUM_ASKED = 12
# Of the tiny trunk's features, the means of the channels from 0 to 1.
WEIGHT = 8 * PERFECT
THRESHOLDS = (0.6, 0.9, 0.97)


def several(num: int = 60) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Noise with some channels brighter, uint8 [num, 8, 8, 3], and which, int64 [num, 3]."""
    pictures, _ = exam(num)
    labels = np.random.default_rng(1).integers(0, 2, (num, 3))
    return (pictures // 4 + 150 * labels[:, None, None, :]).astype(np.uint8), labels


def sample_of(pictures: NDArray[np.uint8], labels: NDArray[np.int64]) -> bytes:
    return save({"pictures": pictures, "labels": labels})


@pytest.fixture(scope="module")
def made(small_trunk: SpecialisedTrunk) -> MadeLabels:
    """The traits of digits, by the recipe behind the command line."""
    torch.set_num_threads(1)
    data = read_label_data("digit_traits", seed=0)
    assert data is not None
    return make_label_head(data, small_trunk.folder, task="traits", seed=0, command="test")


@pytest.fixture(scope="module")
def client(
    made: MadeLabels, small_trunk: SpecialisedTrunk, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[HttpClient]:
    """One replica that serves it."""
    with LocalFleet(tmp_path_factory.mktemp("store"), small_trunk.folder, replicas=1) as fleet:
        fleet.must_push(made.bundle)
        yield HttpClient(fleet, "replica-1")


def features(trunk: SpecialisedTrunk, *splits: MultiLabelSplit) -> NDArray[np.float64]:
    """By PyTorch, of all splits one after the other."""
    pictures = [picture for split in splits for picture in split.pictures]
    pixels = [picture.pixels(trunk.backbone.preprocessing) for picture in pictures]
    return extract_features(trunk.backbone, torch.from_numpy(np.stack(pixels))).double().numpy()


def test_scores_and_labels_over_http_are_those_of_scikit_learn(
    made: MadeLabels, client: HttpClient, small_trunk: SpecialisedTrunk
) -> None:
    """A logistic regression for each label by itself, at whatever strength was chosen for it."""
    data, test = made.data, made.data.test
    rows = features(small_trunk, data.train, data.validation)
    scaler = StandardScaler().fit(rows)
    truth = torch.cat([data.train.labels, data.validation.labels]).numpy()
    unseen = scaler.transform(features(small_trunk, test)[:NUM_ASKED])
    answers = [
        client.post("/predict/traits", content=png(test, n)).json() for n in range(NUM_ASKED)
    ]

    for place, label in enumerate(data.labels):
        mine = [answer["scores"][label] for answer in answers]
        candidates = [
            LogisticRegression(C=1 / (l2 * len(rows)), max_iter=2000)
            .fit(scaler.transform(rows), truth[:, place])
            .predict_proba(unseen)[:, 1]
            for l2 in (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)
        ]
        # Weak penalties stop at 300 steps in the head and at 2,000 here.
        assert min(np.abs(candidate - mine).max() for candidate in candidates) < 0.02
    for answer in answers:
        given = [
            label
            for label, threshold in zip(data.labels, made.trained.thresholds, strict=True)
            if answer["scores"][label] >= threshold
        ]
        assert answer["labels"] == given
        assert (
            answer["score"] == max(answer["scores"].values()) == answer["scores"][answer["label"]]
        )


def png(split: MultiLabelSplit, place: int) -> bytes:
    """One of its pictures as a file."""
    source = split.pictures[place].source
    assert isinstance(source, np.ndarray)
    buffer = io.BytesIO()
    Image.fromarray(source).save(buffer, "PNG")
    return buffer.getvalue()


def test_answers_are_as_documented_and_as_the_client_types_them(
    made: MadeLabels, client: HttpClient
) -> None:
    """All labels that reach their threshold come with ?top=1 too, which shortens scores alone."""
    whole = client.post("/predict/traits", content=png(made.data.test, 0)).json()
    short = client.post("/predict/traits?top=1", content=png(made.data.test, 0)).json()
    schema = client.get("/openapi.json").json()["components"]["schemas"]["Result"]

    assert Prediction(**whole).labels == whole["labels"] == short["labels"]
    assert len(short["scores"]) == 1
    assert "reaches its threshold" in schema["properties"]["labels"]["description"]
    assert "labels" not in schema["required"]


def test_the_head_is_served_as_one_product(made: MadeLabels) -> None:
    """However many labels there are."""
    assert Head.of_bundle(made.bundle).is_packed


def test_what_is_measured_is_in_the_manifest_and_on_the_card(made: MadeLabels) -> None:
    """Beside the same of thumbnails, with each label's threshold."""
    card = made.bundle.files["card.md"].decode()

    assert made.bundle.manifest.link == "sigmoid"
    assert made.bundle.manifest.thresholds == made.trained.thresholds
    assert {"test map", "test f1", "test exact", "baseline_test map", "test auc odd"} <= set(
        made.bundle.manifest.metrics
    )
    assert "each label is right or wrong by itself" in card
    for label, threshold in zip(TRAITS, made.trained.thresholds, strict=True):
        assert f"{label} {threshold:.3f}" in card


def test_the_sample_that_it_brings_has_all_labels_of_each_picture(
    made: MadeLabels, small_trunk: SpecialisedTrunk
) -> None:
    """Of test pictures alone; the head is right about as many of them as its card says."""
    data = made.bundle.files[HELDOUT]
    sample = read_heldout(data, size_px=32, num_labels=3)
    contender = Contender(made.bundle, small_trunk.engine())
    (right,) = exam_of(data).right_answers([contender])

    assert sample.labels.shape == (len(made.data.test), 3)
    assert right.mean() == pytest.approx(made.trained.metrics["test exact"].value, abs=1e-9)


def test_another_strategy_is_refused_by_name(
    made: MadeLabels, small_trunk: SpecialisedTrunk
) -> None:
    """Only logistic regression is trained for such pictures."""
    with pytest.raises(LearningError, match=r"The strategy is 'knn'.*expected 'linear'"):
        make_label_head(
            made.data, small_trunk.folder, task="traits", strategy="knn", seed=0, command="test"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"link": "softmax"}, "there are thresholds and link is softmax, expected sigmoid"),
        ({"thresholds": [0.5]}, "there are 1 thresholds and 3 labels"),
        ({"thresholds": [0.5, 0.0, 0.5]}, "greater than 0"),
        ({"thresholds": [0.5, 1.0, 0.5]}, "less than 1"),
    ],
)
def test_thresholds_that_do_not_fit_are_no_manifest(
    change: dict[str, object], message: str, make_bundle: BundleMaker
) -> None:
    """One for each label, between 0 and 1, of scores that are probabilities by themselves."""
    good = make_bundle(thresholds=THRESHOLDS)
    fields = {**json.loads(good.manifest_bytes), **change}
    del fields["files"]

    with pytest.raises(BundleError, match=message):
        Bundle.pack(good.files, **fields)


def test_a_manifest_without_thresholds_does_not_name_them(make_bundle: BundleMaker) -> None:
    """A service from before there were any refuses fields that it does not know."""
    assert "thresholds" not in json.loads(make_bundle().manifest_bytes)
    assert json.loads(make_bundle(thresholds=THRESHOLDS).manifest_bytes)["thresholds"] == list(
        THRESHOLDS
    )


def test_a_label_is_given_from_its_threshold_on(make_bundle: BundleMaker) -> None:
    """At it too; all, some or none. One-label heads give the best."""
    head = Head.of_bundle(make_bundle(thresholds=THRESHOLDS))
    single = Head.of_bundle(make_bundle())

    def given(*scores: float) -> tuple[str, ...]:
        return head.labels_given(np.array(scores, np.float32))

    assert given(0.6, 0.9, 0.97) == ("red", "green", "blue")
    assert given(0.59, 0.95, 0.96) == ("green",)
    assert given(0.5, 0.5, 0.5) == ()
    assert single.labels_given(np.array([0.2, 0.3, 0.5], np.float32)) == ("blue",)


def test_a_picture_is_right_if_exactly_its_labels_are_given(
    make_bundle: BundleMaker, engine: Engine
) -> None:
    """By numpy: every score on the right side of its threshold."""
    pictures, labels = several()
    bundle = make_bundle(weight=WEIGHT, thresholds=THRESHOLDS)
    (right,) = exam_of(sample_of(pictures, labels)).right_answers([Contender(bundle, engine)])
    means = pictures.astype(np.float64).mean(axis=(1, 2)) / 255
    scores = 1 / (1 + np.exp(-8 * means))

    expected = ((scores >= THRESHOLDS) == (labels == 1)).all(axis=1)
    np.testing.assert_array_equal(right, expected)
    assert 0 < expected.mean() < 1


@pytest.mark.parametrize(
    ("thresholds", "sample", "message"),
    [
        (THRESHOLDS, heldout(20), "have one label each, and the head gives any number of labels"),
        (None, sample_of(*several(20)), "have any number of labels each, and the head gives one"),
    ],
)
def test_an_exam_of_the_other_kind_is_none(
    thresholds: tuple[float, ...] | None,
    sample: bytes,
    message: str,
    make_bundle: BundleMaker,
    engine: Engine,
) -> None:
    """With what to do."""
    contender = Contender(make_bundle(thresholds=thresholds), engine)

    with pytest.raises(GateError, match=f"{message}.*headstock task heldout"):
        exam_of(sample).right_answers([contender])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full((4, 3), 2), "holds labels from 0 to 2; expected 0 to 1, whether a picture has"),
        (np.zeros((4, 2), np.int64), r"int64 \(4, 2\).*int64 \(4,\), or \(4, 3\) where a picture"),
    ],
)
def test_a_sample_of_several_labels_is_checked(labels: NDArray[np.int64], message: str) -> None:
    """0 or 1, and as many columns as the task has labels."""
    pictures, _ = several(4)
    labels = labels.copy()
    labels[0, 0] = 0

    with pytest.raises(HeldoutError, match=message):
        read_heldout(sample_of(pictures, labels), size_px=8, num_labels=3)


def test_a_worse_head_is_refused_and_one_of_the_other_kind_is_not_compared(
    make_bundle: BundleMaker, trunk_folder: Path, tmp_path: Path
) -> None:
    """On the sample that came first; a head with one label has other right answers."""
    pictures, labels = several(200)
    sample = sample_of(pictures, labels)
    good = make_bundle(weight=WEIGHT, thresholds=(0.9, 0.9, 0.9), heldout=sample)
    worse = make_bundle(weight=WEIGHT, thresholds=(0.9999, 0.9, 0.9))
    single = make_bundle(weight=WEIGHT)
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        client = HttpClient(fleet, "replica-1")
        client.post("/tasks/colours/versions", content=good.to_zip(), headers=ZIP)
        refused = client.post("/tasks/colours/versions", content=worse.to_zip(), headers=ZIP)
        other = client.post("/tasks/colours/versions", content=single.to_zip(), headers=ZIP)

    gates = {gate["gate"]: gate for gate in refused.json()["gates"]}
    assert refused.status_code == 422
    assert "The head is worse than what is live" in gates["accuracy"]["reason"]
    assert other.status_code == 200, other.text


ZIP = {"content-type": "application/zip"}


def test_a_bundle_whose_sample_is_of_the_other_kind_is_refused(
    make_bundle: BundleMaker, trunk_folder: Path, tmp_path: Path
) -> None:
    """Before it becomes the task's exam."""
    bundle = make_bundle(thresholds=THRESHOLDS, heldout=heldout(20))
    with LocalFleet(tmp_path, trunk_folder, replicas=1) as fleet:
        client = HttpClient(fleet, "replica-1")
        refused = client.post("/tasks/colours/versions", content=bundle.to_zip(), headers=ZIP)

    assert refused.status_code == 422
    assert "held-out sample is for a head that gives one label" in refused.text


def test_a_diff_compares_the_labels_that_are_given(
    make_bundle: BundleMaker, engine: Engine
) -> None:
    """Another threshold is another answer, though no score has changed."""
    low = make_bundle(weight=WEIGHT, thresholds=(0.5, 0.5, 0.5))
    high = make_bundle(weight=WEIGHT, thresholds=(0.5, 0.5, 0.9999))
    found = diff(low, high, engine)

    assert found["golden"]["largest_score_change"] == 0
    assert found["golden"]["agreement"] == 0
    assert found["golden"]["changed"][0]["a"]["labels"] == ["red", "green", "blue"]
    assert found["golden"]["changed"][0]["b"]["labels"] == ["red", "green"]
    assert found["b"]["thresholds"] == (0.5, 0.5, 0.9999)
