"""What the log's records fold to."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from export.bundle import digest_of
from serve.record import (
    ORIGIN,
    HeadLogError,
    LogView,
    Record,
    SettingsChange,
    TaskChange,
    TrunkChange,
    Verdict,
    fold,
)
from serve.task_settings import TaskSettings
from serve.trust import SignedBy
from tests.serve.signers import NOW, trusting

TRUNK = TrunkChange(trunk=digest_of(b"trunk"), manifest=digest_of(b"trunk.json"))


def change(task: str, version: int) -> TaskChange:
    """A push of a task; its bundle says which."""
    bundle = digest_of(f"{task} {version}".encode())
    return TaskChange(
        task=task, version=version, action="push", bundle=bundle, labels=("no", "yes")
    )


CHANGE = change("pets", 1).model_dump()


def record(after: LogView, *changes: TaskChange, **fields: object) -> Record:
    """A commit that follows a view."""
    first = {"number": after.number + 1, "kind": "commit", "previous": after.tip}
    return Record.model_validate(
        {"writer": "w", "written_at": "now", "changes": changes, **first, **fields}
    )


def log_of(*changes: TaskChange) -> tuple[LogView, list[Record]]:
    """A log with one commit for each change."""
    view = LogView()
    records: list[Record] = []
    for one in changes:
        records.append(record(view, one))
        view = fold(view, records[-1:])
    return view, records


def test_an_empty_log_has_nothing_live() -> None:
    """The first record follows record 0, which is nothing."""
    view = fold(LogView(), [])

    assert (view.number, view.tip, view.live_number) == (0, ORIGIN, 0)
    assert view.live("pets") is None
    assert view.made_by("key") == ()
    assert digest_of(b"") == ORIGIN


def test_the_last_commit_of_a_task_is_live() -> None:
    """Every task has its own versions, oldest first, each with the number that made it so."""
    view, _ = log_of(change("pets", 1), change("cars", 1), change("pets", 2))
    pets, cars = view.live("pets"), view.live("cars")

    assert view.live_number == view.number == 3
    assert pets is not None
    assert (pets.change, pets.number) == (change("pets", 2), 3)
    assert cars is not None
    assert (cars.change, cars.number) == (change("cars", 1), 2)
    assert [v.change.version for v in view.tasks["pets"]] == [1, 2]


def test_one_record_may_change_several_tasks() -> None:
    """They go live together."""
    view = fold(LogView(), [record(LogView(), change("pets", 1), change("cars", 1))])

    assert {task: v[-1].number for task, v in view.tasks.items()} == {"pets": 1, "cars": 1}


def test_a_version_keeps_what_its_record_says_of_it() -> None:
    """Who reads the history sees when, why, and what the gates said."""
    verdict = Verdict(gate="golden", passed=True, reason="3 of 3 agree")
    made = record(
        LogView(), change("pets", 1), message="better", idempotency_key="k", verdicts=(verdict,)
    )

    live = fold(LogView(), [made]).live("pets")

    assert live is not None
    assert (live.written_at, live.message) == ("now", "better")
    assert (live.idempotency_key, live.verdicts) == ("k", (verdict,))


def test_an_abort_uses_up_its_number_and_changes_nothing() -> None:
    """Even if it carries changes, a trunk and a key; the next record follows it."""
    view, _ = log_of(change("pets", 1))
    abort = record(view, change("pets", 2), kind="abort", trunk=TRUNK, idempotency_key="k")

    after = fold(view, [abort])

    assert (after.number, after.tip) == (2, abort.digest)
    assert (after.live_number, after.tasks, after.trunk) == (1, view.tasks, None)
    assert after.made_by("k") == ()
    assert fold(after, [record(after, change("pets", 2))]).live_number == 3


def test_the_trunk_stays_until_a_record_names_another() -> None:
    """Records of heads do not repeat it."""
    view = fold(LogView(), [record(LogView(), trunk=TRUNK)])

    assert fold(view, [record(view, change("pets", 1))]).trunk == TRUNK


def test_an_idempotency_key_finds_the_version_that_it_made() -> None:
    """Also when the task has moved on since."""
    view = fold(LogView(), [record(LogView(), change("pets", 1), idempotency_key="a")])
    view = fold(view, [record(view, change("pets", 2), idempotency_key="b")])
    view = fold(view, [record(view, change("pets", 3))])
    (first,), unknown, empty = view.made_by("a"), view.made_by("c"), view.made_by("")

    assert first.change == change("pets", 1)
    assert unknown == ()
    assert empty == ()  # record 3 has no key, which is not a key


def setting(task: str, **settings: object) -> dict[str, tuple[SettingsChange]]:
    """The field of a record that sets something for a task."""
    chosen = TaskSettings.model_validate(settings)
    return {"settings": (SettingsChange(task=task, settings=chosen),)}


def test_the_last_settings_of_a_task_hold_and_make_no_version() -> None:
    """Also when the task moves on; a task for which nothing was set has none in the log."""
    view, _ = log_of(change("pets", 1), change("cars", 1))
    view = fold(view, [record(view, message="busy", **setting("pets", weight=2))])
    view = fold(view, [record(view, **setting("pets", weight=3, pinned=True))])
    view = fold(view, [record(view, change("pets", 2))])

    assert view.settings == {"pets": TaskSettings(weight=3, pinned=True)}
    assert [(v.number, v.message) for v in view.set_tasks["pets"]] == [(3, "busy"), (4, "")]
    assert [v.number for v in view.tasks["pets"]] == [1, 5]
    assert view.live_number == 5


def test_an_aborted_change_of_settings_changes_nothing() -> None:
    """As with every abort."""
    view = fold(LogView(), [record(LogView(), kind="abort", **setting("pets", weight=2))])

    assert view.settings == {}


def test_a_key_finds_the_settings_that_it_made() -> None:
    """As it finds versions."""
    view, _ = log_of(change("pets", 1))
    view = fold(view, [record(view, idempotency_key="k", **setting("pets", weight=2))])
    (made,) = view.made_by("k")

    assert (made.number, made.change) == (2, setting("pets", weight=2)["settings"][0])


def test_a_record_from_before_there_were_settings_is_as_it_was() -> None:
    """To the byte, so that the record after it still names its digest."""
    old = (
        b'{"schema_version":1,"number":1,"kind":"commit","previous":"' + ORIGIN.encode() + b'",'
        b'"writer":"w","written_at":"now","changes":[{"task":"pets","version":1,"action":"push",'
        b'"bundle":"' + ORIGIN.encode() + b'","labels":["no","yes"]}],"idempotency_key":"k"}'
    )
    read = Record.model_validate_json(old)

    assert read.to_bytes() == old
    assert fold(LogView(), [read]).settings == {}


def test_what_was_said_of_a_key_is_kept_and_the_last_word_counts() -> None:
    """An abort says nothing; an idempotency key finds what it made."""
    view, key = LogView(), trusting(1, valid_until=NOW)
    said = [trusting(1), key, key.model_copy(update={"is_revoked": True})]
    for place, (change, kind) in enumerate(zip(said, ("commit", "commit", "abort"), strict=True)):
        made = record(view, kind=kind, signing_keys=(change,), idempotency_key=f"k{place}")
        view = fold(view, [made])

    assert view.signing_keys == {key.key_id: key}
    assert [version.number for version in view.key_history[key.key_id]] == [1, 2]
    assert view.made_by("k1") == (view.key_history[key.key_id][1],)
    assert view.made_by("k2") == ()


def test_folding_does_not_change_the_view_before() -> None:
    """A batch reads its snapshot while the log goes on."""
    before, _ = log_of(change("pets", 1))

    fold(before, [record(before, change("pets", 2), change("cars", 1), idempotency_key="k")])

    assert before == log_of(change("pets", 1))[0]


def test_folding_at_once_or_one_by_one_is_the_same() -> None:
    """A replica that follows and one that has just started agree."""
    view, records = log_of(change("pets", 1), change("cars", 1), change("pets", 2))

    assert fold(LogView(), records) == view
    assert fold(fold(LogView(), records[:2]), records[2:]) == view


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ([2], "Record 2 follows record 0; expected 1"),
        ([1, 3], "Record 3 follows record 1; expected 2"),
        ([1, 2, 2], "Record 2 follows record 2; expected 3"),
        ([1, 2, 1], "Record 1 follows record 2; expected 3"),
    ],
    ids=["no first", "gap", "repeated", "backwards"],
)
def test_a_record_out_of_order_is_refused(numbers: list[int], problem: str) -> None:
    """The error says which is there and which was expected."""
    _, records = log_of(change("pets", 1), change("pets", 2), change("pets", 3))

    with pytest.raises(HeadLogError, match=problem):
        fold(LogView(), [records[number - 1] for number in numbers])


def test_an_edited_record_is_noticed_at_the_next() -> None:
    """Every record names the digest of the one before it."""
    _, records = log_of(change("pets", 1), change("pets", 2))
    edited = records[0].model_copy(update={"written_at": "yesterday"})

    with pytest.raises(HeadLogError, match=f"Record 2 names {records[0].digest}.*record 1 is"):
        fold(LogView(), [edited, records[1]])


def test_a_record_of_another_log_is_refused() -> None:
    """Its number fits and its predecessor does not."""
    ours, _ = log_of(change("pets", 1))
    theirs, _ = log_of(change("cars", 1))

    with pytest.raises(HeadLogError, match="edited or replaced"):
        fold(ours, [record(theirs, change("cars", 2))])


def test_a_record_is_the_same_after_a_round_trip_through_bytes() -> None:
    """Reading what was written gives the same record, bytes and digest."""
    full = record(
        LogView(),
        change("pets", 1).model_copy(update={"action": "rollback", "rolled_back_to": 1}),
        trunk=TRUNK,
        message='größer ⚙ "\n',
        idempotency_key="k",
        verdicts=(Verdict(gate="parity", passed=False, reason=""),),
        signing_keys=(trusting(1, tasks=("pets*",), valid_until=NOW), trusting(2)),
        **setting("pets", weight=0.1, pinned=True, deadline_s=1 / 3),
    )
    by = SignedBy(key_id=trusting(1).key_id, signed_at=NOW, envelope=full.digest)
    signed = record(LogView(), change("pets", 1).model_copy(update={"signed": by}))
    plain = record(LogView(), **setting("pets"))  # back to the defaults
    bare = record(LogView(), kind="abort")

    for written in (full, signed, plain, bare):
        read = Record.model_validate_json(written.to_bytes())
        assert read == written
        assert read.to_bytes() == written.to_bytes()
        assert read.digest == digest_of(written.to_bytes())


def test_a_field_that_is_not_of_this_format_is_refused() -> None:
    """A record of a later format is not half understood; the error names the field."""
    data = {**json.loads(record(LogView()).to_bytes()), "canary": 0.1}

    with pytest.raises(ValidationError, match="canary"):
        Record.model_validate(data)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("number", 0),
        ("kind", "maybe"),
        ("schema_version", 2),
        ("previous", "sha256:abc"),
        ("message", "\ud800"),  # half a character, which has no bytes
        ("changes.0.task", "../pets"),
        ("changes.0.version", 0),
        ("changes.0.labels", None),
        ("settings", [{"task": "pets", "settings": {"weight": -1}}]),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: object) -> None:
    """What could not be stored or followed is never a record; the error names the field."""
    name = field.rpartition(".")[2]
    wrong = {name: value} if name == field else {"changes": [CHANGE | {name: value}]}

    with pytest.raises(ValidationError, match=field.replace(".", r"\.")):
        record(LogView(), **wrong)


def test_a_retired_task_has_a_last_version_and_none_that_is_live() -> None:
    """Until the next push."""
    gone = TaskChange(task="pets", version=2, action="retire", labels=("no", "yes"))
    view, _ = log_of(change("pets", 1), gone)
    back, _ = log_of(change("pets", 1), gone, change("pets", 3))
    last, live = view.last("pets"), back.live("pets")

    assert view.live("pets") is None
    assert last is not None
    assert last.change == gone
    assert live is not None
    assert live.change.version == 3


@pytest.mark.parametrize("fields", [{"action": "retire"}, {"bundle": None}])
def test_only_a_retirement_has_no_bundle(fields: dict[str, object]) -> None:
    """And every other version has one."""
    with pytest.raises(ValidationError, match="and bundle is"):
        TaskChange.model_validate({**CHANGE, **fields})


def test_the_pen_goes_to_whoever_took_it_last() -> None:
    """An epoch is an abort that names a cluster; one that takes it again changes nothing."""
    view = LogView()
    for cluster in ("a", "a", "", "b"):
        epoch = record(view).model_copy(update={"kind": "abort", "epoch": cluster})
        view = fold(view, [epoch])

    assert LogView().pen == ""
    assert (view.epochs, view.pen) == (("a", "b"), "b")
    assert b"epoch" not in record(view).to_bytes()
