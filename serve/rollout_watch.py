"""What all replicas saw of the rollouts under way, and the changes that the tasks' rules ask for.

It stands beside the conductor and asks it for changes as a pusher does, so a decision by rule is a
record like any other.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter

from serve.announce import announce
from serve.conductor import Conductor
from serve.messages import Change, Swapped
from serve.metrics import Report, report_of
from serve.protocol import ReplicaId
from serve.record import TaskChange
from serve.rollout import Judgement, Trial, judge, total
from serve.task_settings import DEFAULTS

logger = logging.getLogger(__name__)

Trials = Mapping[str, tuple[int, Trial]]  # of each task the version that was seen, and its counts


class RolloutWatch:
    """Collects counts, those of replicas that are gone among them, and acts on them.

    Args:
        webhook_url: Told of what is done by rule; "" for nobody.
    """

    def __init__(self, conductor: Conductor, *, webhook_url: str) -> None:
        self._conductor, self._webhook_url = conductor, webhook_url
        self._trials: dict[ReplicaId, Trials] = {}
        self._under_way: dict[str, asyncio.Task[None]] = {}  # by task
        self._registry = CollectorRegistry()
        self._changes = Counter(
            "headstock_rollout_decisions",
            "Rollouts that were ended by rule.",
            ["action"],
            registry=self._registry,
        )

    def take(self, replica: ReplicaId, trials: Trials) -> None:
        """Note what a replica has seen since it started, and decide what can be decided."""
        self._trials[replica] = trials
        for task in trials:
            if task not in self._under_way and (change := self._decision(task)):
                self._under_way[task] = asyncio.ensure_future(self._make(change))

    def trial(self, live: TaskChange) -> Trial:
        """What the fleet saw of the candidate of a version."""
        seen = [trials.get(live.task, (0, Trial())) for trials in self._trials.values()]
        return total(trial for version, trial in seen if version == live.version)

    def judgement(self, live: TaskChange) -> Judgement:
        """What the counts so far say, by the task's rules."""
        rules = self._conductor.view.settings.get(live.task, DEFAULTS)
        return judge(self.trial(live), rules)

    def metrics(self) -> Report:
        """How often it acted."""
        return report_of(self._registry)

    def _decision(self, task: str) -> Change | None:
        """The change that the rules of a task ask for now."""
        live = self._conductor.view.live(task)
        if live is None or live.change.candidate is None:
            return None
        judgement = self.judgement(live.change)
        promote = judgement.verdict == "good"
        rules = self._conductor.view.settings.get(task, DEFAULTS)
        if judgement.verdict == "undecided" or (promote and not rules.promote_good):
            return None
        return Change(
            task=task,
            # One for each version, so that a restarted conductor decides it once too.
            key=f"rollout-{task}-{live.change.version}",
            expected=live.change.version,
            promote=promote,
            message=f"by rule: {judgement.reason}",
        )

    async def _make(self, change: Change) -> None:
        """Ask for the change; if it is refused, the next report decides anew."""
        try:
            outcome = await self._conductor.change(change)
            if not isinstance(outcome, Swapped) or outcome.is_repeat:
                logger.warning("%s of task %s was not made: %s", change.key, change.task, outcome)
                return
            action = "promote" if change.promote else "rollback"
            self._changes.labels(action).inc()
            assert outcome.change is not None
            event: dict[str, object] = {
                "event": action,
                "task": change.task,
                "version": outcome.change.version,
                "bundle": outcome.change.bundle,
                "reason": change.message,
            }
            await announce(event, self._webhook_url)
        except Exception:
            logger.exception("%s of task %s failed", change.key, change.task)
        finally:
            del self._under_way[change.task]
