"""A card tells a reader what a head is for, how good it is, and what it cannot do."""

from __future__ import annotations

from typing import Any

import pytest

from export.bundle import Provenance
from export.card import write_card
from export.trunk import TrunkReport
from models.evaluate import Estimate, share
from models.record import DataRecord

DATA = DataRecord(
    name="fruit",
    sha256="ab" * 32,
    num_pictures={
        "train": {"apple": 40, "pear": 12},
        "validation": {"apple": 5, "pear": 3},
        "test": {"apple": 30, "pear": 20},
    },
)


@pytest.fixture
def write(trunk: TrunkReport, provenance: Provenance) -> Any:
    """Writes a card with some of its fields changed."""

    def write_with(**changes: Any) -> str:
        fields: dict[str, Any] = {
            "task": "fruit-kind",
            "labels": ("apple", "pear"),
            "link": "softmax",
            "temperature": 1.0,
            "trunk": trunk.manifest,
            "data": DATA,
            "metrics": {"test": share(45, 50), "baseline_test": share(25, 50)},
            "provenance": provenance,
            "kind": "head",
            "adapter": None,
            "model_bytes": 1234,
            "verdict": "",
            "notes": (),
        }
        return write_card(**fields | changes)

    return write_with


def test_a_card_says_what_the_head_is_and_how_it_was_made(
    write: Any, trunk: TrunkReport, provenance: Provenance
) -> None:
    """Task, labels, trunk, data, command, time, seed and versions."""
    card = write()

    for fact in (
        "# fruit-kind", "2 labels (apple, pear)", "1,234 bytes", trunk.digest, "small32", "fruit",
        DATA.sha256, provenance.command, provenance.created_at, "seed 0", "torch 2.12.1",
    ):  # fmt: skip
        assert fact in card, fact


def test_accuracies_stand_beside_the_baseline_with_interval_and_count(write: Any) -> None:
    """Wilson's interval of 45 of 50 is .786 to .957."""
    assert "| test | 0.900 [0.786, 0.957] of 50 | 0.500 [0.366, 0.634] of 50 |" in write()


def test_class_balance_is_shown_for_every_split(write: Any) -> None:
    """And the extremes in words."""
    card = write()

    assert "| label | train | validation | test |" in card
    assert "| pear | 12 | 3 | 20 |" in card
    assert "most frequent label is apple (40 pictures), the rarest pear (12)" in card


def test_a_label_with_few_pictures_is_a_limit(write: Any) -> None:
    """Below 20; apple has 40."""
    assert "- Fewer than 20 training pictures: pear." in write()


def test_negative_transfer_is_called_out(write: Any) -> None:
    """The head is below its baseline: no reader may miss it."""
    card = write(metrics={"test": share(20, 50), "baseline_test": share(45, 50)})

    assert (
        "**Negative transfer**: on test this head is at 0.400, below the baseline's 0.900." in card
    )
    assert "chance" not in card


def test_negative_transfer_within_the_intervals_is_called_out_with_its_doubt(write: Any) -> None:
    """One picture of fifty proves nothing, and the card says so."""
    card = write(metrics={"test": share(44, 50), "baseline_test": share(45, 50)})

    assert "**Negative transfer**" in card
    assert "the intervals overlap, so it may be chance" in card


def test_a_gain_within_the_intervals_is_not_claimed(write: Any) -> None:
    """Better by chance is not better."""
    card = write(metrics={"test": share(45, 50), "baseline_test": share(43, 50)})

    assert "that the trunk helps is not shown" in card
    assert "Negative transfer" not in card


def test_a_clear_gain_needs_no_remark(write: Any) -> None:
    """Only what a reader must not overlook is said in words."""
    card = write()

    assert "Negative transfer" not in card
    assert "overlap" not in card


def test_a_verdict_takes_the_place_of_comparing_intervals(write: Any) -> None:
    """It compares the same pictures one by one, which is sharper than two intervals."""
    card = write(
        metrics={"test": share(45, 50), "baseline_test": share(43, 50)},
        verdict="Transfer pays: *on* the same test pictures.",
    )

    assert "**Transfer pays: \\*on\\* the same test pictures.**" in card
    assert "that the trunk helps is not shown" not in card


def test_other_scores_of_the_test_split_have_a_table_of_their_own(write: Any) -> None:
    """They are no accuracies, and no baseline stands beside them."""
    card = write(metrics={"test": share(45, 50), "test_log_loss": Estimate(1.5, 1.25, 1.75, 50)})

    assert "| log loss | 1.500 [1.250, 1.750] of 50 | mean of -log p of the right label" in card
    assert "| test\\_log\\_loss |" not in card


def test_a_metric_without_baseline_says_so(write: Any) -> None:
    """Rather than an empty cell."""
    card = write(metrics={"test": Estimate(0.9, 0.8, 0.95, 50)})

    assert "| test | 0.900 [0.800, 0.950] of 50 | not measured |" in card


def test_nothing_measured_is_said(write: Any) -> None:
    """A head without numbers is bundled with a card that admits it."""
    assert "Nothing was measured." in write(metrics={})


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_scores_without_a_fitted_temperature_are_not_called_calibrated(
    write: Any, link: str
) -> None:
    """Raw outputs are no probabilities, so there is nothing to calibrate."""
    assert "not calibrated" in write(link=link, temperature=1.0)
    assert "not calibrated" not in write(link=link, temperature=1.7)
    assert "not calibrated" not in write(link="none", temperature=1.0)


def test_notes_are_limits(write: Any) -> None:
    """What training found goes to the reader."""
    assert "\n- 3 pictures were duplicates.\n" in write(notes=("3 pictures were duplicates.",))


def test_names_do_not_become_markup(write: Any) -> None:
    """A label may hold any character."""
    card = write(labels=("a|b", "<script>"))

    assert "a\\|b" in card
    assert "<script" not in card.replace("\\<script", "")


def test_many_labels_are_cut_short(write: Any) -> None:
    """A card stays readable with ten thousand classes."""
    card = write(labels=tuple(f"label{i}" for i in range(10_000)))

    assert "10000 labels" in card
    assert "and 9950 more" in card
    assert len(card) < 10_000
