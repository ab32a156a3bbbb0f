"""What a requested change means for the log as it stands: the next version of its task, or a no."""

from __future__ import annotations

from dataclasses import dataclass

from serve.messages import Change, Refused, Swapped
from serve.record import LogView, SettingsChange, SettingsVersion, TaskChange, TaskVersion
from serve.task_settings import DEFAULTS


@dataclass(frozen=True)
class Proposal:
    """What the record of a change says."""

    changes: tuple[TaskChange, ...] = ()
    settings: tuple[SettingsChange, ...] = ()


def propose(view: LogView, change: Change) -> Proposal | Refused | Swapped:
    """What the record says; or the answer at once, when nothing is to be written.

    Pure: the same log and the same change always give the same proposal.
    """
    if made := view.made_by(change.key):
        return _repeat(made, change)
    live = view.live(change.task)
    if change.expected is not None and change.expected != (live.change.version if live else 0):
        now = f"version {live.change.version}" if live else "no version"
        return Refused(
            "conflict", f"Task {change.task} is at {now}; expected version {change.expected}."
        )
    if change.settings:
        return _set(view, change)
    if change.bundle is None:
        return _roll_back(view, change)
    if live and live.change.labels != change.labels and not change.allow_new_labels:
        return Refused("gate", new_labels_reason(live.change.labels, change.labels))
    push = TaskChange(
        task=change.task,
        version=live.change.version + 1 if live else 1,
        action="push",
        bundle=change.bundle,
        labels=change.labels,
    )
    return Proposal(changes=(push,))


def new_labels_reason(live: tuple[str, ...], pushed: tuple[str, ...]) -> str:
    """Why labels that are not the live ones need a declaration."""
    gone = [label for label in live if label not in pushed]
    new = [label for label in pushed if label not in live]
    difference = f"gone: {gone}, new: {new}" if gone or new else "the order differs"
    return (
        f"The labels are not those that are live ({difference}). Callers would see other names: "
        "push with the change of labels declared if that is meant."
    )


def _set(view: LogView, change: Change) -> Proposal | Refused:
    if change.task not in view.tasks:
        return _never_pushed(change)
    settings = view.settings.get(change.task, DEFAULTS).updated(change.settings)
    return Proposal(settings=(SettingsChange(task=change.task, settings=settings),))


def _never_pushed(change: Change) -> Refused:
    return Refused("unknown", f"Task {change.task!r} was never pushed.")


def _roll_back(view: LogView, change: Change) -> Proposal | Refused:
    history = view.tasks.get(change.task)
    if not history:
        return _never_pushed(change)
    live = history[-1].change
    target = _target(history, change.to)
    if target is None:
        known = ", ".join(str(v.change.version) for v in history[-10:])
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
    )
    return Proposal(changes=(rollback,))


def _target(history: tuple[TaskVersion, ...], to: int | None) -> TaskVersion | None:
    """The version asked for, or the last one whose bundle is not the live one."""
    if to is not None:
        return next((v for v in history if v.change.version == to), None)
    live = history[-1].change.bundle
    return next((v for v in reversed(history) if v.change.bundle != live), None)


def _repeat(made: TaskVersion | SettingsVersion, change: Change) -> Swapped | Refused:
    """The same key gives the same answer, unless it is used for something else."""
    if made.change.task == change.task and _made_by_the_same(made, change):
        version = made.change if isinstance(made.change, TaskChange) else None
        return Swapped(version, stage_ms=0.0, hold_ms=0.0, replicas=0, is_repeat=True)
    is_version = isinstance(made, TaskVersion)
    did = f"made version {made.change.version}" if is_version else "changed the settings"
    return Refused(
        "conflict",
        f"The idempotency key {change.key!r} already {did} of task {made.change.task}; use a new "
        "key for another change.",
    )


def _made_by_the_same(made: TaskVersion | SettingsVersion, change: Change) -> bool:
    if isinstance(made, SettingsVersion):
        settings = made.change.settings
        return bool(change.settings) and settings.updated(change.settings) == settings
    if change.settings:
        return False
    if change.bundle:
        return made.change.bundle == change.bundle
    return made.change.action == "rollback" and change.to in {None, made.change.rolled_back_to}
