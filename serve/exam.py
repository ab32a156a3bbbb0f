"""A task's held-out sample as contenders take it, and what is remembered of it between pushes.

Every push to a task is compared on the same pictures, so what a trunk makes of them is kept for the
next one; and so is which of them a bundle got right, for what is pushed now is live then.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from export.bundle import Digest
from serve.contender import Contender, Source
from serve.engine import Engine
from serve.graph_gate import GateError
from serve.heads import HeadOutputError, score
from serve.heldout import Heldout, HeldoutError, read_heldout

BATCH = 8  # the trunk's memory grows with its largest batch, and stays
KEPT_BYTES = 64 * 2**20  # MobileNetV2's features of 200 pictures are 1 MB, their prefix maps 15 MB

Arrays = tuple[NDArray[Any], ...]
Key = tuple[Digest, ...]  # a trunk, and what of it


class Kept:
    """Arrays in memory; those that were asked for longest ago make room for new ones.

    Args:
        trunks: See `only`.
        budget_bytes: Of all of them together.
    """

    def __init__(self, *trunks: Digest, budget_bytes: int = KEPT_BYTES) -> None:
        self._trunks, self._budget_bytes = frozenset(trunks), budget_bytes
        self._lock = threading.Lock()
        self._arrays: OrderedDict[Key, Arrays] = OrderedDict()

    def only(self, *trunks: Digest) -> None:
        """Keep what belongs to these trunks and to no other, now and from now on."""
        with self._lock:
            self._trunks = frozenset(trunks)
            for key in [key for key in self._arrays if key[0] not in self._trunks]:
                del self._arrays[key]

    def get(self, key: Key) -> Arrays | None:
        """What was put under a key, if it is still there."""
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
            return self._arrays.get(key)

    def make_room(self, num_bytes: int) -> bool:
        """Let the oldest go until so much more fits; False if it never would."""
        with self._lock:
            if num_bytes > self._budget_bytes:
                return False
            while num_bytes + sum(map(_num_bytes, self._arrays.values())) > self._budget_bytes:
                self._arrays.popitem(last=False)
            return True

    def put(self, key: Key, *arrays: NDArray[Any]) -> None:
        """Keep arrays, unless they are of another trunk, or too large for the whole budget."""
        if self.make_room(_num_bytes(arrays)):
            with self._lock:
                if key[0] in self._trunks:
                    self._arrays[key] = arrays


class Exam:
    """A sample, for contenders of one trunk or several that take the same pictures.

    Args:
        digest: Of the sample.
        read: Gets its bytes, where what is kept does not do.
        num_labels: How many labels its task has.
    """

    def __init__(
        self, digest: Digest, read: Callable[[Digest], bytes], kept: Kept, *, num_labels: int
    ) -> None:
        self._digest, self._read, self._kept = digest, read, kept
        self._num_labels = num_labels

    def right_answers(self, contenders: Sequence[Contender]) -> list[NDArray[np.bool_]]:
        """Which pictures each contender gets right, bool [n]; what is not finite is wrong.

        A head that gives any number of labels is right about a picture if it gives exactly those
        that the picture has.

        Raises:
            GateError: one cannot be run, or the sample is none for its trunk and these labels.
            StoreError: the sample cannot be read.
        """
        asked = {self._right_key(one): one for one in contenders}
        right = {key: kept[0] for key in asked if (kept := self._kept.get(key))}
        new = [one for key, one in asked.items() if key not in right]
        # A trunk runs once for all that start from the same.
        for source in dict.fromkeys(one.source for one in new):
            same = [one for one in new if one.source == source]
            for one, answers in zip(same, self._judge(source, same), strict=True):
                right[self._right_key(one)] = answers
                self._kept.put(self._right_key(one), answers)
        return [right[self._right_key(one)] for one in contenders]

    def _judge(self, source: Source, contenders: Sequence[Contender]) -> list[NDArray[np.bool_]]:
        right: list[list[NDArray[np.bool_]]] = [[] for _ in contenders]
        for given, labels in self._batches(source):
            for parts, one in zip(right, contenders, strict=True):
                parts.append(_is_right(one, _logits(one, given), labels))
        return [np.concatenate(parts) for parts in right]

    def _batches(self, source: Source) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """What the trunk gives for some pictures after the other, and their labels."""
        key = self._key(source.engine, source.takes)
        if kept := self._kept.get(key):
            whole, labels = kept
            for rows in _parts(len(labels)):
                yield whole[rows], labels[rows]
            return
        sample = self._sample_for(source.engine)
        whole = None
        for rows in _parts(len(sample.labels)):
            given = source.give(sample.pictures[rows])
            # Room is made before the array: at no time is there more than the budget.
            if not rows.start and self._kept.make_room(given[0].nbytes * len(sample.labels)):
                whole = np.empty((len(sample.labels), *given.shape[1:]), np.float32)
            if whole is not None:
                whole[rows] = given
            yield given, sample.labels[rows]
        if whole is not None:
            self._kept.put(key, whole, sample.labels)

    def _sample_for(self, engine: Engine) -> Heldout:
        size_px = engine.manifest.preprocessing.size_px
        try:
            return read_heldout(self._data, size_px=size_px, num_labels=self._num_labels)
        except HeldoutError as error:
            raise GateError(str(error)) from error

    @cached_property
    def _data(self) -> bytes:
        return self._read(self._digest)

    def _right_key(self, contender: Contender) -> Key:
        return self._key(contender.source.engine, "right", contender.digest)

    def _key(self, engine: Engine, *of: str) -> Key:
        # A trunk answers otherwise in another precision; labels are checked against their number.
        trunk = engine.manifest.digest
        return (trunk, engine.precision, self._digest, str(self._num_labels), *of)


def _parts(num: int) -> Iterator[slice]:
    """Batch by batch."""
    return (slice(place, place + BATCH) for place in range(0, num, BATCH))


def _num_bytes(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays)


def _is_right(
    contender: Contender, logits: NDArray[np.float32], labels: NDArray[np.int64]
) -> NDArray[np.bool_]:
    head = contender.head
    if head.is_multilabel != (labels.ndim > 1):
        one, any_number = "one label", "any number of labels"
        has, gives = (any_number, one) if labels.ndim > 1 else (one, any_number)
        raise GateError(
            f"The task's held-out pictures have {has} each, and the head gives {gives}. Set a "
            "sample of its kind with headstock task heldout."
        )
    is_finite = np.isfinite(logits).all(axis=1)
    if labels.ndim == 1:
        return is_finite & (logits.argmax(axis=1) == labels)
    scores = score(list(logits), [head] * len(logits))
    given = [not isinstance(row, HeadOutputError) and head.given(row) for row in scores]
    return np.array([np.array_equal(*pair) for pair in zip(given, labels == 1, strict=True)])


def _logits(contender: Contender, given: NDArray[np.float32]) -> NDArray[np.float32]:
    try:
        return contender.logits(given)
    # ONNX Runtime has no common error class below Exception.
    except Exception as error:
        raise GateError(f"The graph cannot be run on held-out pictures: {error}") from error
