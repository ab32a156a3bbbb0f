"""The search for an INT8 trunk: what it tries, when it falls back on float layers, where it ends.

Time is the one thing that is made up here: how fast a graph is decides when the search gives up,
and a busy machine must not.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx
import pytest
import torch
from jaxtyping import UInt8
from onnx import TensorProto

from export import precision
from export.agreement import Agreement, HeadOutcome, judge
from export.parity import open_session
from export.precision import Candidate, float_candidate, int8_candidates
from export.quantize import PRODUCTS, Scheme, calibrate, layers_of, prepare, quantize
from export.trial import Trial, features, make_trial
from export.trunk import trunk_graph
from export.variants import PrecisionRefusedError, Variants, calibration_pictures, choose_variants
from models.backbones import Backbone, build_backbone
from models.data import PictureData
from models.digits import load_digit_task
from models.evaluate import Estimate
from models.fine_tuning import fine_tuning
from models.transfer import teach
from tests.export.test_quantize import with_loud_channel

FAST, SLOW = Estimate(1.5, 1.4, 1.6, 9), Estimate(0.6, 0.5, 0.7, 9)


@dataclasses.dataclass(frozen=True)
class Case:
    """A trunk with a fault that 8 bits do not survive, pictures for its ranges, and its judges."""

    graph: bytes
    layers: list[tuple[str, ...]]
    faulty: int
    pictures: UInt8[np.ndarray, "pictures height width 3"]
    trial: Trial

    def search(self) -> list[Candidate]:
        """Every INT8 candidate, in the order in which they were tried."""
        return int8_candidates(self.graph, self.pictures, self.trial)

    def choose(self, candidates: list[Candidate]) -> Variants:
        """What an export that asks for INT8 makes of them."""
        return choose_variants([float_candidate(self.graph), *candidates], "int8")


@pytest.fixture(scope="module")
def digits() -> PictureData:
    """Real ones, ten labels."""
    return load_digit_task("digits", seed=0)


@pytest.fixture(scope="module")
def learned(digits: PictureData) -> Backbone:
    """Three epochs of them."""
    torch.set_num_threads(1)
    backbone, _ = build_backbone("small32", weights=None, allow_untrained=True)
    teach(backbone, digits, fine_tuning("scratch", num_epochs=3), augmentation=None, seed=0)
    return backbone.eval()


@pytest.fixture(scope="module")
def sick(learned: Backbone, digits: PictureData) -> Case:
    """One channel of a depthwise layer a thousand times too loud, undone by the next layer."""
    graph, place = with_loud_channel(trunk_graph(learned), channel=3)
    return Case(
        graph,
        layers_of(prepare(graph)),
        place,
        calibration_pictures([digits], learned.preprocessing)[:16],
        make_trial(graph, [digits], learned.preprocessing),
    )


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[Estimate]:
    """How fast every graph is said to be: the last entry."""
    speeds = [FAST]

    def speedup(*_: object) -> Estimate:
        return speeds[-1]

    monkeypatch.setattr(precision, "speedup", speedup)
    return speeds


def float_layers(candidate: Candidate) -> int:
    """How many layers it leaves in float, by its own words."""
    found = re.search(r"(\d+) of \d+ layers in float", candidate.how)
    return int(found[1]) if found else 0


def agreement_of(candidate: Candidate) -> Agreement:
    """What the heads say of it."""
    assert candidate.agreement is not None
    return candidate.agreement


def float_products(graph: bytes) -> set[str]:
    """Names of the products whose weights are float numbers in the file."""
    found = onnx.load_model_from_string(graph).graph
    floats = {w.name for w in found.initializer if w.data_type == TensorProto.FLOAT}
    return {n.name for n in found.node if n.op_type in PRODUCTS and n.input[1] in floats}


def test_a_fault_that_no_scheme_survives_is_mended_by_leaving_it_in_float(sick: Case) -> None:
    """1, 2, 4, ... layers, the faulty one among the first, until real heads agree."""
    candidates = sick.search()
    whole, mended = candidates[:4], candidates[4:]

    assert [(c.is_accepted, float_layers(c)) for c in whole] == [(False, 0)] * 4
    assert [float_layers(c) for c in mended] == [1, 2, 4][: len(mended)]
    assert [c.is_accepted for c in mended] == [False] * (len(mended) - 1) + [True]
    assert len(float_products(mended[-1].graph)) == float_layers(mended[-1])
    best = max(whole, key=lambda candidate: agreement_of(candidate).agreement.value)
    assert all(c.how.startswith(f"{best.how}, ") for c in mended)
    assert float_products(mended[-1].graph) & {
        sick.layers[place][0] for place in (sick.faulty, sick.faulty + 1)
    }
    assert sick.choose(candidates).graphs == {"int8": mended[-1].graph}


def test_a_healthy_trunk_needs_no_float_layers(sick: Case, learned: Backbone) -> None:
    """The same net without the fault: four schemes, all of them measured, and no more."""
    healthy = dataclasses.replace(sick, graph=trunk_graph(learned)).search()

    assert {(c.how.rpartition(", ")[0], c.precision) for c in healthy} == {
        (f"{activations}, per {weights}", "int8")
        for activations in ("uint8", "int8")
        for weights in ("channel", "tensor")
    }
    assert all(float_products(c.graph) == set() for c in healthy)
    assert any(c.is_accepted for c in healthy)


@pytest.mark.parametrize("per_channel", [True, False])
def test_ranges_are_found_by_the_method_that_moves_features_least(
    sick: Case, learned: Backbone, *, per_channel: bool
) -> None:
    """Of four, on the pictures of calibration."""
    graph = prepare(trunk_graph(learned))
    ranges = calibrate(graph, sick.pictures)
    expected = features(open_session(graph), sick.pictures)
    errors = {
        method: float(np.square(features(open_session(int8), sick.pictures) - expected).sum())
        for method, bounds in ranges.items()
        for int8 in [quantize(graph, bounds, Scheme("uint8", per_channel, method))]
    }
    weights = "per channel" if per_channel else "per tensor"
    healthy = dataclasses.replace(sick, graph=trunk_graph(learned)).search()
    (found,) = [c.how for c in healthy if c.how.startswith(f"uint8, {weights}")]

    assert len(set(errors.values())) == 4
    assert found == f"uint8, {weights}, {min(errors, key=lambda method: errors[method])}"


def test_the_search_ends_where_float_layers_make_it_slower_than_float(
    sick: Case, clock: list[Estimate], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One try, although the heads still object: more layers would be slower still."""
    clock.append(SLOW)
    monkeypatch.setattr(precision, "judge", refused)

    assert [float_layers(c) for c in sick.search()] == [0, 0, 0, 0, 1]


def test_the_search_ends_with_half_of_the_layers_in_float(
    sick: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of eleven: 1, 2 and 4; heads that never agree are told so by a refusal."""
    monkeypatch.setattr(precision, "judge", refused)
    candidates = sick.search()

    assert [float_layers(c) for c in candidates] == [0, 0, 0, 0, 1, 2, 4]
    assert len(sick.layers) == 11
    with pytest.raises(PrecisionRefusedError, match="4 of 11 layers in float: too odd"):
        sick.choose(candidates)


def refused(outcomes: list[HeadOutcome]) -> Agreement:
    """What the heads say, with an objection more."""
    return dataclasses.replace(judge(outcomes), objections=("too odd",))
