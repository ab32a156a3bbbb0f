"""Rows in, scores out: the trunk's session, and each row's head after it.

The engine knows nothing of HTTP, Ray, or where bundles come from. A row is one (picture, task)
pair; the trunk runs once a picture, however many tasks ask about it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx.utils import Extractor

from export.bundle import Digest, Precision, TrunkManifest
from serve.adapted import families_in
from serve.bank import Bank, PagedAdapter
from serve.heads import Head, HeadOutputError, logits_of, score
from serve.onnx_session import Device, open_session
from serve.task_settings import DEFAULTS, TaskSettings


@dataclass(frozen=True)
class LiveHead:
    """A head as a version of a task.

    Args:
        row_cost: What one row of it costs beside its picture, where a picture through the trunk
            costs 1.
        adapter: What changes the trunk's features for it.
        candidate: During a rollout the other side of this version.
        share: Of the callers that the candidate answers, from 0 (a shadow) to 1.
    """

    task: str
    version: int
    bundle: Digest
    head: Head
    row_cost: float = 0.0
    adapter: PagedAdapter | None = None
    candidate: LiveHead | None = None
    share: float = 0.0

    @property
    def needs_picture(self) -> bool:
        """Whether it starts from the prefix maps, as adapters and tails do."""
        return self.adapter is not None or self.head.takes == "prefix"

    def side_for(self, caller: bytes) -> LiveHead:
        """The side that answers a caller: always the same one, and when the share grows too."""
        if self.candidate is None or not self.share:
            return self
        digest = hashlib.sha256(self.candidate.bundle.encode() + b" " + caller).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        return self.candidate if place < self.share else self


@dataclass(frozen=True)
class Retired:
    """A task that answers nothing any more, since this version and that time (UTC, ISO 8601)."""

    task: str
    version: int
    since: str


@dataclass(frozen=True)
class Snapshot:
    """What is live at one moment, never changed: a swap makes the next one.

    Args:
        number: The log record that made it so.
        settings: Of the tasks for which something was set; see `settings_of`.
        retired: The tasks that had a head and have none now.
    """

    number: int = 0
    heads: Mapping[str, LiveHead] = field(default_factory=dict)
    settings: Mapping[str, TaskSettings] = field(default_factory=dict)
    retired: Mapping[str, Retired] = field(default_factory=dict)

    def settings_of(self, task: str) -> TaskSettings:
        """The task's settings; the defaults if nothing was set."""
        return self.settings.get(task, DEFAULTS)

    def with_heads(
        self,
        number: int,
        heads: Sequence[LiveHead | Retired],
        settings: Mapping[str, TaskSettings] | None = None,
    ) -> Snapshot:
        """The snapshot after record `number` has made these heads and settings live.

        Args:
            heads: What changed, the tasks that were retired among them.
            settings: Of all tasks that have any; None leaves them as they are.
        """
        live, retired = dict(self.heads), dict(self.retired)
        for head in heads:
            if isinstance(head, Retired):
                live.pop(head.task, None)
                retired[head.task] = head
            else:
                live[head.task] = head
                retired.pop(head.task, None)
        settings = self.settings if settings is None else settings
        return Snapshot(number, live, settings, retired)


class Row(NamedTuple):
    """One question: what does this task say of that picture of the batch?"""

    image_of: int
    head: LiveHead


class Engine:
    """The trunk: pictures to features, and rows to scores.

    Args:
        graph: The bytes of `trunk.onnx`, or of its variant in that precision.
        manifest: Its `trunk.json`.
        adapted: The bytes of `trunk_adapted.onnx`, if the trunk has one.
        device: Where the trunk and its adapted graph run.

    Raises:
        DeviceError: a session did not get that device.
    """

    def __init__(
        self,
        graph: bytes,
        manifest: TrunkManifest,
        *,
        precision: Precision = "fp32",
        adapted: bytes | None = None,
        device: Device = "cpu",
    ) -> None:
        self.manifest, self.precision, self.device = manifest, precision, device
        self.families = families_in(adapted, device) if adapted else {}
        self._timed = threading.local()
        self._graph = graph
        self._session = open_session(graph, device)

    @cached_property
    def prefix_shape(self) -> tuple[int, ...]:
        """Of a prefix map: channels, height, width, or tokens, width; none if there is none."""
        outputs = {output.name: output.shape for output in self._session.get_outputs()}
        return tuple(outputs.get("prefix", [None])[1:])

    def features(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Uint8 [batch, height, width, 3] -> float32 [batch, num_features]."""
        return np.asarray(self._session.run(["features"], {"images": pictures})[0])

    def prefix(self, pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Uint8 [batch, height, width, 3] -> maps, float32 [batch, *prefix_shape]."""
        return np.asarray(self._prefix_session.run(["prefix"], {"images": pictures})[0])

    def run(
        self, pictures: NDArray[np.uint8], rows: Sequence[Row]
    ) -> list[NDArray[np.float32] | HeadOutputError]:
        """Answer a batch of rows, which may mix any tasks.

        A row takes the same path whatever rows are beside it: a plain one through the whole trunk,
        one with an adapter or a tail from the prefix map that all rows of its picture share.

        Returns:
            For each row its scores, float32 [labels], or why its head has none.
        """
        began_s = time.monotonic()
        if not any(row.head.needs_picture for row in rows):
            features = self.features(pictures)
            self._timed.trunk_s = time.monotonic() - began_s
            return self.run_features(features, rows)
        features, maps = self._features_and_maps(pictures, rows)
        self._timed.trunk_s = time.monotonic() - began_s
        logits: list[NDArray[np.float32] | HeadOutputError] = [_UNANSWERED] * len(rows)
        for bank, places in _paths(rows):
            mine = [rows[place] for place in places]
            images = np.array([row.image_of for row in mine])
            if isinstance(bank, Bank):
                began_s = time.monotonic()
                inputs = bank.features(maps, images, _slots(mine))
                self._timed.trunk_s += time.monotonic() - began_s
            else:
                inputs = (maps if bank == "prefix" else features)[images]
            found = logits_of(inputs, [row.head.head for row in mine])
            for place, answer in zip(places, found, strict=True):
                logits[place] = answer
        return score(logits, [row.head.head for row in rows])

    @property
    def trunk_s(self) -> float:
        """Of this thread's last `run` the seconds in the trunk, its adapters among them."""
        return getattr(self._timed, "trunk_s", 0.0)

    def run_features(
        self, features: NDArray[np.float32], rows: Sequence[Row]
    ) -> list[NDArray[np.float32] | HeadOutputError]:
        """Answer a batch of rows from features, float32 [batch, num_features]; see `run`."""
        gathered = features[[row.image_of for row in rows]]
        heads = [row.head.head for row in rows]
        return score(logits_of(gathered, heads), heads)

    @cached_property
    def _prefix_session(self) -> onnxruntime.InferenceSession:
        # ONNX Runtime runs a graph whole, whichever output is asked for, also with
        # `only_execute_path_to_fetches` set (1.31 ran all 115 nodes of MobileNetV3-small).
        model = Extractor(onnx.load_model_from_string(self._graph)).extract_model(
            ["images"], ["prefix"]
        )
        return open_session(model.SerializeToString(), self.device)

    def _features_and_maps(
        self, pictures: NDArray[np.uint8], rows: Sequence[Row]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Both for the batch; what no row asks of a picture is not computed, and left undefined."""
        plain = sorted({row.image_of for row in rows if not row.head.needs_picture})
        others = {row.image_of for row in rows if row.head.needs_picture}
        only_maps = sorted(others.difference(plain))
        features = np.empty((len(pictures), self.manifest.num_features), np.float32)
        maps = np.empty((len(pictures), *self.prefix_shape), np.float32)
        if plain:
            names = ["features", "prefix"] if others.intersection(plain) else ["features"]
            found = self._session.run(names, {"images": pictures[plain]})
            features[plain] = np.asarray(found[0])
            if len(found) > 1:
                maps[plain] = np.asarray(found[1])
        if only_maps:
            maps[only_maps] = self.prefix(pictures[only_maps])
        return features, maps


_UNANSWERED = HeadOutputError("The row was not answered.")


def _paths(rows: Sequence[Row]) -> Iterable[tuple[Bank | str, list[int]]]:
    """Places of the rows that share a run: those of a bank, of plain features, and of tails."""
    paths: dict[Bank | str, list[int]] = {}
    for place, row in enumerate(rows):
        adapter = row.head.adapter
        path = adapter.bank if adapter else row.head.head.takes
        paths.setdefault(path, []).append(place)
    return paths.items()


def _slots(rows: Sequence[Row]) -> NDArray[np.int64]:
    slots = [row.head.adapter.slot for row in rows if row.head.adapter]
    assert None not in slots, "a job pins its adapters before its rows run"
    return np.array(slots, np.int64)
