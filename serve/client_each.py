"""Many pictures through one client: a few at once, answered in the order in which they came."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from serve.client_calls import Prediction
from serve.client_sending import NOT_NOW, ClientError

AT_ONCE = 8
# Another picture may be answered; whatever else goes wrong would go wrong with each.
ONE_PICTURES = frozenset({400, 413, 415}) | NOT_NOW

Told = Prediction | ClientError | OSError


def predict_each(
    ask: Callable[[Path], Prediction], images: Iterable[Path], *, at_once: int
) -> Iterator[tuple[Path, Told]]:
    """Ask of each picture from threads."""
    with ThreadPoolExecutor(at_once) as pool:
        asked: deque[tuple[Path, Future[Prediction]]] = deque()

        def oldest() -> tuple[Path, Told]:
            image, future = asked.popleft()
            try:
                return image, future.result()
            except (ClientError, OSError) as error:
                return image, _its_own(error)

        try:
            for image in images:
                asked.append((image, pool.submit(ask, image)))
                if len(asked) == at_once:
                    yield oldest()
            while asked:
                yield oldest()
        finally:
            for _, future in asked:
                future.cancel()


async def predict_each_async(
    ask: Callable[[Path], Awaitable[Prediction]], images: Iterable[Path], *, at_once: int
) -> AsyncIterator[tuple[Path, Told]]:
    """Ask of each picture from tasks of the event loop."""
    asked: deque[tuple[Path, asyncio.Future[Prediction]]] = deque()

    async def oldest() -> tuple[Path, Told]:
        image, future = asked.popleft()
        try:
            return image, await future
        except (ClientError, OSError) as error:
            return image, _its_own(error)

    try:
        for image in images:
            asked.append((image, asyncio.ensure_future(ask(image))))
            if len(asked) == at_once:
                yield await oldest()
        while asked:
            yield await oldest()
    finally:
        for _, future in asked:
            future.cancel()
        await asyncio.gather(*(future for _, future in asked), return_exceptions=True)


def _its_own(error: ClientError | OSError) -> ClientError | OSError:
    """The error, if it is of this picture alone; else it is everybody's and is raised."""
    if isinstance(error, ClientError) and error.status not in ONE_PICTURES:
        raise error
    return error
