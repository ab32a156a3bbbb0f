"""What may be set for a task, and what is said of all else."""

from __future__ import annotations

import pytest

from serve.task_settings import DEFAULTS, SettingError, TaskSettings, asked_settings

NAN, INFINITY = float("nan"), float("inf")


def test_by_default_a_task_has_a_plain_share_and_the_services_deadline() -> None:
    """Weight 1, not pinned, no deadline of its own; what pushes may lose is little."""
    assert (DEFAULTS.weight, DEFAULTS.pinned, DEFAULTS.deadline_s) == (1.0, False, None)
    assert (DEFAULTS.margin, DEFAULTS.max_slowdown) == (0.01, 1.5)


def test_what_is_not_asked_stays_as_it_was() -> None:
    """A change names only what it changes."""
    before = TaskSettings(weight=3.0, deadline_s=0.5)

    assert before.updated([("pinned", True)]) == TaskSettings(
        weight=3.0, pinned=True, deadline_s=0.5
    )
    assert before.updated([("deadline_s", None)]) == TaskSettings(weight=3.0)
    assert before == TaskSettings(weight=3.0, deadline_s=0.5)


def test_differences_name_what_is_otherwise_in_another() -> None:
    """As history and status show them."""
    mine = TaskSettings(weight=2, pinned=True)

    assert mine.different_from(DEFAULTS) == {"weight": 2.0, "pinned": True}
    assert DEFAULTS.different_from(mine) == {"weight": 1.0, "pinned": False}
    assert mine.different_from(mine) == {}


def test_what_is_asked_is_the_same_value_in_any_order_and_form() -> None:
    """So that a repeated request is recognised."""
    assert asked_settings({"weight": 2, "pinned": True}) == (("weight", 2.0), ("pinned", True))
    assert asked_settings({"pinned": True, "weight": 2.0}) == (("weight", 2.0), ("pinned", True))
    assert asked_settings({"weight": 1}) == (("weight", 1.0),)  # a default may be asked for, too
    assert asked_settings({"deadline_s": None}) == (("deadline_s", None),)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"weight": -1}, "weight is -1: Input should be greater than or equal to 0.001."),
        ({"weight": 0}, "weight is 0: Input should be greater than or equal to 0.001."),
        ({"weight": 1e4}, "weight is 10000.0: Input should be less than or equal to 1000."),
        ({"weight": NAN}, "weight is nan: Input should be a finite number."),
        ({"weight": INFINITY}, "weight is inf: Input should be"),
        ({"weight": "2"}, "weight is '2': Input should be a valid number."),
        ({"weight": True}, "weight is True: Input should be a valid number."),
        ({"weight": None}, "weight is None: Input should be a valid number."),
        ({"margin": -0.1}, "margin is -0.1: Input should be greater than or equal to 0."),
        ({"margin": 2}, "margin is 2: Input should be less than or equal to 1."),
        ({"max_slowdown": 0.5}, "max_slowdown is 0.5: Input should be greater than or equal to 1."),
        ({"max_slowdown": INFINITY}, "max_slowdown is inf: Input should be"),
        ({"pinned": "maybe"}, "pinned is 'maybe': Input should be a valid boolean."),
        ({"pinned": 1}, "pinned is 1: Input should be a valid boolean."),
        ({"deadline_s": 0}, "deadline_s is 0: Input should be greater than 0."),
        ({"deadline_s": NAN}, "deadline_s is nan: Input should be a finite number."),
        ({"deadline_s": "soon"}, "deadline_s is 'soon': Input should be a valid number."),
        (
            {"wieght": 2},
            "wieght is 2: there is no such setting; expected weight, pinned, deadline_s, ",
        ),
        ({}, "No setting is named; expected one or more of weight, pinned, deadline_s, "),
    ],
    ids=str,
)
def test_what_cannot_be_set_is_refused_by_name_value_and_what_was_expected(
    values: dict[str, object], reason: str
) -> None:
    """One line, of the first setting that is wrong."""
    with pytest.raises(SettingError) as error:
        asked_settings(values)

    assert str(error.value).startswith(reason)
    assert "\n" not in str(error.value)
