"""Does a fleet heal when conductor, replica or pusher is killed at any point of a swap?

At each seeded point a push is under way and callers ask; after a random time one process is killed
(SIGKILL). Then every replica has to answer by the version that the log names, no answer may have
broken a promise, and the next push has to work. A finished run has seen every kind of victim at
every stage of the protocol many times.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil

from benchmarks.background import Background
from benchmarks.channel_means import make_trunk
from benchmarks.fixtures import serving
from benchmarks.judged_load import PROMISES, TASKS, Answer, JudgedLoad, Swap
from benchmarks.report import Figure, arguments, finish, note, quantile_of
from serve.client import Client, ClientError
from serve.headlog import HeadLog
from serve.record import LogView, TaskVersion

REPLICAS = 2
RATE = 60.0
PROCESSES = {"conductor": "ray::ConductorActor", "replica": "ray::ServeReplica:headstock:predictor"}
VICTIMS = ("conductor", "replica", "pusher")
LONGEST_DELAY_S = 0.3  # a push takes about half of it
HEAL_LIMIT_S = 90.0
ANSWERS_PER_CHECK = 24  # callers that ask for the version afterwards, each by a new connection
PUSHER = """
import sys
from pathlib import Path
from serve.client import Client
with Client(sys.argv[1]) as client:
    client.tasks()
    print("ready", flush=True)
    sys.stdin.readline()
    client.push(Path(sys.argv[2]), key=sys.argv[3])
"""


@dataclass
class Point:
    """What one crash showed."""

    victim: str
    delay_s: float
    outcome: str = ""  # whether the interrupted push is in the log
    healed_s: float = 0.0
    problems: dict[str, int] = field(default_factory=dict)


def main() -> None:
    """Kill, look, push again."""
    chosen, num_points = _arguments()
    points: list[Point] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = make_trunk(folder / "trunk")
        store = folder / "store"
        with (
            serving(store, trunk=folder / "trunk", replicas=REPLICAS) as service,
            Client(service["url"]) as client,
        ):
            load = JudgedLoad(service["url"], manifest, tries=3)
            for task in TASKS:
                client.push(load.bundle(task))
            crashes = Crashes(service, client, HeadLog(str(store)), load, folder)
            for number in range(num_points):
                points.append(crashes.point(seed=number))
                note(f"{number + 1} of {num_points}: {_told(points[-1])}")
    finish("crash_points", _figures(points), chosen)


class Crashes:
    """One service whose processes are killed."""

    def __init__(
        self,
        service: dict[str, object],
        client: Client,
        log: HeadLog,
        load: JudgedLoad,
        folder: Path,
    ) -> None:
        self._url, self._client, self._log = str(service["url"]), client, log
        self._root = psutil.Process(int(str(service["pid"])))
        self._load, self._folder = load, folder

    def point(self, seed: int) -> Point:
        """One crash, and what came of it."""
        chance = np.random.default_rng(seed)
        point = Point(VICTIMS[seed % len(VICTIMS)], float(chance.uniform(0, LONGEST_DELAY_S)))
        task = TASKS[chance.integers(len(TASKS))]
        bundle = self._load.bundle(task)
        file, key = self._folder / f"{seed}.zip", f"point {seed}"
        file.write_bytes(bundle.to_zip())
        before = self._log.follow(LogView())
        answers: list[Answer] = []
        calls = chance.spawn(1)[0]

        def ask(_: int) -> None:
            answers.extend(asyncio.run(self._load.ask(calls, rate=RATE, seconds=0.5)))

        with Background(ask), _pusher(self._url, file, key) as pusher:
            began_s = time.monotonic()
            _go(pusher)
            time.sleep(point.delay_s)
            self._kill(point.victim, pusher, chance)
            killed_s = time.monotonic()
            pusher.wait(HEAL_LIMIT_S)
            swap = self._push_again(task)
            self._wait_whole()
            point.healed_s = time.monotonic() - killed_s
        view = self._log.follow(before)
        point.outcome = "made" if key in view.keys else "not made"
        swaps = [swap]
        made = [one for one in view.made_by(key) if isinstance(one, TaskVersion)]
        if pusher.returncode == 0 and made:
            version = made[0].change.version
            # When the pusher heard of it is not known exactly; by its end it had.
            swaps.append(Swap(task, version, began_s, swap.asked_s, 0.0))
        point.problems = self._load.judge(answers, swaps, view)
        point.problems |= self._disagreements(view)
        return point

    def _kill(
        self, victim: str, pusher: subprocess.Popen[str], chance: np.random.Generator
    ) -> None:
        if victim == "pusher":
            pusher.kill()
            return
        named = [p for p in self._root.children(recursive=True) if PROCESSES[victim] in _line(p)]
        if named:  # one that restarts from the last point may not be there
            named[chance.integers(len(named))].send_signal(signal.SIGKILL)

    def _push_again(self, task: str) -> Swap:
        """The next push has to work, as soon as the service can take one."""
        bundle, asked_s = self._load.bundle(task), time.monotonic()
        deadline_s = asked_s + HEAL_LIMIT_S
        key = bundle.digest
        while True:
            try:
                made = self._client.push(bundle, key=key)
            except ClientError as error:
                if error.status not in {0, 503} or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.2)
            else:
                return Swap(task, made["version"], asked_s, time.monotonic(), 0.0)

    def _wait_whole(self) -> None:
        """Until as many replicas answer as before."""
        deadline_s = time.monotonic() + HEAL_LIMIT_S
        while f"headstock_replicas {float(REPLICAS)}" not in self._metrics():
            assert time.monotonic() < deadline_s, "the fleet does not heal"
            time.sleep(0.2)

    def _metrics(self) -> str:
        try:
            answer = httpx.get(f"{self._url}/metrics", timeout=30)
        except httpx.HTTPError:
            return ""
        return answer.text if answer.is_success else ""

    def _disagreements(self, view: LogView) -> dict[str, int]:
        """Answers, each by a connection of its own, that are not by what the log says is live."""
        wrong = 0
        for number in range(ANSWERS_PER_CHECK):
            task = TASKS[number % len(TASKS)]
            answer = httpx.post(f"{self._url}/predict/{task}", content=self._load.files[0])
            live = view.tasks[task][-1].change
            said = answer.json() if answer.is_success else {}
            wrong += (said.get("version"), said.get("bundle")) != (live.version, live.bundle)
        return {"disagreeing": wrong} if wrong else {}


def _pusher(url: str, file: Path, key: str) -> subprocess.Popen[str]:
    """A process that pushes when it is told to; it has connected already."""
    return subprocess.Popen(
        [sys.executable, "-c", PUSHER, url, str(file), key],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a push that is interrupted complains
        text=True,
    )


def _go(pusher: subprocess.Popen[str]) -> None:
    assert pusher.stdin is not None
    assert pusher.stdout is not None
    assert pusher.stdout.readline() == "ready\n"
    pusher.stdin.write("go\n")
    pusher.stdin.flush()


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _told(point: Point) -> str:
    return (
        f"{point.victim} after {1000 * point.delay_s:.0f} ms, push {point.outcome}, "
        f"whole after {point.healed_s:.1f} s; {point.problems or 'fine'}"
    )


def _figures(points: list[Point]) -> list[Figure]:
    promises = {**PROMISES, "disagreeing": "answers not by the live version afterwards"}
    totals = Counter[str]()
    for point in points:
        totals.update(point.problems)
    return [
        _count("crashes", len(points), ""),
        *(
            _count(f"{victim} killed, push {outcome}", _number(points, victim, outcome), "")
            for victim in VICTIMS
            for outcome in ("made", "not made")
        ),
        *(_count(what, totals[name], "<= 0") for name, what in promises.items()),
        *(
            quantile_of(
                f"whole again after a {victim}'s death, p50",
                [point.healed_s for point in points if point.victim == victim],
                0.5,
                unit="s",
            )
            for victim in VICTIMS
        ),
    ]


def _number(points: list[Point], victim: str, outcome: str) -> int:
    return sum((point.victim, point.outcome) == (victim, outcome) for point in points)


def _count(name: str, value: float, aim: str) -> Figure:
    return Figure(name, value, value, value, "", aim)


def _arguments() -> tuple[argparse.Namespace, int]:
    chosen = arguments(__doc__ or "")
    return chosen, 9 if chosen.quick else 210


if __name__ == "__main__":
    main()
