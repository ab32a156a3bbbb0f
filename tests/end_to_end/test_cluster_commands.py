"""The command line and the metrics, against a running service."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.end_to_end.callers import png
from tests.end_to_end.program import HEAL_LIMIT_S, Program, free_port, headstock
from tests.serve.harness import until
from tests.serve.oracle import Heads, expected_scores, some_picture

pytestmark = pytest.mark.cluster


def said_in_json(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    """The JSON that a command printed; there is nothing else on its standard output."""
    text = done.stdout.strip()
    return [json.loads(text)] if "\n{" not in text else [json.loads(x) for x in text.splitlines()]


def test_a_head_is_pushed_rolled_back_and_shown_by_commands(
    service: Program, heads: Heads, tmp_path: Path
) -> None:
    """A folder, then a zip; the history says what happened, and why."""
    heads(0, "typed").write(tmp_path / "bundle")
    (tmp_path / "second.zip").write_bytes(heads(1, "typed").to_zip())

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        done = headstock(*arguments, server=service.url)
        assert done.returncode == 0, done.stderr
        return done

    (first,) = said_in_json(run("push", tmp_path / "bundle", "--json"))
    told = run("push", tmp_path / "second.zip", "--message", "more pictures").stdout
    (back,) = said_in_json(run("rollback", "typed", "--expected", "2", "--json"))
    history = json.loads(run("history", "typed", "--json").stdout)
    live = json.loads(run("status", "--json").stdout)
    shown = run("status").stdout

    assert (first["version"], first["bundle"]) == (1, heads(0, "typed").digest)
    assert "typed version 2 is live on 2 replicas" in told
    assert (back["version"], back["bundle"]) == (3, heads(0, "typed").digest)
    assert [(v["version"], v["action"], v["message"]) for v in history] == [
        (1, "push", ""),
        (2, "push", "more pictures"),
        (3, "rollback", ""),
    ]
    assert {task["task"]: task["version"] for task in live["tasks"]}["typed"] == 3
    assert "typed" in shown


def test_a_folder_with_a_broken_picture_is_asked_to_its_end(
    service: Program, heads: Heads, tmp_path: Path
) -> None:
    """The others are answered; the broken one is named, and the exit code says that it was."""
    with service.client() as client:
        client.push(heads(0, "asked"))
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(png(some_picture(seed)))
    (tmp_path / "1.png").write_bytes(b"broken")
    (tmp_path / "notes.txt").write_text("no picture")

    done = headstock("predict", "asked", tmp_path, "--top", "3", "--json", server=service.url)

    assert done.returncode == 1
    assert done.stderr.strip() == "headstock: 1 of 3 pictures have no answer."
    lines = said_in_json(done)
    assert [Path(str(line["picture"])).name for line in lines] == ["0.png", "1.png", "2.png"]
    assert "JPEG, PNG, WebP" in str(lines[1]["error"])
    for seed in (0, 2):
        scores = lines[seed]["scores"]
        assert isinstance(scores, dict)
        expected = sorted(expected_scores(some_picture(seed), 0), reverse=True)
        np.testing.assert_allclose(list(scores.values()), expected, atol=1e-5)


def test_one_picture_is_answered_in_a_table(service: Program, heads: Heads, tmp_path: Path) -> None:
    """With the label that the plain model gives."""
    with service.client() as client:
        client.push(heads(0, "asked"), key="asked once")
    (tmp_path / "one.png").write_bytes(png(some_picture(0)))

    done = headstock("predict", "asked", tmp_path / "one.png", server=service.url)

    assert (done.returncode, done.stderr.strip()) == (0, "")
    label = ("red", "green", "blue")[int(np.argmax(expected_scores(some_picture(0), 0)))]
    assert label in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("history", "nothing-like-it"), "no task 'nothing-like-it'"),
        (("push", "no-such-folder"), "no bundle at no-such-folder"),
        (("rollback", "nothing-like-it", "--json"), "never pushed"),
        (("serve", "--store", "somewhere", "--port", "{port}"), "is taken"),
    ],
)
def test_a_command_that_cannot_be_done_says_so_in_one_line(
    service: Program, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    """Exit code 1, nothing on the standard output."""
    filled = [argument.format(port=service.port) for argument in arguments]
    if filled[0] == "serve":
        filled[2] = str(tmp_path)
        done = headstock(*filled)
    else:
        done = headstock(*filled, server=service.url)

    assert (done.returncode, done.stdout) == (1, "")
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_service_that_is_not_there_is_named() -> None:
    """By the address that was tried."""
    url = f"http://127.0.0.1:{free_port()}"

    done = headstock("status", "--json", server=url)

    assert (done.returncode, done.stdout) == (1, "")
    assert f"{url} does not answer" in done.stderr


REQUESTS = "headstock_requests_total"
GOOD = '{route="/predict/{task}",status="200"}'
SETTLED_S = 2.5  # replicas report once a second, when a poll of as long is answered


def answered(service: Program) -> float:
    """Predictions that the fleet says it has answered."""
    return service.counts(REQUESTS).get(GOOD, 0.0)


def settled(service: Program) -> float:
    """The same, once no report is on its way."""
    last, changed_s = -1.0, 0.0

    def is_settled() -> bool:
        nonlocal last, changed_s
        if (now := answered(service)) != last:
            last, changed_s = now, time.monotonic()
        return time.monotonic() - changed_s > SETTLED_S

    until(is_settled, limit_s=HEAL_LIMIT_S)
    return last


def test_metrics_count_every_request_of_every_replica_once(service: Program, heads: Heads) -> None:
    """Whichever replica is asked, it tells the sum."""
    picture = png(some_picture(0))
    with service.client() as client:
        client.push(heads(0, "counted"))
        before = settled(service)
        for replica, times in zip(service.replicas(), (3, 8), strict=True):
            with service.client(replica) as direct:
                for _ in range(times):
                    direct.predict("counted", picture)
        for _ in range(20):
            client.predict("counted", picture)

    assert settled(service) - before == 31


def test_metrics_never_go_back_when_a_replica_dies(service: Program, heads: Heads) -> None:
    """What it had reported stays in the sum."""
    with service.client() as client:
        client.push(heads(0, "buried"))
        for _ in range(20):
            client.predict("buried", png(some_picture(0)))
    seen = [settled(service)]

    def is_healed() -> bool:
        seen.append(answered(service))
        return service.is_whole()

    service.replicas()[0].kill()
    until(is_healed, limit_s=HEAL_LIMIT_S)
    assert seen[0] >= 20
    assert sorted(seen) == seen
