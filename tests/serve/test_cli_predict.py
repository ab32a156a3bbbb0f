"""`headstock predict`, and many pictures through either client."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from export.bundle import Bundle
from serve.client import AsyncClient, Client, ClientError, Prediction
from serve.client_each import Told
from tests.serve.commands import Run
from tests.serve.harness import LocalFleet
from tests.serve.oracle import Heads, expected_scores, some_picture
from tests.serve.test_client import ANSWER

LABELS = ("red", "green", "blue")
NUM_PICTURES = 24

AskEach = Callable[..., list[tuple[Path, Told]]]


@pytest.fixture(scope="module")
def fleet(
    tmp_path_factory: pytest.TempPathFactory, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> Iterator[LocalFleet]:
    """One replica with one task."""
    with LocalFleet(tmp_path_factory.mktemp("store"), trunk_folder, replicas=1) as fleet:
        fleet.must_push(Heads(make_bundle)(1))
        yield fleet


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures, one of them broken and one empty, in a folder within a folder."""
    (tmp_path / "more").mkdir()
    for seed in range(4):
        Image.fromarray(some_picture(seed)).save(tmp_path / "more" / f"{seed}.png")
    (tmp_path / "more" / "1.png").write_bytes(b"no picture")
    (tmp_path / "z.JPG").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture either")
    return tmp_path


def test_a_folder_is_answered_a_line_a_picture_in_order(run: Run, folder: Path) -> None:
    """What cannot be read is said in its place and counted, and the exit code tells."""
    done = run("predict", "colours", str(folder), "--top", "3", "--json")
    lines = [json.loads(line) for line in done.out.splitlines()]

    assert (done.code, done.err.strip()) == (1, "headstock: 2 of 5 pictures have no answer.")
    names = [str(Path(line["picture"]).relative_to(folder)) for line in lines]
    assert names == ["more/0.png", "more/1.png", "more/2.png", "more/3.png", "z.JPG"]
    assert [line.get("error", "")[:12] for line in lines[1::3]] == ["The bytes ar", "The body is "]
    for seed in (0, 2, 3):
        truth = dict(zip(LABELS, expected_scores(some_picture(seed), 1), strict=True))
        assert lines[seed]["scores"] == pytest.approx(truth, abs=1e-5)
        assert list(lines[seed]["scores"]) == sorted(truth, key=lambda label: -truth[label])


def test_a_table_shows_what_was_answered_and_names_the_rest(run: Run, folder: Path) -> None:
    """The errors beside it."""
    done = run("predict", "colours", str(folder))
    label = LABELS[int(np.argmax(expected_scores(some_picture(3), 1)))]

    assert done.code == 1
    assert any("3.png" in line and label in line for line in done.out.splitlines())
    assert "more/1.png: The bytes are not a picture" in done.err


def test_a_folder_may_be_gone_on_with(run: Run, folder: Path) -> None:
    """After the last picture that was answered; the order is that of names, always."""
    done = run("predict", "colours", str(folder), "--json", "--after", str(folder / "more/2.png"))
    lines = [json.loads(line)["picture"] for line in done.out.splitlines()]

    assert lines == [str(folder / "more/3.png"), str(folder / "z.JPG")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("{folder}/none.png",), "There is no picture at"),
        (("{folder}/empty",), "There is no picture in"),
        (("{folder}", "--after", "elsewhere.png"), "elsewhere.png is none of the 5"),
    ],
)
def test_a_wrong_path_is_named(
    run: Run, folder: Path, arguments: tuple[str, ...], says: str
) -> None:
    """Before anything is asked."""
    (folder / "empty").mkdir()
    done = run("predict", "colours", *(a.format(folder=folder) for a in arguments))

    assert (done.code, done.out) == (1, "")
    assert says in done.err


class Slow:
    """A service that answers after a moment, and counts what it has at once.

    Args:
        statuses: By the body, where it is not 200.
    """

    def __init__(self, statuses: dict[bytes, int]) -> None:
        self._statuses = statuses
        self._lock = threading.Lock()
        self.now, self.most, self.asked = 0, 0, 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer from a thread."""
        self._begin()
        time.sleep(0.01)
        return self._end(request)

    async def answer(self, request: httpx.Request) -> httpx.Response:
        """Answer from an event loop."""
        self._begin()
        await asyncio.sleep(0.01)
        return self._end(request)

    def _begin(self) -> None:
        with self._lock:
            self.now, self.asked = self.now + 1, self.asked + 1
            self.most = max(self.most, self.now)

    def _end(self, request: httpx.Request) -> httpx.Response:
        with self._lock:
            self.now -= 1
        status = self._statuses.get(request.content, 200)
        return httpx.Response(status, json={**ANSWER, "label": request.content.decode()})


@pytest.fixture(params=["waiting", "async"])
def ask_each(request: pytest.FixtureRequest) -> AskEach:
    """Asks a service of many pictures with either client."""

    def waiting(service: Slow, images: list[Path], at_once: int) -> list[tuple[Path, Told]]:
        with Client("http://test") as client:
            transport = httpx.MockTransport(service)
            client._http = httpx.Client(base_url="http://test", transport=transport)
            return list(client.predict_each("colours", images, at_once=at_once))

    def awaiting(service: Slow, images: list[Path], at_once: int) -> list[tuple[Path, Told]]:
        async def ask() -> list[tuple[Path, Told]]:
            async with AsyncClient("http://test") as client:
                transport = httpx.MockTransport(service.answer)
                client._http = httpx.AsyncClient(base_url="http://test", transport=transport)
                each = client.predict_each("colours", images, at_once=at_once)
                return [told async for told in each]

        return asyncio.run(ask())

    return waiting if request.param == "waiting" else awaiting


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Files that hold their own name."""
    paths = [tmp_path / f"{place:02}" for place in range(NUM_PICTURES)]
    for path in paths:
        path.write_bytes(path.name.encode())
    return paths


@pytest.mark.parametrize("at_once", [1, 3])
def test_so_many_are_under_way_at_once(ask_each: AskEach, files: list[Path], at_once: int) -> None:
    """No more, and no fewer; the order of the answers is that of the pictures."""
    service = Slow({})
    told = ask_each(service, files, at_once)
    labels = [answer.label for _, answer in told if isinstance(answer, Prediction)]

    assert service.most == at_once
    assert [path for path, _ in told] == files
    assert labels == [path.name for path in files]


@pytest.mark.parametrize("status", [400, 413, 415, 429, 503])
def test_what_is_wrong_with_one_picture_stops_no_other(
    ask_each: AskEach, files: list[Path], status: int
) -> None:
    """Its error stands in its place; so does one of reading the file."""
    files[5].unlink()
    told = [answer for _, answer in ask_each(Slow({b"03": status}), files, 4)]

    assert isinstance(told[3], ClientError)
    assert told[3].status == status
    assert isinstance(told[5], FileNotFoundError)
    assert sum(isinstance(answer, Prediction) for answer in told) == NUM_PICTURES - 2


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_what_is_wrong_for_all_ends_it(ask_each: AskEach, files: list[Path], status: int) -> None:
    """Nobody waits for the same refusal a thousand times."""
    service = Slow({b"03": status})

    with pytest.raises(ClientError) as refused:
        ask_each(service, files, 4)
    assert refused.value.status == status
    assert service.asked < NUM_PICTURES
