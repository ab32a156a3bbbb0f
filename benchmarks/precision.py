"""What does an INT8 trunk cost in answers, and what does it bring in speed?

Backbones with published weights are quantised as `headstock export --precision int8` does it, on
folders of photographs. Of the accepted candidates the fastest is measured again: by heads for a
folder that the search has not seen, and by its speed on one thread. Data and weights are looked for
in `../shared`, or where HEADSTOCK_SHARED says.
"""

import dataclasses
import os
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.report import Figure, arguments, finish, note
from export.agreement import Agreement, judge
from export.latency import speedup
from export.precision import Candidate, int8_candidates
from export.trial import make_trial
from export.trunk import trunk_graph
from export.variants import calibration_pictures
from models.backbones import build_backbone
from models.data import PictureData, Split
from models.evaluate import Estimate
from models.progress import Progress
from models.recipe import read_data

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("HEADSTOCK_SHARED", REPOSITORY.parent / "shared"))
NETS = REPOSITORY / "tests" / "end_to_end" / "my_nets.py"
CIFAR_NETS = REPOSITORY / "benchmarks" / "cifar_nets.py"
PHOTOS = ("clothing10", "grocery_fruit8", "trash6", "sign_digits10")
NUM_ROUNDS, QUICK_ROUNDS = 31, 9
MIN_SPEED = ">= 2"


@dataclass(frozen=True)
class Case:
    """A backbone, and what judges it.

    Args:
        seen: Folders for calibration and for the heads that accept or refuse.
        unseen: A folder for heads that judge afterwards.
    """

    name: str
    reference: str
    weights: str
    seen: tuple[str, ...] = PHOTOS
    unseen: str = "cifar10_small"


@dataclass(frozen=True)
class Outcome:
    """What came of a backbone.

    Args:
        chosen: The fastest accepted candidate; where none is, the one that agreed most.
        unseen: What heads say of it that the search did not have.
    """

    case: Case
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    unseen: Agreement
    speed: Estimate


CASES = (
    Case(
        "ResNet-20",
        f"{CIFAR_NETS}:resnet20",
        "cifar10_resnet20.pth",
        ("cifar10_small",),
        "sign_digits10",
    ),
    Case(
        "ResNet-56",
        f"{CIFAR_NETS}:resnet56",
        "cifar10_resnet56.pth",
        ("cifar10_small",),
        "sign_digits10",
    ),
    Case("MobileNetV1 0.5", f"{NETS}:mobilenet_v1_05", "mobilenet_v1_0.5_160_tfpad_rebn.pth"),
    Case("SqueezeNet 1.1", "squeezenet1_1", "squeezenet1_1_imagenet.pth"),
    Case("MobileNetV2", "mobilenet_v2", "mobilenet_v2_imagenet_trunk_rebn.pth"),
)


def main() -> None:
    """Search on every backbone; one that fails leaves the others their figures."""
    chosen = arguments(__doc__ or "")
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    figures: list[Figure] = []
    for case in CASES[:1] if chosen.quick else CASES:
        try:
            outcomes.append(_measure(case, is_quick=chosen.quick))
        except Exception:  # noqa: BLE001 (the figures of the others are minutes of work)
            note(f"{case.name} failed:\n{traceback.format_exc()}")
            figures.append(_one(f"{case.name}: measured", 0, unit="", aim=">= 1"))
    fastest = max((outcome.speed.value for outcome in outcomes), default=0.0)
    for outcome in outcomes:
        aim = MIN_SPEED if outcome.speed.value == fastest else ""
        figures += _figures(outcome, speed_aim=aim)
    finish("precision", figures, chosen)


def _measure(case: Case, *, is_quick: bool) -> Outcome:
    backbone, _ = build_backbone(case.reference, weights=SHARED / "weights" / case.weights)
    graph = trunk_graph(backbone)
    seen = [_read(name, is_quick=is_quick) for name in case.seen]
    trial = make_trial(graph, seen, backbone.preprocessing)
    note(f"{case.name}: {len(trial.heads)} heads on {sum(map(len, trial.tests))} test pictures")
    pictures = calibration_pictures(seen, backbone.preprocessing)
    candidates = int8_candidates(graph, pictures, trial, progress=lambda step: _say(case, step))
    for candidate in candidates:
        _tell(case, candidate)
    chosen = _choose(candidates)
    other = make_trial(graph, [_read(case.unseen, is_quick=is_quick)], backbone.preprocessing)
    return Outcome(
        case,
        tuple(candidates),
        chosen,
        judge(other.outcomes(chosen.graph, stage="unseen")),
        # Again, because the fastest of several was fast by luck too.
        speedup(
            graph, chosen.graph, pictures[:1], num_rounds=QUICK_ROUNDS if is_quick else NUM_ROUNDS
        ),
    )


def _read(name: str, *, is_quick: bool) -> PictureData:
    """A folder of pictures; of large ones a part."""
    data = read_data(str(SHARED / "data" / name), seed=0)
    most = 400 if is_quick else 1000
    train, validation, test = (_spread(split, most) for split in data.splits.values())
    return dataclasses.replace(data, train=train, validation=validation, test=test)


def _spread(split: Split, most: int) -> Split:
    """At most so many pictures, of all labels; a split keeps its labels together."""
    step = max(1, -(-len(split) // most))
    return Split(split.pictures[::step], split.labels[::step])


def _choose(candidates: Sequence[Candidate]) -> Candidate:
    accepted = [candidate for candidate in candidates if candidate.is_accepted]
    if accepted:
        return max(accepted, key=lambda candidate: candidate.speed_ratio.value)
    return max(candidates, key=lambda candidate: _agreement(candidate).agreement.value)


def _agreement(candidate: Candidate) -> Agreement:
    assert candidate.agreement is not None, "heads judge every INT8 candidate"
    return candidate.agreement


def _say(case: Case, step: Progress) -> None:
    if step.done == step.total:
        note(f"{case.name}: {step.stage}")


def _tell(case: Case, candidate: Candidate) -> None:
    found = _agreement(candidate)
    verdict = "; ".join(found.objections) or "accepted"
    note(
        f"{case.name}: {candidate.how}: agreement {found.agreement.value:.1%}, "
        f"{candidate.speed_ratio.value:.2f} x as fast: {verdict}"
    )


def _figures(outcome: Outcome, *, speed_aim: str) -> Iterator[Figure]:
    name, chosen, found = outcome.case.name, outcome.chosen, _agreement(outcome.chosen)
    accepted = sum(candidate.is_accepted for candidate in outcome.candidates)
    note(f"{name}: figures are of {chosen.how}{'' if accepted else ', though NONE was accepted'}")
    unit = f"of {len(outcome.candidates)}"
    yield _one(f"{name}: accepted candidates", accepted, unit=unit, aim=">= 1")
    yield _figure(f"{name}: agreement", found.agreement, 100, unit="%", aim=">= 98.5")
    change = found.accuracy_change
    yield _figure(f"{name}: accuracy change", change, 100, unit="points")
    low = f"{name}: accuracy change, low end"
    yield _one(low, 100 * change.low, unit="points", aim=">= -1.0")
    worse = f"{name}: heads significantly worse"
    yield _one(worse, len(found.significantly_worse), unit=f"of {found.num_heads}", aim="<= 0")
    yield _one(f"{name}: worst head", 100 * found.worst_change, unit="points")
    unseen = f"{name}: heads for {outcome.case.unseen}, unseen"
    yield _figure(f"{unseen}: agreement", outcome.unseen.agreement, 100, unit="%")
    yield _figure(f"{unseen}: accuracy change", outcome.unseen.accuracy_change, 100, unit="points")
    yield _figure(f"{name}: speed, INT8 / float", outcome.speed, 1, unit="ratio", aim=speed_aim)
    yield _one(f"{name}: size, float / INT8", chosen.size_ratio, unit="ratio")


def _figure(name: str, value: Estimate, scale: float, *, unit: str, aim: str = "") -> Figure:
    return Figure(name, scale * value.value, scale * value.low, scale * value.high, unit, aim)


def _one(name: str, value: float, *, unit: str, aim: str = "") -> Figure:
    """A figure without an interval of its own."""
    return Figure(name, value, value, value, unit, aim)


if __name__ == "__main__":
    main()
