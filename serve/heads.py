"""Heads: features to logits and logits to scores, for rows of any tasks side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from export.bundle import HEAD, TAIL, Bundle, Manifest
from serve.affine import AffineMap, recognise
from serve.onnx_session import Device, open_session

Link = Literal["softmax", "sigmoid", "none"]


def graph_file(manifest: Manifest) -> str:
    """The file of a bundle that gives the logits."""
    return TAIL if manifest.kind == "tail" else HEAD


class HeadOutputError(Exception):
    """A head failed or gave scores that are not numbers; other heads of the batch go on."""


@dataclass(frozen=True, eq=False)
class Head:
    """A loaded head: features float32 [rows, num_features] -> logits float32 [rows, labels].

    A tail is one that takes prefix maps, float32 [rows, channels, height, width], instead.

    Args:
        runner: Packed weights, or a small session for whatever is not affine.
        temperature: Logits are divided by it before the link.
        thresholds: See `Manifest`; None if it gives one label.
    """

    runner: AffineMap | onnxruntime.InferenceSession
    labels: tuple[str, ...]
    link: Link
    temperature: float
    takes: Literal["features", "prefix"] = "features"
    thresholds: tuple[float, ...] | None = None

    @classmethod
    def of_bundle(cls, bundle: Bundle, device: Device = "cpu") -> Head:
        """Load the head or the tail of a bundle that has passed the gates; see `of_graph`."""
        return cls.of_graph(bundle.files[graph_file(bundle.manifest)], bundle.manifest, device)

    @classmethod
    def of_graph(cls, graph: bytes, manifest: Manifest, device: Device = "cpu") -> Head:
        """Load it from the two files of its bundle that say what it computes.

        A tail runs on the device. What starts from features is on the CPU always: it takes
        microseconds, less than a GPU's own overhead (assumed, not measured).

        Raises:
            DeviceError: a tail's session did not get the device.
        """
        if manifest.kind == "tail":
            return cls._of(open_session(graph, device), manifest, "prefix")
        runner = recognise(onnx.load_model_from_string(graph)) or open_session(graph)
        return cls._of(runner, manifest, "features")

    @classmethod
    def _of(
        cls,
        runner: AffineMap | onnxruntime.InferenceSession,
        manifest: Manifest,
        takes: Literal["features", "prefix"],
    ) -> Head:
        return cls(
            runner, manifest.labels, manifest.link, manifest.temperature, takes, manifest.thresholds
        )

    @property
    def is_packed(self) -> bool:
        """Whether it runs from packed weights, without a session."""
        return isinstance(self.runner, AffineMap)

    @property
    def is_multilabel(self) -> bool:
        """Whether it gives any number of labels, not one."""
        return self.thresholds is not None

    def given(self, scores: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Which labels a picture gets, bool [..., labels], by its scores float32 [..., labels].

        Those whose score reaches its threshold, perhaps none; else the one of the best score.
        """
        if self.thresholds is not None:
            # As float32, in which the thresholds of a float64 manifest are compared everywhere.
            return scores >= np.asarray(self.thresholds, np.float32)
        places = np.arange(scores.shape[-1])
        return places == scores.argmax(axis=-1)[..., None]

    def labels_given(self, scores: NDArray[np.float32]) -> tuple[str, ...]:
        """Their names, in the order of the labels, for one picture's scores float32 [labels]."""
        return tuple(self.labels[place] for place in np.flatnonzero(self.given(scores)))

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Float32 [rows, labels]; what ONNX Runtime raises is not caught here."""
        if isinstance(self.runner, AffineMap):
            return self.runner(features)
        return np.asarray(self.runner.run(["logits"], {self.takes: features})[0])


def logits_of(
    features: NDArray[np.float32], heads: Sequence[Head]
) -> list[NDArray[np.float32] | HeadOutputError]:
    """Run every row's own head; rows of one head share a run.

    The answer to a row is the same, bit for bit, whatever rows of other heads are beside it, and
    from a packed head whatever rows are. In a session, rows of its own head may change it by float
    rounding: one row is multiplied in another order than several.

    Args:
        features: Float32 [rows, num_features]; for tails prefix maps.
        heads: One for each row.

    Returns:
        For each row its logits, float32 [labels], or why its head has none.
    """
    logits: list[NDArray[np.float32] | HeadOutputError] = [_UNANSWERED] * len(heads)
    # Each packed head's own product. Measured against gathering the weights of equal class counts
    # into one batched product, 576 features, 2-100 classes, one thread of an AMD EPYC: 65 against
    # 123 us for 8 rows of 8 heads, 255 against 424 us for 32 of 32 (the gather copies what the
    # product then reads once).
    for places in _groups(map(id, heads)):
        answers = _run(heads[places[0]], features[places])
        for place, answer in zip(places, answers, strict=True):
            logits[place] = answer
    return logits


_UNANSWERED = HeadOutputError("The row was not answered.")


def _run(head: Head, features: NDArray[np.float32]) -> NDArray[np.float32] | list[HeadOutputError]:
    try:
        logits = head.logits(features)
    # ONNX Runtime has no common error class below Exception.
    except Exception as error:  # noqa: BLE001
        return [HeadOutputError(f"The head cannot be run: {error}")] * len(features)
    if logits.shape != (len(features), len(head.labels)):
        return [HeadOutputError(f"The head gave logits of shape {logits.shape}.")] * len(features)
    return logits


def score(
    logits: Sequence[NDArray[np.float32] | HeadOutputError], heads: Sequence[Head]
) -> list[NDArray[np.float32] | HeadOutputError]:
    """Link of logits / temperature, for rows whose heads differ in all of that.

    Args:
        logits: For each row float32 [labels] of its head, wherever they come from, or an error.
        heads: One for each row.

    Returns:
        For each row its scores, float32 [labels], or why it has none: the error that it had, or
        that a logit is not a finite number. No row depends on another.
    """
    scores = list(logits)
    for places in _groups(head.link for head in heads):
        good = [place for place in places if not isinstance(logits[place], HeadOutputError)]
        if good:
            rows = [row for row in (logits[place] for place in good) if isinstance(row, np.ndarray)]
            answers = _link(rows, [heads[place] for place in good])
            for place, answer in zip(good, answers, strict=True):
                scores[place] = answer
    return scores


# What overflows is looked for below, and a softmax of huge logits may.
@np.errstate(all="ignore")
def _link(
    rows: Sequence[NDArray[np.float32]], heads: Sequence[Head]
) -> list[NDArray[np.float32] | HeadOutputError]:
    """Scores of rows of one link: the rows end to end, in a handful of calls for all of them."""
    counts = np.array([len(row) for row in rows])
    starts = np.cumsum(counts) - counts
    temperatures = np.array([head.temperature for head in heads], np.float32)
    logits = np.concatenate(rows) / np.repeat(temperatures, counts)
    is_finite = np.logical_and.reduceat(np.isfinite(logits), starts)
    if heads[0].link == "softmax":
        exponentials = np.exp(logits - np.repeat(np.maximum.reduceat(logits, starts), counts))
        logits = exponentials / np.repeat(np.add.reduceat(exponentials, starts), counts)
    elif heads[0].link == "sigmoid":
        # tanh does not overflow where exp(-logit) would.
        logits = np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * logits))
    return [
        scores if good else HeadOutputError("The head gave logits that are not finite numbers.")
        for scores, good in zip(np.split(logits, starts[1:]), is_finite, strict=True)
    ]


def _groups(keys: Iterable[object]) -> list[list[int]]:
    """Places of equal keys."""
    groups: dict[object, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())
