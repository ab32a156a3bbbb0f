"""The search for a faster trunk that real heads do not tell from the float one."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import UInt8

from export.agreement import Agreement, judge
from export.bundle import Precision
from export.half import to_half
from export.injury import injuries, relative_error
from export.latency import speedup
from export.parity import open_session
from export.quantize import Method, Ranges, Scheme, calibrate, prepare, quantize
from export.trial import Trial, features
from models.evaluate import Estimate
from models.progress import ProgressCallback, unheard

# Half of the layers in float leave little to gain.
MAX_FLOAT_SHARE = 0.5
NUM_INJURY_PICTURES = 24


@dataclass(frozen=True)
class Candidate:
    """One way to compute the trunk, and what was measured of it.

    Args:
        how: Such as "uint8, per channel, minmax, 2 of 52 layers in float".
        size_ratio: Bytes of the float graph by bytes of this.
        speed_ratio: Time of the float graph by time of this, on this machine's CPU.
        agreement: With the float graph, over real heads; None for the float graph itself and where
            there were no data.
    """

    precision: Precision
    how: str
    graph: bytes = field(repr=False)
    size_ratio: float
    speed_ratio: Estimate
    agreement: Agreement | None

    @property
    def is_accepted(self) -> bool:
        """Whether heads may be served on it."""
        return self.agreement is None or self.agreement.is_accepted

    def summary(self) -> dict[str, Any]:
        """What was measured, as plain values for JSON."""
        return {
            "precision": self.precision,
            "how": self.how,
            "graph_bytes": len(self.graph),
            "size_ratio": self.size_ratio,
            "speed_ratio": dataclasses.asdict(self.speed_ratio),
            "is_accepted": self.is_accepted,
            "agreement": self.agreement and dataclasses.asdict(self.agreement),
        }


def float_candidate(graph: bytes) -> Candidate:
    """The float graph, which everything is compared with."""
    return Candidate("fp32", "as it is", graph, 1.0, Estimate(1.0, 1.0, 1.0, 1), None)


def half_candidate(
    graph: bytes,
    picture: UInt8[np.ndarray, "1 height width 3"],
    trial: Trial | None,
    *,
    progress: ProgressCallback = unheard,
) -> Candidate:
    """The graph in FP16, measured by real heads if there are any."""
    return _measure(
        graph, "fp16", "float outputs", to_half(graph), picture, trial, progress=progress
    )


def int8_candidates(
    graph: bytes,
    pictures: UInt8[np.ndarray, "pictures height width 3"],
    trial: Trial,
    *,
    progress: ProgressCallback = unheard,
) -> list[Candidate]:
    """Every scheme with its best ranges; and where none is accepted, the best with float layers.

    Args:
        graph: The float trunk.
        pictures: Real ones, none of them among the trial's.
    """
    prepared = prepare(graph)
    ranges = calibrate(prepared, pictures, progress=progress)
    found: list[Candidate] = []
    schemes: list[Scheme] = []
    for per_channel in (True, False):
        method = _best_method(prepared, ranges, pictures, per_channel=per_channel)
        for activations in ("uint8", "int8"):
            scheme = Scheme(activations, per_channel, method)
            int8 = quantize(prepared, ranges[method], scheme)
            schemes.append(scheme)
            found.append(
                _measure(graph, "int8", str(scheme), int8, pictures[:1], trial, progress=progress)
            )
    if not any(candidate.is_accepted for candidate in found):
        _, scheme = max(zip(found, schemes, strict=True), key=lambda tried: _promise(tried[0]))
        found += _with_float_layers(
            graph, prepared, ranges[scheme.method], scheme, pictures, trial, progress=progress
        )
    return found


def fastest(candidates: Sequence[Candidate]) -> Candidate:
    """The fastest on a CPU that is accepted; int8 has to be faster than float beyond doubt.

    Args:
        candidates: The float graph among them.
    """
    fit = [
        candidate
        for candidate in candidates
        if candidate.precision == "fp32"
        or (
            candidate.precision == "int8"
            and candidate.is_accepted
            and candidate.speed_ratio.low > 1
        )
    ]
    return max(fit, key=lambda candidate: candidate.speed_ratio.value)


def _best_method(
    prepared: bytes,
    ranges: Mapping[Method, Ranges],
    pictures: UInt8[np.ndarray, "pictures height width 3"],
    *,
    per_channel: bool,
) -> Method:
    """The ranges that keep features closest to the float ones.

    Judged on the pictures that the ranges come from: the test pictures are for the heads alone.
    """
    expected = features(open_session(prepared), pictures)
    errors: dict[Method, float] = {}
    for method, bounds in ranges.items():
        int8 = quantize(prepared, bounds, Scheme("uint8", per_channel, method))
        errors[method] = relative_error(expected, features(open_session(int8), pictures))
    return min(errors, key=lambda method: errors[method])


def _promise(candidate: Candidate) -> tuple[bool, float]:
    assert candidate.agreement is not None
    return candidate.speed_ratio.value > 1, candidate.agreement.agreement.value


def _with_float_layers(
    graph: bytes,
    prepared: bytes,
    ranges: Ranges,
    scheme: Scheme,
    pictures: UInt8[np.ndarray, "pictures height width 3"],
    trial: Trial,
    *,
    progress: ProgressCallback,
) -> list[Candidate]:
    """Leave the 1, 2, 4, ... layers that are hurt most in float, until the heads agree."""
    hurt = injuries(prepared, ranges, scheme, pictures[:NUM_INJURY_PICTURES], progress=progress)
    tried: list[Candidate] = []
    count = 1
    while count <= MAX_FLOAT_SHARE * len(hurt):
        nodes = frozenset(node for _, layer in hurt[:count] for node in layer)
        int8 = quantize(prepared, ranges, dataclasses.replace(scheme, float_nodes=nodes))
        how = f"{scheme}, {count} of {len(hurt)} layers in float"
        tried.append(_measure(graph, "int8", how, int8, pictures[:1], trial, progress=progress))
        # More layers in float would only be slower.
        if tried[-1].is_accepted or tried[-1].speed_ratio.high < 1:
            break
        count *= 2
    return tried


def _measure(
    graph: bytes,
    precision: Precision,
    how: str,
    other: bytes,
    picture: UInt8[np.ndarray, "1 height width 3"],
    trial: Trial | None,
    *,
    progress: ProgressCallback,
) -> Candidate:
    agreement = None
    if trial is not None:
        agreement = judge(trial.outcomes(other, stage=f"try {precision} {how}", progress=progress))
    speed = speedup(graph, other, picture)
    return Candidate(precision, how, other, len(graph) / len(other), speed, agreement)
