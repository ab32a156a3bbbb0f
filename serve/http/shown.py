"""Versions, settings and swaps as the JSON that callers read."""

from __future__ import annotations

from dataclasses import asdict

from serve.decisions import Made, ReplicaCount
from serve.http.changes import written
from serve.messages import Swapped
from serve.proposal import Proposal
from serve.record import LogView, TaskChange, TaskVersion
from serve.task_settings import DEFAULTS
from serve.trust import SignedBy


def described(view: LogView, task: str, *, after: int | None = None) -> dict[str, object]:
    """What is live of a task and its settings: now, or as of record `after`."""
    number = view.number if after is None else after
    history = reversed(view.set_tasks.get(task, ()))
    settings = next((s.change.settings for s in history if s.number <= number), DEFAULTS)
    version = _live(view, task, number)
    trunk = view.trunk_at(number)
    sample = view.heldout(task, version.change.labels, trunk, until=number)
    heldout = sample.change.heldout if sample else None
    return {**shown(view, version), "settings": settings.model_dump(), "heldout": heldout}


def _live(view: LogView, task: str, number: int) -> TaskVersion:
    """The version that was live after a record."""
    return next(v for v in reversed(view.tasks[task]) if v.number <= number)


def shown(view: LogView, version: TaskVersion) -> dict[str, object]:
    """One version, with the verdicts that let it pass."""
    change, candidate = version.change, version.change.candidate
    return {
        "task": change.task,
        "version": change.version,
        "action": change.action,
        "bundle": change.bundle,
        "labels": list(change.labels),
        "rolled_back_to": change.rolled_back_to,
        "signed_by": _signer(view, change.signed),
        "candidate": candidate
        and {
            "bundle": candidate.bundle,
            "labels": list(candidate.labels),
            "share": candidate.share,
            "signed_by": _signer(view, candidate.signed),
        },
        "record": version.number,
        "written_at": version.written_at,
        "message": version.message,
        "who": version.who,
        "idempotency_key": version.idempotency_key,
        "gates": [verdict.model_dump() for verdict in version.verdicts],
    }


def _signer(view: LogView, signed: SignedBy | None) -> dict[str, object] | None:
    """Which key signed, by its name of today, and when."""
    if signed is None:
        return None
    return {
        "name": view.signing_keys[signed.key_id].name,
        "key_id": signed.key_id,
        "signed_at": written(signed.signed_at),
    }


def replicas_shown(count: ReplicaCount) -> dict[str, object]:
    """How many replicas answer, how many there should be, and why."""
    return {
        "answering": count.answering,
        "wanted": count.last.decision.replicas if count.last else None,
        "last": _decision_shown(count.last) if count.last else None,
        "changes": [_decision_shown(made) for made in count.changes],
    }


def _decision_shown(made: Made) -> dict[str, object]:
    return {"at": made.at, "text": str(made.decision), **asdict(made.decision)}


def settings_shown(view: LogView, task: str) -> list[dict[str, object]]:
    """Every change of a task's settings, with the version that was live then."""
    entries: list[dict[str, object]] = []
    before = DEFAULTS
    for made in view.set_tasks.get(task, ()):
        settings = made.change.settings
        entries.append(
            {
                "task": task,
                "version": _live(view, task, made.number).change.version,
                "action": "settings",
                "settings": settings.model_dump(),
                "changed": settings.different_from(before),
                "record": made.number,
                "written_at": made.written_at,
                "message": made.message,
                "who": made.who,
                "idempotency_key": made.idempotency_key,
            }
        )
        before = settings
    return entries


def heldouts_shown(view: LogView, task: str) -> list[dict[str, object]]:
    """Every held-out sample that the task had, with the version that was live then."""
    return [
        {
            "task": task,
            "version": _live(view, task, made.number).change.version,
            "action": "heldout",
            "heldout": made.change.heldout,
            "labels": list(made.change.labels),
            "record": made.number,
            "written_at": made.written_at,
            "message": made.message,
            "who": made.who,
            "idempotency_key": made.idempotency_key,
        }
        for made in view.heldouts.get(task, ())
    ]


def swap_shown(made: Swapped) -> dict[str, object]:
    """A version that is live everywhere now, and what that took."""
    (change,) = made.changes  # what makes no version is answered otherwise
    return {**_made(change), "repeated": made.is_repeat, "swap": _swap(made)}


def versions_shown(made: Swapped) -> dict[str, object]:
    """Versions that went live in one moment, the trunk that did with them, and what that took."""
    trunk = {"trunk": made.trunk.trunk} if made.trunk else {}
    versions = [_made(change) for change in made.changes]
    return {**trunk, "versions": versions, "repeated": made.is_repeat, "swap": _swap(made)}


def _made(change: TaskChange) -> dict[str, object]:
    return {"task": change.task, "version": change.version, "bundle": change.bundle}


def _swap(made: Swapped) -> dict[str, object]:
    return {
        "stage_ms": round(made.stage_ms, 3),
        "hold_ms": round(made.hold_ms, 3),
        "replicas": made.replicas,
    }


def would_be(proposal: Proposal) -> dict[str, object]:
    """What a push of one bundle would make."""
    (change,) = proposal.changes
    return {"dry_run": True, **would_make(proposal, change)}


def would_be_several(proposal: Proposal) -> dict[str, object]:
    """What a push of several bundles would make, or of a trunk with its bundles."""
    trunk = {"trunk": proposal.trunk.trunk} if proposal.trunk else {}
    versions = [would_make(proposal, change) for change in proposal.changes]
    return {"dry_run": True, **trunk, "versions": versions}


def would_make(proposal: Proposal, change: TaskChange) -> dict[str, object]:
    """What a push would make of one task."""
    brought = change.candidate or change
    samples = (sample.heldout for sample in proposal.heldout if sample.task == change.task)
    return {
        "task": change.task,
        "would_make": {
            "version": change.version,
            "action": change.action,
            "bundle": brought.bundle,
            "labels": list(brought.labels),
            "heldout": next(samples, None),
        },
        "gates": [v.model_dump() for v in proposal.verdicts if v.task == change.task],
    }
