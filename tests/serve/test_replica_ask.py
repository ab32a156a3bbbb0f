"""What a replica does with encoded pictures, before and after they wait for the engine."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export.bundle import Bundle, TrunkManifest
from models.pictures import PictureError
from serve.jobs import OverloadedError, UnknownTaskError
from serve.replica import Replica
from tests.serve.harness import LocalFleet
from tests.serve.oracle import Heads, expected_scores, some_picture

TASK = ("colours",)


def png_of(seed: int) -> bytes:
    """Noise of the trunk's own size, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(some_picture(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def soon() -> float:
    """A deadline that no test reaches."""
    return time.monotonic() + 30


@pytest.fixture(scope="module")
def replica(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[Replica]:
    """A replica with two decoders and one task."""
    store = tmp_path_factory.mktemp("store")
    with LocalFleet(store, trunk_folder, replicas=1, decode_threads=2) as fleet:
        fleet.must_push(Heads(make_bundle)(1))
        yield fleet.replicas["replica-1"]


@pytest.fixture
def decoding(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Decoding waits until this event is set; pictures whose bytes end in `!` do not wait."""
    gate, decode = threading.Event(), replica.decode

    def decode_later(data: bytes, trunk: TrunkManifest) -> np.ndarray:
        if not data.endswith(b"!"):
            assert gate.wait(10)
        return decode(data, trunk)

    monkeypatch.setattr(replica, "decode", decode_later)
    yield gate
    gate.set()


def test_pictures_are_answered_in_their_order(replica: Replica) -> None:
    """One list of answers a picture."""
    answers = replica.ask([png_of(0), png_of(1), png_of(2)], TASK, soon()).result(10)

    for seed, picture in enumerate(answers):
        np.testing.assert_allclose(
            picture[0].scores, expected_scores(some_picture(seed), 1), atol=1e-5
        )


def test_what_decoding_refuses_is_the_answer(replica: Replica) -> None:
    """Though it is found out in a thread that nobody waits for."""
    with pytest.raises(PictureError):
        replica.ask([png_of(0), b"no picture"], TASK, soon()).result(10)


def test_what_the_queue_refuses_is_the_answer(replica: Replica) -> None:
    """The same for the batcher."""
    with pytest.raises(UnknownTaskError):
        replica.ask([png_of(0)], ("moods",), soon()).result(10)


def test_a_request_that_cannot_be_answered_in_time_is_refused_before_it_is_decoded(
    replica: Replica, decoding: threading.Event
) -> None:
    """While others wait for a decoder, it is told so at once."""
    waiting = [replica.ask([png_of(seed)] * 64, TASK, soon()) for seed in range(20)]
    refused = replica.ask([png_of(0)], TASK, time.monotonic() + 0.1)

    assert isinstance(refused.exception(0), OverloadedError)
    decoding.set()
    assert all(answered.result(10) for answered in waiting)


def test_a_request_of_many_pictures_leaves_a_decoder_free(
    replica: Replica, decoding: threading.Event
) -> None:
    """One decoder takes all its pictures; a single picture does not wait for them."""
    many = replica.ask([png_of(seed) for seed in range(5)], TASK, soon())

    assert replica.ask([png_of(0) + b"!"], TASK, soon()).result(10)
    assert not many.done()
    decoding.set()
    assert len(many.result(10)) == 5


def test_pictures_of_a_caller_who_has_gone_are_not_decoded(
    replica: Replica, decoding: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled while it waited for a decoder, so no time is spent on it."""
    busy = [replica.ask([png_of(seed)], TASK, soon()) for seed in range(2)]
    gone = replica.ask([png_of(2)], TASK, soon())
    gone.cancel()
    decoded: list[bytes] = []
    decode = replica.decode

    def decode_noted(data: bytes, trunk: TrunkManifest) -> np.ndarray:
        decoded.append(data)
        return decode(data, trunk)

    monkeypatch.setattr(replica, "decode", decode_noted)
    decoding.set()
    for future in busy:
        future.result(10)
    replica.ask([png_of(3)], TASK, soon()).result(10)

    # A busy decoder may have begun only after the noting one was put in place.
    assert png_of(2) not in decoded
    assert png_of(3) in decoded
