"""Every object of every overlay is valid for Kubernetes and KubeRay, and true to the program."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from copy import deepcopy
from functools import cache
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest

from serve import runtime
from serve.http.operations import OPERATIONS
from serve.settings import PREFIX, ServeSettings, load_settings
from tests.image.dockerfile import read_stages
from tests.k8s.manifests import (
    OVERLAYS,
    ROOT,
    Object,
    containers,
    overlay,
    pods,
    ray_service,
    render,
    serve_config,
    variables,
)
from tests.k8s.prometheus_operator import SCHEMAS
from tests.k8s.schemas import check_core, check_custom, crd_schema

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="there is no kubectl, which renders the manifests"
)
every_overlay = pytest.mark.parametrize("name", OVERLAYS)

CUSTOM = {"RayService": "ray.io_rayservices.yaml"}
COMPONENTS = ("gcs-fault-tolerance", "ingress", "monitoring", "restricted")

# In a process of its own: importing Ray warns, and warnings are errors here.
CHECK_SERVE = """
import json
import sys
from importlib import import_module

from ray.serve.schema import ServeDeploySchema
from serve.cluster import APPLICATION, DEPLOYMENT

config = ServeDeploySchema.model_validate(json.load(sys.stdin))
(application,) = config.applications
module, name = application.import_path.split(":")
build = getattr(import_module(module), name)
print(application.name == APPLICATION, application.route_prefix, build.__annotations__["settings"])
print({d.name for d in application.deployments} <= {DEPLOYMENT}, config.http_options.port)
"""


@pytest.fixture(scope="module")
def schema(shared: Path) -> Object:
    """KubeRay's own of a RayService."""
    return crd_schema(shared / "crd" / CUSTOM["RayService"])


@pytest.fixture
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Object, ...]:
    """The overlay for CPUs with every component."""
    folder = tmp_path_factory.mktemp("all")
    above = "../" * len(folder.parts[1:])
    k8s = f"{above}{str(ROOT / 'k8s').lstrip('/')}"
    components = "".join(
        f"\n- {k8s}/components/{name}" for name in COMPONENTS if name != "restricted"
    )
    (folder / "kustomization.yaml").write_text(
        "apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization\n"
        f"resources:\n- {k8s}/overlays/cpu\ncomponents:{components}\n"
    )
    return render(folder)


@every_overlay
def test_kubernetes_takes_every_object(name: str) -> None:
    """By Kubernetes' own schemas; a field that it does not know is an error."""
    core = [found for found in overlay(name) if found["kind"] not in CUSTOM]
    for found in core:
        check_core(found)
    kinds = {found["kind"] for found in core}

    assert kinds >= {"ConfigMap", "NetworkPolicy", "PodDisruptionBudget", "Role", "ServiceAccount"}


@every_overlay
def test_kuberay_takes_the_service(name: str, schema: Object) -> None:
    """By its CRD's schema, made strict: an unknown field is an error."""
    check_custom(ray_service(overlay(name)), schema)


def test_every_component_renders_and_is_taken(
    everything: tuple[Object, ...], schema: Object
) -> None:
    """All of them at once."""
    custom = SCHEMAS | {"RayService": schema}
    for found in everything:
        if found["kind"] in custom:
            check_custom(found, custom[found["kind"]])
        else:
            check_core(found)
    cluster = ray_service(everything)["spec"]["rayClusterConfig"]

    assert {path.name for path in (ROOT / "k8s" / "components").iterdir()} == set(COMPONENTS)
    assert cluster["gcsFaultToleranceOptions"]["redisAddress"]
    assert {found["kind"] for found in everything} >= {"Ingress", "Namespace", *SCHEMAS}


def test_one_door_is_scraped_where_and_as_it_answers(everything: tuple[Object, ...]) -> None:
    """The head's, by its port and labels; `/metrics` is the fleet's, so no second one."""
    (monitor,) = (found["spec"] for found in everything if found["kind"] == "PodMonitor")
    (endpoint,) = monitor["podMetricsEndpoints"]
    labels = monitor["selector"]["matchLabels"]
    head = pods(everything)["head"]
    ports = containers(everything)["head"]["ports"]
    documented = (ROOT / "docs" / "operations" / "install.md").read_text()

    assert labels.pop("ray.io/node-type") == "head"  # KubeRay's own label
    assert labels.items() <= head["metadata"]["labels"].items()
    assert endpoint["port"] in {port["name"] for port in ports if port["containerPort"] == 8000}
    assert ("GET", endpoint["path"]) in OPERATIONS
    secret = endpoint["authorization"]["credentials"]
    assert f"generic {secret['name']} " in documented
    assert f"--from-literal={secret['key']}=" in documented


def test_a_misspelt_field_is_seen(schema: Object) -> None:
    """In any depth, of either schema."""
    service, policy = map(deepcopy, (ray_service(overlay("cpu")), overlay("cpu")[-2]))
    workers = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    workers["template"]["spec"]["containers"][0]["enviroment"] = []
    policy["spec"]["ingres"] = []

    with pytest.raises(jsonschema.ValidationError, match="enviroment"):
        check_custom(service, schema)
    with pytest.raises(kubernetes_validate.ValidationError, match="ingres"):
        check_core(policy)


@every_overlay
def test_ray_serve_takes_the_configuration_and_finds_the_application(name: str) -> None:
    """By Ray's own schema; the import path, the names and the port are the program's."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK_SERVE],
        input=json.dumps(serve_config(overlay(name))),
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "True / <class 'serve.settings.ServeSettings'>",
        f"True {variables(overlay(name))['HEADSTOCK_PORT']}",
    ]


@every_overlay
def test_the_settings_of_the_pods_are_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are read as in a pod, where nothing else is set; a wrong one would be an error."""
    for setting in ServeSettings.model_fields:
        monkeypatch.delenv(f"{PREFIX}{setting.upper()}", raising=False)
    head = containers(overlay(name))["head"]
    secret = {variable["name"]: 32 * "x" for variable in head["env"]}
    for variable, value in (variables(overlay(name)) | secret).items():
        monkeypatch.setenv(variable, value)
    settings = load_settings()
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}

    assert settings.host == "0.0.0.0"  # noqa: S104 (a pod's own network)
    assert settings.needs_tokens
    assert settings.admin_sha256
    assert ports["serve"] == settings.port == serve_config(overlay(name))["http_options"]["port"]


@cache
def ray_says() -> str:
    """The text of Ray's Python files, and the names of its settings in C++."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    texts = [path.read_text(errors="replace") for path in folder.rglob("*.py")]
    return "\n".join(texts) + (folder / "_raylet.so").read_bytes().decode("latin-1")


@every_overlay
def test_every_variable_for_ray_is_one_that_ray_reads(name: str) -> None:
    """A misspelt one would be ignored without a word."""
    names = [name for name in variables(overlay(name)) if name.startswith("RAY_")]
    # Settings of Ray's C++ are read by their names with this prefix.
    unknown = [n for n in names if n not in ray_says() and n.removeprefix("RAY_") not in ray_says()]

    assert len(names) > 15
    assert unknown == []


@every_overlay
def test_pods_run_ray_with_the_switches_of_one_machine(name: str) -> None:
    """What `headstock serve` sets for every cluster is set here too, to the same values."""
    switches = runtime.SWITCHES | runtime.PROXY_SWITCHES
    values = variables(overlay(name))

    assert {switch: values.get(switch) for switch in switches} == {
        switch: str(value) for switch, value in switches.items()
    }


@every_overlay
def test_what_the_manifests_take_from_the_image_is_in_it(name: str) -> None:
    """The launcher is where the Dockerfile's step writes it; versions are the project's."""
    stages = read_stages()
    (launcher,) = [s.text for s in stages["install"].of("RUN") if "write_launcher" in s.text]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    image = containers(overlay(name))["head"]["image"]
    version = ray_service(overlay(name))["spec"]["rayClusterConfig"]["rayVersion"]
    path = variables(overlay(name))["RAY_SERVE_HAPROXY_BINARY_PATH"]

    assert f"write_launcher(Path('{path.removesuffix('/haproxy')}'))" in launcher
    assert image.rpartition(":")[2].removesuffix("-cuda") == project["version"]
    assert f"ray[serve]=={version}" in project["dependencies"]


@every_overlay
def test_every_path_that_is_probed_is_a_route(name: str) -> None:
    """Of the service, of Ray's dashboard or of its agent, at the port where that listens."""
    for container in containers(overlay(name)).values():
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("readinessProbe", "livenessProbe"):
            asked = container[probe]["httpGet"]
            port = ports.get(asked["port"], asked["port"])
            if port == int(variables(overlay(name))["HEADSTOCK_PORT"]):
                assert ("GET", asked["path"]) in OPERATIONS
            else:
                assert f'@routes.get("{asked["path"]}")' in ray_says()
                assert re.search(rf"DEFAULT_DASHBOARD_(AGENT_LISTEN_)?PORT = {port}\b", ray_says())


def test_callers_find_the_front_door_that_kuberay_makes(everything: tuple[Object, ...]) -> None:
    """Its name follows from the service's, its port's name from the container's; with TLS."""
    (ingress,) = [found["spec"] for found in everything if found["kind"] == "Ingress"]
    (rule,) = ingress["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]

    assert backend == {
        "name": f"{ray_service(everything)['metadata']['name']}-serve-svc",
        "port": {"name": "serve"},
    }
    assert [entry["hosts"] for entry in ingress["tls"]] == [[rule["host"]]]
