"""What a change of the trunk means for the log: with which heads, and the way back."""

from __future__ import annotations

from collections.abc import Iterable

from export.bundle import Digest
from serve.messages import Change, Refused
from serve.record import LogView, TaskChange, TaskVersion, TrunkChange


def is_for_served_trunk(view: LogView, version: TaskVersion) -> bool:
    """Whether a version's bundle is for the trunk that is served now."""
    made_for = view.trunk_at(version.number)
    return (made_for and made_for.trunk) == (view.trunk and view.trunk.trunk)


def trunk_refusal(view: LogView, trunk: TrunkChange, pushes: Iterable[Change]) -> Refused | None:
    """Why a trunk cannot go live with these bundles, apart from what is wrong with one of them."""
    served = view.trunk
    if served is None:
        return Refused("conflict", "There is no trunk yet; start with headstock serve --trunk.")
    if trunk.trunk == served.trunk:
        return Refused("conflict", f"Trunk {trunk.trunk} is served already; push bundles alone.")
    if refused := _rollouts_refusal(view):
        return refused
    if missing := sorted(set(_live(view)) - {push.task for push in pushes}):
        return Refused(
            "gate",
            f"There is no bundle for the new trunk of {', '.join(missing)}. Heads fit one trunk "
            "only: push the trunk with a bundle of every live task, or retire those.",
        )
    return None


def trunk_rollback(
    view: LogView, expected: Digest | None
) -> tuple[TrunkChange, tuple[TaskChange, ...]] | Refused:
    """The trunk that was served before, and of each live task the bundle that it had on it."""
    served = view.trunk
    if served is None or (expected is not None and expected != served.trunk):
        standing = f"Trunk {served.trunk}" if served else "No trunk"
        return Refused("conflict", f"{standing} is served; expected {expected}.")
    since = _served_since(view, served.trunk)
    before = view.trunk_at(since - 1)
    if before is None:
        return Refused("conflict", f"No other trunk was served before trunk {served.trunk}.")
    if refused := _rollouts_refusal(view):
        return refused
    then = {task: _last_before(view, task, since) for task in _live(view)}
    if missing := sorted(task for task, version in then.items() if version is None):
        return Refused(
            "conflict",
            f"There was no live bundle of {', '.join(missing)} on trunk {before.trunk}. Retire "
            "those tasks first, or push that trunk again with a bundle of every live task.",
        )
    changes = tuple(
        TaskChange(
            task=task,
            version=view.tasks[task][-1].change.version + 1,
            action="rollback",
            bundle=version.change.bundle,
            labels=version.change.labels,
            rolled_back_to=version.change.version,
            signed=version.change.signed,
        )
        for task, version in then.items()
        if version is not None
    )
    return before, changes


def _served_since(view: LogView, trunk: Digest) -> int:
    """Number of the record that brought the trunk that is served; its variants may be younger."""
    since = view.trunks[-1].number
    for version in reversed(view.trunks):
        if version.change.trunk != trunk:
            break
        since = version.number
    return since


def _last_before(view: LogView, task: str, number: int) -> TaskVersion | None:
    """What answered for a task right before a record."""
    before = (version for version in reversed(view.tasks[task]) if version.number < number)
    last = next(before, None)
    return None if last is None or last.change.bundle is None else last


def _live(view: LogView) -> list[str]:
    return sorted(task for task in view.tasks if view.live(task))


def _rollouts_refusal(view: LogView) -> Refused | None:
    rollouts = [task for task in _live(view) if view.tasks[task][-1].change.candidate]
    if not rollouts:
        return None
    return Refused(
        "conflict",
        f"A rollout is under way of {', '.join(rollouts)}; promote it or roll it back first.",
    )
