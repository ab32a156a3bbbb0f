"""The last versions of every task, which answer whoever asks for them by number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from serve.engine import LiveHead
from serve.record import LogView, TaskChange, TaskVersion
from serve.trunk_proposal import is_for_served_trunk

NUM_RECENT = 5
MAX_LOADED = 32  # tails of some megabytes among them


class NoVersionError(Exception):
    """There is no such version, or it answers no longer.

    Args:
        known: Those that answer.
        reason: Why it does not, where more can be said than that.
    """

    def __init__(
        self, name: str, number: int, known: tuple[TaskVersion, ...], reason: str = ""
    ) -> None:
        numbers = ", ".join(str(version.change.version) for version in known)
        because = f" {reason}" if reason else ""
        super().__init__(
            f"{name!r} has no version {number} that answers; it has {numbers}.{because}"
        )


def recent(view: LogView, task: str) -> tuple[TaskVersion, ...]:
    """The last versions of a task that have a bundle, oldest first; none if it is not live."""
    if view.live(task) is None:
        return ()
    versions = [version for version in view.tasks[task] if version.change.bundle]
    return tuple(versions[-NUM_RECENT:])


def reason_of(view: LogView, version: TaskVersion) -> str:
    """Why one of them does not answer; "" if it does."""
    made_for = view.trunk_at(version.number)
    if made_for is None or is_for_served_trunk(view, version):
        return ""
    return (
        f"Version {version.change.version} was made for trunk {made_for.trunk}, and another is "
        "served."
    )


class OlderVersions:
    """Heads of versions that are no longer live, loaded when they are first asked for.

    One thread calls it, which is no other's.

    Args:
        load: Fetches and loads what answered in a version.
    """

    def __init__(self, load: Callable[[TaskChange], LiveHead]) -> None:
        self._load = load
        self._loaded: OrderedDict[tuple[str, int], LiveHead] = OrderedDict()

    def head(self, version: TaskVersion) -> LiveHead:
        """The version's head.

        Raises:
            StoreError: its bundle cannot be read.
        """
        key = (version.change.task, version.change.version)
        if key not in self._loaded:
            self._loaded[key] = self._load(version.change)
        self._loaded.move_to_end(key)
        while len(self._loaded) > MAX_LOADED:
            self._loaded.popitem(last=False)
        return self._loaded[key]
