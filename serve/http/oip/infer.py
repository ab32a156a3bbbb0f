"""`POST /v2/models/{model}/infer`: tensors in, tensors out."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from functools import partial

import numpy as np
from starlette.requests import Request
from starlette.responses import Response

from export.bundle import TrunkManifest
from serve.heads import HeadOutputError
from serve.http.access import caller_in
from serve.http.body import read_body
from serve.http.deadline import allowed_s, answered
from serve.http.oip.compress import COMPRESS, accepted_encoding
from serve.http.oip.models import Model, asked_model, asked_version
from serve.http.oip.moment import served_view
from serve.http.oip.request import LENGTH_HEADER, InferRequest, json_length, read_request
from serve.http.oip.response import infer_response, wanted_outputs
from serve.http.oip.tensors import Elements
from serve.http.problems import RequestError
from serve.jobs import Answer, Inputs, VersionHead
from serve.replica import Replica

INLINE_BYTES = 64 * 2**10  # JSON that is read at once; more is read beside other requests


class Infer:
    """The inference routes of one replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def infer(self, request: Request) -> Response:
        """Ask one model of every row of its input, all answered by one version of it."""
        model, number = asked_model(request), asked_version(request)
        timeout_s = allowed_s(request, self._replica, (model.task,))
        body = await read_body(request, max_bytes=self._replica.settings.max_body_bytes)
        arrived_s = time.monotonic()
        trunk = self._replica.engine.manifest
        asked, elements = await self._read(request, body, model, trunk)
        wanted_outputs(asked)  # what cannot be answered is not run
        timeout_s = min(timeout_s, asked.parameters.timeout / 1e6 or timeout_s)
        caller = caller_in(request).token_id or request.headers.get("x-headstock-caller", "")
        deadline_s, version = arrived_s + timeout_s, None
        inputs = _inputs_of(model, elements)
        if number is not None:
            version = await self._version(model, number, deadline_s, timeout_s)
        asking = self._replica.ask(
            inputs, (model.task,), deadline_s, caller, version=version, made_for=trunk
        )
        answers = await self._answers(model, asking, deadline_s, timeout_s)
        return _respond(request, model, asked, answers)

    async def _read(
        self, request: Request, body: bytes, model: Model, trunk: TrunkManifest
    ) -> tuple[InferRequest, Elements]:
        """What the body asks for; a large one is read by a decoder."""
        num_json = json_length(request.headers.get(LENGTH_HEADER), len(body))
        spec = model.input_of(trunk)
        max_rows = self._replica.settings.max_pictures
        read = partial(read_request, body, num_json, spec, max_rows=max_rows)
        if num_json <= INLINE_BYTES:
            return read()
        return await asyncio.get_running_loop().run_in_executor(self._replica.decoders, read)

    async def _answers(
        self,
        model: Model,
        asking: Future[list[list[Answer]]],
        deadline_s: float,
        timeout_s: float,
    ) -> list[Answer]:
        try:
            answers = await answered(asking, deadline_s, timeout_s)
        except HeadOutputError as error:
            if model.kind == "features":  # the caller's own numbers
                raise RequestError(400, f"These features have no scores: {error}") from error
            raise
        return [answer for (answer,) in answers]

    async def _version(
        self, model: Model, number: int, deadline_s: float, timeout_s: float
    ) -> VersionHead:
        """The head of a version, loaded off the way of others if it is not live."""
        trunk, snapshot = self._replica.batcher.served
        live = snapshot.heads.get(model.task)
        if live is not None and live.version == number:
            return VersionHead(live, trunk.engine.manifest)
        view = self._replica.watcher.view
        is_known = any(v.change.version == number for v in view.tasks.get(model.task, ()))
        # A version that another replica answers by already may not be in this one's view, and the
        # trunk of its view not be served yet.
        if not is_known or view.trunk is None or view.trunk.trunk != trunk.digest:
            view, _ = await served_view(self._replica, deadline_s, timeout_s)
        assert view.trunk is not None
        older = self._replica.older(model.version(view, number), view.trunk)
        return await answered(older, deadline_s, timeout_s)


def _inputs_of(model: Model, elements: Elements) -> list[bytes] | Inputs:
    """One input a row.

    Raises:
        RequestError: features that are no numbers, which no head has an answer to.
    """
    if not isinstance(elements, np.ndarray):
        return list(elements)
    if model.kind == "features" and not np.isfinite(elements).all():
        raise RequestError(400, "Input 'features' has values that are not finite numbers.")
    return list(elements)


def _respond(
    request: Request, model: Model, asked: InferRequest, answers: list[Answer]
) -> Response:
    body, num_json = infer_response(model, asked, answers)
    live = answers[0].live
    headers = {
        "content-type": "application/json" if num_json is None else "application/octet-stream",
        "x-headstock-version": str(live.version),
        "x-headstock-bundle": live.bundle,
        "vary": "accept-encoding",
    }
    if num_json is not None:
        headers[LENGTH_HEADER] = str(num_json)
    if encoding := accepted_encoding(request.headers.get("accept-encoding", "")):
        body, headers["content-encoding"] = COMPRESS[encoding](body), encoding
    return Response(body, headers=headers)
