"""A line for each request, with what was asked and nothing that is secret."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from export.bundle import Bundle
from serve import access_log
from serve.access_log import AccessLog
from tests.serve.harness import HttpClient, LocalFleet
from tests.serve.oracle import Heads
from tests.serve.test_http import png_of

SECRET = "s3cret"  # noqa: S105


def lines_of(file: Path) -> list[dict[str, Any]]:
    """What was written, one object a line."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_request_has_a_line(
    tmp_path: Path, trunk_folder: Path, make_bundle: Callable[..., Bundle]
) -> None:
    """Of two replicas in one file: an answer, an error, and nothing of what was sent."""
    file = tmp_path / "access.jsonl"
    began = datetime.now(UTC)
    with LocalFleet(tmp_path / "store", trunk_folder, replicas=2, access_log=str(file)) as fleet:
        fleet.must_push(Heads(make_bundle)(1))
        headers = {"x-request-id": "one", "authorization": f"Bearer {SECRET}"}
        answer = HttpClient(fleet, "replica-1").post(
            f"/predict/colours?top=1&token={SECRET}", content=png_of(0), headers=headers
        )
        HttpClient(fleet, "replica-2").post(
            "/predict/moods", content=SECRET, headers={"x-request-id": "two"}
        )
    lines = {line["request_id"]: line for line in lines_of(file)}

    seconds, time = lines["one"].pop("seconds"), lines["one"].pop("time")
    assert lines["one"] == {
        "request_id": "one",
        "method": "POST",
        "route": "/predict/{task}",
        "task": "colours",
        "version": 1,
        "status": 200,
        "answer_bytes": len(answer.content),
    }
    assert 0 < seconds < 5
    assert began < datetime.fromisoformat(time) < began + timedelta(minutes=1)
    assert (lines["two"]["status"], lines["two"]["error"]) == (415, "picture")
    assert SECRET not in file.read_text()


def test_what_a_caller_chooses_is_cut_and_stays_in_its_line(
    tmp_path: Path, trunk_folder: Path
) -> None:
    """Neither long names nor line ends reach the file as such."""
    file = tmp_path / "access.jsonl"
    with LocalFleet(tmp_path / "store", trunk_folder, replicas=1, access_log=str(file)) as fleet:
        HttpClient(fleet, "replica-1").post(
            "/predict/" + "x%0A" * 200, content=b"?", headers={"x-request-id": "y" * 500}
        )

    (line,) = lines_of(file)
    assert line["task"] == ("x\n" * 200)[:128]
    assert line["request_id"] == "y" * 128


def test_lines_of_several_writers_do_not_mix(tmp_path: Path) -> None:
    """Each line is whole, and none is missing."""
    file = tmp_path / "log"
    logs = [AccessLog(str(file)) for _ in range(4)]

    def write(log: AccessLog, number: int) -> None:
        for place in range(500):
            log.note({"writer": number, "place": place, "text": "x" * 300})

    threads = [threading.Thread(target=write, args=(log, n)) for n, log in enumerate(logs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for log in logs:
        log.close()

    seen = sorted((line["writer"], line["place"]) for line in lines_of(file))
    assert seen == [(number, place) for number in range(4) for place in range(500)]


def test_a_file_that_cannot_be_written_costs_its_lines_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is said how many were lost, and later ones go through."""
    file = tmp_path / "folder" / "log"
    log = AccessLog(str(file))
    log.note({"place": 1})
    log._write()
    file.parent.mkdir()
    log.note({"place": 2})
    log.close()

    assert "1 lines of the access log are lost" in caplog.text
    assert [line["place"] for line in lines_of(file)] == [2]


def test_what_waits_for_the_writer_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines that do not fit are counted in the next one that does."""
    monkeypatch.setattr(access_log, "MAX_LINES", 10)
    monkeypatch.setattr(access_log, "WRITE_S", 60.0)
    log = AccessLog(str(tmp_path / "log"))
    for place in range(25):
        log.note({"place": place})
    log.close()

    lines = lines_of(tmp_path / "log")
    assert [line.get("place") for line in lines] == [*range(10), None]
    assert lines[-1]["dropped_lines"] == 15
