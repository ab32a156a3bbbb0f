"""What a requested change means for a log: pure, so by examples."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from export.bundle import digest_of
from serve.grounds import grounds_of
from serve.messages import AnyChange, Change, KeyRequest, Refused, Swapped
from serve.proposal import Proposal, new_labels_reason, overtaken, propose
from serve.record import LogView, Record, SettingsChange, TaskChange, fold
from serve.task_settings import TaskSettings, asked_settings
from serve.trust import SignedBy
from tests.serve.signers import trusting

LABELS = ("cat", "dog")
NOW = datetime(2026, 11, 21, tzinfo=UTC)
A, B, C = (digest_of(name.encode()) for name in "abc")


def log(*bundles: str, task: str = "pets", labels: tuple[str, ...] = LABELS) -> LogView:
    """A log in which these bundles were pushed in turn; version n was made by the key "kn"."""
    view = LogView()
    for version, bundle in enumerate(bundles, start=1):
        change = TaskChange(task=task, version=version, action="push", bundle=bundle, labels=labels)
        record = Record(
            number=version,
            kind="commit",
            previous=view.tip,
            writer="test",
            written_at="",
            changes=(change,),
            idempotency_key=f"k{version}",
        )
        view = fold(view, [record])
    return view


def push(
    bundle: str, *, key: str = "new", labels: tuple[str, ...] = LABELS, **fields: Any
) -> Change:
    """A pusher's request."""
    return Change("pets", key, bundle=bundle, labels=labels, **fields)


def rollback(*, key: str = "new", **fields: Any) -> Change:
    """A request for an older bundle."""
    return Change("pets", key, **fields)


def retirement(*, key: str = "new", **fields: Any) -> Change:
    """A request to end a task."""
    return Change("pets", key, retires=True, **fields)


def retired(*bundles: str) -> LogView:
    """A log in which these bundles were pushed in turn, and then the task was retired."""
    return after(log(*bundles), retirement(key="end"))


def setting(task: str = "pets", *, key: str = "new", **settings: Any) -> Change:
    """A request to set something for a task."""
    return Change(task, key, settings=asked_settings(settings))


def trust(seed: int = 1, *, key: str = "new", **fields: Any) -> KeyRequest:
    """A request to trust the signing key of that seed."""
    wanted = trusting(seed, **fields)
    return KeyRequest(wanted.key_id, key, wanted)


def revoke(seed: int = 1, *, key: str = "new") -> KeyRequest:
    """A request to trust it no more."""
    return KeyRequest(trusting(seed).key_id, key)


def signed(bundle: str, *, seed: int = 1, minute: int = 0, **fields: Any) -> Change:
    """A push that the gate found signed by the key of that seed, at that minute."""
    at = NOW + timedelta(minutes=minute)
    by = SignedBy(key_id=trusting(seed).key_id, signed_at=at, envelope=bundle)
    return push(bundle, signed=by, **fields)


def after(view: LogView, change: AnyChange) -> LogView:
    """The log once this change has been made."""
    outcome = propose(view, change, NOW)
    assert isinstance(outcome, Proposal), outcome
    record = Record(
        number=view.number + 1,
        kind="commit",
        previous=view.tip,
        writer="test",
        written_at="",
        changes=outcome.changes,
        settings=outcome.settings,
        signing_keys=outcome.signing_keys,
        tokens=outcome.tokens,
        heldout=outcome.heldout,
        idempotency_key=change.key,
    )
    return fold(view, [record])


def proposed(view: LogView, change: Change) -> TaskChange:
    """The one change that is proposed."""
    outcome = propose(view, change, NOW)
    assert isinstance(outcome, Proposal), outcome
    assert outcome.settings == ()
    (task_change,) = outcome.changes
    return task_change


def refused(view: LogView, change: AnyChange) -> Refused:
    """The refusal."""
    outcome = propose(view, change, NOW)
    assert isinstance(outcome, Refused), outcome
    return outcome


@pytest.mark.parametrize(("view", "version"), [(LogView(), 1), (log(A), 2), (log(A, B, A), 4)])
def test_a_push_makes_the_next_version(view: LogView, version: int) -> None:
    """Also of a bundle that was live before."""
    change = proposed(view, push(A))

    assert (change.task, change.version, change.action) == ("pets", version, "push")
    assert (change.bundle, change.labels, change.rolled_back_to) == (A, LABELS, None)


@pytest.mark.parametrize(
    ("history", "to", "bundle", "target"),
    [
        ((A, B), None, A, 1),
        ((A, B, B), None, A, 1),
        ((A, B, C), None, B, 2),
        ((A, B, A), None, B, 2),
        ((A, B, C), 1, A, 1),
        ((A, B, C), 3, C, 3),
    ],
    ids=["two", "repushed", "three", "back and forth", "by number", "the live one by number"],
)
def test_a_rollback_takes_an_older_bundle_as_the_next_version(
    history: tuple[str, ...], to: int | None, bundle: str, target: int
) -> None:
    """By default the last one that is not the live one, with its labels."""
    change = proposed(log(*history), rollback(to=to))

    assert (change.version, change.action) == (len(history) + 1, "rollback")
    assert (change.bundle, change.rolled_back_to, change.labels) == (bundle, target, LABELS)


def test_a_rollback_brings_its_labels_back() -> None:
    """Nobody has to declare what the older version declared already."""
    view = log(A)
    wider = proposed(view, push(B, labels=("cat", "dog", "fish"), allow_new_labels=True))
    record = Record(
        number=2, kind="commit", previous=view.tip, writer="t", written_at="", changes=(wider,)
    )

    assert proposed(fold(view, [record]), rollback()).labels == LABELS


@pytest.mark.parametrize(
    ("view", "change", "kind", "reason"),
    [
        (LogView(), rollback(), "unknown", "Task 'pets' was never pushed."),
        (log(A), rollback(), "conflict", "no earlier bundle to roll back to; it has versions 1"),
        (log(A, A), rollback(), "conflict", "no earlier bundle"),
        (log(A, B), rollback(to=3), "conflict", "no version 3 to roll back to"),
        (log(A, B), rollback(expected=1), "conflict", "is at version 2; expected version 1"),
        (log(A), push(B, expected=2), "conflict", "is at version 1; expected version 2"),
        (LogView(), push(B, expected=2), "conflict", "is at no version; expected version 2"),
        (log(A), push(B, labels=("cat", "fish")), "gate", "gone: ['dog'], new: ['fish']"),
        (log(A), push(B, labels=("dog", "cat")), "gate", "the order differs"),
        (log(A), push(B, key="k1"), "conflict", "'k1' already made version 1 of task pets"),
        (log(A), rollback(key="k1"), "conflict", "'k1' already made"),
        (log(A, task="birds"), push(A, key="k1"), "conflict", "of task birds"),
        (LogView(), retirement(), "unknown", "Task 'pets' was never pushed."),
        (retired(A), retirement(), "conflict", "is retired already, since version 2"),
        (log(A, B), retirement(expected=1), "conflict", "is at version 2; expected version 1"),
        (log(A), retirement(key="k1"), "conflict", "'k1' already made version 1"),
        (retired(A), push(B, key="end"), "conflict", "'end' already made version 2"),
        (retired(A), rollback(key="end"), "conflict", "'end' already made version 2"),
        (
            retired(A),
            rollback(to=2),
            "conflict",
            "no version 2 to roll back to; it has versions 1.",
        ),
        (retired(A), push(B, labels=("dog", "cat")), "gate", "the order differs"),
        (log(A), setting("cars", weight=2), "unknown", "Task 'cars' was never pushed."),
        (log(A), setting(weight=2, key="k1"), "conflict", "'k1' already made version 1"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(
    view: LogView, change: Change, kind: str, reason: str
) -> None:
    """Nothing is proposed then."""
    answer = refused(view, change)

    assert answer.kind == kind
    assert reason in answer.reason


def test_declared_labels_are_accepted() -> None:
    """The change is the pusher's word."""
    change = proposed(log(A), push(B, labels=("dog", "cat"), allow_new_labels=True))

    assert change.labels == ("dog", "cat")


@pytest.mark.parametrize("live", [1, 2])
def test_an_expected_version_that_is_live_changes_nothing(live: int) -> None:
    """It is a condition and no more."""
    assert proposed(log(*[A, B][:live]), push(C, expected=live)).version == live + 1


def test_the_same_key_gives_the_same_answer() -> None:
    """Whatever has been pushed since, and whatever is expected now."""
    outcome = propose(log(A, B, C), push(A, key="k1", expected=1), NOW)

    assert isinstance(outcome, Swapped)
    assert outcome.is_repeat
    assert outcome.change == log(A).tasks["pets"][0].change


@pytest.mark.parametrize(("to", "is_same"), [(None, True), (1, True), (2, False)])
def test_a_repeated_rollback_has_to_name_the_same_version(to: int | None, *, is_same: bool) -> None:
    """Or none, as at first."""
    view = log(A, B)
    record = Record(
        number=3,
        kind="commit",
        previous=view.tip,
        writer="t",
        written_at="",
        changes=(proposed(view, rollback()),),
        idempotency_key="r",
    )
    outcome = propose(fold(view, [record]), rollback(key="r", to=to), NOW)

    assert isinstance(outcome, Swapped) == is_same


def test_labels_that_only_differ_in_order_are_told_apart() -> None:
    """The order is what scores are named by."""
    assert "the order differs" in new_labels_reason(("a", "b"), ("b", "a"))
    assert "gone: ['a'], new: ['c']" in new_labels_reason(("a", "b"), ("b", "c"))


def test_settings_keep_what_is_not_asked_and_touch_no_version() -> None:
    """The record has all of them, as they are from then on."""
    view = after(log(A), setting(weight=2, pinned=True, key="first"))
    outcome = propose(view, setting(weight=3), NOW)

    assert isinstance(outcome, Proposal)
    assert outcome.changes == ()
    assert [(s.task, s.settings) for s in outcome.settings] == [
        ("pets", TaskSettings(weight=3, pinned=True))
    ]
    assert view.tasks == log(A).tasks


@pytest.mark.parametrize(
    ("change", "is_same"),
    [
        (setting(weight=2, key="k"), True),
        (setting(weight=2.0, key="k"), True),
        (setting(weight=3, key="k"), False),
        (setting(pinned=True, key="k"), False),
        (setting("cars", weight=2, key="k"), False),
        (push(B, key="k"), False),
        (rollback(key="k"), False),
    ],
    ids=["same", "as a fraction", "value", "setting", "task", "push", "rollback"],
)
def test_a_repeated_setting_is_one_change(change: Change, *, is_same: bool) -> None:
    """Also when other settings were made since; for anything else the key is used up."""
    view = after(after(log(A), setting(weight=2, key="k")), setting(weight=5, key="l"))
    outcome = propose(view, change, NOW)

    assert isinstance(outcome, Swapped if is_same else Refused)
    if isinstance(outcome, Refused):
        assert "'k' already changed the settings of task pets" in outcome.reason


def test_the_key_of_a_rollback_sets_nothing() -> None:
    """It answers for its rollback alone."""
    view = after(log(A, B), rollback(key="r"))

    assert refused(view, setting(weight=2, key="r")).kind == "conflict"


def test_trusting_a_key_touches_no_task() -> None:
    """The record has the key and nothing else."""
    outcome = propose(log(A), trust(tasks=("pets*",)), NOW)

    assert isinstance(outcome, Proposal)
    assert outcome == Proposal(signing_keys=(trusting(1, tasks=("pets*",)),))


def test_trust_can_be_changed_and_revoked() -> None:
    """The last word counts, and what was said before it is kept."""
    view = after(log(), trust(key="a"))
    view = after(view, trust(tasks=("cars",), key="b"))
    view = after(view, revoke(key="c"))
    key_id = trusting(1).key_id

    assert view.signing_keys == {key_id: trusting(1, tasks=("cars",), is_revoked=True)}
    assert [version.change.tasks for version in view.key_history[key_id]] == [
        ("*",), ("cars",), ("cars",)
    ]  # fmt: skip


def test_what_is_so_already_makes_no_record() -> None:
    """Trusting as before, and revoking twice."""
    view = after(log(), trust(key="a"))
    gone = after(view, revoke(key="b"))

    for now, change in ((view, trust()), (gone, revoke())):
        outcome = propose(now, change, NOW)
        assert isinstance(outcome, Swapped)
        assert outcome.is_repeat


@pytest.mark.parametrize(
    ("view", "change", "kind", "reason"),
    [
        (log(), revoke(), "unknown", "was never trusted"),
        (after(after(log(), trust(key="a")), revoke(key="b")), trust(), "conflict", "for ever"),
        (after(log(), trust(key="a")), trust(2, name="key1"), "conflict", "The name key1 is that"),
        (after(log(), trust(key="a")), trust(2, key="a"), "conflict", "changed the trust in key"),
        (after(log(), trust(key="a")), revoke(key="a"), "conflict", "changed the trust in key"),
        (after(log(), trust(key="a")), push(A, key="a"), "conflict", "the trust in key key1"),
        (log(A), trust(key="k1"), "conflict", "'k1' already made version 1 of task pets"),
    ],
)
def test_trust_that_cannot_be_changed_says_why(
    view: LogView, change: AnyChange, kind: str, reason: str
) -> None:
    """Nothing is proposed then."""
    answer = refused(view, change)

    assert answer.kind == kind
    assert reason in answer.reason


def test_a_name_is_free_again_when_its_key_is_revoked() -> None:
    """So that a key can be replaced by one of the same name."""
    view = after(after(log(), trust(key="a")), revoke(key="b"))

    assert isinstance(propose(view, trust(2, name="key1"), NOW), Proposal)


@pytest.mark.parametrize("change", [trust(key="a"), revoke(key="b")])
def test_a_repeated_request_about_a_key_is_one_change(change: KeyRequest) -> None:
    """Whatever was said of it since."""
    view = after(after(log(), trust(key="a")), revoke(key="b"))
    outcome = propose(view, change, NOW)

    assert isinstance(outcome, Swapped)
    assert outcome.is_repeat


def test_before_any_key_was_trusted_a_push_needs_no_signature() -> None:
    """And the version then has none."""
    assert proposed(log(), push(A)).signed is None


def test_once_a_key_was_trusted_an_unsigned_push_is_refused() -> None:
    """The gate may have admitted it a moment before; also when the key is revoked again."""
    view = after(log(A), trust(key="a"))

    for now in (view, after(view, revoke(key="b"))):
        answer = refused(now, push(B))
        assert answer.kind == "gate"
        assert "The bundle is not signed" in answer.reason


def test_the_version_names_its_signature_and_so_does_a_rollback_to_it() -> None:
    """The rollback needs none of its own."""
    view = after(log(), trust(key="a"))
    view = after(view, signed(A, key="b"))
    first = view.tasks["pets"][0].change
    view = after(view, signed(B, minute=1, key="c"))
    view = after(view, revoke(key="d"))
    back = proposed(view, rollback())

    assert first.signed == signed(A).signed
    assert back.signed == first.signed


def test_a_rollback_to_an_unsigned_version_is_allowed() -> None:
    """It was admitted when nobody asked for signatures."""
    view = after(after(log(A), trust(key="a")), signed(B, key="b"))

    assert proposed(view, rollback()).signed is None


@pytest.mark.parametrize(
    ("requests", "reason"),
    [
        ([trust(key="a"), revoke(key="b")], "which was revoked"),
        ([trust(2, key="a")], "which nobody has trusted"),
        ([trust(key="a", valid_until=NOW)], "was trusted until"),
        ([trust(key="a", tasks=("cars", "pets?"))], "and not for pets"),
    ],
)
def test_a_key_that_was_trusted_a_moment_ago_may_be_so_no_more(
    requests: list[KeyRequest], reason: str
) -> None:
    """What counts is the log as it stands when the record is written."""
    view = log()
    for request in requests:
        view = after(view, request)
    answer = refused(view, signed(A))

    assert answer.kind == "gate"
    assert reason in answer.reason


@pytest.mark.parametrize(("minute", "is_new"), [(4, False), (5, False), (6, True)])
def test_an_old_signature_brings_no_old_bundle_back(minute: int, *, is_new: bool) -> None:
    """It has to be newer than the newest of its task, whoever signed, also after a rollback."""
    view = after(after(log(), trust(key="a")), trust(2, key="b"))
    for place, at in enumerate((4, 5)):
        view = after(view, signed((A, B)[place], minute=at, key=f"p{place}"))
    rolled_back = after(view, rollback(key="r"))
    for now in (view, rolled_back):
        outcome = propose(now, signed(A, seed=2, minute=minute), NOW)

        assert isinstance(outcome, Proposal if is_new else Refused)
        if isinstance(outcome, Refused):
            assert outcome.kind == "conflict"
            assert "signed at 2026-11-21T00:05:00+00:00 has been pushed" in outcome.reason


def canary(bundle: str, **fields: Any) -> Change:
    """A signed push that begins a rollout."""
    return signed(bundle, share=0.5, **fields)


def promotion(*, key: str = "new", **fields: Any) -> Change:
    """A request to promote."""
    return Change("pets", key, promote=True, **fields)


def rolling() -> LogView:
    """A log with a rollout: a signed bundle live, another its candidate."""
    view = after(after(log(), trust(key="a")), trust(2, key="b"))
    view = after(view, signed(A, minute=1, key="c"))
    return after(view, canary(B, seed=2, minute=2, key="d"))


def test_a_candidate_keeps_its_own_signature_until_it_is_live() -> None:
    """Beside that of what is live, also when its share changes."""
    view = after(rolling(), promotion(share=0.9, key="e"))
    both = view.tasks["pets"][-1].change
    alone = proposed(view, promotion())

    assert both.signed == signed(A, minute=1).signed
    assert both.candidate is not None
    assert both.candidate.signed == alone.signed == signed(B, seed=2, minute=2).signed


@pytest.mark.parametrize("share", [None, 0.9])
def test_a_candidate_whose_key_was_revoked_goes_no_further(share: float | None) -> None:
    """Who stole the key may have begun the rollout; what is live keeps its place."""
    answer = refused(after(rolling(), revoke(2, key="e")), promotion(share=share))
    still = propose(after(rolling(), revoke(1, key="e")), promotion(share=share), NOW)

    assert (answer.kind, "which was revoked" in answer.reason) == ("gate", True)
    assert isinstance(still, Proposal)


def test_a_candidate_from_before_signatures_goes_no_further_than_it_is() -> None:
    """It was admitted for some callers when nobody asked; for more it is asked."""
    view = after(log(A), push(B, share=0.5, key="b"))
    before = propose(view, promotion(), NOW)
    answer = refused(after(view, trust(key="c")), promotion())

    assert isinstance(before, Proposal)
    assert "The bundle is not signed" in answer.reason


def test_an_old_signature_is_no_newer_for_having_been_a_candidates() -> None:
    """A rollout that was rolled back was pushed too."""
    view = after(rolling(), rollback(key="e"))

    assert "an old signature" in refused(view, canary(C, minute=2)).reason
    assert isinstance(propose(view, canary(C, minute=3), NOW), Proposal)


def test_each_task_has_its_own_newest_signature() -> None:
    """Signing for one does not make what is signed for another old."""
    view = after(after(log(), trust(key="a")), signed(A, minute=5, key="b"))
    by = signed(B).signed
    cars = Change("cars", "new", bundle=B, labels=LABELS, signed=by)

    assert proposed(view, cars).task == "cars"


def foreign(number: int, *changes: TaskChange | SettingsChange, key: str = "theirs") -> Record:
    """A record of another service."""
    return Record(
        number=number,
        kind="commit" if changes else "abort",
        previous=A,
        writer="conductor-b",
        written_at="",
        changes=tuple(c for c in changes if isinstance(c, TaskChange)),
        settings=tuple(c for c in changes if isinstance(c, SettingsChange)),
        idempotency_key=key if changes else "",
        message="a better one",
    )


def pushed(task: str, version: int = 2) -> TaskChange:
    """Another service's push."""
    return TaskChange(task=task, version=version, action="push", bundle=C, labels=LABELS)


def was_set(task: str) -> SettingsChange:
    """Settings that another service changed."""
    return SettingsChange(task=task, settings=TaskSettings(weight=2))


@pytest.mark.parametrize("change", [push(B), rollback(), setting(weight=3)])
def test_a_change_stands_if_others_left_its_task_alone(change: Change) -> None:
    """Whatever they did to other tasks, and whatever was aborted."""
    assert overtaken(change, [foreign(7), foreign(8, pushed("birds")), foreign(9)]) is None
    assert overtaken(change, [foreign(7, was_set("birds"))]) is None
    assert overtaken(change, []) is None


@pytest.mark.parametrize("change", [push(B), rollback(), setting(weight=3)])
@pytest.mark.parametrize(
    ("theirs", "did"),
    [(pushed("pets", 4), "made version 4"), (was_set("pets"), "changed the settings")],
)
def test_a_change_whose_task_was_touched_is_a_conflict_that_names_who_won(
    change: Change, theirs: TaskChange | SettingsChange, did: str
) -> None:
    """What was proposed was meant for another state of the task."""
    refused = overtaken(change, [foreign(7, pushed("birds")), foreign(8, theirs)])

    assert refused == Refused(
        "conflict",
        f"conductor-b was first: record 8 {did} of task pets (a better one) while this change was "
        "on its way. Look at what is live now, and ask again if the change is still meant.",
    )


def test_a_change_that_another_service_made_by_the_same_key_is_no_conflict() -> None:
    """Its answer is in the log already: the same request reached two services."""
    change = push(C, key="k")

    assert overtaken(change, [foreign(7, pushed("pets"), key="k")]) is None
    assert overtaken(change, [foreign(7, pushed("pets"), key="l")]) is not None


def test_a_retirement_is_the_next_version_without_a_bundle() -> None:
    """Its labels stay, so that a later push is compared with what callers knew."""
    change = proposed(log(A, B), retirement())

    assert (change.version, change.action, change.bundle) == (3, "retire", None)
    assert change.labels == LABELS


@pytest.mark.parametrize(
    ("change", "action", "bundle", "back_to"),
    [
        (push(C), "push", C, None),
        (rollback(), "rollback", B, 2),
        (rollback(to=1), "rollback", A, 1),
    ],
    ids=["push", "rollback", "rollback by number"],
)
def test_a_retired_task_comes_back_as_its_next_version(
    change: Change, action: str, bundle: str, back_to: int | None
) -> None:
    """By a push; or by a rollback, by default to its last bundle."""
    made = proposed(retired(A, B), change)

    assert (made.version, made.action, made.bundle) == (4, action, bundle)
    assert made.rolled_back_to == back_to


def test_a_rollback_after_a_return_passes_over_the_retirement() -> None:
    """It goes to another bundle, not to none."""
    back = after(retired(A, B), rollback(key="back"))

    assert proposed(back, rollback()).bundle == A


def test_a_repeated_retirement_is_one_change() -> None:
    """Also after the task has come back."""
    outcome = propose(after(retired(A), push(B)), retirement(key="end"), NOW)

    assert isinstance(outcome, Swapped)
    assert outcome.is_repeat
    assert outcome.change is not None
    assert outcome.change.version == 2


SAMPLE, OTHER = (digest_of(name.encode()) for name in ("sample", "other"))
WIDER = ("cat", "dog", "fish")


def samples(view: LogView) -> list[tuple[str, tuple[str, ...]]]:
    """The task's held-out samples, oldest first."""
    return [(s.change.heldout, s.change.labels) for s in view.heldouts.get("pets", ())]


def heldout(sample: str, *, key: str = "new", labels: tuple[str, ...] = LABELS) -> Change:
    """A request to replace the task's held-out sample."""
    return Change("pets", key, heldout=sample, labels=labels)


def test_a_tasks_first_push_sets_its_sample_and_later_ones_do_not() -> None:
    """The same record makes the version and the sample."""
    first = after(LogView(), push(A, heldout=SAMPLE, key="a"))
    second = after(first, push(B, heldout=OTHER, key="b"))

    assert samples(first) == samples(second) == [(SAMPLE, LABELS)]
    assert first.heldouts["pets"][0].number == first.tasks["pets"][0].number == 1


def test_a_task_that_went_live_without_a_sample_gets_none_by_a_push() -> None:
    """Else the second pusher would choose."""
    view = after(after(LogView(), push(A, key="a")), push(B, heldout=SAMPLE))

    assert samples(view) == []


def test_new_labels_bring_a_sample_and_old_ones_find_theirs_again() -> None:
    """Back and forth between labels, nobody can choose anew."""
    first = after(LogView(), push(A, heldout=SAMPLE, key="a"))
    wider = push(B, heldout=OTHER, labels=WIDER, allow_new_labels=True, key="b")
    view = after(first, wider)
    back = after(view, push(C, heldout=OTHER, allow_new_labels=True, key="c"))
    mine, theirs = back.heldout("pets", LABELS, None), back.heldout("pets", WIDER, None)

    assert samples(back) == [(SAMPLE, LABELS), (OTHER, WIDER)]
    assert mine is not None
    assert theirs is not None
    assert (mine.change.heldout, theirs.change.heldout) == (SAMPLE, OTHER)
    assert back.heldout("pets", ("dog", "cat"), None) is None


def test_a_sample_is_replaced_on_purpose_without_a_new_version() -> None:
    """And again; the same key makes one change of it."""
    view = after(log(A), heldout(SAMPLE, key="s"))
    again = propose(view, heldout(SAMPLE, key="s"), NOW)
    replaced = after(view, heldout(OTHER))

    assert samples(replaced) == [(SAMPLE, LABELS), (OTHER, LABELS)]
    assert replaced.tasks == log(A).tasks
    assert isinstance(again, Swapped)
    assert (again.is_repeat, again.change) == (True, None)


@pytest.mark.parametrize(
    ("view", "change", "kind", "reason"),
    [
        (LogView(), heldout(SAMPLE), "unknown", "was never pushed"),
        (log(A), heldout(SAMPLE, labels=WIDER), "conflict", "changed while its held-out sample"),
        (log(A), heldout(SAMPLE, key="k1"), "conflict", "'k1' already made version 1"),
        (after(log(A), heldout(SAMPLE, key="s")), heldout(OTHER, key="s"), "conflict", "'s' alr"),
        (
            after(log(A), heldout(SAMPLE, key="s")), push(B, key="s"),
            "conflict", "'s' already set the held-out sample of task pets",
        ),
        (after(log(A), setting(weight=2, key="w")), heldout(SAMPLE, key="w"), "conflict", "'w' al"),
        (after(log(A, B), rollback(key="r")), heldout(SAMPLE, key="r"), "conflict", "'r' already"),
    ],
)  # fmt: skip
def test_a_sample_that_cannot_be_set_says_why(
    view: LogView, change: Change, kind: str, reason: str
) -> None:
    """Nothing is proposed then."""
    answer = refused(view, change)

    assert answer.kind == kind
    assert reason in answer.reason


@pytest.mark.parametrize(
    "between",
    [
        push(C, key="p"),
        rollback(key="r"),
        retirement(key="e"),
        heldout(SAMPLE, key="h"),
        setting(margin=0.2, key="m"),
        setting(max_slowdown=3, key="s"),
    ],
    ids=["push", "rollback", "retirement", "sample", "margin", "slow-down"],
)
def test_a_push_whose_comparison_is_out_of_date_is_stale(between: Change) -> None:
    """Whatever the gates went by has to hold when the record is written."""
    view = log(A, B)
    compared = push(C, grounds=grounds_of(view, "pets", LABELS))

    assert proposed(view, compared).version == 3
    assert refused(after(view, between), compared).kind == "stale"


@pytest.mark.parametrize(
    "between", [setting(weight=2, key="w"), setting("cars", margin=0.5, key="m")]
)
def test_what_the_gates_do_not_go_by_makes_no_push_stale(between: Change) -> None:
    """Nor do other tasks."""
    both = log(A)
    cars = Change("cars", "cars", bundle=B, labels=LABELS)
    both = after(both, cars)
    compared = push(C, grounds=grounds_of(both, "pets", LABELS))

    assert proposed(after(both, between), compared).version == 2
