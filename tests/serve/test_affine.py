"""Which graphs are packed, and that packing changes no answer: against ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from serve.affine import MIN_OPSET, AffineMap, recognise
from serve.onnx_session import open_session
from tests.serve.graphs import FLOAT, constant_node, head_model, node

REPEATABLE = settings(derandomize=True, deadline=None)  # the machine may be busy
ROWS = 6
FEATURES = ("features", FLOAT, ("rows", 3))


@dataclass
class Chain:
    """A graph that grows at its end, with random weights."""

    chance: np.random.Generator
    width: int
    end: str = "features"
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def weight(self, *shape: int, away_from_zero: bool = False) -> str:
        """A random weight; its name."""
        values = self.chance.normal(size=shape)
        if away_from_zero:
            values = np.sign(values) * (0.5 + np.abs(values))
        name = f"weight{len(self.weights)}"
        self.weights[name] = values.astype(np.float32)
        return name

    def vector(self, *, away_from_zero: bool = False) -> str:
        """A weight for each column, in any shape that says so."""
        shapes = [(self.width,), (1, self.width), (), (1,), (1, 1)]
        shape = shapes[self.chance.integers(len(shapes))]
        return self.weight(*shape, away_from_zero=away_from_zero)

    def then(self, operator: str, given: str, **attributes: object) -> str:
        """Add a node; its output is the new end."""
        self.end = f"value{len(self.nodes)}"
        self.nodes.append(node(operator, given, self.end, **attributes))
        return self.end

    def model(self, num_features: int) -> onnx.ModelProto:
        """The graph, ended by a copy named `logits`."""
        return head_model(
            [*self.nodes, node("Identity", self.end, "logits")],
            self.weights,
            inputs=[("features", FLOAT, ("rows", num_features))],
            outputs=[("logits", FLOAT, ("rows", self.width))],
        )


def gemm(chain: Chain) -> None:
    """A product in one of its many spellings."""
    new = int(chain.chance.integers(2, chain.width + 1))  # a wider one may not be folded
    is_transposed = bool(chain.chance.integers(2))
    shape = (new, chain.width) if is_transposed else (chain.width, new)
    weight = chain.weight(*shape)
    if chain.chance.integers(2):
        chain.nodes.append(node("Transpose", weight, f"{weight}t", perm=[1, 0]))
        weight, is_transposed = f"{weight}t", not is_transposed
    end, chain.width = chain.end, new
    term = chain.vector() if chain.chance.integers(2) else ""
    alpha, beta = chain.chance.uniform(0.5, 2, 2).tolist()
    given = f"{end} {weight} {term}".strip()
    chain.then("Gemm", given, transB=int(is_transposed), alpha=alpha, beta=beta)


def matmul(chain: Chain) -> None:
    """A product whose matrix is stored flat."""
    new = int(chain.chance.integers(2, chain.width + 1))  # a wider one may not be folded
    flat = chain.weight(chain.width * new)
    chain.weights[f"{flat}shape"] = np.array([chain.width, -1], np.int64)
    chain.nodes.append(node("Reshape", f"{flat} {flat}shape", f"{flat}m"))
    chain.width = new
    chain.then("MatMul", f"{chain.end} {flat}m")


def reshape(chain: Chain) -> None:
    """The same shape again."""
    shapes = [[0, -1], [-1, chain.width], [0, chain.width]]
    name = f"shape{len(chain.nodes)}"
    chain.weights[name] = np.array(shapes[chain.chance.integers(3)], np.int64)
    chain.then("Reshape", f"{chain.end} {name}")


STEPS: Mapping[str, Callable[[Chain], object]] = {
    "Add": lambda chain: chain.then("Add", f"{chain.end} {chain.vector()}"),
    "Add to": lambda chain: chain.then("Add", f"{chain.vector()} {chain.end}"),
    "Sub": lambda chain: chain.then("Sub", f"{chain.end} {chain.vector()}"),
    "Sub from": lambda chain: chain.then("Sub", f"{chain.vector()} {chain.end}"),
    "Mul": lambda chain: chain.then("Mul", f"{chain.end} {chain.vector()}"),
    "Mul by": lambda chain: chain.then("Mul", f"{chain.vector()} {chain.end}"),
    "Div": lambda chain: chain.then("Div", f"{chain.end} {chain.vector(away_from_zero=True)}"),
    "Neg": lambda chain: chain.then("Neg", chain.end),
    "Identity": lambda chain: chain.then("Identity", chain.end),
    "Flatten": lambda chain: chain.then("Flatten", chain.end),
    "Cast": lambda chain: chain.then("Cast", chain.end, to=FLOAT),
    "Reshape": reshape,
    "Gemm": gemm,
    "MatMul": matmul,
}
DIRECTIONS = ("none", "torch", "Max", "LpNormalization")


def towards(chain: Chain, how: str) -> None:
    """Divide by the norm, as one exporter or another writes it."""
    if how == "LpNormalization":
        chain.then("LpNormalization", chain.end, axis=-1, p=2)
    elif how != "none":
        value = chain.end
        chain.weights |= {"axis": np.array([-1], np.int64), "floor": np.array(1e-12, np.float32)}
        norm = chain.then("ReduceL2", f"{value} axis", keepdims=1)
        floored = (
            chain.then("Clip", f"{norm} floor")
            if how == "torch"
            else chain.then("Max", f"floor {norm}")
        )
        chain.then("Div", f"{value} {floored}")


def check_packed(model: onnx.ModelProto, features: np.ndarray) -> AffineMap:
    """It is recognised and gives what ONNX Runtime gives of the graph."""
    session = open_session(model.SerializeToString())
    expected = np.asarray(session.run(["logits"], {"features": features})[0])
    packed = recognise(model)
    assert packed is not None
    logits = packed(features)
    assert logits.dtype == np.float32
    tolerance = 1e-5 * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(logits, expected, atol=tolerance, rtol=0)
    best, second = np.sort(expected, axis=1)[:, [-1, -2]].T
    # Where two labels are equal within rounding, either is right.
    clear = best - second > 2 * tolerance
    np.testing.assert_array_equal(logits.argmax(axis=1)[clear], expected.argmax(axis=1)[clear])
    return packed


@REPEATABLE
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(DIRECTIONS),
    st.sampled_from(["centred", "as they are"]),
    st.lists(st.sampled_from(sorted(STEPS)), max_size=6),
)
def test_an_affine_graph_is_packed_however_it_is_written(
    seed: int, direction: str, start: str, steps: Sequence[str]
) -> None:
    """Random chains of affine steps, behind a direction or not; a product must be among them."""
    assume({"Gemm", "MatMul"} & set(steps))
    chance = np.random.default_rng(seed)
    num_features = int(chance.integers(2, 7))
    chain = Chain(chance, num_features)
    if start == "centred":
        chain.then("Sub", f"{chain.end} {chain.weight(num_features)}")
    towards(chain, direction)
    for step in steps:
        STEPS[step](chain)
    features = chance.normal(size=(ROWS, num_features)).astype(np.float32)

    packed = check_packed(chain.model(num_features), features)
    assert (packed.floor is None) == (direction == "none")


def test_a_head_behind_standardised_features_keeps_its_digits() -> None:
    """Features far from zero, as a scaler before a classifier takes them: no digits cancel."""
    chance = np.random.default_rng(0)
    weights = {
        "mean": np.full(3, 1e5, np.float32),
        "std": np.full(3, 0.5, np.float32),
        "weight": chance.normal(size=(3, 3)).astype(np.float32),
    }
    nodes = [
        node("Sub", "features mean", "centred"),
        node("Div", "centred std", "standard"),
        node("MatMul", "standard weight", "logits"),
    ]
    features = (1e5 + chance.normal(size=(ROWS, 3))).astype(np.float32)

    check_packed(head_model(nodes, weights), features)


def test_a_row_of_zeros_has_no_direction_and_gives_the_bias() -> None:
    """Its norm is replaced by the floor, or the normaliser leaves it alone: never NaN."""
    for how in DIRECTIONS[1:]:
        chain = Chain(np.random.default_rng(0), 3)
        towards(chain, how)
        gemm(chain)

        check_packed(chain.model(3), np.zeros((2, 3), np.float32))


def test_packed_weights_are_the_graphs_own_bits() -> None:
    """Going through float64 changes nothing of a plain product."""
    weight = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    packed = recognise(head_model([node("Gemm", "features weight", "logits")], {"weight": weight}))

    assert packed is not None
    np.testing.assert_array_equal(packed.weight, weight.T)


EYE = {"weight": np.eye(3, dtype=np.float32), "axis": np.array([-1], np.int64)}
PRODUCT = node("MatMul", "x weight", "logits")
NORM = node("ReduceL2", "features axis", "norm")
DIVIDE = node("Div", "features norm", "x")
NOT_AFFINE: Mapping[str, list[onnx.NodeProto]] = {
    "a bend between": [node("Relu", "features", "x"), PRODUCT],
    "rows that mix": [
        node("ReduceMean", "features first", "mean"),
        node("Sub", "features mean", "x"),
        PRODUCT,
    ],
    "rows that mix in a product": [node("MatMul", "weight features", "x"), PRODUCT],
    "rows that mix in a transposed product": [
        node("Gemm", "features weight", "x", transA=1),
        PRODUCT,
    ],
    "features on the right": [node("Gemm", "weight features", "x"), PRODUCT],
    "features squared": [node("Mul", "features features", "x"), PRODUCT],
    "features twice": [node("Add", "features features", "x"), PRODUCT],
    "features times features": [
        node("MatMul", "features weight", "x"),
        node("Mul", "x features", "logits"),
    ],
    "division by a feature": [node("Div", "weight1 features", "x"), PRODUCT],
    "division by features": [
        node("MatMul", "features weight", "y"),
        node("Div", "y features", "x"),
        PRODUCT,
    ],
    "division by zero": [node("Div", "features zero", "x"), PRODUCT],
    "the norm of something else": [
        node("Sub", "features one", "y"),
        node("ReduceL2", "y axis", "norm"),
        DIVIDE,
        PRODUCT,
    ],
    "the norm of columns": [node("ReduceL2", "features first", "norm"), DIVIDE, PRODUCT],
    "a norm with an upper bound": [
        NORM,
        node("Clip", "norm zero one", "bounded"),
        node("Div", "features bounded", "x"),
        PRODUCT,
    ],
    "a norm and something": [
        NORM,
        node("Add", "norm one", "more"),
        node("Div", "features more", "x"),
        PRODUCT,
    ],
    "a sum of absolutes": [node("LpNormalization", "features", "x", p=1), PRODUCT],
    "a direction of columns": [node("LpNormalization", "features", "x", axis=0), PRODUCT],
    "a direction of a direction": [
        node("LpNormalization", "features", "y"),
        node("LpNormalization", "y", "x"),
        PRODUCT,
    ],
    "the direction of scaled features": [
        node("Mul", "features scales", "y"),
        node("LpNormalization", "y", "x"),
        PRODUCT,
    ],
    "a constant for each row": [node("Add", "features column", "x"), PRODUCT],
    "another third axis": [node("Add", "features deep", "x"), PRODUCT],
    "another shape": [node("Reshape", "features flat", "y"), node("MatMul", "y tall", "logits")],
    "half precision": [
        node("Cast", "features", "half", to=TensorProto.FLOAT16),
        node("Cast", "half", "x", to=FLOAT),
        PRODUCT,
    ],
    "no product": [node("Mul", "features scales", "logits")],
    "another domain": [node("Identity", "features", "x", domain="mine"), PRODUCT],
    "a weight beyond float32": [
        node("Mul", "features huge", "y"),
        node("Mul", "y huge", "x"),
        PRODUCT,
    ],
}
WEIGHTS = {
    **EYE,
    "first": np.array([0], np.int64),
    "zero": np.array(0, np.float32),
    "one": np.array(1, np.float32),
    "weight1": np.ones(3, np.float32),
    "scales": np.array([1, 2, 3], np.float32),
    "huge": np.array(1e30, np.float32),
    "column": np.ones((3, 1), np.float32),
    "deep": np.ones((1, 1, 3), np.float32),
    "flat": np.array([-1, 1], np.int64),
    "tall": np.ones((1, 3), np.float32),
}


@pytest.mark.parametrize("what", NOT_AFFINE)
def test_a_graph_that_only_looks_affine_is_left_to_onnx_runtime(what: str) -> None:
    """Each differs from a packed graph by one thing."""
    assert recognise(head_model(NOT_AFFINE[what], WEIGHTS)) is None


def test_an_old_graph_is_left_to_onnx_runtime() -> None:
    """Before this opset bounds and axes were attributes; the same nodes are known after it."""
    model = head_model([node("MatMul", "features weight", "logits")], EYE)
    assert recognise(model) is not None
    model.opset_import[0].version = MIN_OPSET - 1

    assert recognise(model) is None


def test_a_narrow_waist_is_not_unfolded() -> None:
    """Two small matrices stay two where their product would be larger than both."""
    shapes = {"down": (40, 2), "up": (2, 40)}
    weights = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    nodes = [node("MatMul", "features down", "waist"), node("MatMul", "waist up", "logits")]
    model = head_model(
        nodes,
        weights,
        inputs=[("features", FLOAT, ("rows", 40))],
        outputs=[("logits", FLOAT, ("rows", 40))],
    )

    assert recognise(model) is None


def test_constants_are_computed_where_an_exporter_left_them() -> None:
    """A bias as a node, negated and doubled, is a bias."""
    nodes = [
        constant_node(np.array([1, 2, 3], np.float32)),
        node("Constant", "", "two", value_float=2.0),
        node("Neg", "bias", "negative"),
        node("Mul", "negative two", "doubled"),
        node("MatMul", "features weight", "x"),
        node("Add", "x doubled", "logits"),
    ]
    packed = recognise(head_model(nodes, EYE))

    assert packed is not None
    np.testing.assert_array_equal(packed.bias, [-2, -4, -6])
