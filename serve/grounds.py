"""What the gates that compare go by: a push is made only while that is what the log still says."""

from __future__ import annotations

from dataclasses import dataclass

from export.bundle import Digest
from serve.record import LogView, TrunkChange
from serve.task_settings import DEFAULTS


@dataclass(frozen=True)
class Grounds:
    """What is live of a task, as far as a bundle with certain labels is compared with it.

    Args:
        version: The task's, 0 if it was never pushed.
        live: The bundle that answers; None if the task was never pushed or is retired.
        labels: What callers know, of the bundle that answers or did last; None if there was none.
        has_new_labels: Whether the bundle's labels are others.
        heldout: Digest of the task's held-out sample for the bundle's labels.
        takes_heldout: Whether a sample that the bundle brings becomes the task's: it is the task's
            first, its labels are new or the trunk takes pictures decoded otherwise, and there is
            none for them yet.
        trunk: What is served while this is compared.
    """

    version: int
    live: Digest | None
    labels: tuple[str, ...] | None
    has_new_labels: bool
    heldout: Digest | None
    takes_heldout: bool
    margin: float
    max_slowdown: float
    trunk: Digest | None


def grounds_of(
    view: LogView, task: str, labels: tuple[str, ...], new_trunk: TrunkChange | None = None
) -> Grounds:
    """The grounds for a bundle with these labels, as the log stands.

    Args:
        new_trunk: What the bundle goes live with, if it is not for the trunk that is served.
    """
    last, live = view.last(task), view.live(task)
    served = view.trunk
    heldout = view.heldout(task, labels, new_trunk or served)
    had_one = new_trunk is not None and view.heldout(task, labels, served) is not None
    settings = view.settings.get(task, DEFAULTS)
    has_new_labels = last is not None and last.change.labels != labels
    return Grounds(
        version=last.change.version if last else 0,
        live=live.change.bundle if live else None,
        labels=last.change.labels if last else None,
        has_new_labels=has_new_labels,
        heldout=heldout.change.heldout if heldout else None,
        takes_heldout=heldout is None and (last is None or has_new_labels or had_one),
        margin=settings.margin,
        max_slowdown=settings.max_slowdown,
        trunk=served.trunk if served else None,
    )
