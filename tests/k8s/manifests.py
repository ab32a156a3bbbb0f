"""The manifests as `kubectl kustomize` renders them, and their parts."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import yaml

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ("cpu", "gpu", "local")

Object: TypeAlias = dict[str, Any]


@cache
def render(folder: Path) -> tuple[Object, ...]:
    """Every object of an overlay."""
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def overlay(name: str) -> tuple[Object, ...]:
    """One of the overlays that come with the repository."""
    return render(ROOT / "k8s" / "overlays" / name)


def of_kind(objects: tuple[Object, ...], kind: str) -> list[Object]:
    """Those of one kind."""
    return [found for found in objects if found["kind"] == kind]


def ray_service(objects: tuple[Object, ...]) -> Object:
    """The one RayService."""
    (found,) = of_kind(objects, "RayService")
    return found


def pods(objects: tuple[Object, ...]) -> dict[str, Object]:
    """The pod templates of head and workers, by the group's name."""
    cluster = ray_service(objects)["spec"]["rayClusterConfig"]
    groups = cluster["workerGroupSpecs"]
    return {
        "head": cluster["headGroupSpec"]["template"],
        **{group["groupName"]: group["template"] for group in groups},
    }


def containers(objects: tuple[Object, ...]) -> dict[str, Object]:
    """The one container of each pod."""
    return {
        name: container
        for name, template in pods(objects).items()
        for container in template["spec"]["containers"]
    }


def variables(objects: tuple[Object, ...]) -> dict[str, str]:
    """What the ConfigMaps set in every pod."""
    return {
        name: value
        for found in of_kind(objects, "ConfigMap")
        for name, value in found["data"].items()
    }


def serve_config(objects: tuple[Object, ...]) -> Object:
    """What KubeRay sends to Ray Serve."""
    return yaml.safe_load(ray_service(objects)["spec"]["serveConfigV2"])
