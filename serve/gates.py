"""Admission: what a bundle must pass before anything of it goes live.

Each gate is a small function that gives a verdict with a plain reason. Those that read come before
those that load, so a hostile graph is refused before a session is made of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from export.bundle import ADAPTER, GOLDEN, Bundle
from serve.adapted import AdapterError, family_of
from serve.contender import Contender, read_adapter
from serve.engine import Engine
from serve.graph_gate import GateError, check_graph
from serve.heads import Head, HeadOutputError, graph_file, score
from serve.record import Verdict

MAX_GOLDEN_PICTURES = 64
GOLDEN_BATCH = 8  # the trunk's memory grows with its largest batch, and stays


def admit(bundle: Bundle, engine: Engine, *, max_head_bytes: int) -> tuple[Verdict, ...]:
    """Run the gates in order, up to the first that says no.

    Returns:
        A verdict for each gate that ran; the bundle is admitted if the last one passed.
    """
    prefix_shape = engine.prefix_shape
    checks: dict[str, Callable[[], str]] = {
        "trunk": lambda: check_trunk(bundle, engine),
        "graph": lambda: check_graph(
            bundle, max_head_bytes=max_head_bytes, prefix_shape=prefix_shape
        ),
        "adapter": lambda: check_adapter(bundle, engine),
        "golden": lambda: check_golden(bundle, engine),
    }
    if bundle.manifest.adapter is None:
        del checks["adapter"]
    return run_gates(checks)


class GateSkippedError(Exception):
    """A gate has nothing to look at, and says why."""


def run_gates(checks: Mapping[str, Callable[[], str]]) -> tuple[Verdict, ...]:
    """Verdicts in order, up to the first that refuses."""
    verdicts: list[Verdict] = []
    for gate, check in checks.items():
        try:
            verdicts.append(Verdict(gate=gate, passed=True, reason=check()))
        except GateSkippedError as skip:
            verdicts.append(Verdict(gate=gate, passed=True, skipped=True, reason=str(skip)))
        except GateError as error:
            verdicts.append(Verdict(gate=gate, passed=False, reason=str(error)))
            break
    return tuple(verdicts)


def check_trunk(bundle: Bundle, engine: Engine) -> str:
    """The head was made for the trunk that is served.

    Raises:
        GateError: another trunk, feature width or preprocessing.
    """
    mine, theirs = engine.manifest, bundle.manifest
    if theirs.trunk != mine.digest:
        raise GateError(
            f"The head was trained on trunk {theirs.trunk}; this service has trunk {mine.digest}. "
            "Train the head on this trunk."
        )
    if theirs.num_features != mine.num_features:
        raise GateError(
            f"The head takes {theirs.num_features} features; the trunk gives {mine.num_features}."
        )
    if theirs.preprocessing != mine.preprocessing:
        raise GateError(
            f"The head's preprocessing is {theirs.preprocessing}; the trunk's is "
            f"{mine.preprocessing}."
        )
    return f"trained on this trunk, {mine.num_features} features"


def check_adapter(bundle: Bundle, engine: Engine) -> str:
    """The adapter has the sites of the trunk's adapted graph, and finite weights.

    Raises:
        GateError: the trunk serves no such adapters, or it is another trunk's.
    """
    entry = bundle.manifest.adapter
    assert entry is not None
    graph = engine.families.get(family_of(entry))
    if graph is None:
        raise GateError(f"This trunk has no layers for adapters of kind {entry.kind!r}.")
    weights = read_adapter(bundle)
    for name, weight in weights.items():
        if weight.dtype != np.float32 or not np.isfinite(weight).all():
            raise GateError(f"{ADAPTER}: {name} is not finite float32.")
    try:
        graph.slot_of(entry, weights, entry.width)
    except AdapterError as error:
        raise GateError(str(error)) from error
    num_bytes = len(bundle.files[ADAPTER])
    return f"{entry.kind} at {len(weights) // 2} layers, {num_bytes} bytes"


def check_golden(bundle: Bundle, engine: Engine) -> str:
    """The recorded logits come out of the served trunk and this head again.

    Raises:
        GateError: the samples are not what they should be, or the logits differ.
    """
    pictures, expected = _golden(bundle, engine)
    scale = max(1.0, float(np.abs(expected).max()))
    tolerance = engine.manifest.golden_tolerance[engine.precision] * scale
    contender = Contender(bundle, engine)
    head = contender.head
    starts = range(0, len(pictures), GOLDEN_BATCH)
    batches = [pictures[start : start + GOLDEN_BATCH] for start in starts]
    features = np.concatenate([contender.head_inputs(contender.start(batch)) for batch in batches])
    difference = _difference(head, features, expected)
    if not difference <= tolerance:
        raise GateError(
            f"The golden samples do not reproduce: logits differ by {difference:.2e}, more than "
            f"the trunk's tolerance {tolerance:.2e}. Bundle the head with the trunk that it is for."
        )
    others = np.zeros_like(features)
    among_others = _difference(head, np.concatenate([features, others]), expected)
    began_s = time.perf_counter()
    alone = _difference(head, features[:1], expected[:1])
    row_s = time.perf_counter() - began_s
    if not (among_others <= tolerance and alone <= tolerance):
        raise GateError("The graph answers a row otherwise when others are in its batch.")
    how = (
        "packed" if head.is_packed else _cost(row_s, len(bundle.files[graph_file(bundle.manifest)]))
    )
    return (
        f"{len(pictures)} samples reproduce within {difference:.1e} (tolerance {tolerance:.1e}); "
        f"runs {how}"
    )


def _cost(row_s: float, num_bytes: int) -> str:
    return f"in its own session, {1e6 * row_s:.0f} us a row, graph of {num_bytes / 1e3:.0f} kB"


def _difference(head: Head, features: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Largest difference of a logit in the first rows.

    Raises:
        GateError: the head fails, or gives no scores for these rows.
    """
    shape = (len(features), expected.shape[1])
    try:
        logits = head.logits(features)
    # ONNX Runtime has no common error class below Exception.
    except Exception as error:
        raise GateError(f"The graph cannot be run with {len(features)} rows: {error}") from error
    if logits.shape != shape:
        raise GateError(f"The graph gives logits {logits.shape}; expected {shape}.")
    for scores in score(list(logits), [head] * len(logits))[: len(expected)]:
        if isinstance(scores, HeadOutputError):
            raise GateError(f"The graph gives no scores: {scores}")
    return float(np.abs(logits[: len(expected)] - expected).max())


def _golden(bundle: Bundle, engine: Engine) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Pictures uint8 [n, size, size, 3] and the logits float32 [n, labels] to expect of them."""
    try:
        tensors = load(bundle.files[GOLDEN])
    # safetensors raises an error class of its own that is no public name.
    except Exception as error:
        raise GateError(f"{GOLDEN} cannot be read: {error}.") from error
    if set(tensors) != {"pictures", "logits"}:
        raise GateError(f"{GOLDEN} holds {sorted(tensors)}; expected logits and pictures.")
    pictures, logits = tensors["pictures"], tensors["logits"]
    num, size_px = (len(pictures) if pictures.ndim else 0), engine.manifest.preprocessing.size_px
    shapes = ((num, size_px, size_px, 3), (num, len(bundle.manifest.labels)))
    types = (pictures.dtype == np.uint8) and (logits.dtype == np.float32)
    if (pictures.shape, logits.shape) != shapes or not types:
        raise GateError(
            f"{GOLDEN} holds {pictures.dtype} {pictures.shape} and {logits.dtype} {logits.shape}; "
            f"expected uint8 {shapes[0]} and float32 {shapes[1]}."
        )
    if not 1 <= num <= MAX_GOLDEN_PICTURES:
        raise GateError(f"{GOLDEN} holds {num} samples; expected 1 to {MAX_GOLDEN_PICTURES}.")
    if not math.isfinite(float(np.abs(logits).max())):
        raise GateError(f"{GOLDEN} holds logits that are not finite numbers.")
    return pictures, logits
