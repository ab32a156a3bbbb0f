"""How does the service compare with LitServe and BentoML?

The same trunk and heads, decoder, picture, load and number of workers (2), each peer in an
environment of its own, which is made on first use. A peer is tried without and with its batching,
and goes on with the better; while others are measured its processes are stopped, for LitServe's
idle workers ask for work all the time. The service idles meanwhile: it cannot be stopped.

With 8 models LitServe answers one request by all 8, decoding once (as 8 requests it would decode 8
times); Headstock gets 8 tasks asked of one picture.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx

from benchmarks.fixtures import LABELS, free_port, make_bundle, make_trunk, photograph, serving
from benchmarks.load import run_load
from benchmarks.report import arguments, finish, median_of, note
from export.bundle import HEAD, TRUNK_GRAPH, Bundle, TrunkManifest
from serve.client import Client

CACHE = Path.home() / ".cache" / "headstock-benchmarks"
REPOSITORY = Path(__file__).parent.parent
SHARED = ("onnxruntime==1.31.1", "pillow==13.0.0", "numpy==2.4.6")
PINS = {"litserve": "litserve==0.2.19", "bentoml": "bentoml==1.4.39"}
CONNECTIONS = 8
NUM_TASKS = 8
TRIAL_S = 2.0
READY_S = 90.0
FORM = "multipart/form-data; boundary=frontier"


@dataclass
class Target:
    """Where to send the picture, and in which form.

    Args:
        group: The processes that answer, stopped while they are not asked; 0: left running.
    """

    url: str
    body: bytes
    content_type: str = "image/jpeg"
    group: int = 0

    def rate(self, seconds: float) -> float:
        """Answers per second."""
        with self._running():
            load = asyncio.run(
                run_load(
                    self.url,
                    self.body,
                    connections=CONNECTIONS,
                    seconds=seconds,
                    content_type=self.content_type,
                )
            )
        assert not load.num_failed, f"{load.num_failed} requests to {self.url} failed"
        return load.rate

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        if not self.group:
            yield
            return
        os.killpg(self.group, signal.SIGCONT)
        yield
        os.killpg(self.group, signal.SIGSTOP)


def main() -> None:
    """Alternate between the service and its peers."""
    chosen = arguments(__doc__ or "")
    rounds, seconds = (3, 2.0) if chosen.quick else (9, 6.0)
    jpeg = photograph()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as running:
        folder = Path(name)
        manifest = make_trunk(folder / "trunk")
        bundles = [
            make_bundle(folder / "trunk", task=f"task{seed}", seed=seed)
            for seed in range(NUM_TASKS)
        ]
        _write_models(folder, manifest, bundles)
        targets = {
            "LitServe": running.enter_context(_better_litserve(folder, jpeg, num_models=1)),
            "LitServe, 8 models": running.enter_context(
                _better_litserve(folder, jpeg, num_models=NUM_TASKS)
            ),
            "BentoML": running.enter_context(_better_bentoml(folder, jpeg)),
        }
        service = running.enter_context(serving(folder / "store", trunk=folder / "trunk"))
        with Client(service["url"]) as client:
            for bundle in bundles:
                client.push(bundle)
        tasks = ",".join(bundle.manifest.task for bundle in bundles)
        targets["HTTP"] = Target(f"{service['url']}/predict/task0", jpeg)
        targets["HTTP, 8 tasks"] = Target(f"{service['url']}/predict?tasks={tasks}", jpeg)
        rates: dict[str, list[float]] = {name: [] for name in targets}
        for number in range(rounds):
            for server, target in targets.items():
                rates[server].append(target.rate(seconds))
            latest = ", ".join(f"{name} {sampled[-1]:.0f}/s" for name, sampled in rates.items())
            note(f"round {number + 1} of {rounds}: {latest}")
    comparisons = (
        ("HTTP / LitServe", "HTTP", "LitServe", ">= 1.4"),
        ("HTTP / BentoML", "HTTP", "BentoML", ">= 2"),
        ("8 tasks / LitServe with 8 models", "HTTP, 8 tasks", "LitServe, 8 models", ">= 7"),
    )
    figures = [
        *(
            median_of(name, _ratios(rates[own], rates[other]), unit="ratio", aim=aim)
            for name, own, other, aim in comparisons
        ),
        *(median_of(name, sampled, unit="pictures/s") for name, sampled in rates.items()),
    ]
    finish("peers", figures, chosen)


def _write_models(folder: Path, manifest: TrunkManifest, bundles: list[Bundle]) -> None:
    """What `peer_model.py` reads."""
    (folder / "trunk.onnx").write_bytes((folder / "trunk" / TRUNK_GRAPH).read_bytes())
    for number, bundle in enumerate(bundles):
        (folder / f"head{number}.onnx").write_bytes(bundle.files[HEAD])
    described = {"preprocessing": asdict(manifest.preprocessing), "labels": LABELS}
    (folder / "model.json").write_text(json.dumps(described))


@contextlib.contextmanager
def _better_litserve(folder: Path, jpeg: bytes, *, num_models: int) -> Iterator[Target]:
    python = _environment("litserve") / "python"
    commands = []
    for max_batch in (1, 8):
        port = free_port()
        options = (str(folder), str(port), str(num_models), str(max_batch))
        command = [str(python), "-m", "benchmarks.peer_litserve", *options]
        commands.append((command, Target(f"http://127.0.0.1:{port}/predict", jpeg)))
    with _better(commands, folder) as target:
        yield target


@contextlib.contextmanager
def _better_bentoml(folder: Path, jpeg: bytes) -> Iterator[Target]:
    program = _environment("bentoml") / "bentoml"
    commands = []
    for kind in ("Single", "Batched"):
        port = free_port()
        address = ["--host", "127.0.0.1", "--port", str(port)]
        command = [str(program), "serve", f"benchmarks.peer_bentoml:{kind}", *address]
        url = f"http://127.0.0.1:{port}/predict"
        target = Target(url, jpeg) if kind == "Single" else Target(url, _form(jpeg), FORM)
        commands.append((command, target))
    with _better(commands, folder) as target:
        yield target


@contextlib.contextmanager
def _better(commands: list[tuple[list[str], Target]], folder: Path) -> Iterator[Target]:
    """Try each by itself, and start the faster one again."""
    rates = []
    for command, target in commands:
        with _started(command, target, folder):
            target.rate(TRIAL_S / 2)  # the first runs allocate
            rates.append(target.rate(TRIAL_S))
    note(
        f"{Path(commands[0][0][0]).parent.parent.name}: {rates[0]:.0f}/s, batching {rates[1]:.0f}/s"
    )
    command, target = commands[rates.index(max(rates))]
    with _started(command, target, folder):
        yield target


@contextlib.contextmanager
def _started(command: list[str], target: Target, folder: Path) -> Iterator[None]:
    """A peer that answers, in a process group that is ended as a whole."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PEER_FOLDER": str(folder)}
    log = folder / "peer.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env=environment,
            cwd=REPOSITORY,
            start_new_session=True,
        ) as process,
    ):
        try:
            _wait_for(target, process, log)
            target.group = process.pid
            yield
        finally:
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            with contextlib.suppress(ProcessLookupError):  # workers that outlive their parent
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for(target: Target, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    headers = {"content-type": target.content_type}
    while time.monotonic() < deadline_s and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.post(target.url, content=target.body, headers=headers).is_success:
                return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args} does not answer:\n{log.read_text()[-2000:]}")


def _environment(name: str) -> Path:
    """The folder of programs of a peer's environment, made if it is not there.

    Raises:
        RuntimeError: uv cannot make it.
    """
    folder = CACHE / PINS[name].replace("==", "-")
    if not (folder / "complete").exists():
        note(f"making an environment for {PINS[name]} in {folder}")
        install = ["uv", "pip", "install", "-q", "--python", str(folder / "bin" / "python")]
        for command in (
            ["uv", "venv", "-q", "--clear", "--python", "3.11", str(folder)],
            [*install, PINS[name], *SHARED],
        ):
            made = subprocess.run(command, capture_output=True, text=True, check=False)
            if made.returncode:
                raise RuntimeError(
                    f"The environment for {PINS[name]} cannot be made in {folder}; this benchmark "
                    f"needs uv and a package index:\n{made.stderr}"
                )
        (folder / "complete").touch()
    return folder / "bin"


def _form(jpeg: bytes) -> bytes:
    head = 'Content-Disposition: form-data; name="image"; filename="a.jpg"'
    part = f"--frontier\r\n{head}\r\nContent-Type: image/jpeg\r\n\r\n".encode()
    return part + jpeg + b"\r\n--frontier--\r\n"


def _ratios(ours: list[float], theirs: list[float]) -> list[float]:
    return [own / other for own, other in zip(ours, theirs, strict=True)]


if __name__ == "__main__":
    main()
