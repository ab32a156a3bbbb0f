"""Where Ray Serve listens, and whether the settings know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EVERYWHERE = "0.0.0.0"  # noqa: S104
ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: Ray changes much of the one that imports it. Says what build_app says.
BUILD = """
import json, sys
from types import SimpleNamespace
from serve import app
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
    except app.HostError as error:
        print(error)
"""


@pytest.mark.timeout(600)
def test_a_setting_that_says_loopback_does_not_hide_a_service_for_all() -> None:
    """It would ask nobody for a token; in a RayService two places say where it listens."""
    cases: list[tuple[str, dict[str, str]]] = [
        (EVERYWHERE, {}),
        (EVERYWHERE, {"host": EVERYWHERE}),
        (EVERYWHERE, {"host": "10.0.0.1"}),
        (EVERYWHERE, {"access": "on"}),
        (EVERYWHERE, {"access": "off"}),
        ("127.0.0.1", {}),
    ]
    command = [sys.executable, "-c", BUILD, json.dumps(cases)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    hidden, *others = done.stdout.splitlines()

    assert hidden.startswith("Ray Serve listens on 0.0.0.0, and the setting host is 127.0.0.1")
    assert hidden.endswith("Set HEADSTOCK_HOST=0.0.0.0.")
    assert others == ["built"] * 5
