"""Heads that are no product: support vectors and nearest neighbours, exact and bounded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from safetensors.numpy import save
from sklearn.svm import SVC

from export.bundle import Bundle
from serve import gates
from serve.engine import Engine
from serve.heads import Head
from serve.svm import DOMAIN
from tests.serve.graphs import FLOAT, head_model, node
from tests.serve.oracle import some_picture

BundleMaker = Callable[..., Bundle]
MAX_HEAD_BYTES = 32 * 2**20
GAMMA = 0.7
CHANCE = np.random.default_rng(0)
POINTS = CHANCE.uniform(0, 1, (120, 3)).astype(np.float32)
QUERIES = CHANCE.uniform(0, 1, (9, 3)).astype(np.float32)
PICTURES = np.stack([some_picture(0), some_picture(1)])


def labels_of(num_labels: int) -> np.ndarray:
    """Labels that a straight line does not divide, int64 [120]."""
    return (POINTS.sum(axis=1) * 5).astype(np.int64) % num_labels


def machine(num_labels: int) -> SVC:
    """A machine with a radial kernel, as scikit-learn fits it."""
    return SVC(kernel="rbf", gamma=GAMMA, decision_function_shape="ovo").fit(
        POINTS, labels_of(num_labels)
    )


def lists_of(fitted: SVC) -> dict[str, Any]:
    """What both operators store of it."""
    return {
        "kernel_type": "RBF",
        "kernel_params": [GAMMA, 0.0, 3.0],
        "coefficients": fitted.dual_coef_.ravel().tolist(),
        "support_vectors": fitted.support_vectors_.ravel().tolist(),
        "rho": fitted.intercept_.tolist(),
    }


def regressor_head(**changes: Any) -> onnx.ModelProto:
    """Two labels: minus and plus the one decision value."""
    fitted = machine(2)
    lists: dict[str, Any] = {
        **lists_of(fitted),
        "n_supports": len(fitted.support_vectors_),
        **changes,
    }
    nodes = [
        helper.make_node("SVMRegressor", ["features"], ["decision"], domain=DOMAIN, **lists),
        node("MatMul", "decision sides", "logits"),
    ]
    weights = {"sides": np.array([[-1, 1]], np.float32)}
    outputs = [("logits", FLOAT, ("rows", 2))]
    return head_model(nodes, weights, outputs=outputs, domains=("", DOMAIN))


def classifier_head(num_labels: int, **changes: Any) -> onnx.ModelProto:
    """A value for each pair of labels, or for each side of the only pair."""
    fitted = machine(num_labels)
    lists: dict[str, Any] = {
        **lists_of(fitted),
        "classlabels_ints": list(range(num_labels)),
        "vectors_per_class": fitted.n_support_.tolist(),
        **changes,
    }
    nodes = [
        helper.make_node(
            "SVMClassifier", ["features"], ["label", "scores"], domain=DOMAIN, **lists
        ),
        node("Identity", "scores", "logits"),
    ]
    num_scores = max(2, num_labels * (num_labels - 1) // 2)
    outputs = [("logits", FLOAT, ("rows", num_scores))]
    return head_model(nodes, outputs=outputs, domains=("", DOMAIN))


def neighbours_head(num_neighbours: int = 5) -> onnx.ModelProto:
    """Votes of the nearest by cosine: directions, one product, TopK, and one-hot labels to sum."""
    weights = {
        "points": directions(POINTS).T.copy(),
        "k": np.array([num_neighbours], np.int64),
        "votes": np.eye(3, dtype=np.float32)[labels_of(3)],
        "axis": np.array([1], np.int64),
    }
    nodes = [
        node("LpNormalization", "features", "direction", axis=-1, p=2),
        node("MatMul", "direction points", "cosines"),
        node("TopK", "cosines k", "nearest places", axis=-1),
        node("Gather", "votes places", "cast"),
        node("ReduceSum", "cast axis", "logits", keepdims=0),
    ]
    return head_model(nodes, weights)


def directions(points: np.ndarray) -> np.ndarray:
    """Rows of norm 1."""
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def bundle_of(make_bundle: BundleMaker, engine: Engine, model: onnx.ModelProto) -> Bundle:
    """A bundle of the graph, with golden samples that it gives itself."""
    (width,) = (output.type.tensor_type.shape.dim[1].dim_value for output in model.graph.output)
    graph = model.SerializeToString()
    plain = make_bundle(graph=graph, labels=tuple(f"label {place}" for place in range(width)))
    logits = Head.of_bundle(plain).logits(engine.features(PICTURES))
    golden = save({"pictures": PICTURES, "logits": logits})
    return make_bundle(graph=graph, labels=plain.manifest.labels, golden=golden)


def test_a_machine_of_two_labels_decides_as_scikit_learn_does(
    make_bundle: BundleMaker, engine: Engine
) -> None:
    """Kernels in float32: 1e-4 of values about 1."""
    head = Head.of_bundle(bundle_of(make_bundle, engine, regressor_head()))
    decision = machine(2).decision_function(QUERIES)

    assert not head.is_packed
    np.testing.assert_allclose(
        head.logits(QUERIES), np.stack([-decision, decision], axis=1), atol=1e-4
    )


@pytest.mark.parametrize("num_labels", [3, 4])
def test_a_machine_of_several_labels_decides_as_scikit_learn_does(
    make_bundle: BundleMaker, engine: Engine, num_labels: int
) -> None:
    """One value for each pair of labels, all from the same support vectors."""
    head = Head.of_bundle(bundle_of(make_bundle, engine, classifier_head(num_labels)))

    np.testing.assert_allclose(
        head.logits(QUERIES), machine(num_labels).decision_function(QUERIES), atol=1e-4
    )


def test_neighbours_are_those_that_a_search_through_all_finds(
    make_bundle: BundleMaker, engine: Engine
) -> None:
    """Votes of the five largest cosines of all, for every query."""
    head = Head.of_bundle(bundle_of(make_bundle, engine, neighbours_head()))
    cosines = directions(QUERIES.astype(np.float64)) @ directions(POINTS.astype(np.float64)).T
    nearest = np.argsort(-cosines, axis=1)[:, :5]
    votes = [np.bincount(row, minlength=3) for row in labels_of(3)[nearest]]

    np.testing.assert_array_equal(head.logits(QUERIES), votes)


@pytest.mark.parametrize(
    "model",
    [regressor_head(), classifier_head(2), classifier_head(4), neighbours_head()],
    ids=["regressor", "classifier of two", "classifier of four", "neighbours"],
)
def test_a_head_that_is_no_product_is_admitted_and_says_what_it_costs(
    make_bundle: BundleMaker, engine: Engine, model: onnx.ModelProto
) -> None:
    """In a session of its own, with the time of a row and the size of its graph."""
    bundle = bundle_of(make_bundle, engine, model)
    verdicts = gates.admit(bundle, engine, max_head_bytes=MAX_HEAD_BYTES)

    assert verdicts[-1].passed, verdicts[-1].reason
    assert re.search(
        r"; runs in its own session, \d+ us a row, graph of \d+ kB$", verdicts[-1].reason
    )


BAD_MACHINES: Mapping[str, tuple[onnx.ModelProto, str]] = {
    "fewer vectors than said": (regressor_head(n_supports=10_000), "are no 10000 support vectors"),
    "no vectors": (regressor_head(n_supports=0), "are no 0 support vectors"),
    "a negative number of vectors": (regressor_head(n_supports=-3), "are no -3 support vectors"),
    "vectors of another width": (
        regressor_head(n_supports=1, coefficients=[1.0]),
        r"SVMRegressor takes \d+ numbers a row",
    ),
    "too few coefficients": (regressor_head(coefficients=[1.0]), "coefficients has 1 numbers"),
    "two offsets": (regressor_head(rho=[0.1, 0.2]), "rho has 2 numbers, not 1"),
    "another kernel": (regressor_head(kernel_type="POLY"), "kernel is not RBF"),
    "a kernel without its width": (regressor_head(kernel_params=[GAMMA]), "kernel is not RBF"),
    "a last step": (regressor_head(post_transform="PROBIT"), "ends with a transform"),
    "one class": (regressor_head(one_class=1), "one_class is nothing that"),
    "more vectors of a label": (
        classifier_head(3, vectors_per_class=[1000, 1000, 1000]),
        "are no 3000 support vectors",
    ),
    "a label without vectors": (
        classifier_head(3, vectors_per_class=[len(machine(3).support_vectors_), 0, 0]),
        "a label has no support vector",
    ),
    "one label": (classifier_head(3, vectors_per_class=[5]), "classlabels_ints are not"),
    "other labels": (classifier_head(3, classlabels_ints=[0, 1, 7]), "classlabels_ints are not"),
    "offsets of fewer pairs": (classifier_head(3, rho=[0.0]), "rho has 1 numbers, not 3"),
    "probabilities": (classifier_head(3, prob_a=[1.0], prob_b=[1.0]), "prob_a is nothing that"),
}


@pytest.mark.parametrize("what", BAD_MACHINES)
def test_a_machine_that_contradicts_itself_is_refused(make_bundle: BundleMaker, what: str) -> None:
    """By the gate that only reads: ONNX Runtime would believe it."""
    model, reason = BAD_MACHINES[what]
    (width,) = (output.type.tensor_type.shape.dim[1].dim_value for output in model.graph.output)
    labels = tuple(f"label {place}" for place in range(width))
    bundle = make_bundle(graph=model.SerializeToString(), labels=labels)

    with pytest.raises(gates.GateError, match=reason):
        gates.check_graph(bundle, max_head_bytes=MAX_HEAD_BYTES)


def test_an_attribute_given_twice_is_refused(make_bundle: BundleMaker) -> None:
    """Two readers might take one each."""
    model = regressor_head()
    model.graph.node[0].attribute.append(helper.make_attribute("rho", [0.5]))
    bundle = make_bundle(graph=model.SerializeToString(), labels=("no", "yes"))

    with pytest.raises(gates.GateError, match="appeared multiple times"):
        gates.check_graph(bundle, max_head_bytes=MAX_HEAD_BYTES)


def test_a_machine_that_costs_too_much_is_refused(make_bundle: BundleMaker) -> None:
    """1.2 million support vectors: 64 rows would need 77 million kernels."""
    num_vectors = 1_200_000
    lists = {
        "n_supports": num_vectors,
        "coefficients": np.ones(num_vectors),
        "support_vectors": np.zeros(3 * num_vectors),
    }
    bundle = make_bundle(graph=regressor_head(**lists).SerializeToString(), labels=("no", "yes"))

    with pytest.raises(gates.GateError, match="refused for its cost: 64 rows need"):
        gates.check_graph(bundle, max_head_bytes=MAX_HEAD_BYTES)


@pytest.mark.parametrize("operator", ["TreeEnsembleRegressor", "SVMTransformer"])
def test_the_domain_of_machines_has_no_other_operators(
    make_bundle: BundleMaker, operator: str
) -> None:
    """Two are known; all others are refused by name."""
    strange = helper.make_node(operator, ["features"], ["logits"], domain=DOMAIN)
    bundle = make_bundle(graph=head_model([strange], domains=("", DOMAIN)).SerializeToString())

    with pytest.raises(gates.GateError, match=rf"uses the operator ai\.onnx\.ml\.{operator}"):
        gates.check_graph(bundle, max_head_bytes=MAX_HEAD_BYTES)
