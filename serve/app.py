"""The Ray Serve application: one deployment that is ingress and replica in one process."""

# No `from __future__ import annotations` here: Ray validates the arguments of `build_app` by its
# annotation, and would skip that without a word if the annotation were text.

import asyncio
import logging
import warnings
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve._private import replica
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.context import _get_global_client
from ray.serve.schema import LoggingConfig
from starlette.applications import Starlette

from serve.admission import HEADROOM
from serve.autoscale import BIN_S
from serve.cluster import (
    APPLICATION,
    CONDUCTOR,
    DEPLOYMENT,
    NAMESPACE,
    RayLink,
    conductor_of,
)
from serve.demand import Demand
from serve.devices import gpu_share, limit_gpu_memory
from serve.first_token import refuse_without_admin
from serve.first_trunk import wait_for_trunk
from serve.headlog import HeadLog
from serve.http.routes import http_app
from serve.replica import Replica
from serve.runtime import LOOPBACK
from serve.settings import ServeSettings, refuse_unknown_variables
from serve.store import ask_until_answered

# Ray's own queue is kept out of the way: the batcher refuses what it cannot take.
MAX_ONGOING_REQUESTS = 4096
REPORT_EVERY_S = 1.0  # of replicas to the controller, where their number follows the load


class HostError(Exception):
    """Ray Serve listens beyond loopback, and the settings do not say so."""


class Predictor:
    """One replica in a Ray actor.

    Args:
        settings: `ServeSettings` as JSON; the pods' variables have been read already.
    """

    async def __init__(self, settings: str) -> None:
        _log_to_stderr()
        checked = ServeSettings.model_validate_json(settings)
        if checked.host in LOOPBACK:
            _keep_grpc_on_loopback()
        name = ray_serve.get_replica_context().replica_id.to_full_id_str()
        # Ray keeps count of fractions of a GPU, and holds nobody to them.
        limit_gpu_memory(ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0))
        self._link = RayLink(conductor_of(checked))
        log = await asyncio.to_thread(ask_until_answered, lambda: HeadLog(checked.store))
        self._replica = await asyncio.to_thread(Replica, name, log, self._link, checked)
        self._demand = Demand(self._replica.batcher, decode_threads=checked.decode_threads)
        # Ray sends traffic once this returns, so it returns once the conductor has said yes.
        await asyncio.to_thread(self._replica.watcher.wait_admitted)

    def __serve_build_asgi_app__(self) -> Starlette:
        return http_app(self._replica, self._link)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray where the number of replicas follows the load.

        A coroutine, because those run in the thread that answers HTTP.
        """
        return self._demand.stats()

    def check_health(self) -> None:
        """Called by Ray; an error here replaces the replica."""
        if not self._replica.is_healthy:
            raise RuntimeError("A thread of this replica has ended.")

    def __del__(self) -> None:
        # Set last in __init__, so it is missing if that failed.
        if hasattr(self, "_replica"):
            self._replica.close()


def _log_to_stderr() -> None:
    """Into the file that Ray keeps of this process; without a handler Python drops what is INFO."""
    ours = logging.getLogger("serve")
    ours.setLevel(logging.INFO)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    ours.addHandler(handler)


def _keep_grpc_on_loopback() -> None:
    """Bind the server for calls between deployments to loopback, where Ray binds every interface.

    It takes pickled arguments from anyone who reaches it. Nothing here calls it, Ray 2.60 has no
    setting for its address, and it starts after the replica is made.
    """
    bind = replica.add_port_to_grpc_server

    def bind_to_loopback(server: Any, address: str) -> int:
        return bind(server, f"127.0.0.1:{address.rpartition(':')[2]}")

    replica.add_port_to_grpc_server = bind_to_loopback


def build_app(settings: ServeSettings) -> ray_serve.Application:
    """The application, as `serve.run` and a RayService's `import_path` take it.

    Returns once the store has a trunk. A replica without one could only fail, and Ray gives an
    application up whose replicas failed a few times.

    Raises:
        SettingsError: a `HEADSTOCK_*` variable is no setting.
        DeviceError: the setting is "cuda", and the cluster has no GPU.
        HostError: Ray Serve listens elsewhere than the settings say.
        NoTokenError: callers would be asked for a token, and nobody could make one.
    """
    refuse_unknown_variables()
    _check_host(settings)
    wait_for_trunk(settings.store)
    refuse_without_admin(settings)
    deployment = ray_serve.deployment(
        name=DEPLOYMENT,
        **_replicas(settings),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_timeout_s=10,
        # A line for each request took 3 % of the time in which a replica held the interpreter, and
        # making a record that is thrown away, as Ray does without its access log, as much again.
        logging_config=LoggingConfig(enable_access_log=False, log_level="WARNING"),
        ray_actor_options={"num_cpus": 1, "num_gpus": _gpu_share(settings)},
    )(ray_serve.ingress()(Predictor))
    return deployment.bind(settings.model_dump_json())


def _replicas(settings: ServeSettings) -> dict[str, Any]:
    """How many replicas, as Ray Serve's deployment takes it."""
    if not settings.is_autoscaled:
        return {"num_replicas": settings.first_replicas}
    config = autoscaled(
        least=settings.fewest_replicas,
        most=settings.most_replicas,
        # What would be answered later is refused at once.
        deadline_s=HEADROOM * settings.request_timeout_s,
        max_queued=settings.max_queued,
        keep_s=settings.keep_replicas_s,
    )
    return {"autoscaling_config": config}


def autoscaled(
    *, least: int, most: int, deadline_s: float, max_queued: int, keep_s: float | None
) -> AutoscalingConfig:
    """Replicas whose number the policy decides; see `scaling.Scaling`."""
    with warnings.catch_warnings():
        # Ray 2.60 warns that two variables take the place of the interval, and reads neither.
        warnings.simplefilter("ignore", DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=least,
            initial_replicas=max(1, least),  # one shows that they can start
            max_replicas=most,
            metrics_interval_s=REPORT_EVERY_S,
            # Of this a replica keeps a point every fifth: one a bin.
            look_back_period_s=5 * BIN_S,
            # When to act is the policy's affair.
            upscale_delay_s=0,
            downscale_delay_s=0,
            policy=AutoscalingPolicy(
                policy_function="serve.scaling:Scaling",
                policy_kwargs={
                    "deadline_s": deadline_s,
                    "max_queued": max_queued,
                    "keep_s": keep_s,
                    "conductor": [CONDUCTOR, NAMESPACE],
                },
            ),
        )


def _check_host(settings: ServeSettings) -> None:
    """By the setting it is decided whether tokens are asked for, so it has to be true."""
    if not ray.is_initialized() or settings.access != "auto":
        return
    client = _get_global_client(raise_if_no_controller_running=False)
    host = client.http_config.host if client else settings.host
    if settings.host in LOOPBACK and host not in LOOPBACK:
        raise HostError(
            f"Ray Serve listens on {host}, and the setting host is {settings.host}, where nobody "
            f"is asked for a token. Set HEADSTOCK_HOST={host}."
        )


def _gpu_share(settings: ServeSettings) -> float:
    """GPUs for each replica: as set, or of those that this cluster has now."""
    if settings.gpus_per_replica and settings.device != "cpu":
        return settings.gpus_per_replica  # a node that has one may come only when it is asked for
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    return gpu_share(settings.device, replicas=settings.most_replicas, num_gpus=num_gpus)


def run_app(settings: ServeSettings) -> None:
    """Start the application in the Serve instance of this cluster; returns when it answers."""
    ray_serve.run(build_app(settings), name=APPLICATION, route_prefix="/")
