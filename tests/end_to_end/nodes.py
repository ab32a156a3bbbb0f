"""A fleet over several nodes: Ray nodes of this machine, with nothing of ours on the head's.

Run as a program that takes the arguments of `headstock serve`. It starts the same application, on a
Ray cluster of several nodes as KubeRay makes them, and one front door on the head. SIGUSR1 adds a
node.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx

from serve import runtime
from serve.first_trunk import store_folder
from serve.headlog import HeadLog
from serve.settings import load_settings

NUM_NODES = 2
REPLICAS_OF_A_NODE = 2
REPLICAS = NUM_NODES * REPLICAS_OF_A_NODE


def main() -> None:
    """Serve until SIGTERM."""
    arguments = sys.argv[2:]  # after "serve"
    given = dict(zip(arguments[::2], arguments[1::2], strict=False))
    settings = load_settings(
        store=given["--store"], port=int(given["--port"]), replicas=REPLICAS, swap_stage_s=4.0
    )
    folder = Path(tempfile.mkdtemp(prefix="headstock-", dir="/tmp"))  # has to be short
    trunk = store_folder(HeadLog(settings.store), Path(given["--trunk"]))
    runtime.prepare(
        folder,
        host=settings.host,
        max_body_bytes=settings.max_body_bytes,
        timeout_s=settings.request_timeout_s,
        proxy="haproxy",
    )
    (folder / "ray").mkdir()
    os.environ["RAY_TMPDIR"] = str(folder)
    # Ray reads the variables that were set above when it is imported.
    import ray  # noqa: PLC0415
    from ray import serve as ray_serve  # noqa: PLC0415
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    from serve import app, cluster  # noqa: PLC0415

    head = {"num_cpus": 0, "node_ip_address": settings.host, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args=head)

    def add_node(*_: object) -> None:
        nodes.add_node(num_cpus=REPLICAS_OF_A_NODE, node_ip_address=settings.host)

    for _ in range(NUM_NODES):
        add_node()
    ray.init(address=nodes.address, log_to_driver=False, logging_level=logging.ERROR)
    door = {"host": settings.host, "port": settings.port}
    ray_serve.start(proxy_location="HeadOnly", http_options=door)
    cluster.install_trunk(settings, trunk)
    app.run_app(settings)
    url = f"http://{settings.host}:{settings.port}"
    while not _is_ready(url):
        time.sleep(0.2)

    signal.signal(signal.SIGUSR1, add_node)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    sys.stdout.write(json.dumps({"url": url}) + "\n")
    sys.stdout.flush()
    try:
        while True:
            signal.pause()
    finally:
        ray_serve.shutdown()
        ray.shutdown()
        nodes.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v2/health/ready").is_success
    except httpx.HTTPError:
        return False


if __name__ == "__main__":
    main()
