"""A client of the service, `Client`, and its twin for asyncio, `AsyncClient`.

What each call sends and how it reads the answer is in `client_calls.py`, `client_pushes.py` and so
on, once for both; here is how it gets there and back.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import itertools
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import httpx

from serve import client_calls as calls
from serve import client_changes as changes
from serve import client_pushes as pushes
from serve import client_tokens as access
from serve.client_calls import Prediction
from serve.client_each import AT_ONCE, Told, predict_each, predict_each_async
from serve.client_sending import TRIES, Ask, ClientError, Steps, read, wait_s

__all__ = ["AsyncClient", "Client", "ClientError", "Prediction"]

P = ParamSpec("P")
T = TypeVar("T")


def _waits(call: Callable[P, Steps[T]]) -> Callable[Concatenate[Client, P], T]:
    """A call as a method that returns its result."""

    @functools.wraps(call)
    def method(client: Client, *args: P.args, **kwargs: P.kwargs) -> T:
        steps = call(*args, **kwargs)
        try:
            asked = next(steps)
            while True:
                asked = steps.send(client.send(asked))
        except StopIteration as done:
            return done.value

    return _shown_as_method(method, call)


def _awaits(call: Callable[P, Steps[T]]) -> Callable[Concatenate[AsyncClient, P], Awaitable[T]]:
    """A call as a method that is awaited."""

    @functools.wraps(call)
    async def method(client: AsyncClient, *args: P.args, **kwargs: P.kwargs) -> T:
        steps = call(*args, **kwargs)
        try:
            asked = next(steps)
            while True:
                asked = steps.send(await client.send(asked))
        except StopIteration as done:
            return done.value

    return _shown_as_method(method, call)


def _shown_as_method(method: Any, call: Callable[..., Any]) -> Any:
    """The signature that `help` shows begins with the client."""
    signature = inspect.signature(call)
    client = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    method.__signature__ = signature.replace(
        parameters=[client, *signature.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    return method


class Client:
    """Talks to one service, and may be shared by threads.

    Args:
        url: Where the service answers, as `headstock serve` prints it.
        token: Access token, for a service that asks for one.
        timeout_s: Longest time for one call, with all that is sent again.
        tries: How often a request is sent whose connection broke, or that was told "not now".
    """

    def __init__(
        self, url: str, *, token: str = "", timeout_s: float = 60.0, tries: int = TRIES
    ) -> None:
        self.url = url
        self._timeout_s, self._tries = timeout_s, tries
        self._http = httpx.Client(base_url=url, headers=access.headers(token), timeout=timeout_s)

    # Not Self: the shape checks of the tests wrap methods one by one, and Self needs the class.
    def __enter__(self) -> Client:  # noqa: PYI034
        """Use the client for a while."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close its connections."""
        self._http.close()

    predict = _waits(calls.predict)
    predict_tasks = _waits(calls.predict_tasks)
    tasks = _waits(calls.tasks)
    metrics = _waits(calls.metrics)
    task = _waits(calls.task)
    versions = _waits(calls.versions)
    history = _waits(calls.history)
    diff = _waits(calls.diff)
    bundle = _waits(calls.bundle)
    keys = _waits(calls.keys)
    push = _waits(pushes.push)
    push_together = _waits(pushes.push_together)
    push_trunk = _waits(pushes.push_trunk)
    try_push = _waits(pushes.try_push)
    try_push_together = _waits(pushes.try_push_together)
    try_push_trunk = _waits(pushes.try_push_trunk)
    promote = _waits(changes.promote)
    rollback = _waits(changes.rollback)
    rollback_trunk = _waits(changes.rollback_trunk)
    retire = _waits(changes.retire)
    set_task = _waits(changes.set_task)
    set_heldout = _waits(changes.set_heldout)
    trust_key = _waits(changes.trust_key)
    revoke_key = _waits(changes.revoke_key)
    make_token = _waits(access.make_token)
    revoke_token = _waits(access.revoke_token)
    tokens = _waits(access.tokens)

    def predict_each(
        self, task: str, images: Iterable[Path], *, top: int | None = None, at_once: int = AT_ONCE
    ) -> Iterator[tuple[Path, Told]]:
        """Ask one task of many pictures; yields each with its prediction, in their order.

        A picture that gets no answer, because it cannot be read or the service has no time for it,
        comes with its error, and the others go on.

        Args:
            top: See `predict`.
            at_once: Most pictures that are under way at any time.

        Raises:
            ClientError: the service said no to more than the picture, or does not answer.
        """

        def ask(image: Path) -> Prediction:
            return self.predict(task, image, top=top)

        return predict_each(ask, images, at_once=at_once)

    def log(self, *, after: int = 0) -> Iterator[dict[str, Any]]:
        """Every record of the head log after that number, oldest first, as it arrives.

        Raises:
            ClientError: the service said no, or stopped in the middle.
        """
        try:
            with self._http.stream("GET", "/log", params={"after": after}) as response:
                if not response.is_success:
                    response.read()
                    read(response, self.url)
                for line in response.iter_lines():
                    yield json.loads(line)
        except httpx.TransportError as error:
            raise ClientError(0, f"{self.url} stopped answering: {error}.") from error

    def send(self, asked: Ask) -> Any:
        """Send one request, again if need be; the JSON of its answer.

        Raises:
            ClientError: the service said no, or did not answer.
        """
        ends_s = time.monotonic() + self._timeout_s
        for attempt in itertools.count(1):
            left_s = max(0.0, ends_s - time.monotonic())
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = self._http.request(
                    asked.method, asked.path, timeout=left_s, **asked.options()
                )
            except httpx.TransportError as error:
                outcome = error
            left_s = ends_s - time.monotonic()
            pause_s = wait_s(outcome, attempt=attempt, tries=self._tries, left_s=left_s)
            if pause_s is None:
                return read(outcome, self.url)
            time.sleep(pause_s)
        raise AssertionError


class AsyncClient:
    """`Client` for asyncio: the same calls, awaited.

    Args:
        url: See `Client`.
        token: See `Client`.
        timeout_s: See `Client`.
        tries: See `Client`.
    """

    def __init__(
        self, url: str, *, token: str = "", timeout_s: float = 60.0, tries: int = TRIES
    ) -> None:
        self.url = url
        self._timeout_s, self._tries = timeout_s, tries
        self._http = httpx.AsyncClient(
            base_url=url, headers=access.headers(token), timeout=timeout_s
        )

    async def __aenter__(self) -> AsyncClient:  # noqa: PYI034 (see Client)
        """Use the client for a while."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close its connections."""
        await self._http.aclose()

    predict = _awaits(calls.predict)
    predict_tasks = _awaits(calls.predict_tasks)
    tasks = _awaits(calls.tasks)
    metrics = _awaits(calls.metrics)
    task = _awaits(calls.task)
    versions = _awaits(calls.versions)
    history = _awaits(calls.history)
    diff = _awaits(calls.diff)
    bundle = _awaits(calls.bundle)
    keys = _awaits(calls.keys)
    push = _awaits(pushes.push)
    push_together = _awaits(pushes.push_together)
    push_trunk = _awaits(pushes.push_trunk)
    try_push = _awaits(pushes.try_push)
    try_push_together = _awaits(pushes.try_push_together)
    try_push_trunk = _awaits(pushes.try_push_trunk)
    promote = _awaits(changes.promote)
    rollback = _awaits(changes.rollback)
    rollback_trunk = _awaits(changes.rollback_trunk)
    retire = _awaits(changes.retire)
    set_task = _awaits(changes.set_task)
    set_heldout = _awaits(changes.set_heldout)
    trust_key = _awaits(changes.trust_key)
    revoke_key = _awaits(changes.revoke_key)
    make_token = _awaits(access.make_token)
    revoke_token = _awaits(access.revoke_token)
    tokens = _awaits(access.tokens)

    def predict_each(
        self, task: str, images: Iterable[Path], *, top: int | None = None, at_once: int = AT_ONCE
    ) -> AsyncIterator[tuple[Path, Told]]:
        """See `Client.predict_each`.

        Raises:
            ClientError: see there.
        """

        def ask(image: Path) -> Awaitable[Prediction]:
            return self.predict(task, image, top=top)

        return predict_each_async(ask, images, at_once=at_once)

    async def log(self, *, after: int = 0) -> AsyncIterator[dict[str, Any]]:
        """See `Client.log`.

        Raises:
            ClientError: the service said no, or stopped in the middle.
        """
        try:
            async with self._http.stream("GET", "/log", params={"after": after}) as response:
                if not response.is_success:
                    await response.aread()
                    read(response, self.url)
                async for line in response.aiter_lines():
                    yield json.loads(line)
        except httpx.TransportError as error:
            raise ClientError(0, f"{self.url} stopped answering: {error}.") from error

    async def send(self, asked: Ask) -> Any:
        """See `Client.send`.

        Raises:
            ClientError: the service said no, or did not answer.
        """
        ends_s = time.monotonic() + self._timeout_s
        for attempt in itertools.count(1):
            left_s = max(0.0, ends_s - time.monotonic())
            outcome: httpx.Response | httpx.TransportError
            try:
                outcome = await self._http.request(
                    asked.method, asked.path, timeout=left_s, **asked.options()
                )
            except httpx.TransportError as error:
                outcome = error
            left_s = ends_s - time.monotonic()
            pause_s = wait_s(outcome, attempt=attempt, tries=self._tries, left_s=left_s)
            if pause_s is None:
                return read(outcome, self.url)
            await asyncio.sleep(pause_s)
        raise AssertionError
