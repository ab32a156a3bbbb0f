"""The overlays keep every rule, and every rule sees what would break it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from tests.k8s import policy
from tests.k8s.manifests import OVERLAYS, Object, containers, of_kind, overlay, pods, ray_service

pytestmark = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="there is no kubectl, which renders the manifests"
)

Objects = tuple[Object, ...]


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("rule", policy.RULES)
def test_every_overlay_keeps_every_rule(rule: policy.Rule, name: str) -> None:
    """As rendered."""
    assert list(rule(overlay(name))) == []


def head(objects: Objects) -> Object:
    """The head's container."""
    return containers(objects)["head"]


def workers(objects: Objects) -> Object:
    """The workers' container."""
    return containers(objects)["workers"]


def spec(objects: Objects) -> Object:
    """The workers' pod."""
    return pods(objects)["workers"]["spec"]


def cluster(objects: Objects) -> Object:
    """What KubeRay makes a cluster of."""
    return ray_service(objects)["spec"]["rayClusterConfig"]


def settings(objects: Objects) -> Object:
    """The service's own variables."""
    return next(m["data"] for m in of_kind(objects, "ConfigMap") if "HEADSTOCK_STORE" in m["data"])


def one(objects: Objects, kind: str) -> Object:
    """The one object of a kind."""
    return of_kind(objects, kind)[0]["spec"]


def rules(objects: Objects) -> list[Any]:
    """Who may come in."""
    return one(objects, "NetworkPolicy")["ingress"]


def stop(objects: Objects) -> list[str]:
    """The workers' preStop."""
    return workers(objects)["lifecycle"]["preStop"]["exec"]["command"]


DRAIN = "ray drain-node --deadline-remaining-seconds {}; sleep {}; ray stop"
EVERYWHERE = {"ports": [{"port": 8000}]}
NEIGHBOURS: list[Object] = [{"podSelector": {}}]
DASHBOARD = {"from": NEIGHBOURS, "ports": [{"port": 8265}]}
CLIENT = {"from": NEIGHBOURS, "ports": [{"port": 10001}]}
SECRET = {"kind": "Secret", "metadata": {"name": "s"}, "stringData": {"password": "x"}}
IN_CLEAR = {"name": "HEADSTOCK_ADMIN_TOKEN", "value": "x"}

BREAKS: tuple[tuple[policy.Rule, Callable[[Objects], object]], ...] = (
    (policy.runs_without_rights, lambda o: spec(o)["securityContext"].pop("runAsNonRoot")),
    (policy.runs_without_rights, lambda o: spec(o)["securityContext"].update(runAsUser=0)),
    (policy.runs_without_rights, lambda o: spec(o)["securityContext"].pop("seccompProfile")),
    (policy.runs_without_rights, lambda o: spec(o).update(hostNetwork=True)),
    (policy.runs_without_rights, lambda o: spec(o)["volumes"].append({"hostPath": {}})),
    (policy.is_confined, lambda o: head(o).pop("securityContext")),
    (policy.is_confined, lambda o: head(o)["securityContext"].pop("capabilities")),
    (
        policy.is_confined,
        lambda o: workers(o)["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    (
        policy.is_confined,
        lambda o: cluster(o)["autoscalerOptions"].pop("securityContext"),
    ),
    (policy.is_confined, lambda o: head(o)["volumeMounts"].append({"mountPath": "/etc"})),
    (policy.has_limits, lambda o: head(o)["resources"].pop("limits")),
    (policy.has_limits, lambda o: workers(o)["resources"]["requests"].update(memory="1Gi")),
    (policy.has_limits, lambda o: cluster(o)["autoscalerOptions"]["resources"].pop("limits")),
    (policy.has_limits, lambda o: spec(o)["volumes"].append({"name": "x", "emptyDir": {}})),
    (policy.is_probed, lambda o: workers(o).pop("readinessProbe")),
    (policy.is_probed, lambda o: head(o).pop("livenessProbe")),
    (policy.has_exact_images, lambda o: head(o).update(image="headstock:latest")),
    (policy.has_exact_images, lambda o: [c.update(image="h") for c in containers(o).values()]),
    (policy.has_no_secret_in_clear, lambda o: workers(o)["env"].append(IN_CLEAR)),
    (policy.has_no_secret_in_clear, lambda o: settings(o).update({"HEADSTOCK_ADMIN_TOKEN": "x"})),
    (policy.has_no_secret_in_clear, lambda o: settings(o).update({"AWS_SECRET_ACCESS_KEY": "x"})),
    (policy.ends_in_time, lambda o: spec(o).update(terminationGracePeriodSeconds=50)),
    (policy.ends_in_time, lambda o: settings(o).update(HEADSTOCK_REQUEST_TIMEOUT_S="60")),
    (policy.ends_in_time, lambda o: stop(o).__setitem__(-1, DRAIN.format(30, 30))),
    (policy.ends_in_time, lambda o: stop(o).__setitem__(-1, DRAIN.format(90, 45))),
    (
        policy.ends_in_time,
        lambda o: ray_service(o)["spec"].update(rayClusterDeletionDelaySeconds=5),
    ),
    (policy.is_closed, lambda o: rules(o).append(DASHBOARD)),
    (policy.is_closed, lambda o: rules(o).append(CLIENT)),
    (policy.is_closed, lambda o: rules(o).append(EVERYWHERE)),
    (policy.is_closed, lambda o: one(o, "NetworkPolicy").update(policyTypes=["Egress"])),
    (policy.is_closed, lambda o: pods(o)["head"]["metadata"]["labels"].clear()),
    (policy.is_closed, lambda o: cluster(o).pop("authOptions")),
    (policy.refers_to_what_is_there, lambda o: workers(o)["envFrom"].pop(0)),
    (policy.refers_to_what_is_there, lambda o: workers(o)["env"].clear()),
    (
        policy.refers_to_what_is_there,
        lambda o: [
            c["envFrom"][0]["configMapRef"].update(name="headstock-ray")
            for c in containers(o).values()
        ],
    ),
    (policy.refers_to_what_is_there, lambda o: spec(o).update(serviceAccountName="other")),
    (policy.refers_to_what_is_there, lambda o: spec(o).pop("enableServiceLinks")),
    (policy.refers_to_what_is_there, lambda o: head(o)["volumeMounts"].pop()),
    (
        policy.moves_one_worker_at_a_time,
        lambda o: one(o, "PodDisruptionBudget").update(maxUnavailable=2),
    ),
    (
        policy.moves_one_worker_at_a_time,
        lambda o: one(o, "PodDisruptionBudget")["selector"]["matchLabels"].clear(),
    ),
    (
        policy.gives_the_kubernetes_api_to_the_autoscaler_alone,
        lambda o: spec(o).update(automountServiceAccountToken=True),
    ),
    (
        policy.gives_the_kubernetes_api_to_the_autoscaler_alone,
        lambda o: of_kind(o, "Role")[0]["rules"][0].update(verbs=["*"]),
    ),
    (
        policy.gives_the_kubernetes_api_to_the_autoscaler_alone,
        lambda o: of_kind(o, "ServiceAccount")[0].update(automountServiceAccountToken=True),
    ),
    (policy.has_room_for_its_replicas, lambda o: settings(o).update(HEADSTOCK_MAX_REPLICAS="33")),
    (policy.has_room_for_its_replicas, lambda o: settings(o).update(HEADSTOCK_DEVICE="cpu")),
    (policy.has_room_for_its_replicas, lambda o: spec(o).pop("tolerations")),
    (
        policy.has_room_for_its_replicas,
        lambda o: settings(o).update(HEADSTOCK_GPUS_PER_REPLICA="1", HEADSTOCK_MAX_REPLICAS="9"),
    ),
)


@pytest.mark.parametrize("number", range(len(BREAKS)))
def test_a_manifest_that_breaks_a_rule_is_seen(number: int) -> None:
    """The overlay for GPUs, with one thing changed."""
    rule, break_it = BREAKS[number]
    objects = deepcopy(overlay("gpu"))
    break_it(objects)

    assert list(rule(objects)) != []


def test_a_secret_that_is_written_out_is_seen() -> None:
    """An object more, not a change."""
    assert list(policy.has_no_secret_in_clear((*overlay("cpu"), SECRET))) != []


def test_a_volume_that_nobody_claimed_is_seen() -> None:
    """Of the overlay that has one."""
    objects = tuple(o for o in overlay("local") if o["kind"] != "PersistentVolumeClaim")

    assert list(policy.refers_to_what_is_there(objects)) != []


def test_there_is_a_break_for_every_rule() -> None:
    """A rule that nothing breaks would be no rule."""
    assert {rule for rule, _ in BREAKS} == set(policy.RULES)
