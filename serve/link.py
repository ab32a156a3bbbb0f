"""How a replica reaches the conductor, whatever carries the messages."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from serve.decisions import ReplicaCount
from serve.messages import AnyChange, Directive, Outcome, Poll
from serve.record import TaskChange
from serve.rollout import Judgement, Trial
from serve.statistics import ModelCounts


class LinkError(Exception):
    """The conductor cannot be reached now."""


@runtime_checkable
class Link(Protocol):
    """The conductor, from afar: blocking for the watcher's thread, awaitable for requests."""

    def poll(self, poll: Poll, timeout_s: float) -> Directive:
        """Report and ask; the answer comes when there is news, or after a while.

        Raises:
            LinkError: no answer within `timeout_s`, or no conductor.
        """
        ...

    async def change(self, change: AnyChange) -> Outcome:
        """Ask for a change.

        Raises:
            LinkError: no conductor; whether the change was made is not known, so ask again with
                the same key.
        """
        ...

    async def rollout(self, live: TaskChange) -> tuple[Trial, Judgement]:
        """What the fleet has seen of the candidate of a version, and what the rules say of it.

        Raises:
            LinkError: no conductor.
        """
        ...

    async def statistics(self, model: str | None) -> ModelCounts:
        """What the fleet counted of a model, or of every one that was ever asked.

        Raises:
            LinkError: no conductor.
        """
        ...

    async def replicas(self) -> ReplicaCount:
        """How many replicas there are, and why.

        Raises:
            LinkError: no conductor.
        """
        ...

    async def metrics(self) -> bytes:
        """The fleet's metrics as Prometheus text.

        Raises:
            LinkError: no conductor.
        """
        ...
