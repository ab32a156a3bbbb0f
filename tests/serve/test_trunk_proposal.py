"""A change of the trunk, as the log stands: which way is back, and who was first."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from export.bundle import digest_of
from serve.grounds import grounds_of
from serve.messages import Change, Pushes, Refused, TrunkRollback
from serve.proposal import Proposal, overtaken, propose
from serve.record import Candidate, LogView, Record, TaskChange, TrunkChange, fold
from serve.trust import SignedBy

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LABELS = ("cat", "dog")
SIGNED = SignedBy(key_id="1" * 64, signed_at=NOW, envelope=digest_of(b"signature"))


def trunk(name: str, *, variants: str = "") -> TrunkChange:
    """A trunk, perhaps with other variants."""
    manifest = digest_of(f"{name}{variants}".encode())
    return TrunkChange(trunk=digest_of(name.encode()), manifest=manifest, pictures=(8, 8))


def version(task: str, number: int, bundle: str = "", **fields: Any) -> TaskChange:
    """A version of a task; without a bundle it is retired."""
    given: dict[str, Any] = {"action": "push", "bundle": digest_of(bundle.encode()), **fields}
    if not bundle:
        given = {"action": "retire"}
    return TaskChange(task=task, version=number, labels=LABELS, **given)


def log(*records: dict[str, Any]) -> LogView:
    """The log that these commits make."""
    view = LogView()
    for fields in records:
        view = fold(view, [record_after(view, **fields)])
    return view


def record_after(view: LogView, **fields: Any) -> Record:
    """The next commit."""
    return Record(
        number=view.number + 1,
        kind="commit",
        previous=view.tip,
        writer="w",
        written_at="",
        **fields,
    )


THERE = (
    {"trunk": trunk("old")},
    {"changes": (version("pets", 1, "a", signed=SIGNED), version("signs", 1, "b"))},
    {"changes": (version("pets", 2, "c", signed=SIGNED),)},
    {"trunk": trunk("new"), "changes": (version("pets", 3, "d"), version("signs", 2, "e"))},
)


def way_back(view: LogView) -> Proposal | Refused:
    """What a rollback of the trunk says."""
    found = propose(view, TrunkRollback("back"), NOW)
    assert isinstance(found, Proposal | Refused)
    return found


def test_the_way_back_is_to_what_answered_right_before() -> None:
    """The last bundle of each task on the trunk before, with its own signature."""
    view = log(*THERE, {"changes": (version("pets", 4, "f"),)})
    back = way_back(view)

    assert isinstance(back, Proposal)
    assert back.trunk == trunk("old")
    assert [(c.task, c.version, c.bundle, c.rolled_back_to) for c in back.changes] == [
        ("pets", 5, digest_of(b"c"), 2),
        ("signs", 3, digest_of(b"b"), 1),
    ]
    assert [change.signed for change in back.changes] == [SIGNED, None]


def test_other_variants_of_a_trunk_are_no_other_trunk() -> None:
    """The way back passes over them, and takes those of the trunk before that were its last."""
    view = log(
        THERE[0],
        {"trunk": trunk("old", variants="int8")},
        *THERE[1:],
        {"trunk": trunk("new", variants="int8")},
    )
    back = way_back(view)

    assert isinstance(back, Proposal)
    assert back.trunk == trunk("old", variants="int8")
    assert back.changes[0].rolled_back_to == 2


def test_what_was_retired_before_has_nothing_to_go_back_to() -> None:
    """It came back with the new trunk; its last bundle on the old one did not answer then."""
    view = log(*THERE[:3], {"changes": (version("signs", 2),)}, {
        "trunk": trunk("new"), "changes": (version("pets", 3, "d"), version("signs", 3, "e")),
    })  # fmt: skip
    refused = way_back(view)

    assert isinstance(refused, Refused)
    assert refused.reason.startswith("There was no live bundle of signs on trunk")


def test_a_rollout_under_way_stops_the_way_back() -> None:
    """Neither of its sides would answer on the trunk before; it is named."""
    candidate = Candidate(bundle=digest_of(b"f"), labels=LABELS, share=0.1)
    canary = version("pets", 4, "d", action="canary", candidate=candidate)
    refused = way_back(log(*THERE, {"changes": (canary,)}))

    assert isinstance(refused, Refused)
    assert refused.reason.startswith("A rollout is under way of pets;")


def test_one_task_goes_back_to_what_it_had_on_the_trunk_that_is_served() -> None:
    """Passing over what it had on another meanwhile."""
    again = version("pets", 4, "c", action="rollback", rolled_back_to=2)
    view = log(*THERE, {"trunk": trunk("old"), "changes": (again,)})
    back = propose(view, Change("pets", "k"), NOW)

    assert isinstance(back, Proposal)
    assert back.changes[0].rolled_back_to == 1


def test_what_was_compared_on_the_trunk_before_is_compared_anew() -> None:
    """The head is for the trunk before; that the task did not change does not make it fit."""
    before = log(*THERE[:3])
    now = fold(before, [record_after(before, trunk=trunk("new"))])
    push = Change(
        "pets", "k", bundle=digest_of(b"f"), labels=LABELS,
        grounds=grounds_of(before, "pets", LABELS),
    )  # fmt: skip
    late = propose(now, push, NOW)

    assert isinstance(propose(before, push, NOW), Proposal)
    assert isinstance(late, Refused)
    assert late.kind == "stale"


def test_a_trunk_and_any_change_of_a_task_do_not_pass_each_other() -> None:
    """Whoever was first; what is no task's passes both."""
    view = log(*THERE[:3])
    push = Change("moods", "k", bundle=digest_of(b"f"), labels=LABELS)
    with_trunk = Pushes((push,), "k", trunk=trunk("new"))
    of_trunk = record_after(view, trunk=trunk("other"))
    of_task = record_after(view, changes=(version("pets", 3, "d"),))
    of_nothing = record_after(view)

    for asked in (push, with_trunk, TrunkRollback("k")):
        refused = overtaken(asked, [of_trunk])
        assert refused is not None
        assert refused.kind == "conflict"
    for asked in (with_trunk, TrunkRollback("k")):
        assert overtaken(asked, [of_task]) is not None
    assert overtaken(push, [of_task]) is None
    assert all(overtaken(asked, [of_nothing]) is None for asked in (push, with_trunk))
