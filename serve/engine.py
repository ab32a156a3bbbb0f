"""Rows in, scores out: the trunk and the heads as ONNX Runtime sessions.

The engine knows nothing of HTTP, Ray, or where bundles come from. A row is one (picture, task)
pair; the trunk runs once a picture, however many tasks ask about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from export.bundle import HEAD, Bundle, Digest, Precision, TrunkManifest
from serve.task_settings import DEFAULTS, TaskSettings

onnxruntime.set_default_logger_severity(3)  # warnings of ONNX Runtime are for those who export


class HeadOutputError(Exception):
    """A head failed or gave scores that are not numbers; other heads of the batch go on."""


@dataclass(frozen=True)
class Head:
    """A loaded head: features float32 [rows, num_features] -> logits float32 [rows, labels]."""

    session: onnxruntime.InferenceSession
    labels: tuple[str, ...]
    link: Literal["softmax", "sigmoid", "none"]
    temperature: float

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Head:
        """Load the head of a bundle that has passed the gates."""
        manifest = bundle.manifest
        session = open_session(bundle.files[HEAD])
        return cls(session, manifest.labels, manifest.link, manifest.temperature)

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Float32 [rows, labels]."""
        return np.asarray(self.session.run(["logits"], {"features": features})[0])

    # What overflows is looked for below, and a softmax of huge logits may.
    @np.errstate(all="ignore")
    def scores(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Link of logits / temperature, float32 [rows, labels].

        Raises:
            HeadOutputError: the head fails, or a score is not a finite number.
        """
        try:
            logits = self.logits(features) / np.float32(self.temperature)
        # ONNX Runtime has no common error class below Exception.
        except Exception as error:
            raise HeadOutputError(f"The head cannot be run: {error}") from error
        if logits.shape != (len(features), len(self.labels)):
            raise HeadOutputError(f"The head gave logits of shape {logits.shape}.")
        if not np.isfinite(logits).all():
            raise HeadOutputError("The head gave logits that are not finite numbers.")
        if self.link == "softmax":
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
            return exponentials / exponentials.sum(axis=1, keepdims=True)
        if self.link == "sigmoid":
            # tanh does not overflow where exp(-logit) would.
            return (0.5 * (1 + np.tanh(0.5 * logits))).astype(np.float32)
        return logits


@dataclass(frozen=True)
class LiveHead:
    """A head as a version of a task."""

    task: str
    version: int
    bundle: Digest
    head: Head


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
        features = self.features(pictures)
        answers: list[NDArray[np.float32] | HeadOutputError] = [_UNANSWERED] * len(rows)
        for places in _by_head(rows):
            head = rows[places[0]].head.head
            try:
                scores = head.scores(features[[rows[place].image_of for place in places]])
            except HeadOutputError as error:
                scores = [error] * len(places)
            for place, score in zip(places, scores, strict=True):
                answers[place] = score
        return answers


_UNANSWERED = HeadOutputError("The row was not answered.")


def open_session(graph: bytes) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session with one thread that does not spin: replicas are the parallelism."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _by_head(rows: Sequence[Row]) -> list[list[int]]:
    """Places of the rows that share a head, so that each head runs once."""
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(id(row.head), []).append(place)
    return list(groups.values())
