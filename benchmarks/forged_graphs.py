"""Bundles that a trusted key signed and that must not go live: by mistake, or by a thief."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import helper, numpy_helper
from safetensors.numpy import load, save

from benchmarks.forgery import Kind, Make, Stock, cut, kind, repacked
from export.bundle import ADAPTER, GOLDEN, HEAD, TAIL, digest_of

Edit = Callable[[onnx.ModelProto, np.random.Generator], object]


def _graph(edit: Edit) -> Make:
    """A good head's graph changed, packed and signed again."""

    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        bundle = stock.some(chance)
        model = onnx.load_model_from_string(bundle.files[HEAD])
        edit(model, chance)
        forged = repacked(bundle, {HEAD: model.SerializeToString()})
        return stock.signed(forged).to_zip()

    return make


def _head(change: Callable[[bytes, np.random.Generator, Stock], bytes]) -> Make:
    """Other bytes in place of a good head."""

    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        bundle = stock.some(chance)
        forged = repacked(bundle, {HEAD: change(bundle.files[HEAD], chance, stock)})
        return stock.signed(forged).to_zip()

    return make


Samples = dict[str, np.ndarray]


def _golden(change: Callable[[Samples, np.random.Generator], Samples]) -> Make:
    """Other golden samples."""

    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        bundle = stock.some(chance)
        samples = save(change(load(bundle.files[GOLDEN]), chance))
        return stock.signed(repacked(bundle, {GOLDEN: samples})).to_zip()

    return make


def _fields(**changes: Callable[[np.random.Generator], object]) -> Make:
    """Other fields in the manifest."""

    def make(chance: np.random.Generator, stock: Stock) -> bytes:
        fields = {name: change(chance) for name, change in changes.items()}
        return stock.signed(repacked(stock.some(chance), None, **fields)).to_zip()

    return make


def _weight(model: onnx.ModelProto, chance: np.random.Generator) -> onnx.TensorProto:
    weights = model.graph.initializer
    return weights[int(chance.integers(len(weights)))]


def _poison(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    """One number that is none."""
    tensor = _weight(model, chance)
    values = numpy_helper.to_array(tensor).copy()
    values.flat[int(chance.integers(values.size))] = chance.choice([np.nan, np.inf, -np.inf])
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _shift(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    """A weight that is a little other: finite, and not what the samples were made with."""
    tensor = _weight(model, chance)
    values = numpy_helper.to_array(tensor) + np.float32(chance.uniform(1, 10))
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))


def _elsewhere(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    """A weight that is read from a path."""
    tensor = _weight(model, chance)
    path = str(chance.choice(["/etc/passwd", "../../secret", "weights.bin"]))
    onnx.external_data_helper.set_external_data(tensor, path)
    tensor.ClearField("raw_data")


def _claim(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    """A weight that claims more elements than it has bytes for, or fewer than none."""
    tensor = _weight(model, chance)
    place = int(chance.integers(len(tensor.dims)))
    claims = [tensor.dims[place] + 1, 10**6, 10**12, 2**62, -1, -(10**9)]
    tensor.dims[place] = claims[int(chance.integers(len(claims)))]


def _shorten(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    """A weight with bytes missing."""
    tensor = _weight(model, chance)
    tensor.raw_data = cut(tensor.raw_data, chance)


def _retype(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    """A weight of a type that no head has."""
    types = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.STRING, onnx.TensorProto.COMPLEX64, 999)
    _weight(model, chance).data_type = int(chance.choice(types))


def _sparse(model: onnx.ModelProto, _: np.random.Generator) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    places = numpy_helper.from_array(np.array([1], np.int64), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [10**12]))


def _operate(*operators: str, domain: str = "") -> Edit:
    """Another operator in place of one of the head's."""

    def edit(model: onnx.ModelProto, chance: np.random.Generator) -> None:
        nodes = model.graph.node
        node = nodes[int(chance.integers(len(nodes)))]
        node.op_type, node.domain = str(chance.choice(operators)), domain

    return edit


def _subgraph(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    branch = helper.make_graph([], "branch", [], [])
    name = str(chance.choice(["then_branch", "body", "alpha"]))
    model.graph.node[0].attribute.append(helper.make_attribute(name, branch))


def _function(model: onnx.ModelProto, _: np.random.Generator) -> None:
    body = [helper.make_node("Identity", ["x"], ["y"])]
    opset = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("mine", "Copy", ["x"], ["y"], body, opset))


def _train(model: onnx.ModelProto, _: np.random.Generator) -> None:
    model.training_info.add()


def _append(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """More nodes, from `inner`, which the logits are now called, to new `logits`."""
    for node in model.graph.node:
        node.output[:] = ["inner" if name == "logits" else name for name in node.output]
    model.graph.node.extend(nodes)


def _deepen(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    """Thousands of nodes."""
    names = ["inner", *(f"copy{n}" for n in range(int(chance.integers(64, 3000)))), "logits"]
    _append(model, [helper.make_node("Identity", [a], [b]) for a, b in itertools.pairwise(names)])


def _double(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    """A tensor that is joined with itself until it fills any memory."""
    names = ["inner", *(f"wide{n}" for n in range(int(chance.integers(26, 58))))]
    nodes = [
        helper.make_node("Concat", [small, small], [large], axis=1)
        for small, large in itertools.pairwise(names)
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "axes1"))
    nodes.append(helper.make_node("ReduceMean", [names[-1], "axes1"], ["mean"]))
    _append(model, [*nodes, helper.make_node("Add", ["inner", "mean"], ["logits"])])


def _mix(model: onnx.ModelProto, _: np.random.Generator) -> None:
    """Logits that depend on what else is in the batch."""
    model.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "axes0"))
    mean = helper.make_node("ReduceMean", ["inner", "axes0"], ["mean"])
    _append(model, [mean, helper.make_node("Sub", ["inner", "mean"], ["logits"])])


def _widen(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    """Another width, name or number of inputs or outputs."""
    values = [model.graph.input, model.graph.output][int(chance.integers(2))]
    how = int(chance.integers(3))
    if how == 0:
        values[0].name += "2"
    elif how == 1:
        values[0].type.tensor_type.shape.dim[1].dim_value += int(chance.integers(1, 1000))
    else:
        values.append(helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, ["rows", 3]))


def _crowd(model: onnx.ModelProto, chance: np.random.Generator) -> None:
    """Weights by the ten thousand, each of one number."""
    for place in range(int(chance.integers(20_000, 40_000))):
        model.graph.initializer.add(name=f"w{place}", data_type=1, dims=[], float_data=[0.0])


def _samples(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Make:
    def edit(samples: Samples, _: np.random.Generator) -> Samples:
        return {**samples, name: np.ascontiguousarray(change(samples[name]))}

    return _golden(edit)


def _cut_golden(chance: np.random.Generator, stock: Stock) -> bytes:
    bundle = stock.some(chance)
    forged = repacked(bundle, {GOLDEN: cut(bundle.files[GOLDEN], chance)})
    return stock.signed(forged).to_zip()


def _digest(chance: np.random.Generator) -> str:
    return digest_of(chance.bytes(8))


def _relabelled(chance: np.random.Generator, stock: Stock) -> bytes:
    bundle = stock.some(chance)
    labels = list(bundle.manifest.labels)
    labels[int(chance.integers(len(labels)))] = f"new{chance.integers(10**9)}"
    return stock.signed(repacked(bundle, labels=labels)).to_zip()


def _adapted(chance: np.random.Generator, stock: Stock) -> bytes:
    """An adapter for a trunk that has no sites for any."""
    bundle = stock.some(chance)
    weights = {"site.a": chance.normal(size=(4, 8)).astype(np.float32)}
    entry = {"kind": "lora", "width": 4}
    forged = repacked(bundle, {ADAPTER: save(weights)}, kind="adapter", adapter=entry)
    return stock.signed(forged).to_zip()


def _as_tail(chance: np.random.Generator, stock: Stock) -> bytes:
    """A head that gives itself out as a tail, which has more rights."""
    bundle = stock.some(chance)
    files = {TAIL if name == HEAD else name: data for name, data in bundle.files.items()}
    return stock.signed(repacked(replace(bundle, files=files), kind="tail")).to_zip()


OPERATOR = "uses the operator"
CONTROL = ("If", "Loop", "Scan", "SequenceMap")
CHANCE = ("RandomNormal", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout")
FILES = ("StringNormalizer", "ImageDecoder", "TfIdfVectorizer", "Optional", "QLinearMatMul")
FOREIGN = ("FusedMatMul", "Gelu", "Gemm", "PyOp", "BiasGelu")
OTHER_PREPROCESSING = {
    "size_px": 8,
    "resize_px": 9,
    "mean": [9.0, 0.0, 0.0],
    "std": [1.0, 1.0, 1.0],
}

KINDS: Sequence[Kind] = (
    kind("another trunk", "trunk", "was trained on trunk", _fields(trunk=_digest)),
    kind(
        "another width of features",
        "trunk",
        "features; the trunk gives",
        _fields(num_features=lambda c: int(c.integers(10_000, 20_000))),
    ),
    kind(
        "another preprocessing",
        "trunk",
        "preprocessing is",
        _fields(preprocessing=lambda _: OTHER_PREPROCESSING),
    ),
    kind("no graph", "graph", "is not an ONNX graph|has", _head(lambda _d, c, _s: c.bytes(5000))),
    kind(
        "a zip as the head",
        "graph",
        "is not an ONNX graph|has",
        _head(lambda _d, c, s: s.signed(s.some(c)).to_zip()),
    ),
    kind("NaN or infinity", "graph", "is not finite everywhere", _graph(_poison)),
    kind("weight in another file", "graph", "in another file", _graph(_elsewhere)),
    kind(
        "weight that claims another size",
        "graph",
        "cannot be read|Negative dimension",
        _graph(_claim),
    ),
    kind("weight with bytes missing", "graph", "cannot be read", _graph(_shorten)),
    kind("weight of another type", "graph", "is of the type numbered", _graph(_retype)),
    kind("sparse weight", "graph", "sparse weights", _graph(_sparse)),
    kind("weights by the ten thousand", "graph", "too many parts; at most 65536", _graph(_crowd)),
    kind("control flow", "graph", OPERATOR, _graph(_operate(*CONTROL))),
    kind("chance", "graph", OPERATOR, _graph(_operate(*CHANCE))),
    kind("operators that no head needs", "graph", OPERATOR, _graph(_operate(*FILES))),
    kind(
        "foreign operators",
        "graph",
        f"{OPERATOR} com.microsoft",
        _graph(_operate(*FOREIGN, domain="com.microsoft")),
    ),
    kind("operators of its own", "graph", OPERATOR, _graph(_operate("Gemm", domain="mine"))),
    kind("graph in a graph", "graph", "has a graph inside", _graph(_subgraph)),
    kind("function of its own", "graph", "defines functions", _graph(_function)),
    kind("training steps", "graph", "functions or training steps", _graph(_train)),
    kind("too many nodes", "graph", "nodes; at most 64", _graph(_deepen)),
    kind("tensor that fills the memory", "graph", "refused for its cost", _graph(_double)),
    kind("another interface", "graph", "expected one float32", _graph(_widen)),
    kind("a head as a tail", "graph", "expected one float32 'prefix'", _as_tail),
    kind("adapter without a place", "adapter", "no layers for adapters", _adapted),
    kind("damaged samples", "golden", "cannot be read", _cut_golden),
    kind(
        "samples that are not finite",
        "golden",
        "not finite numbers",
        _samples("logits", lambda logits: logits * np.float32(np.nan)),
    ),
    kind(
        "samples of another size",
        "golden",
        "expected uint8",
        _samples("pictures", lambda pictures: pictures[:, 1:]),
    ),
    kind(
        "too many samples",
        "golden",
        "samples; expected 1 to 64",
        _golden(lambda samples, _: {n: np.repeat(v, 65, axis=0) for n, v in samples.items()}),
    ),
    kind("other weights", "golden", "do not reproduce", _graph(_shift), is_loaded=True),
    kind(
        "rows that depend on each other",
        "golden",
        "do not reproduce|answers a row otherwise",
        _graph(_mix),
        is_loaded=True,
    ),
    kind(
        "temperature without scores",
        "golden",
        "gives no scores",
        _fields(temperature=lambda _: 1e-300),
        is_loaded=True,
    ),
    kind("other labels", "labels", "The labels are not those", _relabelled, is_loaded=True),
)
