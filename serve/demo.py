"""`headstock demo`: the whole story on real handwritten digits.

A teacher is fine-tuned, a student trunk distilled from it, exported, four heads trained on it and
served on two replicas; while requests run, a better head is pushed, rolled back, and two bad ones
are refused. Part of the composition root, like `cli_learn.py`.
"""

from __future__ import annotations

import io
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from export.bundle import GOLDEN, Bundle, digest_of
from serve.answers import Swapped, TaskState
from serve.client import Client, ClientError
from serve.console import short
from serve.runtime import DEFAULT_PROXY
from serve.service import Service, asked_to_end
from serve.settings import load_settings

TASKS = ("digits", "parity", "loop", "at_least_five")
DISTILLED = "digits"  # what teacher and student learn
SWAPPED = "at_least_five"  # the task whose head is pushed anew and rolled back
NUM_FIRST_PICTURES = 40  # what the first head of that task learns from
NUM_CLIENTS = 2
MIN_TIMES_SMALLER = 5
MAX_POINTS_BELOW = 0.02
COMMAND = "headstock demo"

console = Console()


@dataclass
class Report:
    """What the demo found; `failures` decides the exit code."""

    seconds: float = 0.0
    accuracies: list[dict[str, Any]] = field(default_factory=list)
    tasks: list[dict[str, Any]] = field(default_factory=list)
    traffic: dict[str, Any] = field(default_factory=dict)
    swaps: list[Swapped] = field(default_factory=list)
    refusals: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def check(self, *, that: str, holds: bool) -> None:
        """Note a failure unless what was promised holds."""
        if not holds:
            self.failures.append(that)


@dataclass(frozen=True)
class Learned:
    """What the learning side hands over."""

    trunk: Path
    heads: dict[str, Bundle]  # each task's first head
    better: Bundle
    pictures: list[bytes]  # PNG files of the test split
    truths: list[str]  # label of each for SWAPPED


def run_demo(*, stay: bool, is_quiet: bool) -> Report:
    """Tell the story, print it unless quiet, and return what was found."""
    began_s = time.monotonic()
    report = Report()
    say = _teller(began_s, is_quiet=is_quiet)
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="headstock-demo-")))
        learned = learn(folder, report, say)
        settings = load_settings(store=str(folder / "store"), port=_free_port(), replicas=2)
        service = held.enter_context(
            Service(
                settings,
                trunk=learned.trunk,
                proxy=DEFAULT_PROXY,
                progress=lambda step: say(f"start the service: {step}"),
            )
        )
        with Client(service.url) as client:
            operate(client, learned, report, say)
        report.seconds = time.monotonic() - began_s
        if not is_quiet:
            show(report)
        if stay:
            wait_for_end = asked_to_end()
            console.print(f"The service stays up at {service.url}; Ctrl-C ends it.")
            wait_for_end()
            console.print("stopping")
    return report


def learn(folder: Path, report: Report, say: Callable[[str], None]) -> Learned:
    """Teacher, student, trunk, heads."""
    import torch  # noqa: PLC0415 (for this part only)

    from export.recipe import make_head, make_trunk  # noqa: PLC0415
    from models.recipe import fine_tuning, make_student, make_teacher, read_data  # noqa: PLC0415

    # Layers of 32 px pictures are too small to share: two threads take longer than one.
    torch.set_num_threads(1)
    say("fine-tune a teacher on 1,151 handwritten digits")
    teacher = make_teacher(
        DISTILLED, folder / "teacher", backbone="small32_teacher", weights=None,
        how=fine_tuning("scratch"), augmentation=None, seed=0, command=COMMAND,
    )  # fmt: skip
    say("distil a student trunk from it")
    student = make_student(
        [folder / "teacher"], [DISTILLED], folder / "student", student="small32", weights=None,
        augmentation=None, seed=0, command=COMMAND,
    )  # fmt: skip
    say("export the trunk to ONNX and compare it with PyTorch")
    trunk = make_trunk(folder / "student", folder / "trunk", command=COMMAND)
    heads: dict[str, Bundle] = {}
    for task in TASKS:
        say(f"train a head: {task}")
        made = make_head(
            task, folder / "trunk", task=task, seed=0, command=COMMAND,
            max_train=NUM_FIRST_PICTURES if task == SWAPPED else None,
        )  # fmt: skip
        heads[task] = made.bundle
    say(f"train a better head: {SWAPPED}")
    better = make_head(SWAPPED, folder / "trunk", task=SWAPPED, seed=0, command=COMMAND)
    _report_accuracies(report, teacher, student, trunk.graph_bytes)
    data = read_data(SWAPPED, seed=0)
    return Learned(
        folder / "trunk",
        heads,
        better.bundle,
        [_png(picture.source) for picture in data.test.pictures],
        [data.labels[int(label)] for label in data.test.labels],
    )


def operate(client: Client, learned: Learned, report: Report, say: Callable[[str], None]) -> None:
    """Push, predict, swap under traffic, roll back, refuse."""
    for task, bundle in learned.heads.items():
        say(f"push {task}")
        client.push(bundle)
    with _traffic(client.url, learned.pictures) as traffic:
        say(f"ask {SWAPPED} of {len(learned.pictures)} test pictures")
        first = _accuracy(client, learned)
        say(f"push a better head of {SWAPPED} while requests run")
        report.swaps.append(client.push(learned.better, message="learned from all pictures"))
        better = _accuracy(client, learned)
        say("push a head that was made for another trunk")
        _refused(report, client, _for_another_trunk(learned.better), gate="trunk")
        say("push a head whose golden samples do not reproduce")
        _refused(report, client, _with_wrong_golden(learned.better), gate="golden")
        say("roll back")
        report.swaps.append(client.rollback(SWAPPED, message="end of the demo"))
        after = _accuracy(client, learned)
    live = {entry["task"]: entry for entry in client.tasks()["tasks"]}
    report.tasks = [_task_row(live[task], bundle) for task, bundle in learned.heads.items()]
    report.traffic = traffic.summary()
    report.traffic["accuracy_by_version"] = dict(
        zip(("first", "better", "rolled_back"), (first, better, after), strict=True)
    )
    report.check(that="no request was dropped", holds=traffic.num_failed == 0)
    report.check(that="versions never went back", holds=not traffic.went_back)
    report.check(that="the rollback answers as before the push", holds=after == first)
    report.check(that="the better head answered", holds=live[SWAPPED]["version"] == 3)  # noqa: PLR2004


def show(report: Report) -> None:
    """The final tables."""
    table = Table("on digits the trunk never saw", "accuracy", "95 % interval", "parameters")
    for row in report.accuracies:
        table.add_row(row["what"], f"{row['value']:.3f}", row["interval"], row["parameters"])
    console.print(table)
    table = Table("task", "version", "labels", "test accuracy", "head", "bundle")
    for row in report.tasks:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)
    table = Table("under traffic", "")
    for swap, what in zip(report.swaps, ("push", "rollback"), strict=True):
        times = swap["swap"]
        table.add_row(
            f"{what} to version {swap['version']}",
            f"staged {times['stage_ms']:.0f} ms, held {times['hold_ms']:.0f} ms, "
            f"{times['replicas']} replicas",
        )
    for refusal in report.refusals:
        table.add_row(f"refused by the gate {refusal['gate']}", refusal["reason"])
    for name, value in report.traffic.items():
        table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    for failure in report.failures:
        console.print(f"FAILED: {failure}", style="red")
    console.print(f"{report.seconds:.0f} s in all")


class _Traffic:
    """What the clients saw; one lock, since several threads write."""

    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.num_failed, self.went_back = 0, False
        self._lock = threading.Lock()
        self._latencies_ms: list[float] = []
        self._newest = 0
        self._began_s = time.monotonic()

    def ask(self, url: str, pictures: list[bytes]) -> None:
        """Ask every task of picture after picture until it is over."""
        with Client(url, tries=1) as client:  # what is refused counts as dropped
            place = 0
            while not self.is_over.is_set():
                self._ask_once(client, pictures[place % len(pictures)])
                place += 1

    def summary(self) -> dict[str, Any]:
        """Counts, rate and latencies."""
        seconds = time.monotonic() - self._began_s
        steps = statistics.quantiles(self._latencies_ms, n=100)
        return {
            "requests": len(self._latencies_ms) + self.num_failed,
            "dropped": self.num_failed,
            "answers_per_second": round(len(TASKS) * len(self._latencies_ms) / seconds),
            "p50_ms": round(steps[49], 1),
            "p99_ms": round(steps[98], 1),
        }

    def _ask_once(self, client: Client, picture: bytes) -> None:
        with self._lock:
            newest_before = self._newest
        sent_s = time.monotonic()
        try:
            answers = client.predict_tasks(TASKS, picture)
        except ClientError:
            with self._lock:
                self.num_failed += 1
            return
        version = next(answer.version for answer in answers if answer.task == SWAPPED)
        with self._lock:
            self._latencies_ms.append(1000 * (time.monotonic() - sent_s))
            # Whoever asks after a version was seen must not be answered by an older one.
            self.went_back |= version < newest_before
            self._newest = max(self._newest, version)


@contextmanager
def _traffic(url: str, pictures: list[bytes]) -> Iterator[_Traffic]:
    traffic = _Traffic()
    clients = [
        threading.Thread(target=traffic.ask, args=(url, pictures)) for _ in range(NUM_CLIENTS)
    ]
    for client in clients:
        client.start()
    try:
        yield traffic
    finally:
        traffic.is_over.set()
        for client in clients:
            client.join()


def _accuracy(client: Client, learned: Learned) -> float:
    """Share of test pictures that the service gets right, over HTTP."""
    hits = [
        client.predict(SWAPPED, picture).label == truth
        for picture, truth in zip(learned.pictures, learned.truths, strict=True)
    ]
    return round(sum(hits) / len(hits), 3)


def _refused(report: Report, client: Client, bundle: Bundle, *, gate: str) -> None:
    try:
        client.push(bundle)
    except ClientError as error:
        refused_by = error.gates[-1]["gate"] if error.gates else None
        report.refusals.append({"gate": refused_by, "reason": str(error)})
        report.check(that=f"the gate {gate} refuses", holds=refused_by == gate)
    else:
        report.check(that=f"the gate {gate} refuses", holds=False)


def _for_another_trunk(bundle: Bundle) -> Bundle:
    return _repacked(bundle, dict(bundle.files), trunk=digest_of(b"another trunk"))


def _with_wrong_golden(bundle: Bundle) -> Bundle:
    from safetensors.numpy import load, save  # noqa: PLC0415

    golden = load(bundle.files[GOLDEN])
    golden["logits"] = golden["logits"] + np.float32(0.1)
    return _repacked(bundle, {**bundle.files, GOLDEN: save(golden)})


def _repacked(bundle: Bundle, files: dict[str, bytes], **changed: object) -> Bundle:
    fields = bundle.manifest.model_dump(exclude={"files"}) | changed
    return Bundle.pack(files, **fields)


def _report_accuracies(report: Report, teacher: Any, student: Any, trunk_bytes: int) -> None:
    baseline, top = teacher.taught.metrics["baseline_test"], teacher.taught.metrics["test"]
    small = student.distilled.metrics[f"{DISTILLED}/test"]
    sizes = (teacher.taught.backbone.num_parameters, student.distilled.student.num_parameters)
    report.accuracies = [
        _accuracy_row("linear model on raw pixels", baseline, "-"),
        _accuracy_row("teacher", top, f"{sizes[0]:,}"),
        _accuracy_row("student", small, f"{sizes[1]:,} ({trunk_bytes / 1000:.0f} kB of ONNX)"),
    ]
    report.check(
        that=f"the student is at least {MIN_TIMES_SMALLER} times smaller",
        holds=sizes[0] >= MIN_TIMES_SMALLER * sizes[1],
    )
    report.check(
        that="the student is at most 2 points below its teacher",
        holds=small.value >= top.value - MAX_POINTS_BELOW,
    )


def _accuracy_row(what: str, estimate: Any, parameters: str) -> dict[str, Any]:
    return {
        "what": what,
        "value": estimate.value,
        "interval": f"{estimate.low:.3f} to {estimate.high:.3f}",
        "parameters": parameters,
    }


def _task_row(live: TaskState, bundle: Bundle) -> dict[str, Any]:
    test = bundle.manifest.metrics["test"]
    return {
        "task": live["task"],
        "version": live["version"],
        "labels": len(live["labels"]),
        "test_accuracy": f"{test.value:.3f} ({test.low:.3f} to {test.high:.3f})",
        "head": f"{len(bundle.files['head.onnx']) / 1000:.1f} kB",
        "bundle": short(live["bundle"] or ""),
    }


def _png(pixels: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _teller(began_s: float, *, is_quiet: bool) -> Callable[[str], None]:
    def say(step: str) -> None:
        if not is_quiet:
            console.print(f"{time.monotonic() - began_s:5.1f} s  {step}", highlight=False)

    return say


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
