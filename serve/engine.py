"""Rows in, scores out: the trunk's session, and each row's head after it.

The engine knows nothing of HTTP, Ray, or where bundles come from. A row is one (picture, task)
pair; the trunk runs once a picture, however many tasks ask about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from export.bundle import Digest, Precision, TrunkManifest
from serve.heads import Head, HeadOutputError, logits_of, score
from serve.onnx_session import open_session
from serve.task_settings import DEFAULTS, TaskSettings


@dataclass(frozen=True)
class LiveHead:
    """A head as a version of a task.

    Args:
        row_cost: What one row of it costs beside its picture, where a picture through the trunk
            costs 1.
        needs_picture: Whether features are not enough for it.
    """

    task: str
    version: int
    bundle: Digest
    head: Head
    row_cost: float = 0.0
    needs_picture: bool = False


@dataclass(frozen=True)
class Snapshot:
    """What is live at one moment, never changed: a swap makes the next one.

    Args:
        number: The log record that made it so.
        settings: Of the tasks for which something was set; see `settings_of`.
    """

    number: int = 0
    heads: Mapping[str, LiveHead] = field(default_factory=dict)
    settings: Mapping[str, TaskSettings] = field(default_factory=dict)

    def settings_of(self, task: str) -> TaskSettings:
        """The task's settings; the defaults if nothing was set."""
        return self.settings.get(task, DEFAULTS)

    def with_heads(
        self,
        number: int,
        heads: Sequence[LiveHead],
        settings: Mapping[str, TaskSettings] | None = None,
    ) -> Snapshot:
        """The snapshot after record `number` has made these heads and settings live.

        Args:
            settings: Of all tasks that have any; None leaves them as they are.
        """
        live = {**self.heads, **{head.task: head for head in heads}}
        return Snapshot(number, live, self.settings if settings is None else settings)


class Row(NamedTuple):
    """One question: what does this task say of that picture of the batch?"""

    image_of: int
    head: LiveHead


class Engine:
    """The trunk: pictures to features, and rows to scores.

    Args:
        graph: The bytes of `trunk.onnx`, or of its variant in that precision.
        manifest: Its `trunk.json`.
    """

    def __init__(
        self, graph: bytes, manifest: TrunkManifest, *, precision: Precision = "fp32"
    ) -> None:
        self.manifest, self.precision = manifest, precision
        self._session = open_session(graph)

    def features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Uint8 [batch, height, width, 3] -> float32 [batch, num_features]."""
        return np.asarray(self._session.run(["features"], {"images": pictures})[0])

    def run(
        self, pictures: NDArray[np.uint8], rows: Sequence[Row]
    ) -> list[NDArray[np.float32] | HeadOutputError]:
        """Answer a batch of rows, which may mix any tasks.

        Returns:
            For each row its scores, float32 [labels], or why its head has none.
        """
        return self.run_features(self.features(pictures), rows)

    def run_features(
        self, features: NDArray[np.float32], rows: Sequence[Row]
    ) -> list[NDArray[np.float32] | HeadOutputError]:
        """Answer a batch of rows from features, float32 [batch, num_features]; see `run`."""
        gathered = features[[row.image_of for row in rows]]
        heads = [row.head.head for row in rows]
        return score(logits_of(gathered, heads), heads)
