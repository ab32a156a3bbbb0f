"""A whole fleet in one process: a real conductor, real replicas, a real log, and no Ray.

What carries the messages is written here, so a test can cut, delay or crash anything at any step.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import uuid4

import httpx
from typing_extensions import override

from export.bundle import Bundle, read_trunk_folder
from serve.access import TokenChange
from serve.conductor import Conductor
from serve.decisions import Decisions, ReplicaCount
from serve.headlog import HeadLog
from serve.http.routes import http_app
from serve.link import LinkError
from serve.messages import (
    AnyChange,
    Change,
    Directive,
    KeyRequest,
    Outcome,
    Poll,
    Pushes,
    Swapped,
    TokenRequest,
    TrunkRollback,
)
from serve.record import LogView, Record, TaskChange, TrunkChange
from serve.replica import Replica
from serve.rollout import Judgement, Trial
from serve.rollout_watch import RolloutWatch
from serve.settings import ServeSettings
from serve.signature_gate import check_signature
from serve.statistics import FleetStatistics, ModelCounts
from serve.task_settings import asked_settings
from serve.trunks import store_trunk
from serve.trust import KeyChange

T = TypeVar("T")
CUT_S = 0.02


def until(is_so: Callable[[], bool], *, limit_s: float = 10.0) -> None:
    """Wait until something is so, and fail if it never is."""
    deadline_s = time.monotonic() + limit_s
    while not is_so():
        assert time.monotonic() < deadline_s, "this never came to be"
        time.sleep(0.005)


class LoopThread:
    """An event loop in a thread of its own, as an actor's process has one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._under_way: set[Future[Any]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine there."""
        try:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        except RuntimeError as error:  # closed: the process is gone
            coroutine.close()
            raise LinkError(str(error)) from error
        self._under_way.add(future)
        future.add_done_callback(self._under_way.discard)
        return future

    def crash(self) -> None:
        """Stop at whatever is awaited now; everyone who waits hears that the process is gone."""
        if self._loop.is_closed() or not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._end(), self._loop)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=10)
            self._loop.close()
        for future in list(self._under_way):
            future.cancel()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._loop.call_soon(self._loop.stop)


class LocalLink:
    """One replica's way to the conductor; `serve.link.Link`.

    Args:
        fleet: Where the conductor of the moment is found.
    """

    def __init__(self, fleet: LocalFleet) -> None:
        self._fleet = fleet
        self.is_cut = False
        self.on_poll: Callable[[Poll], None] = lambda _: None
        self.on_directive: Callable[[Directive], None] = lambda _: None

    def poll(self, poll: Poll, timeout_s: float) -> Directive:
        """See `Link.poll`; the two hooks may raise LinkError, crash things or take their time."""
        if self.is_cut:
            time.sleep(min(CUT_S, max(0.0, timeout_s)))
            raise LinkError("the line is cut")
        self.on_poll(poll)
        future = self._fleet.ask(lambda conductor: self._fleet.poll(conductor, poll))
        try:
            directive = future.result(max(0.0, timeout_s))
        except (CancelledError, FutureTimeoutError) as error:
            raise LinkError("no answer") from error
        self.on_directive(directive)
        if self.is_cut:
            raise LinkError("the line is cut")
        return directive

    async def change(self, change: AnyChange) -> Outcome:
        """See `Link.change`."""
        return await self._await(self._fleet.ask(lambda conductor: conductor.change(change)))

    async def metrics(self) -> bytes:
        """See `Link.metrics`."""
        return await self._await(self._fleet.ask(lambda conductor: conductor.metrics()))

    async def rollout(self, live: TaskChange) -> tuple[Trial, Judgement]:
        """See `Link.rollout`."""
        watch = self._fleet.rollouts
        assert watch is not None
        return watch.trial(live), watch.judgement(live)

    async def statistics(self, model: str | None) -> ModelCounts:
        """See `Link.statistics`."""
        await self._await(self._fleet.ask(lambda conductor: conductor.members()))
        return self._fleet.statistics.of(model)

    async def replicas(self) -> ReplicaCount:
        """See `Link.replicas`."""
        members = await self._await(self._fleet.ask(lambda conductor: conductor.members()))
        return self._fleet.decisions.count(len(members))

    async def _await(self, future: Future[T]) -> T:
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError as error:
            if not future.cancelled():  # it is the caller who is gone
                raise
            raise LinkError("the conductor is gone") from error


class ConductorLog(HeadLog):
    """The conductor's log, with hooks around every record that it puts."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.before_put: Callable[[Record], None] = lambda _: None
        self.after_put: Callable[[Record], None] = lambda _: None

    @override
    def put_record(self, record: Record, *, timeout_s: float = 10.0) -> Record:
        """See `HeadLog.put_record`."""
        self.before_put(record)
        standing = super().put_record(record, timeout_s=timeout_s)
        self.after_put(record)
        return standing


class HttpClient:
    """Sends requests to the application of one replica, without a socket."""

    def __init__(self, fleet: LocalFleet, replica: str) -> None:
        self._app = http_app(fleet.replicas[replica], fleet.links[replica])

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send one request, and wait for the whole answer."""
        return asyncio.run(self._request(method, path, **options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        """GET."""
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """POST."""
        return self.request("POST", path, **options)

    async def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self._app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)


def stored_trunk(log: HeadLog, folder: Path) -> TrunkChange:
    """Store a trunk, and what a record says of it."""
    manifest, files = read_trunk_folder(folder)
    return store_trunk(log, manifest.model_dump_json().encode(), files)


class LocalFleet:
    """Conductor and replicas over one log; use as a context manager.

    It is also the conductor's `Fleet`: it knows which replicas live, and kills.

    Args:
        store: Folder or URL of the log.
        trunk: Folder of the trunk, installed in the log first.
        replicas: How many to start.
        cluster: Its name, which its conductors keep; a new one if it is not given.
    """

    def __init__(
        self,
        store: Path | str,
        trunk: Path,
        *,
        replicas: int,
        hold_s: float = 1.0,
        cluster: str = "",
        **settings: Any,
    ) -> None:
        self.settings = ServeSettings.model_validate(
            {"store": str(store), "swap_hold_s": hold_s, "swap_stage_s": 5.0, **settings}
        )
        self.log = ConductorLog(str(store))
        self.cluster = cluster or secrets.token_hex(4)
        self.replicas: dict[str, Replica] = {}
        self.links: dict[str, LocalLink] = {}
        self.killed: list[str] = []
        self._num_started = 0
        self._routed: set[str] = set()
        self._first_replicas = replicas
        self._trunk = trunk
        self._loop: LoopThread | None = None
        self.conductor: Conductor | None = None
        self.rollouts: RolloutWatch | None = None
        self.statistics = FleetStatistics()
        self.decisions = Decisions()

    def __enter__(self) -> Self:
        self.start_conductor()
        trunk = stored_trunk(self.log, self._trunk)
        self.ask(lambda conductor: conductor.install_trunk(trunk)).result(10)
        for _ in range(self._first_replicas):
            self.start_replica()
        for name in self.replicas:
            self.wait_admitted(name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for replica in self.replicas.values():
            replica.watcher.stop()
        for link in self.links.values():
            link.is_cut = True
        self.crash_conductor()
        for replica in self.replicas.values():
            replica.close()
            replica.watcher._thread.join(timeout=10)

    def start_conductor(self) -> None:
        """A new conductor on the same log; whatever an older one knew is gone."""
        self.crash_conductor()
        loop = LoopThread()
        self.conductor = loop.start(self._new_conductor()).result(10)
        self._loop = loop

    def crash_conductor(self) -> None:
        """The conductor's process ends where it stands."""
        loop, self._loop, self.conductor = self._loop, None, None
        if loop is not None:
            loop.crash()

    async def _new_conductor(self) -> Conductor:
        conductor = Conductor(
            self.log,
            self,
            cluster=self.cluster,
            may_differ=self.settings.may_differ,
            hold_s=self.settings.swap_hold_s,
            stage_s=self.settings.swap_stage_s,
            trunk_stage_s=self.settings.trunk_stage_s,
        )
        self.statistics = FleetStatistics()
        self.rollouts = RolloutWatch(conductor, webhook_url=self.settings.webhook_url)
        return conductor

    async def poll(self, conductor: Conductor, poll: Poll) -> Directive:
        """What the conductor's process does with a poll."""
        if poll.trials is not None and self.rollouts is not None:
            self.rollouts.take(poll.replica, poll.trials)
        if poll.models is not None:
            self.statistics.take(poll.replica, poll.models, await conductor.members())
        return await conductor.poll(poll)

    def ask(self, question: Callable[[Conductor], Coroutine[Any, Any, T]]) -> Future[T]:
        """Call the conductor of the moment.

        Raises:
            LinkError: there is none.
        """
        loop, conductor = self._loop, self.conductor
        if loop is None or conductor is None:
            raise LinkError("no conductor")
        return loop.start(question(conductor))

    def start_replica(self, link: LocalLink | None = None, log: HeadLog | None = None) -> str:
        """Start one more replica, under a name that none ever had."""
        self._num_started += 1
        name = f"replica-{self._num_started}"
        self.links[name] = link or LocalLink(self)
        log = log or HeadLog(self.settings.store)
        self.replicas[name] = Replica(name, log, self.links[name], self.settings)
        return name

    def wait_admitted(self, name: str) -> None:
        """Until the replica may answer."""
        until(lambda: self.replicas[name].watcher.is_admitted)
        self._routed.add(name)

    def routed(self) -> list[str]:
        """The replicas that get traffic: those that were admitted once and live."""
        return sorted(self._routed - frozenset(self.killed))

    def living(self) -> frozenset[str]:
        """See `roll_call.Fleet.living`."""
        return frozenset(self.replicas) - frozenset(self.killed)

    def kill(self, replica: str) -> None:
        """See `roll_call.Fleet.kill`: the process is gone at once, with all that it was doing."""
        if replica in self.killed:
            return
        self.links[replica].is_cut = True
        self.replicas[replica].watcher.stop()
        batcher = self.replicas[replica].batcher
        batcher.set_open(is_open=False)
        self.killed.append(replica)
        for job in list(batcher._waiting):
            job.done.cancel()  # the connection is reset

    def start_push(
        self, bundle: Bundle, *, task: str | None = None, key: str = "", **fields: Any
    ) -> Future[Outcome]:
        """Ask for a push, as a replica does once its gates have passed."""
        change = self.asked(bundle, task=task, key=key, **fields)
        return self.ask(lambda conductor: conductor.change(change))

    def asked(
        self, bundle: Bundle, *, task: str | None = None, key: str = "", **fields: Any
    ) -> Change:
        """What asks for a push; the bundle is stored."""
        self.log.put_bundle(bundle)
        task = task or bundle.manifest.task
        if bundle.signature is not None:
            keys, now = self.view().signing_keys, datetime.now(UTC)
            fields = {"signed": check_signature(bundle, task, keys, now), **fields}
        return Change(
            task,
            key or bundle.digest,
            bundle=bundle.digest,
            labels=bundle.manifest.labels,
            **fields,
        )

    def start_pushes(
        self, *bundles: Bundle, key: str = "", trunk: Path | None = None
    ) -> Future[Outcome]:
        """Ask for pushes of several tasks that go live together, perhaps with a trunk."""
        pushes = tuple(self.asked(bundle) for bundle in bundles)
        stored = None if trunk is None else stored_trunk(self.log, trunk)
        change = Pushes(pushes, key or uuid4().hex, trunk=stored)
        return self.ask(lambda conductor: conductor.change(change))

    def push_together(self, *bundles: Bundle, key: str = "", trunk: Path | None = None) -> Outcome:
        """Push several and wait for the outcome."""
        return self.start_pushes(*bundles, key=key, trunk=trunk).result(30)

    def roll_trunk_back(self, *, key: str = "", expected: str | None = None) -> Outcome:
        """Go back to the trunk before and wait for the outcome."""
        change = TrunkRollback(key or uuid4().hex, expected=expected)
        return self.ask(lambda conductor: conductor.change(change)).result(30)

    def push(
        self, bundle: Bundle, *, task: str | None = None, key: str = "", **fields: Any
    ) -> Outcome:
        """Push and wait for the outcome."""
        return self.start_push(bundle, task=task, key=key, **fields).result(30)

    def must_push(self, bundle: Bundle, **fields: Any) -> int:
        """Push what has to succeed; returns its version."""
        outcome = self.push(bundle, **fields)
        assert isinstance(outcome, Swapped), outcome
        assert outcome.change is not None
        return outcome.change.version

    def promote(self, task: str, *, key: str, **fields: Any) -> Outcome:
        """Promote the candidate and wait for the outcome."""
        return self.roll_back(task, key=key, promote=True, **fields)

    def roll_back(self, task: str, *, key: str, **fields: Any) -> Outcome:
        """Roll back and wait for the outcome."""
        return self.ask(lambda conductor: conductor.change(Change(task, key, **fields))).result(30)

    def start_setting(self, task: str, *, key: str = "", **settings: object) -> Future[Outcome]:
        """Ask for settings, as a replica does once it has checked them."""
        asked = asked_settings(settings)
        change = Change(task, key or repr(asked), settings=asked)
        return self.ask(lambda conductor: conductor.change(change))

    def set_task(self, task: str, *, key: str = "", **settings: object) -> Outcome:
        """Set and wait for the outcome."""
        return self.start_setting(task, key=key, **settings).result(30)

    def start_trust(self, trust: KeyChange, *, key: str = "") -> Future[Outcome]:
        """Ask for trust in a key."""
        request = KeyRequest(trust.key_id, key or uuid4().hex, trust)
        return self.ask(lambda conductor: conductor.change(request))

    def trust(self, trust: KeyChange) -> Outcome:
        """Trust a key and wait for the outcome."""
        return self.start_trust(trust).result(30)

    def revoke(self, key_id: str) -> Outcome:
        """Revoke a key and wait for the outcome."""
        request = KeyRequest(key_id, uuid4().hex)
        return self.ask(lambda conductor: conductor.change(request)).result(30)

    def issue(self, token: TokenChange) -> Outcome:
        """Make an access token and wait for the outcome."""
        request = TokenRequest(token.token_id, uuid4().hex, token)
        return self.ask(lambda conductor: conductor.change(request)).result(30)

    def revoke_token(self, token_id: str) -> Outcome:
        """Revoke an access token and wait for the outcome."""
        request = TokenRequest(token_id, uuid4().hex)
        return self.ask(lambda conductor: conductor.change(request)).result(30)

    def live_versions(self, task: str) -> set[int]:
        """The versions that the living replicas point at."""
        heads = [self.replicas[name].batcher.snapshot.heads for name in self.living()]
        return {mine[task].version if task in mine else 0 for mine in heads}

    def break_store(self) -> None:
        """Nothing can be read from the log or written to it: a file stands where its folder was."""
        folder = Path(self.settings.store)
        (folder / "log").rename(folder / "away")
        (folder / "log").touch()

    def mend_store(self) -> None:
        """The log is back."""
        folder = Path(self.settings.store)
        (folder / "log").unlink()
        (folder / "away").rename(folder / "log")

    def view(self) -> LogView:
        """What the log says, read anew."""
        return HeadLog(self.settings.store).follow(LogView())
