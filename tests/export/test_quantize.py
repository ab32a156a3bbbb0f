"""INT8: what stays float, what is found to hurt, and that real heads have the last word."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from jaxtyping import UInt8
from onnx import TensorProto, numpy_helper
from torch import Tensor

from export.half import to_half
from export.injury import injuries, relative_error
from export.parity import open_session, run
from export.quantize import Method, Ranges, Scheme, calibrate, layers_of, prepare, quantize
from export.trial import features
from export.trunk import trunk_graph
from models.backbones import Backbone
from tests.export.conftest import BuildBackbone

SCHEME = Scheme("uint8", per_channel=True, method="minmax")
Pixels = UInt8[np.ndarray, "pictures height width 3"]


@pytest.fixture(scope="module")
def images(pictures: Tensor) -> Pixels:
    """Pictures of 32 px."""
    return pictures.numpy()


@pytest.fixture(scope="module")
def graph(student: Backbone) -> bytes:
    """The float trunk, ready to be quantised."""
    return prepare(trunk_graph(student))


@pytest.fixture(scope="module")
def ranges(graph: bytes, images: Pixels) -> dict[Method, Ranges]:
    """Ranges by each method."""
    return calibrate(graph, images)


def operators(graph: bytes) -> dict[str, str]:
    """Name of a node -> its operator."""
    return {n.name: n.op_type for n in onnx.load_model_from_string(graph).graph.node}


def all_values(graph: bytes, images: Pixels) -> dict[str, np.ndarray]:
    """What every float tensor holds, from ONNX Runtime itself."""
    model = onnx.load_model_from_string(graph)
    known = {output.name for output in model.graph.output}
    for node in model.graph.node:
        model.graph.output.extend(
            onnx.helper.make_empty_tensor_value_info(name)
            for name in node.output
            if name not in known
        )
    session = open_session(model.SerializeToString())
    names = tuple(output.name for output in session.get_outputs())
    return run(session, names, images)


def test_layers_begin_at_products_and_leave_the_normalisation_out(graph: bytes) -> None:
    """Every node is in one layer, but for those that make floats of pixels."""
    layers, kinds = layers_of(graph), operators(graph)
    inside = [name for layer in layers for name in layer]

    assert all(kinds[layer[0]] in {"Conv", "Gemm", "MatMul"} for layer in layers)
    assert len(inside) == len(set(inside))
    assert {kinds[name] for name in kinds.keys() - inside} == {"Transpose", "Cast", "Sub", "Div"}


def test_ranges_hold_what_the_pictures_cause(
    graph: bytes, images: Pixels, ranges: dict[Method, Ranges]
) -> None:
    """The least and the largest value of every tensor; and shares of them, negative ones too."""
    values = all_values(graph, images)
    assert any(low < 0 for low, _ in ranges["percentile 99.9"].values())
    for name, (low, high) in ranges["minmax"].items():
        assert low == pytest.approx(values[name].min(), rel=1e-5, abs=1e-5)
        assert high == pytest.approx(values[name].max(), rel=1e-5, abs=1e-5)
    for name, (low, high) in ranges["percentile 99.9"].items():
        found = values[name].ravel()
        # A bin of the histogram is 1/1024 of the largest value.
        bin_width = float(np.abs(found).max()) / 1024
        assert low == pytest.approx(np.quantile(found, 0.0005), abs=3 * bin_width)
        assert high == pytest.approx(np.quantile(found, 0.9995), abs=3 * bin_width)


@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_an_int8_trunk_keeps_its_interface_and_nearly_its_features(
    graph: bytes,
    images: Pixels,
    ranges: dict[Method, Ranges],
    activations: str,
    *,
    per_channel: bool,
) -> None:
    """Uint8 pixels in, float features and prefix out, on any number of pictures."""
    scheme = Scheme(activations, per_channel, "minmax")  # pyrefly: ignore
    session = open_session(quantize(graph, ranges["minmax"], scheme))
    names = ("features", "prefix")
    found, expected = run(session, names, images), run(open_session(graph), names, images)

    assert session.get_inputs()[0].type == "tensor(uint8)"
    for name in names:
        assert found[name].dtype == np.float32
        # 8 bits over six layers: a few percent (0.4 % for each rounding of a full range).
        assert 0 < relative_error(flat(expected[name]), flat(found[name])) < 0.1
    assert run(session, names, images[:3])["features"].shape == expected["features"][:3].shape


def flat(values: np.ndarray) -> np.ndarray:
    """One row a picture."""
    return values.reshape(len(values), -1)


def test_weights_are_stored_in_eight_bits(graph: bytes, ranges: dict[Method, Ranges]) -> None:
    """Every convolution's weights, so that the file is about a quarter."""
    model = onnx.load_model_from_string(quantize(graph, ranges["minmax"], SCHEME))
    stored = {w.name: w.data_type for w in model.graph.initializer}
    of = {node.output[0]: node for node in model.graph.node}
    products = [node for node in model.graph.node if node.op_type == "Conv"]

    assert products
    for node in products:
        assert stored[of[node.input[1]].input[0]] == TensorProto.INT8


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_scale_is_of_a_channel_or_of_all(
    graph: bytes, ranges: dict[Method, Ranges], *, per_channel: bool
) -> None:
    """The largest weight it covers by 127, by numpy."""
    scheme = Scheme("uint8", per_channel, "minmax")
    given = {w.name: numpy_helper.to_array(w) for w in loaded(graph).initializer}
    found = loaded(quantize(graph, ranges["minmax"], scheme))
    values = {w.name: numpy_helper.to_array(w) for w in found.initializer}
    of = {node.output[0]: node for node in found.node}
    (first,) = [n for n in loaded(graph).node if n.name == layers_of(graph)[0][0]]
    (product,) = [node for node in found.node if node.name == first.name]
    largest = np.abs(given[first.input[1]]).max(axis=(1, 2, 3) if per_channel else None)

    assert values[of[product.input[1]].input[1]] == pytest.approx(largest / 127, rel=1e-5)


@pytest.mark.parametrize(
    ("activations", "expected"), [("uint8", TensorProto.UINT8), ("int8", TensorProto.INT8)]
)
def test_activations_are_what_the_scheme_says(
    graph: bytes, ranges: dict[Method, Ranges], activations: str, expected: int
) -> None:
    """By the zero point of every Q node, which gives the type of its output."""
    scheme = Scheme(activations, per_channel=True, method="minmax")  # pyrefly: ignore
    found = loaded(quantize(graph, ranges["minmax"], scheme))
    types = {w.name: w.data_type for w in found.initializer}
    quantised = [node for node in found.node if node.op_type == "QuantizeLinear"]

    assert quantised
    assert {types[node.input[2]] for node in quantised} == {expected}


def loaded(graph: bytes) -> onnx.GraphProto:
    """The graph of a file."""
    return onnx.load_model_from_string(graph).graph


def test_float_nodes_stay_float_and_the_rest_does_not(
    graph: bytes, ranges: dict[Method, Ranges]
) -> None:
    """The weights of a layer in float are the float weights, and only those."""
    layer = layers_of(graph)[1]
    scheme = Scheme("uint8", per_channel=True, method="minmax", float_nodes=frozenset(layer))
    found = onnx.load_model_from_string(quantize(graph, ranges["minmax"], scheme)).graph
    floats = {w.name for w in found.initializer if w.data_type == TensorProto.FLOAT}
    has_float_weight = {n.name: n.input[1] in floats for n in found.node if n.op_type == "Conv"}

    assert {name for name, is_float in has_float_weight.items() if is_float} == {layer[0]}


def test_quantising_twice_gives_the_same_bytes(graph: bytes, ranges: dict[Method, Ranges]) -> None:
    """A variant is named by its sha256."""
    once = quantize(graph, ranges["minmax"], SCHEME)

    assert quantize(graph, ranges["minmax"], SCHEME) == once


@pytest.mark.parametrize("seed", range(3))
def test_one_badly_scaled_depthwise_channel_is_found_and_mended(
    build: BuildBackbone, images: Pixels, seed: int
) -> None:
    """A channel a thousand times larger, undone by the next layer, eats the others' range."""
    healthy = trunk_graph(build("small32", seed=seed))
    sick, place = with_loud_channel(healthy, channel=seed)
    prepared = prepare(sick)
    bounds = calibrate(prepared, images)["minmax"]
    expected = features(open_session(prepared), images)
    np.testing.assert_allclose(
        expected, features(open_session(healthy), images), rtol=1e-2, atol=1e-4
    )

    def error(scheme: Scheme) -> float:
        int8 = quantize(prepared, bounds, scheme)
        return relative_error(expected, features(open_session(int8), images))

    (worst, layer), *others = injuries(prepared, bounds, SCHEME, images[:24])
    mended = Scheme("uint8", True, "minmax", frozenset((*layer, *others[0][1])))

    assert layers_of(prepared)[place] in {layer, others[0][1]}
    assert worst > 3 * others[1][0]
    assert error(mended) < error(SCHEME) / 3


def test_layers_of_deep_networks_are_tried_in_groups_of_neighbours(
    graph: bytes,
    images: Pixels,
    ranges: dict[Method, Ranges],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eleven layers in at most four groups; each layer is in one of them."""
    monkeypatch.setattr("export.injury.MAX_GROUPS", 4)
    layers = layers_of(graph)
    groups = [names for _, names in injuries(graph, ranges["minmax"], SCHEME, images[:2])]

    assert len(layers) == 11
    assert sorted(groups) == sorted(
        tuple(name for layer in layers[start : start + 3] for name in layer)
        for start in range(0, 11, 3)
    )


def with_loud_channel(graph: bytes, *, channel: int) -> tuple[bytes, int]:
    """The same function, with one output channel of a depthwise layer scaled up and back down.

    Returns:
        The graph, and the place of the layer among its products.
    """
    model = onnx.load_model_from_string(graph)
    weights = {w.name: w for w in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "Conv"]
    place = next(
        place
        for place, node in enumerate(products)
        if any(a.name == "group" and a.i > 1 for a in node.attribute)
    )
    depthwise, pointwise = products[place], products[place + 1]
    for name in depthwise.input[1:]:
        scaled = numpy_helper.to_array(weights[name]).copy()
        scaled[channel] *= 1000
        weights[name].CopyFrom(numpy_helper.from_array(scaled, name))
    name = pointwise.input[1]
    scaled = numpy_helper.to_array(weights[name]).copy()
    scaled[:, channel] /= 1000
    weights[name].CopyFrom(numpy_helper.from_array(scaled, name))
    return model.SerializeToString(), place


def test_half_keeps_the_interface_and_features_to_ten_bits(
    student: Backbone, images: Pixels
) -> None:
    """Uint8 in and float32 out; ten bits of mantissa round by 5e-4, layers add up."""
    graph = trunk_graph(student)
    session = open_session(to_half(graph))
    found = run(session, ("features", "prefix"), images)
    expected = features(open_session(graph), images)

    assert session.get_inputs()[0].type == "tensor(uint8)"
    assert {values.dtype for values in found.values()} == {np.dtype(np.float32)}
    assert 1e-6 < relative_error(expected, found["features"]) < 5e-3
    assert len(to_half(graph)) < 0.7 * len(graph)


def test_a_trunk_without_products_has_nothing_to_quantise() -> None:
    """Means of colours, for instance."""
    node = onnx.helper.make_node("Identity", ["images"], ["features"])
    value = [
        onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3])
        for name in ("images", "features")
    ]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", value[:1], value[1:]),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )

    with pytest.raises(ValueError, match="no convolution and no matrix product"):
        prepare(model.SerializeToString())
