"""Where Ray Serve listens, and whether the settings know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from serve.admission import HEADROOM
from serve.autoscale import BIN_S, STALE_S

EVERYWHERE = "0.0.0.0"  # noqa: S104
ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: Ray changes much of the one that imports it. Says what build_app says.
BUILD = """
import json, sys
from types import SimpleNamespace
from serve import app
from serve.first_token import NoTokenError
from serve.settings import ServeSettings

for listens_on, settings in json.loads(sys.argv[1]):
    client = SimpleNamespace(http_config=SimpleNamespace(host=listens_on))
    app.ray.is_initialized = lambda: True
    app.ray.cluster_resources = dict
    app._get_global_client = lambda **_: client
    app.wait_for_trunk = lambda _: None
    try:
        app.build_app(ServeSettings.model_validate({"store": "/s", **settings}))
        print("built")
    except (app.HostError, NoTokenError) as error:
        print(error)
"""


@pytest.mark.timeout(600)
def test_a_setting_that_says_loopback_does_not_hide_a_service_for_all(tmp_path: Path) -> None:
    """It would ask nobody for a token; in a RayService two places say where it listens."""
    cases: list[tuple[str, dict[str, str]]] = [
        (EVERYWHERE, {}),
        (EVERYWHERE, {"host": EVERYWHERE, "admin_token": "a" * 32}),
        (EVERYWHERE, {"host": "10.0.0.1", "admin_token": "a" * 32}),
        (EVERYWHERE, {"access": "on", "admin_token": "a" * 32}),
        (EVERYWHERE, {"access": "off"}),
        ("127.0.0.1", {}),
        (EVERYWHERE, {"host": EVERYWHERE, "store": str(tmp_path)}),
    ]
    command = [sys.executable, "-c", BUILD, json.dumps(cases)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    hidden, *others, closed = done.stdout.splitlines()

    assert hidden.startswith("Ray Serve listens on 0.0.0.0, and the setting host is 127.0.0.1")
    assert hidden.endswith("Set HEADSTOCK_HOST=0.0.0.0.")
    assert others == ["built"] * 5
    assert closed.startswith("Callers of 0.0.0.0 have to bring a token, and nobody could make one")


# What Ray's controller gets where the number of replicas follows the load, and where it is fixed.
POLICY = """
import json
from serve import app
from serve.settings import ServeSettings
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.constants import RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR

app.ray.is_initialized = lambda: False
app.ray.cluster_resources = lambda: {"GPU": 2.0}
app.wait_for_trunk = lambda _: None
given = dict(store="/s", max_replicas=8, keep_replicas_s=60, request_timeout_s=10, max_queued=7)

def sent(settings):
    deployment = app.build_app(ServeSettings.model_validate(settings))._bound_deployment
    config = deployment._deployment_config.to_proto_bytes()
    return deployment, DeploymentConfig.from_proto_bytes(config).autoscaling_config

deployment, config = sent(given)
_, sleepy = sent(given | {"min_replicas": 0})
policy = _resolve_policy_callable(config.policy)
fixed = app.build_app(ServeSettings(store="/s", replicas=3))._bound_deployment
told = {
    "bounds": [[c.min_replicas, c.initial_replicas, c.max_replicas] for c in (config, sleepy)],
    "delays": [config.upscale_delay_s, config.downscale_delay_s, config.downscale_to_zero_delay_s],
    "report_s": config.metrics_interval_s,
    "point_s": config.look_back_period_s * RAY_SERVE_AUTOSCALING_METRIC_RECORD_INTERVAL_FACTOR,
    "policy": [type(policy).__name__, config.policy.policy_kwargs],
    "gpus": deployment.ray_actor_options["num_gpus"],
    "can_report": callable(deployment.func_or_class.record_autoscaling_stats),
    "fixed": [fixed.num_replicas, fixed._deployment_config.autoscaling_config is None],
}
print(json.dumps(told))
"""


@pytest.mark.timeout(600)
def test_ray_is_told_the_bounds_and_asks_the_policy() -> None:
    """As it arrives in the controller; nothing of Ray's own delays stands between the two."""
    done = subprocess.run(
        [sys.executable, "-c", POLICY], check=True, capture_output=True, text=True, cwd=ROOT
    )
    told = json.loads(done.stdout.splitlines()[-1])
    kwargs = {
        "deadline_s": HEADROOM * 10,
        "max_queued": 7,
        "keep_s": 60.0,
        "conductor": ["conductor", "headstock"],
    }

    assert told["bounds"] == [[1, 1, 8], [0, 1, 8]]
    assert told["delays"] == [0, 0, None]
    assert told["report_s"] < STALE_S / 3
    assert told["point_s"] == BIN_S
    assert told["policy"] == ["Scaling", kwargs]
    assert told["gpus"] == 0.25  # eight at most on two
    assert told["can_report"]
    assert told["fixed"] == [3, True]
