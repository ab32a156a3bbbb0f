"""Parity: does ONNX Runtime compute from a graph what PyTorch computes from its module?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnxruntime
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from export.errors import ExportError
from models.backbones import Backbone
from models.progress import Progress, ProgressCallback, unheard

# PyTorch and ONNX Runtime sum in other orders and fuse other operations. Measured on photos with
# six backbones: 2e-7 to 3e-6 of the output's scale. Faults put into small32's graph: padding on one
# side 8e-2, swapped colours 2e-2, one weight in 200 of the last layer nudged 1e-2, a mean off by 2
# of 255 1e-3 (one x86-64 CPU thread, November 2026; GPUs not measured).
PARITY_TOLERANCE = 1e-4
# Share of the scale of the logits. Golden samples are replayed by machines whose ONNX Runtime sums
# and fuses in other orders, after a head that may amplify differences of features: ten times what
# parity allows here, assumed and not measured for GPUs. Most of the faults above exceed it; a mean
# off by 2 of 255 is at its edge, and parity catches that.
GOLDEN_TOLERANCE = 1e-3
MAX_BATCH = 16

AnyType = TypeVar("AnyType", bound=np.generic)


class ParityError(ExportError):
    """A graph does not compute what its module computes."""


@dataclass(frozen=True)
class Parity:
    """How close an output of a graph is to that of its module.

    Args:
        largest_absolute: Largest absolute difference of a value.
        largest_relative: The same as a share of the largest absolute value of the module's output.
            (Value by value it would say nothing: most features are close to 0.)
        argmax_agreement: Share of rows whose largest value is at the same place.
        tolerance: Upper bound of `largest_relative`.
    """

    num_pictures: int
    largest_absolute: float
    largest_relative: float
    argmax_agreement: float
    tolerance: float


def trunk_parity(
    backbone: Backbone,
    graph: bytes,
    pictures: UInt8[Tensor, "pictures height width 3"],
    *,
    tolerance: float = PARITY_TOLERANCE,
    progress: ProgressCallback = unheard,
) -> dict[str, Parity]:
    """Compare `features` and `prefix` of a trunk's graph with the backbone, in uneven batches.

    Args:
        backbone: In evaluation mode, on the CPU.

    Returns:
        Output -> parity.

    Raises:
        ParityError: out of tolerance, not finite, or the graph cannot be run.
    """
    session = open_session(graph)
    found: list[dict[str, NDArray[np.float32]]] = []
    done = 0
    for batch in _uneven_batches(pictures.numpy()):
        found.append(run(session, ("features", "prefix"), batch))
        done += len(batch)
        progress(Progress("parity", done, len(pictures)))
    # Other batches for PyTorch: what depends on who else is in the batch shows as a difference.
    expected = [_torch_outputs(backbone, batch) for batch in pictures.split(MAX_BATCH)]
    return {
        name: compare(name, _joined(expected, name), _joined(found, name), tolerance=tolerance)
        for name in ("features", "prefix")
    }


def head_parity(
    head: nn.Module,
    graph: bytes,
    features: Float[np.ndarray, "rows num_features"],
    *,
    tolerance: float = PARITY_TOLERANCE,
) -> Parity:
    """Compare the logits of a head's graph with those of the module.

    Args:
        head: In evaluation mode, on the CPU.

    Raises:
        ParityError: out of tolerance, not finite, or the graph cannot be run.
    """
    with torch.no_grad():
        expected = head(torch.from_numpy(features)).numpy()
    session = open_session(graph)
    found = [run(session, ("logits",), batch) for batch in _uneven_batches(features)]
    return compare("logits", expected, _joined(found, "logits"), tolerance=tolerance)


def compare(
    name: str,
    expected: NDArray[np.float32],
    found: NDArray[np.float32],
    *,
    tolerance: float,
) -> Parity:
    """Compare what PyTorch computed with what ONNX Runtime computed.

    Args:
        name: What it is, for the message.
        expected: PyTorch's, [rows, ...].
        found: ONNX Runtime's, which should have the same shape.

    Raises:
        ParityError: other shapes, values that are not finite, or differences out of tolerance.
    """
    if expected.shape != found.shape:
        raise ParityError(
            f"The graph gives {name} of shape {list(found.shape)}, PyTorch {list(expected.shape)}."
        )
    if not np.isfinite(expected).all():
        raise ParityError(
            f"PyTorch computes {name} that are not finite on these pictures, so there is nothing "
            "to compare with. Check the weights; training may have diverged."
        )
    largest = float(np.abs(expected - found).max())
    scale = float(np.abs(expected).max()) or 1.0
    if not largest / scale <= tolerance:
        raise ParityError(
            f"The exported graph is not what was trained: {name} differ by {largest:.2e}, "
            f"{largest / scale:.1e} of their scale; at most {tolerance:.0e} is float rounding. "
            "Nothing was written. Look for an operation that ONNX computes in another way "
            "(padding, rounding, interpolation) or that mixes the rows of a batch, and replace it."
        )
    rows = len(expected)
    places = [values.reshape(rows, -1).argmax(axis=1) for values in (expected, found)]
    agreement = float(np.mean(places[0] == places[1]))
    return Parity(rows, largest, largest / scale, agreement, tolerance)


def open_session(graph: bytes) -> onnxruntime.InferenceSession:
    """A session as serving opens it: one thread that does not spin, on the CPU.

    Raises:
        ParityError: ONNX Runtime cannot load the graph.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    # ONNX Runtime has no common error class below Exception.
    except Exception as error:
        raise ParityError(f"ONNX Runtime cannot load the exported graph: {error}") from error


def run(
    session: onnxruntime.InferenceSession, outputs: tuple[str, ...], rows: NDArray[np.generic]
) -> dict[str, NDArray[np.float32]]:
    """Run a graph of one input; gives output -> values.

    Raises:
        ParityError: ONNX Runtime cannot run it on these rows.
    """
    name = session.get_inputs()[0].name
    try:
        values = session.run(list(outputs), {name: rows})
    except Exception as error:
        raise ParityError(f"ONNX Runtime cannot run the exported graph: {error}") from error
    return {output: np.asarray(value) for output, value in zip(outputs, values, strict=True)}


def _torch_outputs(
    backbone: Backbone, pictures: UInt8[Tensor, "batch height width 3"]
) -> dict[str, NDArray[np.float32]]:
    with torch.no_grad():
        maps = backbone.prefix(backbone.normalise(pictures))
        return {"features": backbone.suffix(maps).numpy(), "prefix": maps.numpy()}


def _joined(batches: Sequence[Mapping[str, NDArray[np.float32]]], name: str) -> NDArray[np.float32]:
    return np.concatenate([outputs[name] for outputs in batches])


def _uneven_batches(rows: NDArray[AnyType]) -> Iterator[NDArray[AnyType]]:
    """Batches of 1, 2, 4, 8, 16, 16, ...: a graph of one fixed size fails."""
    start, size = 0, 1
    while start < len(rows):
        yield rows[start : start + size]
        start, size = start + size, min(2 * size, MAX_BATCH)
