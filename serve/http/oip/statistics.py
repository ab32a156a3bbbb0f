"""The statistics extension: what the fleet counted of every model, whichever replica is asked.

Source: Triton's statistics extension of the Open Inference Protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

import orjson
from starlette.requests import Request
from starlette.responses import Response

from serve.http.access import caller_in
from serve.http.oip.models import asked_model, asked_version
from serve.link import Link
from serve.replica import Replica
from serve.statistics import Counts


class ModelStatistics:
    """The statistics routes of one replica."""

    def __init__(self, replica: Replica, link: Link) -> None:
        self._replica, self._link = replica, link

    async def all(self, request: Request) -> Response:
        """Of every model and version that was ever asked."""
        counted, caller = await self._link.statistics(None), caller_in(request)
        return _answer(
            (model, version, counts)
            for model, versions in sorted(counted.items())
            if caller.may("read", model.partition(".")[0])
            for version, counts in sorted(versions.items())
        )

    async def model(self, request: Request) -> Response:
        """Of the versions of a model that answer, or of one of them, asked or not."""
        model, number = asked_model(request), asked_version(request)
        view = await asyncio.to_thread(self._replica.history)
        one = model.version(view, number)
        versions = model.versions(view) if number is None else (one,)
        counted = (await self._link.statistics(model.name)).get(model.name, {})
        numbers = [version.change.version for version in versions]
        return _answer((model.name, known, counted.get(known, Counts())) for known in numbers)


def _answer(entries: Iterable[tuple[str, int, Counts]]) -> Response:
    shown = [_shown(model, version, counts) for model, version, counts in entries]
    return Response(orjson.dumps({"model_stats": shown}), media_type="application/json")


def _shown(model: str, version: int, counts: Counts) -> dict[str, object]:
    answered = counts.answered
    return {
        "name": model,
        "version": str(version),
        "last_inference": counts.last_ms,
        "inference_count": counts.num_rows,
        "execution_count": sum(counts.runs.values()),
        "inference_stats": {
            "success": _timed(answered, counts.answered_ns),
            "fail": _timed(counts.failed, counts.failed_ns),
            "queue": _timed(answered, counts.waiting_ns),
            "compute_input": _timed(answered, counts.decoding_ns),
            "compute_infer": _timed(answered, counts.running_ns),
            # Scores are ready when a run ends; what becomes of them is not counted.
            "compute_output": _timed(answered, 0),
            "cache_hit": _timed(0, 0),
            "cache_miss": _timed(0, 0),
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": _timed(num, 0),
                "compute_infer": _timed(num, counts.runs_ns[size]),
                "compute_output": _timed(num, 0),
            }
            for size, num in sorted(counts.runs.items())
        ],
        "memory_usage": [],
    }


def _timed(count: int, ns: int) -> Mapping[str, int]:
    return {"count": count, "ns": ns}
