"""The service on this machine: start Ray, the conductor and the replicas; stop them again."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx

from serve import runtime
from serve.devices import refuse_without_gpu
from serve.first_token import refuse_without_admin
from serve.first_trunk import store_folder
from serve.front_door import close_front_door
from serve.headlog import HeadLog
from serve.precision import choose_precision
from serve.record import LogView, TrunkChange
from serve.replica import NoTrunkError
from serve.settings import ServeSettings
from serve.tls import certificate_for, context_for
from serve.trunks import load_trunk_manifest

logger = logging.getLogger(__name__)

ray_logger = logging.getLogger(f"{__name__}.ray")

READY_S = 60.0
READY_CHECK_S = 0.02
CLOSE_S = 5.0  # for what is in flight when the service is told to stop
# The names of unix sockets have to fit 107 bytes, so a long TMPDIR does not do.
_SHORT = "/tmp" if Path("/tmp").is_dir() else None  # noqa: S108 (made private, under a random name)


class StartError(Exception):
    """The service could not be started, with the reason."""


class Service:
    """A running service; use as a context manager, so that it is always stopped.

    Args:
        trunk: Folder of the trunk for a store that has none yet.
        proxy: "haproxy" or "python".
        progress: Told each step of the start.
    """

    def __init__(
        self,
        settings: ServeSettings,
        *,
        trunk: Path | None,
        proxy: str,
        progress: Callable[[str], None],
    ) -> None:
        self.settings, self._trunk, self._proxy = settings, trunk, proxy
        self._progress = progress
        self._folder = Path()
        self._certificate: Path | None = None
        self._step_began_s = 0.0
        self.step_seconds: dict[str, float] = {}

    @property
    def url(self) -> str:
        """Where it answers."""
        host = "127.0.0.1" if self.settings.host in {"0.0.0.0", "::"} else self.settings.host  # noqa: S104
        scheme = "https" if self.settings.tls_certificate else "http"
        return f"{scheme}://{host}:{self.settings.port}"

    # Not Self: the shape checks of the tests wrap methods one by one, and Self needs the class.
    def __enter__(self) -> Service:  # noqa: PYI034
        """Start everything; returns when the first request would be answered.

        Raises:
            StartError: the port is taken, or a replica cannot start.
            NoTokenError: callers would be asked for a token, and nobody could make one.
            NoTrunkError: the store has no trunk and none was given.
            OtherTrunkError: the store has another trunk than the one given.
            PrecisionError: the trunk has no variant of the precision in the settings.
            DeviceError: the device in the settings is not on this machine.
            StoreError: the store cannot be used.
            CertificateError: the certificate in the settings cannot be used.
            RuntimeProblemError: this machine lacks something.
        """
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop everything."""
        self._stop()

    def _start(self) -> None:
        settings = self.settings
        self._step("store")
        if not runtime.is_port_free(settings.host, settings.port):
            raise StartError(
                f"Port {settings.port} of {settings.host} is taken; choose another with --port."
            )
        trunk = self._find_trunk()
        refuse_without_admin(settings)
        # Both asked here as well, because what a replica raises arrives as an error of Ray's.
        choose_precision(load_trunk_manifest(HeadLog(settings.store), trunk), settings.precision)
        refuse_without_gpu(settings.device)
        self._folder = Path(tempfile.mkdtemp(prefix="headstock-", dir=_SHORT))
        self._certificate = certificate_for(
            self._folder, settings.tls_certificate, settings.tls_key
        )
        runtime.prepare(
            self._folder,
            host=settings.host,
            max_body_bytes=settings.max_body_bytes,
            timeout_s=settings.request_timeout_s,
            body_timeout_s=settings.body_timeout_s,
            certificate=self._certificate,
            proxy=self._proxy,
            may_sleep=settings.may_sleep,
        )
        self._step("ray")
        self._start_ray()
        self._step("ray serve")
        from ray import serve as ray_serve  # noqa: PLC0415 (reads the variables set above)

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        ray_serve.start(http_options=self._http_options())
        self._step("conductor")
        from serve import app, cluster  # noqa: PLC0415 (see above)

        cluster.install_trunk(settings, trunk)
        self._step("replicas")
        try:
            app.run_app(settings)
        except RuntimeError as error:
            raise StartError(f"The replicas did not start: {error}") from error
        self._step("front door")
        self._wait_until_ready()
        self._step("")

    def _http_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"host": self.settings.host, "port": self.settings.port}
        if self._proxy == "haproxy" or not self._certificate:
            return options  # HAProxy has been told; these would make the replicas speak TLS to it
        files = {
            "ssl_certfile": self.settings.tls_certificate,
            "ssl_keyfile": self.settings.tls_key,
        }
        return options | files

    def _find_trunk(self) -> TrunkChange:
        """The trunk to serve: what the log names, else the folder given, stored now."""
        log = HeadLog(self.settings.store)
        if self._trunk is not None:
            return store_folder(log, self._trunk)
        logged = log.follow(LogView()).trunk
        if logged is None:
            raise NoTrunkError(f"The store {log.url} has no trunk; start with --trunk FOLDER.")
        return logged

    def _start_ray(self) -> None:
        import ray  # noqa: PLC0415 (reads the variables that were set before)

        try:
            self._init_ray(ray)
        except Exception as error:  # Ray raises no class of its own here
            if "timed out" not in str(error):
                raise
            # Ray gives its processes 30 s, whatever else the machine is doing; those of the first
            # try end with this process.
            self._progress("ray again: its first start took too long")
            ray.shutdown()
            self._init_ray(ray)

    def _init_ray(self, ray: Any) -> None:
        """Start a cluster of this service's own."""
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, self.settings.most_replicas),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=100 * 2**20,  # nothing large goes through it
            # Ray's own folder is open to every user of the machine, and stays when it stops.
            _temp_dir=str(self._folder / "ray"),
        )
        # Ray prints what goes wrong in its processes to standard output, which is the command's.
        ray._private.worker.print_to_stdstream = _log_of_ray  # noqa: SLF001

    def _wait_until_ready(self) -> None:
        deadline_s = time.monotonic() + READY_S
        verify = context_for(self._certificate)
        with httpx.Client(base_url=self.url, timeout=5, verify=verify) as client:
            while time.monotonic() < deadline_s:
                try:
                    if client.get("/v2/health/ready").status_code == 200:  # noqa: PLR2004
                        return
                except httpx.HTTPError:
                    pass
                time.sleep(READY_CHECK_S)
        raise StartError(f"{self.url} did not become ready within {READY_S:.0f} s.")

    def _stop(self) -> None:
        try:
            import ray  # noqa: PLC0415 (it may never have been imported)

            # Ray reports the end of its own controller as an error of it.
            ray_logger.setLevel(logging.ERROR)
            if ray.is_initialized():
                from ray import serve as ray_serve  # noqa: PLC0415

                if self._folder != Path():
                    close_front_door(self._folder, limit_s=CLOSE_S)
                ray_serve.shutdown()
                ray.shutdown()
        finally:
            if self._folder != Path():
                shutil.rmtree(self._folder, ignore_errors=True)

    def _step(self, name: str) -> None:
        """Note how long the last step took, and tell of the next."""
        now_s = time.monotonic()
        if self.step_seconds:
            last = next(reversed(self.step_seconds))
            self.step_seconds[last] = now_s - self._step_began_s
        self._step_began_s = now_s
        if name:
            self.step_seconds[name] = 0.0
            self._progress(name)


def asked_to_end() -> Callable[[], object]:
    """Let SIGINT (Ctrl-C) and SIGTERM do nothing else, from now on, than end a wait.

    For when the service is up: Ray sets handlers of its own while it starts, and a start that is
    interrupted ends by the exception that they raise.

    Returns:
        Waits for the first of them.
    """
    # Not an event: its lock is not reentrant, and a second signal (`uv run` hands on a Ctrl-C that
    # the terminal has already sent) would wait in its handler for the one that it interrupts.
    asked = SimpleQueue[int]()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: asked.put(number))
    return asked.get


def _log_of_ray(data: dict[str, Any], ignore_prefix: bool) -> None:  # noqa: FBT001, ARG001
    for line in data["lines"]:
        ray_logger.warning("%s: %s", data["pid"], line)
