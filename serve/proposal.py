"""What a requested change means for the log as it stands: the next version of its task, or a no."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from export.bundle import Digest
from serve.access import TokenChange
from serve.grounds import grounds_of
from serve.messages import (
    AnyChange,
    Change,
    KeyRequest,
    Pushes,
    Refused,
    Swapped,
    TokenRequest,
    TrunkRollback,
)
from serve.record import (
    Candidate,
    HeldoutChange,
    LogView,
    Record,
    SettingsChange,
    TaskChange,
    TaskVersion,
    TrunkChange,
    Verdict,
)
from serve.repeats import repeated, touched
from serve.task_settings import DEFAULTS
from serve.trunk_proposal import is_for_served_trunk, trunk_refusal, trunk_rollback
from serve.trust import (
    SHORT_ID,
    KeyChange,
    SignedBy,
    UntrustedError,
    trusted_key,
    unsigned_reason,
)

NOTHING_TO_DO = Swapped((), stage_ms=0.0, hold_ms=0.0, replicas=0, is_repeat=True)


@dataclass(frozen=True)
class Proposal:
    """What the record of a change says."""

    changes: tuple[TaskChange, ...] = ()
    settings: tuple[SettingsChange, ...] = ()
    signing_keys: tuple[KeyChange, ...] = ()
    tokens: tuple[TokenChange, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    heldout: tuple[HeldoutChange, ...] = ()
    trunk: TrunkChange | None = None


def propose(view: LogView, change: AnyChange, now: datetime) -> Proposal | Refused | Swapped:
    """What the record says; or the answer at once, when nothing is to be written.

    Pure: the same log, change and time always give the same proposal.

    Args:
        now: UTC; what signing keys are valid at.
    """
    if made := view.made_by(change.key):
        return repeated(made, change)
    if isinstance(change, KeyRequest | TokenRequest):
        return _trust_or_revoke(view, change)
    if isinstance(change, Pushes):
        return _push_all(view, change, now)
    if isinstance(change, TrunkRollback):
        back = trunk_rollback(view, change.expected)
        return back if isinstance(back, Refused) else Proposal(trunk=back[0], changes=back[1])
    return _of_one_task(view, change, now)


def _of_one_task(view: LogView, change: Change, now: datetime) -> Proposal | Refused:
    last = view.last(change.task)
    if change.expected is not None and change.expected != (last.change.version if last else 0):
        standing = f"version {last.change.version}" if last else "no version"
        return Refused(
            "conflict", f"Task {change.task} is at {standing}; expected version {change.expected}."
        )
    if change.settings:
        return _set(view, change)
    if change.promote:
        return _promote(view, change, now)
    if change.retires:
        return _retire(last, change)
    if change.bundle is not None:
        return _push(view, change, change.bundle, now)
    if change.heldout is not None:
        return _set_heldout(view, change)
    return _roll_back(view, change)


def _push_all(view: LogView, asked: Pushes, now: datetime) -> Proposal | Refused:
    """What all pushes say in one record, or why some cannot be made."""
    if asked.trunk and (refused := trunk_refusal(view, asked.trunk, asked.pushes)):
        return refused
    made: list[Proposal] = []
    refusals: dict[str, Refused] = {}
    for push in asked.pushes:
        assert push.bundle is not None
        proposed = _push(view, push, push.bundle, now, asked.trunk)
        if isinstance(proposed, Refused):
            refusals[push.task] = proposed
        else:
            made.append(proposed)
    if refusals:
        # One that cannot be made whatever is compared anew stops all the others.
        kinds = sorted((refused.kind for refused in refusals.values()), key="stale".__eq__)
        reasons = (f"{task}: {refused.reason}" for task, refused in refusals.items())
        return Refused(kinds[0], " ".join(reasons))
    return Proposal(
        changes=tuple(change for proposal in made for change in proposal.changes),
        heldout=tuple(sample for proposal in made for sample in proposal.heldout),
        verdicts=tuple(verdict for proposal in made for verdict in proposal.verdicts),
        trunk=asked.trunk,
    )


def _push(
    view: LogView,
    change: Change,
    bundle: Digest,
    now: datetime,
    new_trunk: TrunkChange | None = None,
) -> Proposal | Refused:
    last, grounds = view.last(change.task), grounds_of(view, change.task, change.labels, new_trunk)
    if last and last.change.candidate:
        return Refused(
            "conflict",
            f"A rollout is under way in version {last.change.version} of task {change.task}; "
            "promote it or roll it back first.",
        )
    if change.grounds is not None and change.grounds != grounds:
        return Refused(
            "stale",
            f"Task {change.task} changed while the gates compared this push with what was live. "
            "Push again.",
        )
    if last and last.change.labels != change.labels and not change.allow_new_labels:
        return Refused("gate", new_labels_reason(last.change.labels, change.labels))
    if refused := _signer_refusal(view, change.task, change.signed, now):
        return refused
    if refused := _replay_refusal(view, change):
        return refused
    heldout = _samples(change) if grounds.takes_heldout else ()
    if change.share is not None:
        return _begin_rollout(view.live(change.task), bundle, change, heldout)
    push = TaskChange(
        task=change.task,
        version=last.change.version + 1 if last else 1,
        action="push",
        bundle=bundle,
        labels=change.labels,
        signed=change.signed,
    )
    return Proposal(changes=(push,), heldout=heldout, verdicts=change.verdicts)


def overtaken(change: AnyChange, foreign: Iterable[Record]) -> Refused | None:
    """Whether a change that was proposed still stands after records of other writers.

    Pure. One whose task they left alone stands, and is proposed anew for the next free number; so
    does one that they made themselves, by the same key, which then has its answer already. What
    is asked about a signing key or a token means the same whatever others did.

    Returns:
        None if it stands; else why not, and who was first.
    """
    tasks = _tasks_of(change)
    for record in foreign:
        if record.idempotency_key == change.key:
            return None
        is_shared = tasks is None and (record.changes or record.heldout or record.trunk)
        if is_shared or (record.trunk and tasks):
            return Refused(
                "conflict",
                f"{record.writer} was first: record {record.number} was written while this change "
                "was on its way, and one of the two is of the trunk, which all tasks share. Look "
                "at what is live now, and ask again if the change is still meant.",
            )
        for other in (*record.changes, *record.settings, *record.heldout):
            if tasks and other.task in tasks:
                why = f" ({record.message})" if record.message else ""
                return Refused(
                    "conflict",
                    f"{record.writer} was first: record {record.number} {touched(other)} of task "
                    f"{other.task}{why} while this change was on its way. Look at what is live "
                    "now, and ask again if the change is still meant.",
                )
    return None


def _tasks_of(change: AnyChange) -> set[str] | None:
    """The tasks that a change is about; None for all of them."""
    if isinstance(change, KeyRequest | TokenRequest):
        return set()
    if isinstance(change, TrunkRollback) or (isinstance(change, Pushes) and change.trunk):
        return None
    return {push.task for push in (change.pushes if isinstance(change, Pushes) else (change,))}


def new_labels_reason(live: tuple[str, ...], pushed: tuple[str, ...]) -> str:
    """Why labels that are not the live ones need a declaration."""
    gone = [label for label in live if label not in pushed]
    new = [label for label in pushed if label not in live]
    difference = f"gone: {gone}, new: {new}" if gone or new else "the order differs"
    return (
        f"The labels are not those that are live ({difference}). Callers would see other names: "
        "push with the change of labels declared if that is meant."
    )


def _signer_refusal(
    view: LogView, task: str, signed: SignedBy | None, now: datetime
) -> Refused | None:
    """The gate verified the signature; since then a key may have been trusted or revoked."""
    keys = view.signing_keys
    if signed is None:
        return Refused("gate", unsigned_reason(keys, now)) if keys else None
    try:
        trusted_key(keys, signed.key_id, task=task, now=now)
    except UntrustedError as error:
        return Refused("gate", str(error))
    return None


def _replay_refusal(view: LogView, change: Change) -> Refused | None:
    if change.signed is None:
        return None
    versions = [version.change for version in view.tasks.get(change.task, ())]
    earlier = [side.signed for v in versions for side in (v, v.candidate) if side]
    newest = max((signed.signed_at for signed in earlier if signed), default=None)
    if newest is not None and change.signed.signed_at <= newest:
        return Refused(
            "conflict",
            f"The bundle was signed at {change.signed.signed_at.isoformat()}, and one that was "
            f"signed at {newest.isoformat()} has been pushed: an old signature does not bring an "
            "old bundle back. Sign it again, or roll back.",
        )
    return None


def _trust_or_revoke(
    view: LogView, request: KeyRequest | TokenRequest
) -> Proposal | Refused | Swapped:
    if isinstance(request, KeyRequest):
        return _revoke(view, request) if request.trust is None else _trust(view, request.trust)
    return _revoke_token(view, request) if request.token is None else _issue(view, request.token)


def _trust(view: LogView, wanted: KeyChange) -> Proposal | Refused | Swapped:
    known = view.signing_keys
    if wanted == known.get(wanted.key_id):
        return NOTHING_TO_DO
    if wanted.key_id in known and known[wanted.key_id].is_revoked:
        return Refused(
            "conflict",
            f"Key {wanted.key_id[:SHORT_ID]} was revoked, which is for ever; make a new key.",
        )
    for other in known.values():
        is_other = other.key_id != wanted.key_id and not other.is_revoked
        if is_other and other.name == wanted.name:
            return Refused(
                "conflict",
                f"The name {wanted.name} is that of key {other.key_id[:SHORT_ID]}; choose another, "
                "or revoke that key first.",
            )
    return Proposal(signing_keys=(wanted,))


def _revoke(view: LogView, request: KeyRequest) -> Proposal | Refused | Swapped:
    known = view.signing_keys.get(request.key_id)
    if known is None:
        return Refused("unknown", f"Key {request.key_id[:SHORT_ID]} was never trusted.")
    if known.is_revoked:
        return NOTHING_TO_DO
    return Proposal(signing_keys=(known.model_copy(update={"is_revoked": True}),))


def _issue(view: LogView, wanted: TokenChange) -> Proposal | Refused | Swapped:
    known = view.tokens
    if wanted == known.get(wanted.token_id):
        return NOTHING_TO_DO
    if wanted.token_id in known:
        return Refused(
            "conflict",
            f"Token {wanted.token_id} is there already and stays as it is; make a new one, and "
            "revoke this one when nobody needs it any more.",
        )
    for other in known.values():
        if other.name == wanted.name and not other.is_revoked:
            return Refused(
                "conflict",
                f"The name {wanted.name} is that of token {other.token_id}; choose another, or "
                "revoke that token first.",
            )
    return Proposal(tokens=(wanted,))


def _revoke_token(view: LogView, request: TokenRequest) -> Proposal | Refused | Swapped:
    known = view.tokens.get(request.token_id)
    if known is None:
        return Refused("unknown", f"There is no token {request.token_id}.")
    if known.is_revoked:
        return NOTHING_TO_DO
    return Proposal(tokens=(known.model_copy(update={"is_revoked": True}),))


def _samples(change: Change) -> tuple[HeldoutChange, ...]:
    if change.heldout is None:
        return ()
    return (HeldoutChange(task=change.task, labels=change.labels, heldout=change.heldout),)


def _set_heldout(view: LogView, change: Change) -> Proposal | Refused:
    last, trunk = view.last(change.task), view.trunk
    if last is None:
        return _never_pushed(change)
    if trunk is not None and trunk.pictures != change.pictures:
        return Refused(
            "conflict",
            f"Trunk {trunk.trunk} went live while the held-out sample of task {change.task} was "
            "checked, and takes pictures decoded otherwise. Decode the sample for that trunk and "
            "send it again.",
        )
    if last.change.labels != change.labels:
        return Refused(
            "conflict",
            f"The labels of task {change.task} changed while its held-out sample was checked. "
            "Send it again.",
        )
    return Proposal(heldout=_samples(change))


def _set(view: LogView, change: Change) -> Proposal | Refused:
    if change.task not in view.tasks:
        return _never_pushed(change)
    settings = view.settings.get(change.task, DEFAULTS).updated(change.settings)
    return Proposal(settings=(SettingsChange(task=change.task, settings=settings),))


def _begin_rollout(
    live: TaskVersion | None,
    bundle: Digest,
    change: Change,
    heldout: tuple[HeldoutChange, ...],
) -> Proposal | Refused:
    assert change.share is not None
    if live is None:
        return Refused(
            "conflict",
            f"Task {change.task} has no live version to compare with; push the first at once.",
        )
    if live.change.bundle == bundle:
        return Refused("conflict", f"Bundle {bundle} is what is live of task {change.task}.")
    candidate = Candidate(
        bundle=bundle, labels=change.labels, share=change.share, signed=change.signed
    )
    begun = _with_candidate(live.change, candidate)
    return Proposal(changes=(begun,), heldout=heldout, verdicts=change.verdicts)


def _with_candidate(live: TaskChange, candidate: Candidate) -> TaskChange:
    return TaskChange(
        task=live.task,
        version=live.version + 1,
        action="canary" if candidate.share else "shadow",
        bundle=live.bundle,
        labels=live.labels,
        signed=live.signed,
        candidate=candidate,
    )


def _promote(view: LogView, change: Change, now: datetime) -> Proposal | Refused:
    live = view.last(change.task)
    if live is None:
        return _never_pushed(change)
    candidate = live.change.candidate
    if candidate is None:
        return Refused("conflict", f"Task {change.task} has no candidate to promote.")
    # Who stole a key may have begun the rollout: it ends where the key is revoked.
    if refused := _signer_refusal(view, change.task, candidate.signed, now):
        return refused
    if change.share is not None:
        wider = candidate.model_copy(update={"share": change.share})
        return Proposal(changes=(_with_candidate(live.change, wider),))
    promoted = TaskChange(
        task=change.task,
        version=live.change.version + 1,
        action="promote",
        bundle=candidate.bundle,
        labels=candidate.labels,
        signed=candidate.signed,
    )
    return Proposal(changes=(promoted,))


def _never_pushed(change: Change) -> Refused:
    return Refused("unknown", f"Task {change.task!r} was never pushed.")


def _retire(last: TaskVersion | None, change: Change) -> Proposal | Refused:
    if last is None:
        return _never_pushed(change)
    if last.change.bundle is None:
        since = f"since version {last.change.version}"
        return Refused("conflict", f"Task {change.task} is retired already, {since}.")
    retirement = TaskChange(
        task=change.task,
        version=last.change.version + 1,
        action="retire",
        labels=last.change.labels,
    )
    return Proposal(changes=(retirement,))


def _roll_back(view: LogView, change: Change) -> Proposal | Refused:
    history = view.tasks.get(change.task)
    if not history:
        return _never_pushed(change)
    live = history[-1].change
    target = _target(view, history, change.to)
    if target is not None and not is_for_served_trunk(view, target):
        return Refused("conflict", _other_trunk(view, target))
    if target is None:
        known = ", ".join(str(v.change.version) for v in history[-10:] if v.change.bundle)
        asked = f"version {change.to}" if change.to else "earlier bundle"
        return Refused(
            "conflict",
            f"Task {change.task} has no {asked} to roll back to; it has versions {known}.",
        )
    rollback = TaskChange(
        task=change.task,
        version=live.version + 1,
        action="rollback",
        bundle=target.change.bundle,
        labels=target.change.labels,
        rolled_back_to=target.change.version,
        signed=target.change.signed,
    )
    return Proposal(changes=(rollback,))


def _target(view: LogView, history: tuple[TaskVersion, ...], to: int | None) -> TaskVersion | None:
    """The version asked for, else the last before a rollout, or whose bundle is another.

    Without a number one that is for the trunk that is served is preferred.
    """
    bundles = [version for version in history if version.change.bundle]
    if to is not None:
        return next((v for v in bundles if v.change.version == to), None)
    live = history[-1].change
    alone = [v for v in reversed(bundles) if not v.change.candidate]
    if live.candidate:  # back to before the rollout, which has the same bundle
        return alone[0]
    others = [v for v in alone if v.change.bundle != live.bundle]
    return next((v for v in others if is_for_served_trunk(view, v)), next(iter(others), None))


def _other_trunk(view: LogView, target: TaskVersion) -> str:
    change, trunk = target.change, view.trunk_at(target.number)
    assert trunk is not None
    return (
        f"Version {change.version} of task {change.task} is for trunk {trunk.trunk}, and another "
        "is served now; a head fits one trunk only. Push a bundle for the trunk that is served, or "
        "take the trunk back with all its heads: headstock rollback --trunk."
    )
