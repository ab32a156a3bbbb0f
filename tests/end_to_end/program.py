"""The real program: `headstock serve` as a user starts it, and the processes below it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil

from serve.client import Client
from serve.headlog import HeadLog
from serve.record import LogView
from tests.serve.harness import until

HEADSTOCK = Path(sysconfig.get_path("scripts")) / "headstock"
REPLICA = "ray::ServeReplica:headstock:predictor"
CONDUCTOR = "ray::ConductorActor"
HAPROXY = "haproxy -db"
START_LIMIT_S = 150  # 15 s on a free machine of two cores
HEAL_LIMIT_S = 90  # a new replica takes about 5 s there
STOP_LIMIT_S = 30


def clean_environment(**settings: object) -> dict[str, str]:
    """This process's variables without those that would change the program, and these settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("HEADSTOCK_", "RAY_"))}
    return inherited | {f"HEADSTOCK_{k.upper()}": str(v) for k, v in settings.items()}


def headstock(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    """Run a command of the program to its end."""
    return subprocess.run(
        [HEADSTOCK, *map(str, arguments)],
        env=clean_environment(**settings),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Program:
    """A running service; use as a context manager, so that no process of it stays.

    Args:
        folder: Where its store and its output go.
        trunk: Folder of its trunk.
        command: How it is called.
        store: URL of its store, if that is no folder.
        replicas: The flags that say how many.
        settings: `HEADSTOCK_*` variables, without the prefix.
    """

    def __init__(
        self,
        folder: Path,
        trunk: Path,
        *,
        command: Sequence[object] = (HEADSTOCK,),
        store: str = "",
        replicas: Sequence[str] = ("--replicas", "2"),
        **settings: object,
    ) -> None:
        self.store, self.port = folder / "store", free_port()
        self._store_url = store or str(self.store)
        self.url = f"http://127.0.0.1:{self.port}"
        self._folder, self._trunk, self._settings = folder, trunk, settings
        self._command, self._replicas = [str(part) for part in command], replicas
        self._process: subprocess.Popen[bytes] | None = None
        self._seen: dict[int, psutil.Process] = {}
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "out").open("wb") as out, (self._folder / "err").open("wb") as err:
            self._process = subprocess.Popen(
                [
                    *self._command, "serve", "--store", self._store_url, "--trunk", self._trunk,
                    "--port", str(self.port), *self._replicas, "--json",
                ],
                env=clean_environment(**self._settings),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )  # fmt: skip
        try:
            until(self._is_ready, limit_s=START_LIMIT_S)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        self.ready = json.loads(self.out)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.stop()
        for process in self.left_over():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert self._process is not None
        self._process.wait(STOP_LIMIT_S)

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    @property
    def out(self) -> str:
        """What it has written to its standard output."""
        return (self._folder / "out").read_text()

    def _is_ready(self) -> bool:
        assert self._process is not None
        said = (self._folder / "err").read_text()
        assert self._process.poll() is None, f"the service ended at its start: {said}"
        self.tree()
        return self.out.endswith("\n")

    def stop(self) -> float:
        """Ask it to end, as Ctrl-C or an init system does; returns the seconds it took."""
        assert self._process is not None
        self.tree()
        began_s = time.monotonic()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        self._process.wait(STOP_LIMIT_S)
        return time.monotonic() - began_s

    def send_signal(self, number: int) -> None:
        """To the program itself."""
        assert self._process is not None
        self._process.send_signal(number)

    def left_over(self) -> list[psutil.Process]:
        """The processes that were ever seen below it and still run."""
        return [p for p in self._seen.values() if p.is_running() and _line(p)]

    def tree(self) -> list[psutil.Process]:
        """Every process of the service that runs now."""
        assert self._process is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            tree = [root, *root.children(recursive=True)]
            self._seen |= {process.pid: process for process in tree}
            return tree
        return []

    def named(self, beginning: str) -> list[psutil.Process]:
        """Its processes whose command line holds this, the oldest first."""
        found = [process for process in self.tree() if beginning in _line(process)]
        return sorted(found, key=lambda process: process.create_time())

    def replicas(self) -> list[psutil.Process]:
        """The replica processes."""
        return self.named(REPLICA)

    def conductor(self) -> psutil.Process:
        """The conductor's process; waits for it while it restarts."""
        until(lambda: bool(self.named(CONDUCTOR)), limit_s=HEAL_LIMIT_S)
        return self.named(CONDUCTOR)[-1]

    def view(self) -> LogView:
        """What its log says, read anew."""
        return HeadLog(self._store_url).follow(LogView())

    def next_record(self) -> Path:
        """The file in which the next record will be."""
        last = max((int(path.stem) for path in (self.store / "log").glob("*.json")), default=0)
        return self.store / "log" / f"{last + 1:020d}.json"

    def client(self, replica: psutil.Process | None = None) -> Client:
        """A client of it; or of one of its replicas, past the front door."""
        return Client(doors(replica)[0] if replica else self.url)

    def run_folder(self) -> Path:
        """Where its sockets and its other files of the moment are."""
        arguments = self.named(HAPROXY)[-1].cmdline()
        return Path(arguments[arguments.index("-f") + 1]).parent.parent

    def counts(self, name: str) -> dict[str, float]:
        """The samples of a metric of the whole fleet: labels as they are printed -> value."""
        text = httpx.get(f"{self.url}/metrics", timeout=60).raise_for_status().text
        samples = [line.rpartition(" ") for line in text.splitlines() if line.startswith(name)]
        return {
            sample.removeprefix(name): float(value)
            for sample, _, value in samples
            if sample.partition("{")[0] == name
        }

    def is_whole(self, replicas: int = 2) -> bool:
        """Whether all replicas answer, each by itself, through the front door, and in a swap."""
        try:
            known = self.counts("headstock_replicas").get("", 0.0)
        except httpx.HTTPError:
            return False
        answering = [replica for replica in self.replicas() if doors(replica)]
        return known == len(answering) == replicas

    def wait_whole(self) -> float:
        """Until the fleet has healed by itself; returns the seconds that took."""
        began_s = time.monotonic()
        until(self.is_whole, limit_s=HEAL_LIMIT_S)
        return time.monotonic() - began_s


def listening(process: psutil.Process) -> Iterator[tuple[str, int]]:
    """The addresses and ports that a process takes connections on."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                yield connection.laddr.ip, connection.laddr.port


def doors(replica: psutil.Process) -> list[str]:
    """Where one replica answers HTTP itself; none while it starts or once it has ended."""
    # Ray's own ports are bound to both address families, and named otherwise.
    return [f"http://{ip}:{port}" for ip, port in listening(replica) if ip == "127.0.0.1"]


def _line(process: psutil.Process) -> str:
    """A process's command line; nothing if it has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
