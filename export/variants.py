"""Which precisions of a trunk are written beside the float graph, and which is picked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from export.bundle import Precision
from export.errors import ExportError
from export.parity import GOLDEN_TOLERANCE
from export.precision import (
    Candidate,
    fastest,
    float_candidate,
    half_candidate,
    int8_candidates,
)
from export.trial import make_trial
from models.data import PictureData, to_batch
from models.pictures import Preprocessing
from models.progress import Progress, ProgressCallback, unheard

NUM_CALIBRATION = 64
# Golden samples of a bundle are eight pictures: their largest logit, which the difference is
# divided by, is smaller than that of the whole test split, and heads for other data amplify other
# differences. Twice what was measured leaves room for both (assumed); a head for another trunk is
# off by its whole scale.
SHIFT_MARGIN = 2.0
# Where no heads were tried FP16. With ten heads on photographs logits moved by 0.002 of their scale
# (SqueezeNet 1.1) and 0.006 (MobileNetV2), on a CPU; CUDA is not measured.
UNTRIED_TOLERANCE = 0.02


class PrecisionRefusedError(ExportError):
    """No candidate of the precision that was asked for is accepted; `candidates` says why."""

    def __init__(self, wanted: Precision, candidates: Sequence[Candidate]) -> None:
        self.candidates = tuple(candidates)
        reasons = [
            f"{candidate.how}: {'; '.join(candidate.agreement.objections)}"
            for candidate in candidates
            if candidate.precision == wanted and candidate.agreement is not None
        ]
        super().__init__(
            f"No {wanted} trunk gives what the float trunk gives; nothing was written. "
            f"{'. '.join(reasons)}. Export with --precision auto or fp32, or give more --data."
        )


@dataclass(frozen=True)
class Variants:
    """What is written beside the float graph.

    Args:
        graphs: By precision; the float graph is none of them.
        golden_tolerance: By the same precisions.
        picked: What a CPU serves unless told otherwise; "fp32" unless a variant is faster.
        candidates: Everything that was measured, the float graph first.
    """

    graphs: Mapping[Precision, bytes] = field(default_factory=dict, repr=False)
    golden_tolerance: Mapping[Precision, float] = field(default_factory=dict)
    picked: Precision = "fp32"
    candidates: tuple[Candidate, ...] = ()


def find_variants(
    graph: bytes,
    wanted: Precision | Literal["auto"],
    tasks: Sequence[PictureData],
    samples: UInt8[np.ndarray, "pictures height width 3"],
    preprocessing: Preprocessing,
    *,
    progress: ProgressCallback = unheard,
) -> Variants:
    """Try the precision that is wanted; "auto" tries int8.

    Args:
        graph: The float trunk.
        tasks: Data of real tasks: calibration takes their train pictures, heads are trained on
            train and validation, and judged on test.
        samples: Pictures to measure FP16 on where there are no tasks.

    Raises:
        PrecisionRefusedError: the precision is refused, and "auto" was not what was asked.
        ExportError: INT8 without data, or with data that give too few heads.
    """
    if wanted == "fp32":
        return Variants()
    if wanted != "fp16" and not tasks:
        raise ExportError(
            "INT8 is calibrated on real pictures and judged by real heads: name at least one "
            "--data, a folder of pictures with its labels or one of the digits tasks."
        )
    trial = make_trial(graph, tasks, preprocessing, progress=progress) if tasks else None
    candidates = [float_candidate(graph)]
    if wanted == "fp16":
        candidates.append(half_candidate(graph, samples[:1], trial, progress=progress))
    else:
        assert trial is not None
        pictures = calibration_pictures(tasks, preprocessing, progress=progress)
        candidates += int8_candidates(graph, pictures, trial, progress=progress)
    return choose_variants(candidates, wanted)


def choose_variants(
    candidates: Sequence[Candidate], wanted: Precision | Literal["auto"]
) -> Variants:
    """Keep the fastest accepted graph of the precision that was asked for; see `find_variants`."""
    picked = fastest(candidates)
    if wanted == "auto":
        kept = picked
    else:
        accepted = [c for c in candidates if c.precision == wanted and c.is_accepted]
        if not accepted:
            raise PrecisionRefusedError(wanted, candidates)
        kept = max(accepted, key=lambda candidate: candidate.speed_ratio.value)
    if kept.precision == "fp32":
        return Variants(candidates=tuple(candidates))
    return Variants(
        graphs={kept.precision: kept.graph},
        golden_tolerance={kept.precision: golden_tolerance(kept)},
        picked=picked.precision,
        candidates=tuple(candidates),
    )


def golden_tolerance(candidate: Candidate) -> float:
    """How far logits may be off on golden samples, as a share of their scale."""
    if candidate.agreement is None:
        return UNTRIED_TOLERANCE
    return max(GOLDEN_TOLERANCE, SHIFT_MARGIN * candidate.agreement.largest_shift)


def calibration_pictures(
    tasks: Sequence[PictureData],
    preprocessing: Preprocessing,
    *,
    progress: ProgressCallback = unheard,
) -> UInt8[np.ndarray, "pictures height width 3"]:
    """Train pictures of all tasks and labels alike, in an order that mixes them."""
    each = -(-NUM_CALIBRATION // len(tasks))
    chosen: list[UInt8[np.ndarray, "pictures height width 3"]] = []
    for place, data in enumerate(tasks):
        # A split keeps its labels together, so evenly spaced places are of all of them.
        count = min(each, len(data.train))
        places = np.linspace(0, len(data.train) - 1, count).round().astype(int)
        pictures = [data.train.pictures[place] for place in places]
        chosen.append(to_batch(pictures, preprocessing).numpy())
        progress(Progress("calibration pictures", place + 1, len(tasks)))
    return np.random.default_rng(0).permutation(np.concatenate(chosen))
