"""What changed from one bundle to another."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load

from export.bundle import GOLDEN
from serve.diff import diff, weights_distance
from serve.engine import Engine
from tests.serve.conftest import BundleMaker
from tests.serve.graphs import head_model, node
from tests.serve.oracle import expected_scores
from tests.serve.specialised import SpecialisedTrunk


def test_a_bundle_does_not_differ_from_itself(engine: Engine, make_bundle: BundleMaker) -> None:
    """No distance, all answers alike."""
    bundle = make_bundle(seed=1)
    found = diff(bundle, bundle, engine)

    assert found["a"] == found["b"]
    assert found["labels"] == {"added": [], "removed": [], "reordered": False}
    assert found["weights"]["distance"] == 0
    assert found["packages"] == {}
    assert found["golden"] == {
        "pictures": 2,
        "agreement": 1,
        "largest_score_change": 0,
        "changed": [],
    }


def test_answers_are_compared_on_the_golden_pictures_of_both(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """Against numpy: which pictures change their label, and the largest change of a score."""
    found = diff(make_bundle(seed=3), make_bundle(seed=4), engine)["golden"]
    pictures = [p for s in (3, 4) for p in load(make_bundle(seed=s).files[GOLDEN])["pictures"]]
    scores = np.array([[expected_scores(p, seed) for p in pictures] for seed in (3, 4)])
    best = scores.argmax(axis=2)
    changed = np.flatnonzero(best[0] != best[1])
    labels = ("red", "green", "blue")

    assert found["pictures"] == 4
    assert [one["picture"] for one in found["changed"]] == changed.tolist()
    assert [one["a"]["label"] for one in found["changed"]] == [labels[best[0][c]] for c in changed]
    assert [one["b"]["label"] for one in found["changed"]] == [labels[best[1][c]] for c in changed]
    assert found["agreement"] == 1 - len(changed) / 4
    assert found["largest_score_change"] == pytest.approx(
        abs(scores[0] - scores[1]).max(), abs=1e-5
    )
    assert 0 < len(changed) < 4


def test_answers_are_matched_by_label_and_not_by_place(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """The same head with its outputs in another order says the same."""
    weight = np.random.default_rng(5).normal(size=(3, 3)).astype(np.float32)
    turned = make_bundle(labels=("green", "blue", "red"), weight=weight[:, [1, 2, 0]])
    found = diff(make_bundle(weight=weight), turned, engine)

    assert found["golden"]["agreement"] == 1
    assert found["golden"]["largest_score_change"] < 1e-6
    assert found["labels"] == {"added": [], "removed": [], "reordered": True}


def test_labels_that_come_and_go_are_named(engine: Engine, make_bundle: BundleMaker) -> None:
    """What stayed is in its order."""
    wider = make_bundle(labels=("red", "green", "violet", "black"))

    assert diff(make_bundle(), wider, engine)["labels"] == {
        "added": ["violet", "black"],
        "removed": ["blue"],
        "reordered": False,
    }


def weights(**tensors: Any) -> dict[str, Any]:
    """Tensors by name."""
    return {name: np.array(values, np.float32) for name, values in tensors.items()}


def test_the_distance_of_weights_is_relative_to_the_first() -> None:
    """||b - a|| / ||a||, over all tensors."""
    a = weights(weight=[[3.0, 0.0]], bias=[4.0])
    b = weights(weight=[[3.0, 1.0]], bias=[4.0])

    assert weights_distance(a, b)["distance"] == pytest.approx(1 / 5)
    assert weights_distance(a, a)["distance"] == 0


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (weights(w=[1]), weights(v=[1]), "2 tensors differ in name or shape, as v: none and (1,)"),
        (weights(w=[1]), weights(w=[1, 2]), "1 tensors differ in name or shape, as w: (1,) and"),
        (weights(), weights(), "neither graph keeps weights"),
        (weights(w=[0]), weights(w=[1]), "no weight other than 0"),
    ],
)
def test_weights_that_cannot_be_compared_say_why(
    a: dict[str, Any], b: dict[str, Any], reason: str
) -> None:
    """No number then."""
    found = weights_distance(a, b)

    assert found["distance"] is None
    assert reason in found["reason"]


def test_a_head_of_another_kind_has_answers_but_no_distance(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """A graph without weights beside one with some."""
    bare = head_model([node("Identity", "features", "logits")]).SerializeToString()
    found = diff(make_bundle(seed=1), make_bundle(seed=1, graph=bare), engine)

    assert found["weights"]["distance"] is None
    assert found["golden"]["pictures"] == 2


def test_adapters_and_tails_are_compared_too(small_trunk: SpecialisedTrunk) -> None:
    """Each by its own path; adapters of one kind have a distance, with their weights in it."""
    engine = small_trunk.engine()
    first, second = (small_trunk.with_adapter("a", "lora", seed).bundle for seed in (1, 2))
    tail = small_trunk.with_tail("a", 3).bundle
    adapters, sizes = diff(first, second, engine), diff(first, tail, engine)

    assert adapters["weights"]["distance"] > 0
    assert adapters["a"]["adapter"] == {"kind": "lora", "width": 2}
    assert sizes["weights"]["distance"] is None
    assert (sizes["a"]["kind"], sizes["b"]["kind"]) == ("adapter", "tail")
    assert sizes["golden"]["pictures"] == 4
