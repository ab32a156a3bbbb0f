"""What a requested change means for the log as it stands: the next version of its task, or a no."""

from __future__ import annotations

from serve.messages import Change, Refused, Swapped
from serve.record import LogView, TaskChange, TaskVersion


def propose(view: LogView, change: Change) -> tuple[TaskChange] | Refused | Swapped:
    """The record's changes; or the answer at once, when nothing is to be written.

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
    if change.bundle is None:
        return _roll_back(view, change)
    if live and live.change.labels != change.labels and not change.allow_new_labels:
        return Refused("gate", new_labels_reason(live.change.labels, change.labels))
    return (
        TaskChange(
            task=change.task,
            version=live.change.version + 1 if live else 1,
            action="push",
            bundle=change.bundle,
            labels=change.labels,
        ),
    )


def new_labels_reason(live: tuple[str, ...], pushed: tuple[str, ...]) -> str:
    """Why labels that are not the live ones need a declaration."""
    gone = [label for label in live if label not in pushed]
    new = [label for label in pushed if label not in live]
    difference = f"gone: {gone}, new: {new}" if gone or new else "the order differs"
    return (
        f"The labels are not those that are live ({difference}). Callers would see other names: "
        "push with the change of labels declared if that is meant."
    )


def _roll_back(view: LogView, change: Change) -> tuple[TaskChange] | Refused:
    history = view.tasks.get(change.task)
    if not history:
        return Refused("unknown", f"Task {change.task!r} was never pushed.")
    live = history[-1].change
    target = _target(history, change.to)
    if target is None:
        known = ", ".join(str(v.change.version) for v in history[-10:])
        asked = f"version {change.to}" if change.to else "earlier bundle"
        return Refused(
            "conflict",
            f"Task {change.task} has no {asked} to roll back to; it has versions {known}.",
        )
    return (
        TaskChange(
            task=change.task,
            version=live.version + 1,
            action="rollback",
            bundle=target.change.bundle,
            labels=target.change.labels,
            rolled_back_to=target.change.version,
        ),
    )


def _target(history: tuple[TaskVersion, ...], to: int | None) -> TaskVersion | None:
    """The version asked for, or the last one whose bundle is not the live one."""
    if to is not None:
        return next((v for v in history if v.change.version == to), None)
    live = history[-1].change.bundle
    return next((v for v in reversed(history) if v.change.bundle != live), None)


def _repeat(made: TaskVersion, change: Change) -> Swapped | Refused:
    """The same key gives the same answer, unless it is used for something else."""
    is_same = made.change.task == change.task and (
        made.change.bundle == change.bundle
        if change.bundle
        else made.change.action == "rollback" and change.to in (None, made.change.rolled_back_to)
    )
    if is_same:
        return Swapped(made.change, stage_ms=0.0, hold_ms=0.0, replicas=0, is_repeat=True)
    return Refused(
        "conflict",
        f"The idempotency key {change.key!r} already made version {made.change.version} of task "
        f"{made.change.task}; use a new key for another change.",
    )
