"""Conductor and replicas as Ray actors: the only place where the swap touches Ray."""

from __future__ import annotations

import logging
import os
import secrets
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from serve.autoscale import Decision
from serve.conductor import Conductor
from serve.decisions import Decisions, ReplicaCount
from serve.first_trunk import OtherTrunkError
from serve.headlog import HeadLog
from serve.link import LinkError
from serve.messages import AnyChange, Directive, Outcome, Poll
from serve.protocol import ReplicaId
from serve.record import TaskChange, TrunkChange
from serve.rollout import Judgement, Trial
from serve.rollout_watch import RolloutWatch
from serve.settings import ServeSettings
from serve.statistics import FleetStatistics, ModelCounts
from serve.store import ask_until_answered

logger = logging.getLogger(__name__)

NAMESPACE = "headstock"
CONDUCTOR = "conductor"
APPLICATION = "headstock"
DEPLOYMENT = "predictor"
REPLICA_PREFIX = f"SERVE_REPLICA::{APPLICATION}#{DEPLOYMENT}#"
PROCESS_CHECK_S = 2.0


class RayFleet:
    """The replica processes of this Ray cluster."""

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id()
        self._dead: set[ReplicaId] = set()

    def living(self) -> frozenset[ReplicaId]:
        """Every replica whose process is not confirmed dead.

        Ray calls an actor dead the moment it asks for its end; a frozen process lives on for about
        five seconds (measured with SIGSTOP) and could answer once more. So what Ray calls dead is
        looked for among the processes of its node before it is believed.
        """
        living = set()
        for replica, entry in self._replicas().items():
            if replica in self._dead:
                continue
            if entry["State"] != "DEAD" or self._has_process(entry):
                living.add(replica)
            else:
                self._dead.add(replica)
        return frozenset(living)

    def kill(self, replica: ReplicaId) -> None:
        """Tell Ray, which forgets the actor and starts another, and end the process itself."""
        entry = self._replicas().get(replica)
        try:
            ray.kill(ray.get_actor(replica, namespace="serve"))
        except ValueError:
            logger.info("Ray has already let go of replica %s", replica)
        if entry is not None:
            self._on_node(entry, _end_process)

    def _replicas(self) -> dict[ReplicaId, dict[str, Any]]:
        # The public listing (ray.util.state) needs the dashboard.
        actors: Any = ray._private.state.actors()  # noqa: SLF001
        entries = {entry["Name"]: entry for entry in actors.values()}
        return {name: e for name, e in entries.items() if name.startswith(REPLICA_PREFIX)}

    def _has_process(self, entry: dict[str, Any]) -> bool:
        return bool(entry["Pid"]) and self._on_node(entry, _is_running)

    def _on_node(self, entry: dict[str, Any], question: Callable[[int], bool]) -> bool:
        """Ask on the node where the process is; a node that is dead has no processes."""
        node, pid = entry["Address"]["NodeID"], entry["Pid"]
        if node == self._node:
            return question(pid)
        if not any(known["NodeID"] == node and known["Alive"] for known in ray.nodes()):
            return False
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        ask = ray.remote(question).options(num_cpus=0, scheduling_strategy=strategy)
        try:
            return bool(ray.get(ask.remote(pid), timeout=PROCESS_CHECK_S))
        except (RayError, GetTimeoutError):
            return True  # not confirmed


class ConductorActor:
    """The conductor in a process of its own."""

    def __init__(self, settings: str, cluster: str) -> None:
        checked = ServeSettings.model_validate_json(settings)
        # Ray restarts an actor whose process dies, but not one that fails to start.
        self._conductor = ask_until_answered(
            lambda: Conductor(
                HeadLog(checked.store),
                RayFleet(),
                cluster=cluster,
                hold_s=checked.swap_hold_s,
                stage_s=checked.swap_stage_s,
                trunk_stage_s=checked.trunk_stage_s,
                may_differ=checked.may_differ,
            )
        )
        self._statistics = FleetStatistics()
        self._rollouts = RolloutWatch(self._conductor, webhook_url=checked.webhook_url)
        self._decisions = Decisions()

    async def poll(self, poll: Poll) -> Directive:
        """See `Conductor.poll`."""
        if poll.trials is not None:
            self._rollouts.take(poll.replica, poll.trials)
        if poll.models is not None:
            members = await self._conductor.members()
            self._statistics.take(poll.replica, poll.models, members)
        return await self._conductor.poll(poll)

    async def rollout(self, live: TaskChange) -> tuple[Trial, Judgement]:
        """See `link.Link.rollout`."""
        return self._rollouts.trial(live), self._rollouts.judgement(live)

    async def statistics(self, model: str | None) -> ModelCounts:
        """See `link.Link.statistics`."""
        return self._statistics.of(model)

    async def scaled(self, decision: Decision) -> None:
        """Take note of a decision of `scaling.Scaling`."""
        self._decisions.take(decision)

    async def replicas(self) -> ReplicaCount:
        """See `link.Link.replicas`."""
        return self._decisions.count(len(await self._conductor.members()))

    async def change(self, change: AnyChange) -> Outcome:
        """See `Conductor.change`."""
        return await self._conductor.change(change)

    async def install_trunk(self, trunk: TrunkChange) -> str:
        """See `Conductor.install_trunk`."""
        return await self._conductor.install_trunk(trunk)

    async def metrics(self) -> bytes:
        """See `Conductor.metrics`."""
        more = (self._rollouts.metrics(), self._decisions.metrics())
        return await self._conductor.metrics(*more)


def conductor_of(settings: ServeSettings) -> Any:
    """The handle of this cluster's conductor, which is started if there is none yet."""
    return (
        ray.remote(ConductorActor)
        .options(
            name=CONDUCTOR,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            # On the head, so that it never keeps a node alive that would scale away.
            resources={"node:__internal_head__": 0.001},
            max_restarts=-1,
            max_concurrency=1000,
        )
        # Given once, and to every restart of the actor: so the name stays that of the cluster.
        .remote(settings.model_dump_json(), secrets.token_hex(4))
    )


def install_trunk(settings: ServeSettings, trunk: TrunkChange) -> None:
    """Let this cluster's conductor write to the log which trunk it has.

    Raises:
        OtherTrunkError: it has another one.
    """
    live = ray.get(conductor_of(settings).install_trunk.remote(trunk))
    if live != trunk.trunk:
        raise OtherTrunkError(live=live, given=trunk.trunk)


class RayLink:
    """See `link.Link`."""

    def __init__(self, conductor: Any) -> None:
        self._conductor = conductor

    def poll(self, poll: Poll, timeout_s: float) -> Directive:
        """See `link.Link.poll`."""
        try:
            return ray.get(self._conductor.poll.remote(poll), timeout=max(0.0, timeout_s))
        except (RayError, GetTimeoutError) as error:
            raise LinkError(str(error)) from error

    async def change(self, change: AnyChange) -> Outcome:
        """See `link.Link.change`."""
        return await _reach(self._conductor.change.remote(change))

    async def rollout(self, live: TaskChange) -> tuple[Trial, Judgement]:
        """See `link.Link.rollout`."""
        return await _reach(self._conductor.rollout.remote(live))

    async def statistics(self, model: str | None) -> ModelCounts:
        """See `link.Link.statistics`."""
        return await _reach(self._conductor.statistics.remote(model))

    async def replicas(self) -> ReplicaCount:
        """See `link.Link.replicas`."""
        return await _reach(self._conductor.replicas.remote())

    async def metrics(self) -> bytes:
        """See `link.Link.metrics`."""
        return await _reach(self._conductor.metrics.remote())


async def _reach(reference: Awaitable[Any]) -> Any:
    try:
        return await reference
    # An error inside the conductor is not one of these: asking again would not help.
    except RayActorError as error:
        raise LinkError(f"The conductor cannot be reached: {error}") from error


def _is_running(pid: int) -> bool:
    """Whether a replica still runs under this pid, which the system may have given to another."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    is_zombie = stat.rpartition(")")[2].split()[0] == "Z"
    return not is_zombie and command.startswith(b"ray::")


def _end_process(pid: int) -> bool:
    if _is_running(pid):
        os.kill(pid, signal.SIGKILL)
    return True
