"""`POST /predict/{task}` and `POST /predict?tasks=a,b`: pictures in, labels out."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import orjson
from starlette.requests import Request
from starlette.responses import Response

from serve.http.access import caller_in, check
from serve.http.body import pictures_in, read_body
from serve.http.deadline import allowed_s, answered
from serve.http.problems import RequestError
from serve.jobs import Answer
from serve.replica import Replica

MAX_TOP_DIGITS = 6


class Predict:
    """The prediction routes of one replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def one_task(self, request: Request) -> Response:
        """Ask one task of every picture in the body."""
        top = _top(request)
        answers = await self._ask(request, (request.path_params["task"],))
        results = [result_of(picture[0], top) for picture in answers]
        live = answers[0][0].live
        headers = {
            "x-headstock-version": str(live.version),
            "x-headstock-bundle": live.bundle,
        }
        return _json(results[0] if len(results) == 1 else {"results": results}, headers)

    async def many_tasks(self, request: Request) -> Response:
        """Ask several tasks, all answered from one snapshot of versions.

        `*` asks those that the caller may ask; of tasks that are named he has to be allowed all.
        """
        top, tasks = _top(request), _tasks(request)
        for task in tasks or ():
            check(request, "predict", task)
        answers = await self._ask(request, tasks)
        if len(answers) == 1:
            return _json({"results": [result_of(answer, top) for answer in answers[0]]})
        return _json(
            {
                "results": [
                    {"picture": number, **result_of(answer, top)}
                    for number, picture in enumerate(answers)
                    for answer in picture
                ]
            }
        )

    async def _ask(self, request: Request, tasks: tuple[str, ...] | None) -> list[list[Answer]]:
        replica, settings = self._replica, self._replica.settings
        timeout_s = allowed_s(request, replica, tasks)
        body = await read_body(request, max_bytes=settings.max_body_bytes)
        deadline_s = time.monotonic() + timeout_s
        pictures = await pictures_in(request, body, max_pictures=settings.max_pictures)
        num_tasks = len(replica.batcher.snapshot.heads if tasks is None else tasks)
        if (num_rows := len(pictures) * num_tasks) > settings.max_rows:
            raise RequestError(
                413,
                f"{len(pictures)} pictures of {num_tasks} tasks are {num_rows} answers; at most "
                f"{settings.max_rows} are given at once. Ask for fewer.",
            )
        asking = caller_in(request)
        caller = asking.token_id or request.headers.get("x-headstock-caller", "")
        may_ask = partial(asking.may, "predict")
        return await answered(
            replica.ask(pictures, tasks, deadline_s, caller, may_ask), deadline_s, timeout_s
        )


def _tasks(request: Request) -> tuple[str, ...] | None:
    """The tasks of the query, or None for `*`."""
    value = request.query_params.get("tasks", "")
    names = tuple(name for name in value.split(",") if name)
    if not names:
        raise RequestError(
            400, "Name the tasks: POST /predict/{task}, /predict?tasks=a,b or /predict?tasks=*."
        )
    if len(set(names)) != len(names):
        raise RequestError(400, f"A task is named twice in tasks={value}.")
    return None if names == ("*",) else names


def _top(request: Request) -> int | None:
    value = request.query_params.get("top")
    if value is None:
        return None
    if not value.isdecimal() or len(value) > MAX_TOP_DIGITS or int(value) < 1:
        raise RequestError(400, f"top is {value!r:.20}; expected a whole number of at least 1.")
    return int(value)


def _json(content: object, headers: dict[str, str] | None = None) -> Response:
    # Measured for 8 tasks of 10 labels: 4 us, where the standard library takes 72.
    return Response(orjson.dumps(content), headers=headers, media_type="application/json")


def result_of(answer: Answer, top: int | None) -> dict[str, object]:
    """The JSON object of one answer, with all its scores or the `top` best."""
    live, head, labels = answer.live, answer.live.head, answer.live.head.labels
    scores = answer.scores.tolist()
    best = int(np.argmax(answer.scores))
    shown = range(len(labels))
    if top is not None:
        # A stable sort, so that equal scores come in the order of the labels.
        shown = np.argsort(-answer.scores, kind="stable")[:top].tolist()
    return {
        "task": live.task,
        "version": live.version,
        "bundle": live.bundle,
        "label": labels[best],
        "score": scores[best],
        **({"labels": list(head.labels_given(answer.scores))} if head.is_multilabel else {}),
        "scores": {labels[place]: scores[place] for place in shown},
    }
