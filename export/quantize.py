"""A float trunk to INT8: ranges found on real pictures, any layers left in float."""

import contextlib
import io
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from jaxtyping import UInt8
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.calibrate import (
    HistogramCollector,
    TensorsData,
    create_calibrator,
    save_tensors_data,
)
from onnxruntime.quantization.shape_inference import quant_pre_process
from typing_extensions import override

from export.errors import ExportError
from models.progress import Progress, ProgressCallback, unheard

Method = Literal["minmax", "percentile 99.999", "percentile 99.99", "percentile 99.9"]
Ranges = Mapping[str, tuple[np.float32, np.float32]]

# Those that multiply by weights; each begins a layer.
PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
NUM_BINS = 2048
# ONNX Runtime's calibrators keep every activation of what they are given: 50 MB a picture in
# MobileNetV2.
CHUNK = 4


@dataclass(frozen=True)
class Scheme:
    """How a trunk is quantised; weights are int8 always.

    Args:
        activations: int8 or uint8; x86 has fast products of uint8 with int8.
        per_channel: A scale for each output channel of the weights, else one for all.
        method: How the ranges of activations were found.
        float_nodes: Names of nodes that stay in float.
    """

    activations: Literal["uint8", "int8"]
    per_channel: bool
    method: Method
    float_nodes: frozenset[str] = field(default=frozenset(), repr=False)

    def __str__(self) -> str:
        weights = "per channel" if self.per_channel else "per tensor"
        return f"{self.activations}, {weights}, {self.method}"


def prepare(graph: bytes) -> bytes:
    """Fold and fuse what can be, and note all shapes: quantisation asks for it.

    Raises:
        ExportError: there is nothing to quantise.
    """
    with _folder_of(graph) as (path, folder):
        # Shapes depend on the batch alone, which ONNX's own inference follows.
        quant_pre_process(str(path), str(folder / "prepared.onnx"), skip_symbolic_shape=True)
        prepared = (folder / "prepared.onnx").read_bytes()
    if not layers_of(prepared):
        raise ExportError("The trunk has no convolution and no matrix product to quantise.")
    return prepared


def layers_of(graph: bytes) -> list[tuple[str, ...]]:
    """Names of the nodes of each layer: a product and all up to the next one.

    What comes before the first is the normalisation of pictures, and no layer.
    """
    layers: list[list[str]] = []
    for node in onnx.load_model_from_string(graph).graph.node:
        if node.op_type in PRODUCTS:
            layers.append([])
        if layers:
            layers[-1].append(node.name)
    return [tuple(layer) for layer in layers]


def calibrate(
    graph: bytes,
    pictures: UInt8[np.ndarray, "pictures height width 3"],
    *,
    progress: ProgressCallback = unheard,
) -> dict[Method, Ranges]:
    """The range of every tensor on real pictures, by each method, from one pass.

    Args:
        graph: From `prepare`.
    """
    with _folder_of(graph) as (path, folder):
        calibrator = create_calibrator(
            path,
            augmented_model_path=str(folder / "augmented.onnx"),
            calibrate_method=CalibrationMethod.Percentile,
            # Symmetric by default, which would count absolute values only.
            extra_options={"num_bins": NUM_BINS, "symmetric": False},
        )
        for start in range(0, len(pictures), CHUNK):
            calibrator.collect_data(_Reader(pictures[start : start + CHUNK]))
            progress(Progress("calibrate", min(start + CHUNK, len(pictures)), len(pictures)))
        histograms = calibrator.collector.get_histogram_dict()
        ranges: dict[Method, Ranges] = {
            "minmax": {name: (seen[2], seen[3]) for name, seen in histograms.items()},
            "percentile 99.999": _percentiles(histograms, 99.999),
            "percentile 99.99": _percentiles(histograms, 99.99),
            "percentile 99.9": _percentiles(histograms, 99.9),
        }
    return ranges


def quantize(
    graph: bytes,
    ranges: Ranges,
    scheme: Scheme,
    *,
    only_nodes: Collection[str] = (),
) -> bytes:
    """The graph with Q and DQ nodes around what is to be computed in INT8.

    Args:
        graph: From `prepare`.
        ranges: From `calibrate`, by the method of the scheme.
        only_nodes: Leave all others in float; none: quantise all but those of the scheme.
    """
    layers = layers_of(graph)
    in_layers = {name for layer in layers for name in layer}
    kept = [
        node.name
        for node in onnx.load_model_from_string(graph).graph.node
        if node.name not in in_layers or node.name in scheme.float_nodes
    ]
    with _folder_of(graph) as (path, folder):
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, dict(ranges)), folder / "ranges")
        quantize_static(
            path,
            folder / "int8.onnx",
            per_channel=scheme.per_channel,
            activation_type=QuantType.QUInt8 if scheme.activations == "uint8" else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=list(only_nodes),
            nodes_to_exclude=kept,
            calibration_cache_path=folder / "ranges",
        )
        model = onnx.load(folder / "int8.onnx")
    return model.SerializeToString(deterministic=True)


class _Reader(CalibrationDataReader):
    """Pictures one by one, as ONNX Runtime's calibrators ask for them."""

    def __init__(self, pictures: NDArray[np.uint8]) -> None:
        self._rest: Iterator[NDArray[np.uint8]] = iter(pictures)

    @override
    def get_next(self) -> dict[str, NDArray[np.uint8]]:
        picture = next(self._rest, None)
        return {} if picture is None else {"images": picture[None]}


def _percentiles(histograms: dict[str, tuple[Any, ...]], percentile: float) -> Ranges:
    """Bounds that leave out the same share of values at both ends."""
    collector = HistogramCollector(
        "percentile", symmetric=False, num_bins=NUM_BINS, num_quantized_bins=None,
        percentile=percentile, scenario=None,
    )  # fmt: skip
    collector.histogram_dict = histograms
    found: Any = collector.compute_collection_result()
    return {name: (np.float32(low), np.float32(high)) for name, (low, high, *_) in found.items()}


@contextlib.contextmanager
def _folder_of(graph: bytes) -> Iterator[tuple[Path, Path]]:
    """A folder of its own with the graph in it; ONNX Runtime's remarks go nowhere."""
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        path = Path(name) / "float.onnx"
        path.write_bytes(graph)
        yield path, Path(name)
