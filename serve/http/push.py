"""Pushes: a bundle of one task, or bundles of several that go live in one moment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from export.bundle import HELDOUT, Bundle, BundleError
from serve.engine import Engine
from serve.grounds import grounds_of
from serve.http.access import caller_in, check
from serve.http.body import File, files_in, read_body
from serve.http.changes import FIELD_NAMES, change_by, idempotency_key, malformed, share_of
from serve.http.problems import RequestError, problem_of_refusal
from serve.http.query import check_parameters, flag_in
from serve.http.shown import swap_shown, versions_shown, would_be, would_be_several
from serve.link import Link
from serve.messages import AnyChange, Change, Outcome, Pushes, Refused
from serve.proposal import Proposal, propose
from serve.record import LogView, TrunkChange, Verdict
from serve.replica import Replica
from serve.timeline import step

T = TypeVar("T")
COMPARE_TRIES = 10  # of pushes that are made at once one is live after each round of gates
FLIP_S = 0.1
PARAMETERS = ("dry_run", "message", "new_labels")
ROLLOUTS = ("canary", "shadow")


@dataclass(frozen=True)
class Wanted:
    """A bundle that is pushed, and what is asked for it."""

    bundle: Bundle
    change: Change


@dataclass(frozen=True)
class Beside:
    """A trunk that was loaded for the gates, and what a record would say of it."""

    engine: Engine
    change: TrunkChange


class Push:
    """The routes of one replica that take bundles."""

    def __init__(self, replica: Replica, link: Link) -> None:
        self._replica, self._link = replica, link

    async def one(self, request: Request) -> Response:
        """Admit a bundle and make it live everywhere."""
        # What is not understood is refused: the push would be live for more callers than meant.
        check_parameters(request, *PARAMETERS, *ROLLOUTS)
        share = _candidate_share(request)
        data = await read_body(request, max_bytes=self._replica.settings.max_bundle_bytes)
        if not data:
            raise RequestError(400, "The body is empty; send a bundle as application/zip.")
        try:
            bundle = await asyncio.to_thread(Bundle.of_zip, data)
        except BundleError as error:
            verdict = Verdict(gate="bundle", passed=False, reason=str(error))
            return problem_of_refusal(Refused("gate", str(error), (verdict,)))
        wanted = _wanted(request, bundle, request.path_params["task"], share=share)
        outcome = await self.push(request, [wanted], lambda checked: checked[0])
        if isinstance(outcome, Refused):
            return problem_of_refusal(outcome)
        if isinstance(outcome, Proposal):
            return JSONResponse(would_be(outcome))
        return JSONResponse(swap_shown(outcome))

    async def several(self, request: Request) -> Response:
        """Admit bundles of several tasks and make them live in one moment, or none of them."""
        if rollouts := [name for name in ROLLOUTS if name in request.query_params]:
            raise RequestError(
                400,
                f"A {rollouts[0]} is begun with one bundle alone, by POST /tasks/TASK/versions.",
            )
        check_parameters(request, *PARAMETERS)
        files = await files_in(request, "bundle", max_bytes=self._replica.settings.max_push_bytes)
        wanted = await wanted_in(request, files)
        key, message = idempotency_key(request), request.query_params.get("message", "")
        who = caller_in(request).name
        outcome = await self.push(
            request, wanted, lambda checked: Pushes(tuple(checked), key, message, who)
        )
        return answer_of_several(outcome)

    async def push(
        self,
        request: Request,
        wanted: Sequence[Wanted],
        together: Callable[[Sequence[Change]], AnyChange],
        beside: Beside | None = None,
    ) -> Outcome | Proposal:
        """Ask the gates, then the conductor; anew if something else went live in between.

        Args:
            together: Makes one change of all pushes.
            beside: The trunk that goes live with them, if it is not the one that is served.

        Returns:
            A proposal for a dry run that every gate lets pass.
        """
        outcome: Outcome = Refused("conflict", "The trunk is just being changed; push again.")
        admitted: list[Wanted] = []
        looked_at: Engine | None = None
        for _ in range(COMPARE_TRIES):
            live = self._replica.engine
            view = await asyncio.to_thread(self._replica.history)
            if view.trunk is not None and view.trunk.trunk != live.manifest.digest:
                await asyncio.sleep(FLIP_S)  # this replica holds, and will move to it
                continue
            engine = beside.engine if beside else live
            if engine is not looked_at:
                admitted = [await self._admitted(one, engine) for one in wanted]
                looked_at = engine
            checked = [one.change for one in admitted]
            # What its key has made already is not compared with what went live since.
            if not view.made_by(idempotency_key(request)):
                checked = [await self._compared(one, view, live, beside) for one in admitted]
            if refused := _refusal(checked):
                return refused
            change = together(checked)
            if flag_in(request, "dry_run"):
                return propose(view, change, datetime.now(UTC))
            for one in wanted:
                await asyncio.to_thread(self._replica.log.put_bundle, one.bundle)
            limit_s = self._replica.settings.request_timeout_s
            outcome = await change_by(self._link, change, limit_s=limit_s)
            if not (isinstance(outcome, Refused) and outcome.kind == "stale"):
                break
        return outcome

    async def _admitted(self, wanted: Wanted, engine: Engine) -> Wanted:
        """With the verdicts of the gates that look at the bundle alone, and who signed it."""
        task = wanted.change.task
        verdicts, signed = await self.examine(self._replica.admit, wanted.bundle, task, engine)
        return replace(
            wanted, change=replace(wanted.change, verdicts=_of_task(verdicts, task), signed=signed)
        )

    async def _compared(
        self, wanted: Wanted, view: LogView, live: Engine, beside: Beside | None
    ) -> Change:
        """With the verdicts of the gates that compare, and what they went by."""
        change = wanted.change
        if not change.verdicts[-1].passed:
            return change
        engine, trunk = (beside.engine, beside.change) if beside else (live, None)
        grounds = grounds_of(view, change.task, change.labels, trunk)
        compare = partial(self._replica.compare, allow_new_labels=change.allow_new_labels)
        verdicts = await self.examine(compare, wanted.bundle, change.task, engine, live, grounds)
        verdicts = (*change.verdicts, *_of_task(verdicts, change.task))
        return replace(change, verdicts=verdicts, grounds=grounds)

    async def examine(self, gates: Callable[..., T], *arguments: object) -> T:
        """Run gates in their own thread, behind answers."""
        loop = asyncio.get_running_loop()
        with step("gates"):
            return await loop.run_in_executor(self._replica.examiner, gates, *arguments)


async def wanted_in(request: Request, files: Sequence[File]) -> list[Wanted]:
    """The bundles of a request, each for the task that it was made for.

    Raises:
        BundleError: one is none.
        RequestError: two are of one task.
    """
    wanted: list[Wanted] = []
    for place, file in enumerate(files, start=1):
        try:
            bundle = await asyncio.to_thread(Bundle.of_zip, file.data)
        except BundleError as error:
            raise BundleError(f"Bundle {place} ({file.name}): {error}") from error
        if bundle.manifest.task in {one.change.task for one in wanted}:
            raise RequestError(
                400, f"Two bundles are of task {bundle.manifest.task}; send one of each task."
            )
        check(request, "push", bundle.manifest.task)
        wanted.append(_wanted(request, bundle, bundle.manifest.task))
    return wanted


def answer_of_several(outcome: Outcome | Proposal) -> Response:
    """What went live, or would, of several tasks and perhaps a trunk."""
    if isinstance(outcome, Refused):
        return problem_of_refusal(outcome)
    if isinstance(outcome, Proposal):
        return JSONResponse(would_be_several(outcome))
    return JSONResponse(versions_shown(outcome))


def _wanted(request: Request, bundle: Bundle, task: str, *, share: float | None = None) -> Wanted:
    """What a request asks for a bundle."""
    heldout = bundle.manifest.files.get(HELDOUT)
    fields: dict[str, Any] = {
        "bundle": bundle.digest,
        "labels": bundle.manifest.labels,
        "message": request.query_params.get("message", ""),
        "who": caller_in(request).name,
        "allow_new_labels": flag_in(request, "new_labels"),
        "heldout": f"sha256:{heldout.sha256}" if heldout else None,
        "share": share,
    }
    try:
        return Wanted(bundle, Change(task, idempotency_key(request), **fields))
    except ValidationError as error:
        raise malformed(error, FIELD_NAMES) from error


def _of_task(verdicts: Sequence[Verdict], task: str) -> tuple[Verdict, ...]:
    return tuple(verdict.model_copy(update={"task": task}) for verdict in verdicts)


def _refusal(checked: Sequence[Change]) -> Refused | None:
    """Why some of the bundles are not admitted, with what every gate said of each."""
    last = {change.task: change.verdicts[-1] for change in checked}
    refused = {task: verdict for task, verdict in last.items() if not verdict.passed}
    if not refused:
        return None
    reasons = [
        verdict.reason if len(checked) == 1 else f"{task}: {verdict.reason}"
        for task, verdict in refused.items()
    ]
    verdicts = tuple(verdict for change in checked for verdict in change.verdicts)
    return Refused("gate", " ".join(reasons), verdicts)


def _candidate_share(request: Request) -> float | None:
    """Of the callers, for a push that starts a rollout; None for one that is live at once."""
    if flag_in(request, "shadow"):
        if "canary" in request.query_params:
            raise RequestError(400, "A push is either a canary or a shadow; name one of the two.")
        return 0.0
    value = request.query_params.get("canary")
    if value is None:
        return None
    try:
        return share_of(float(value))
    except ValueError:
        return share_of(value)
