"""What may go live: every gate says no to what it is there for, with its reason, and else yes."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save

from export.bundle import HEAD, Bundle
from serve import contender, gates
from serve.engine import Engine
from serve.gates import GateError
from tests.serve.graphs import (
    FLOAT,
    biased,
    constant_head,
    constant_node,
    constant_product,
    doubling,
    first_row_head,
    head_model,
    mixing_head,
    node,
    two_row_head,
)
from tests.serve.oracle import some_picture

BundleMaker = Callable[..., Bundle]
MAX_HEAD_BYTES = 32 * 2**20
PICTURES = np.stack([some_picture(0), some_picture(1)])
IDENTITY = head_model([node("Identity", "features", "logits")])


def refusal(
    bundle: Bundle, engine: Engine, *, max_head_bytes: int = MAX_HEAD_BYTES
) -> tuple[str, str]:
    """The gate that said no, and why; nothing after it was asked."""
    verdicts = gates.admit(bundle, engine, max_head_bytes=max_head_bytes)
    assert [verdict.passed for verdict in verdicts[:-1]] == [True] * (len(verdicts) - 1)
    assert not verdicts[-1].passed, verdicts
    return verdicts[-1].gate, verdicts[-1].reason


def changed(bundle: Bundle, **fields: object) -> Bundle:
    """The bundle with another manifest."""
    manifest = bundle.manifest.model_copy(update=fields)
    return replace(bundle, manifest=manifest)


def test_a_good_bundle_passes_every_gate(engine: Engine, make_bundle: BundleMaker) -> None:
    """Each says what it saw."""
    verdicts = gates.admit(make_bundle(seed=1), engine, max_head_bytes=MAX_HEAD_BYTES)

    assert [(verdict.gate, verdict.passed) for verdict in verdicts] == [
        ("trunk", True),
        ("graph", True),
        ("golden", True),
    ]
    assert verdicts[1].reason.startswith("1 nodes")
    assert verdicts[2].reason.startswith("2 samples reproduce within")
    assert verdicts[2].reason.endswith("; runs packed")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"trunk": "sha256:" + 64 * "a"}, "was trained on trunk sha256:aaaa.*this service has"),
        ({"num_features": 4}, "takes 4 features; the trunk gives 3"),
    ],
)
def test_a_head_for_another_trunk_is_refused(
    engine: Engine, make_bundle: BundleMaker, fields: dict[str, object], reason: str
) -> None:
    """Its features would mean something else."""
    gate, why = refusal(changed(make_bundle(), **fields), engine)

    assert gate == "trunk"
    assert re.search(reason, why)


def test_a_head_for_other_pictures_is_refused(engine: Engine, make_bundle: BundleMaker) -> None:
    """Trained on pictures that were prepared in another way."""
    other = replace(engine.manifest.preprocessing, mean=(1.0, 0.0, 0.0))
    gate, why = refusal(changed(make_bundle(), preprocessing=other), engine)

    assert gate == "trunk"
    assert "preprocessing" in why
    assert "mean=(1.0, 0.0, 0.0)" in why


def with_subgraph() -> onnx.ModelProto:
    """A branch, hidden as an attribute of an operator that is allowed."""
    branch = helper.make_graph([], "branch", [], [])
    return head_model([node("Identity", "features", "logits", then_branch=branch)])


def with_function() -> onnx.ModelProto:
    """An operator that the file defines itself."""
    model = head_model([node("Identity", "features", "logits")], domains=("", "mine"))
    body = [helper.make_node("Identity", ["x"], ["y"])]
    opset = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("mine", "Copy", ["x"], ["y"], body, opset))
    return model


def with_external_weight() -> onnx.ModelProto:
    """A weight that is read from a path."""
    model = head_model([node("Add", "features bias", "logits")], {"bias": np.zeros(3, np.float32)})
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "/etc/passwd")
    tensor.ClearField("raw_data")
    return model


def with_sparse_weight() -> onnx.ModelProto:
    """A weight whose claimed size has nothing to do with its bytes."""
    model = head_model([node("Add", "features bias", "logits")])
    values = numpy_helper.from_array(np.ones(1, np.float32), "bias")
    places = numpy_helper.from_array(np.array([1], np.int64), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [10**12]))
    return model


def with_short_weight() -> onnx.ModelProto:
    """A weight that claims more elements than it has bytes for."""
    model = head_model([node("Add", "features bias", "logits")], {"bias": np.zeros(3, np.float32)})
    model.graph.initializer[0].dims[:] = [10**12]
    return model


def deep(num_nodes: int) -> onnx.ModelProto:
    """So many nodes in a row."""
    names = ["features", *(f"copy{place}" for place in range(num_nodes - 1)), "logits"]
    return head_model([node("Identity", *pair) for pair in itertools.pairwise(names)])


def weight_of(value: float, dtype: type[np.floating]) -> onnx.ModelProto:
    """A bias with one bad value, cast to float32."""
    bias = {"bias": np.array([0, value, 0], dtype)}
    nodes = [node("Cast", "bias", "cast", to=FLOAT), node("Add", "features cast", "logits")]
    return head_model(nodes, bias)


def typed_weight(data_type: int) -> onnx.ModelProto:
    """A bias of an unusual type, with the bytes of a NaN."""
    nodes = [node("Cast", "bias", "cast", to=FLOAT), node("Add", "features cast", "logits")]
    model = head_model(nodes)
    model.graph.initializer.append(
        TensorProto(name="bias", data_type=data_type, dims=[3], raw_data=b"\xff" * 6)
    )
    return model


NAN_TENSOR = np.array([0, np.nan, 0], np.float32)
GEMM = [node("Gemm", "features weight", "logits", alpha=float("nan"))]
SQUARE = {"weight": np.eye(3, dtype=np.float32)}
HOSTILE = {
    "a loop": (head_model([node("Loop", "features", "logits")]), "uses the operator Loop"),
    "a branch": (head_model([node("If", "features", "logits")]), "uses the operator If"),
    "chance": (
        head_model([node("RandomNormal", "", "logits", shape=[1, 3])]),
        "uses the operator RandomNormal",
    ),
    "another domain": (
        head_model([node("Gelu", "features", "logits", domain="com.microsoft")]),
        "uses the operator com.microsoft.Gelu",
    ),
    "its own function": (with_function(), "defines functions"),
    "a subgraph": (with_subgraph(), "has a graph inside its node Identity"),
    "too many nodes": (deep(65), "has 65 nodes; at most 64"),
    "a path": (with_external_weight(), "keeps the weight 'bias' in another file"),
    "a sparse weight": (with_sparse_weight(), "sparse weights"),
    "a weight with missing bytes": (with_short_weight(), "weight 'bias' cannot be read"),
    "NaN": (weight_of(np.nan, np.float32), "weight 'bias' is not finite"),
    "infinity": (weight_of(np.inf, np.float32), "weight 'bias' is not finite"),
    "NaN in half precision": (weight_of(np.nan, np.float16), "weight 'bias' is not finite"),
    "NaN in double precision": (weight_of(-np.inf, np.float64), "weight 'bias' is not finite"),
    "NaN in bfloat16": (typed_weight(TensorProto.BFLOAT16), "of the type numbered 16"),
    "NaN in a node": (biased(constant_node(NAN_TENSOR)), "is not finite"),
    "NaN in a node's list": (
        biased(node("Constant", "", "bias", value_floats=[0.0, float("nan"), 0.0])),
        "value_floats of a Constant in head.onnx is not finite",
    ),
    "NaN in a node's setting": (head_model(GEMM, SQUARE), "alpha of a Gemm"),
    "text": (
        head_model([node("Cast", "features", "text", to=TensorProto.STRING)]),
        "A Cast is of the type numbered 8",
    ),
    "another input name": (
        head_model([node("Identity", "x", "logits")], inputs=[("x", FLOAT, ("rows", 3))]),
        "expected one float32 'features'",
    ),
    "another input width": (
        head_model(IDENTITY.graph.node, inputs=[("features", FLOAT, ("rows", 4))]),
        r"\('features', \(4,\)\).*expected one float32 'features' of shape \[rows, 3\]",
    ),
    "another input type": (
        head_model(IDENTITY.graph.node, inputs=[("features", TensorProto.DOUBLE, ("rows", 3))]),
        "expected one float32 'features'",
    ),
    "an input more": (
        head_model(
            IDENTITY.graph.node,
            inputs=[("features", FLOAT, ("rows", 3)), ("more", FLOAT, ("rows", 3))],
        ),
        "'more'.*expected one float32 'features'",
    ),
    "a fixed number of rows": (
        head_model(IDENTITY.graph.node, inputs=[("features", FLOAT, (2, 3))]),
        "expected one float32 'features' of shape",
    ),
    "another output name": (
        head_model([node("Identity", "features", "y")], outputs=[("y", FLOAT, ("rows", 3))]),
        "expected one float32 'logits'",
    ),
    "another output width": (
        head_model(IDENTITY.graph.node, outputs=[("logits", FLOAT, ("rows", 2))]),
        r"expected one float32 'logits' of shape \[rows, 3\]",
    ),
    "another output type": (
        head_model(IDENTITY.graph.node, outputs=[("logits", TensorProto.INT64, ("rows", 3))]),
        "expected one float32 'logits'",
    ),
    "an output more": (
        head_model(
            [*IDENTITY.graph.node, node("Identity", "features", "more")],
            outputs=[("logits", FLOAT, ("rows", 3)), ("more", FLOAT, ("rows", 3))],
        ),
        "'more'.*expected one float32 'logits'",
    ),
    "an input that is nowhere": (
        head_model([node("Add", "features nowhere", "logits")]),
        "not a valid ONNX graph",
    ),
    "shapes that do not fit": (
        head_model([node("MatMul", "features weight", "logits")], {"weight": np.ones((4, 3), "f")}),
        "not a valid ONNX graph",
    ),
    "a tensor that doubles": (doubling(40), "refused for its cost: 64 rows need 8444.* elements"),
    "a large constant": (constant_product(30_000, 1), "refused for its cost: 64 rows need"),
    "long products": (constant_product(2_000, 12), "refused for its cost: 64 rows need"),
    "a shape that only a run shows": (
        head_model(
            [
                node("Cast", "features", "shape2", to=TensorProto.INT64),
                node("Flatten", "shape2", "shape1", axis=0),
                node("Squeeze", "shape1", "shape"),
                node("Reshape", "features shape", "logits"),
            ]
        ),
        "refused for its cost: .*not known before it is run",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_graph_that_no_head_needs_is_refused(
    engine: Engine, make_bundle: BundleMaker, what: str
) -> None:
    """By the gate that only reads, at once: no session is ever made of it."""
    model, reason = HOSTILE[what]
    bundle = make_bundle(graph=model.SerializeToString())
    began_s = time.monotonic()
    gate, why = refusal(bundle, engine)

    assert gate == "graph"
    assert re.search(reason, why), why
    # A bomb would take minutes or the machine; reading takes milliseconds.
    assert time.monotonic() - began_s < 2


def test_a_head_that_is_no_graph_is_refused(engine: Engine, make_bundle: BundleMaker) -> None:
    """Bytes of something else."""
    gate, why = refusal(make_bundle(graph=b"\x89PNG" + bytes(99)), engine)

    assert gate == "graph"
    assert "not an ONNX graph" in why


def test_a_head_of_too_many_bytes_is_refused(engine: Engine, make_bundle: BundleMaker) -> None:
    """Before it is parsed."""
    bundle = make_bundle()
    size = len(bundle.files[HEAD])
    gate, why = refusal(bundle, engine, max_head_bytes=size - 1)

    assert gate == "graph"
    assert why == f"head.onnx has {size} bytes; at most {size - 1} are accepted."
    assert gates.admit(bundle, engine, max_head_bytes=size)[-1].passed


@pytest.mark.parametrize(
    "model",
    [
        deep(64),
        biased(constant_node(np.zeros(3, np.float32))),
        weight_of(0.5, np.float16),
        doubling(5),
        constant_product(100, 3),
    ],
    ids=["64 nodes", "a constant node", "half precision", "some width", "some constants"],
)
def test_what_resembles_a_hostile_graph_and_is_none_is_accepted(
    make_bundle: BundleMaker, model: onnx.ModelProto
) -> None:
    """The bounds are where they are said to be."""
    bundle = make_bundle(graph=model.SerializeToString())

    assert gates.check_graph(bundle, max_head_bytes=MAX_HEAD_BYTES).startswith(
        f"{len(model.graph.node)} nodes"
    )


def golden(pictures: np.ndarray, logits: np.ndarray) -> bytes:
    """A golden file."""
    return save({"pictures": pictures, "logits": logits})


ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"not a tensor file", "cannot be read"),
        (save({"pictures": PICTURES}), r"holds \['pictures'\]; expected logits and pictures"),
        (save({"pictures": PICTURES, "logits": ONES, "more": ONES}), "'more'"),
        (golden(PICTURES[:, :4], ONES), r"expected uint8 \(2, 8, 8, 3\)"),
        (golden(PICTURES.astype(np.float32), ONES), "holds float32"),
        (golden(PICTURES, ONES.astype(np.float64)), "float64"),
        (golden(PICTURES, ONES[:, :2]), r"and float32 \(2, 3\)"),
        (golden(PICTURES, ONES[:1]), r"\(1, 3\)"),
        (golden(np.array(0, np.uint8), ONES), r"holds uint8 \(\)"),
        (golden(PICTURES[:0], ONES[:0]), "holds 0 samples"),
        (golden(np.repeat(PICTURES, 33, 0), np.repeat(ONES, 33, 0)), "holds 66 samples"),
        (golden(PICTURES, np.full_like(ONES, np.nan)), "not finite"),
        (golden(PICTURES, np.full_like(ONES, -np.inf)), "not finite"),
    ],
)
def test_golden_samples_that_are_none_are_refused(
    engine: Engine, make_bundle: BundleMaker, data: bytes, reason: str
) -> None:
    """Wrong names, shapes, types, numbers, or too many."""
    gate, why = refusal(make_bundle(golden=data), engine)

    assert gate == "golden"
    assert re.search(reason, why), why


@pytest.mark.parametrize("size", [1.0, 100.0], ids=["small logits", "large logits"])
def test_logits_reproduce_within_the_trunks_tolerance(
    engine: Engine, make_bundle: BundleMaker, size: float
) -> None:
    """A share of the largest logit or of 1: a little less is accepted, a little more is not."""
    logits = np.array([[0.5, 0.0, -size]] * 2, np.float32)
    tolerance = engine.manifest.golden_tolerance["fp32"] * size
    graph = constant_head(logits[0].tolist())
    # float32 keeps 7 digits, so 100 is known to 4e-6: far below 5 % of the tolerance.
    almost = logits + np.float32(0.95 * tolerance) * np.array([1, 0, 0], np.float32)
    too_far = logits + np.float32(1.05 * tolerance) * np.array([1, 0, 0], np.float32)
    accepted = make_bundle(graph=graph, golden=golden(PICTURES, almost))
    gate, why = refusal(make_bundle(graph=graph, golden=golden(PICTURES, too_far)), engine)

    assert gates.admit(accepted, engine, max_head_bytes=MAX_HEAD_BYTES)[-1].passed
    assert gate == "golden"
    assert "do not reproduce" in why


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (two_row_head(), "cannot be run with 4 rows"),
        (first_row_head(), r"gives logits \(1, 3\); expected \(2, 3\)"),
        (mixing_head(), "answers a row otherwise when others are in its batch"),
    ],
    ids=["fixed rows", "too few rows", "mixed rows"],
)
def test_rows_have_to_be_independent(
    engine: Engine, make_bundle: BundleMaker, graph: bytes, reason: str
) -> None:
    """Batches form by chance: what else is in one must not change an answer, nor leak into it."""
    features = engine.features(PICTURES)
    expected = {two_row_head(): features, first_row_head(): features}
    logits = expected.get(graph, features - features.mean(axis=0))
    gate, why = refusal(make_bundle(graph=graph, golden=golden(PICTURES, logits)), engine)

    assert gate == "golden"
    assert re.search(reason, why), why


def test_one_golden_sample_is_enough_to_see_mixed_rows(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """Alone it reproduces; with another row beside it it does not."""
    data = golden(PICTURES[:1], np.zeros((1, 3), np.float32))
    _, why = refusal(make_bundle(graph=mixing_head(), golden=data), engine)

    assert "answers a row otherwise" in why


def test_a_temperature_that_leaves_no_scores_is_refused(
    engine: Engine, make_bundle: BundleMaker
) -> None:
    """The logits reproduce, and every answer would be an error."""
    gate, why = refusal(changed(make_bundle(), temperature=1e-300), engine)

    assert gate == "golden"
    assert "gives no scores" in why


def test_a_head_that_cannot_be_loaded_says_so(make_bundle: BundleMaker) -> None:
    """ONNX Runtime's error, as the gate's."""
    with pytest.raises(GateError, match=r"head\.onnx cannot be loaded"):
        contender.load_head(make_bundle(graph=b"nothing"))


def test_many_golden_samples_are_taken_through_the_trunk_in_small_batches(
    engine: Engine, make_bundle: BundleMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trunk's memory would grow with its largest batch, beside the traffic."""
    sizes: list[int] = []

    def features(pictures: np.ndarray) -> np.ndarray:
        sizes.append(len(pictures))
        return Engine.features(engine, pictures)

    pictures = np.repeat(PICTURES, 10, axis=0)
    data = golden(pictures, np.tile(np.array([1, 2, 3], np.float32), (20, 1)))
    bundle = make_bundle(graph=constant_head([1, 2, 3]), golden=data)
    monkeypatch.setattr(engine, "features", features)

    assert gates.admit(bundle, engine, max_head_bytes=MAX_HEAD_BYTES)[-1].passed
    assert sizes == [8, 8, 4]
