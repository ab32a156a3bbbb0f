"""What every deployment has to keep to, beyond what schemas say: each rule names what breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from serve.settings import NUM_REPLICAS
from tests.image.dockerfile import read_stages
from tests.k8s.manifests import Object, containers, of_kind, pods, ray_service, variables

WRITABLE = {"/tmp", "/store"}  # noqa: S108 (a volume of the pod's own)
SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|CREDENTIAL|_KEY\b", re.IGNORECASE)
NO_SECRETS = {"RAY_AUTH_MODE"}
OPERATOR = {"kubernetes.io/metadata.name": "kuberay-system"}
STOP_S = 10  # for Ray's own end, after preStop

Objects = tuple[Object, ...]
Rule = Callable[[Objects], Iterator[str]]


def runs_without_rights(objects: Objects) -> Iterator[str]:
    """The image's user, in a pod that shares nothing with its node."""
    user, _, group = read_stages()["serving"].of("USER")[-1].text.partition(":")
    for name, pod in pods(objects).items():
        context = pod["spec"].get("securityContext", {})
        if not context.get("runAsNonRoot"):
            yield f"{name} may run as root"
        if (context.get("runAsUser"), context.get("runAsGroup")) != (int(user), int(group)):
            yield f"{name} runs as another user than the image's"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name} has no seccomp profile"
        if any(pod["spec"].get(shared) for shared in ("hostNetwork", "hostPID", "hostIPC")):
            yield f"{name} shares the node's namespaces"
        if any("hostPath" in volume for volume in pod["spec"]["volumes"]):
            yield f"{name} mounts a folder of its node"


def is_confined(objects: Objects) -> Iterator[str]:
    """No way to more rights, and nothing writable but what is mounted for it."""
    for name, container in _with_autoscaler(objects).items():
        context = container.get("securityContext", {})
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may get more rights"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name} keeps capabilities"
        if context.get("readOnlyRootFilesystem") is not True or context.get("privileged"):
            yield f"{name} may write to its root file system"
        for mount in container["volumeMounts"]:
            if mount["mountPath"] not in WRITABLE:
                yield f"{name} mounts {mount['mountPath']}"


def has_limits(objects: Objects) -> Iterator[str]:
    """Memory is asked for as it is limited, so that no node is overbooked."""
    for name, container in _with_autoscaler(objects).items():
        asked, most = (container["resources"].get(kind, {}) for kind in ("requests", "limits"))
        if not {"cpu", "memory"} <= asked.keys() & most.keys():
            yield f"{name} has no limits"
        if any(asked.get(kind) != most.get(kind) for kind in ("memory", "nvidia.com/gpu")):
            yield f"{name} is limited to other memory or GPUs than it asks for"
    for name, pod in pods(objects).items():
        for volume in pod["spec"]["volumes"]:
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{name} may fill its node's disk"


def is_probed(objects: Objects) -> Iterator[str]:
    """Readiness and liveness of every container."""
    for name, container in containers(objects).items():
        for probe in ("readinessProbe", "livenessProbe"):
            if "httpGet" not in container.get(probe, {}):
                yield f"{name} has no {probe}"


def has_exact_images(objects: Objects) -> Iterator[str]:
    """A tag that is a version, the same for head and workers."""
    images = {container["image"] for container in containers(objects).values()}
    if len(images) != 1:
        yield f"several images: {images}"
    for image in images:
        if not re.fullmatch(r"\S+:\d+\.\d+\.\d+(-cuda)?", image):
            yield f"{image} is not of one version"


def has_no_secret_in_clear(objects: Objects) -> Iterator[str]:
    """Secrets are named, and made by who has them."""
    for found in of_kind(objects, "Secret"):
        yield f"Secret {found['metadata']['name']} is written out"
    for name in variables(objects).keys() - NO_SECRETS:
        if SECRET_NAME.search(name):
            yield f"{name} is in a ConfigMap"
    for group, container in containers(objects).items():
        for variable in container.get("env", []):
            if SECRET_NAME.search(variable["name"]) and "value" in variable:
                yield f"{variable['name']} of {group} is written out"


def ends_in_time(objects: Objects) -> Iterator[str]:
    """Requests end while a worker drains, and it is killed only after it has drained."""
    values = variables(objects)
    request_s = float(values.get("HEADSTOCK_REQUEST_TIMEOUT_S", 30))
    drain_s = float(values["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"])
    pod = pods(objects)["workers"]
    command = containers(objects)["workers"]["lifecycle"]["preStop"]["exec"]["command"][-1]
    (sleep_s,) = map(float, re.findall(r"sleep (\d+)", command))
    (deadline_s,) = map(float, re.findall(r"--deadline-remaining-seconds (\d+)", command))
    if sleep_s < request_s + drain_s:
        yield f"preStop waits {sleep_s} s; a request may take {request_s + drain_s} s"
    if deadline_s > sleep_s:
        yield f"Ray was told {deadline_s} s, and gets {sleep_s} s"
    if pod["spec"]["terminationGracePeriodSeconds"] < sleep_s + STOP_S:
        yield f"the pod is killed {STOP_S} s after preStop's {sleep_s} s, or earlier"
    if ray_service(objects)["spec"]["rayClusterDeletionDelaySeconds"] < request_s + drain_s:
        yield "the old cluster of an upgrade ends before its requests do"


def is_closed(objects: Objects) -> Iterator[str]:
    """All pods are under the policy; the dashboard is the operator's, the client port nobody's."""
    (policy,) = of_kind(objects, "NetworkPolicy")
    chosen = policy["spec"]["podSelector"].get("matchLabels", {})
    for name, pod in pods(objects).items():
        if not chosen.items() <= pod["metadata"]["labels"].items():
            yield f"{name} is under no policy"
    if policy["spec"]["policyTypes"] != ["Ingress"]:
        yield "the policy is not about who comes in"
    for rule in policy["spec"]["ingress"]:
        if rule.get("from") == [{"podSelector": {"matchLabels": chosen}}]:
            continue
        ports = {port["port"] for port in rule.get("ports", [])}
        spaces = [s.get("namespaceSelector", {}).get("matchLabels") for s in rule.get("from", [])]
        if not ports or not rule.get("from"):
            yield "a rule opens every port, or to everybody"
        if not ports <= {8000, 8080} and spaces != [OPERATOR]:
            yield f"ports {ports} are open to {spaces}"
    if ray_service(objects)["spec"]["rayClusterConfig"].get("authOptions") != {"mode": "token"}:
        yield "Ray asks for no token"


def refers_to_what_is_there(objects: Objects) -> Iterator[str]:
    """What is named is made: ConfigMaps, accounts, claims, mounts; for head and workers alike."""
    made = {(found["kind"], found["metadata"]["name"]) for found in objects}
    head, workers = ((c["envFrom"], c["env"]) for c in containers(objects).values())
    if head != workers:
        yield "head and workers read other variables"
    for source in head[0]:
        if "configMapRef" in source and ("ConfigMap", source["configMapRef"]["name"]) not in made:
            yield f"there is no ConfigMap {source['configMapRef']['name']}"
    for name, pod in pods(objects).items():
        spec = pod["spec"]
        if ("ServiceAccount", spec["serviceAccountName"]) not in made:
            yield f"there is no ServiceAccount {spec['serviceAccountName']}"
        if spec.get("enableServiceLinks") is not False:
            yield f"Kubernetes would set HEADSTOCK_* variables in {name}"
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        mounts = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        if volumes.keys() != mounts:
            yield f"{name} mounts {mounts} of {set(volumes)}"
        for volume in volumes.values():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim and ("PersistentVolumeClaim", claim) not in made:
                yield f"there is no claim {claim}"


def moves_one_worker_at_a_time(objects: Objects) -> Iterator[str]:
    """A disruption budget that counts the workers and nothing else."""
    (budget,) = of_kind(objects, "PodDisruptionBudget")
    labels = pods(objects)["workers"]["metadata"]["labels"]
    if budget["spec"].get("maxUnavailable") != 1:
        yield "several workers may be moved at once"
    if budget["spec"]["selector"]["matchLabels"] != labels | {"ray.io/node-type": "worker"}:
        yield "the budget is about other pods"


def gives_the_kubernetes_api_to_the_autoscaler_alone(objects: Objects) -> Iterator[str]:
    """Only a head that has one gets the account's token, and that may do little."""
    has_autoscaler = ray_service(objects)["spec"]["rayClusterConfig"]["enableInTreeAutoscaling"]
    for name, pod in pods(objects).items():
        if pod["spec"].get("automountServiceAccountToken") is not (
            has_autoscaler and name == "head"
        ):
            yield f"{name} has a token it needs not, or lacks one"
    for account in of_kind(objects, "ServiceAccount"):
        if account["automountServiceAccountToken"] is not False:
            yield "pods get a token unless they say otherwise"
    for role in of_kind(objects, "Role"):
        for rule in role["rules"]:
            if {"*", "create", "delete", "update"} & {*rule["verbs"], *rule["resources"]}:
                yield f"the role may {rule['verbs']} {rule['resources']}"


def has_room_for_its_replicas(objects: Objects) -> Iterator[str]:
    """Ray counts a CPU for each replica, and the part of a GPU that is set."""
    (group,) = ray_service(objects)["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    limits = containers(objects)["workers"]["resources"]["limits"]
    values = variables(objects)
    on_one = int(limits["cpu"])
    share = float(values.get("HEADSTOCK_GPUS_PER_REPLICA", 0))
    num_gpus = int(limits.get("nvidia.com/gpu", 0))
    if (values["HEADSTOCK_DEVICE"] == "cuda") != bool(num_gpus and share):
        yield "the device, the GPUs of a pod and the part for each replica do not agree"
    if share:
        on_one = min(on_one, int(num_gpus / share))
        tolerated = pods(objects)["workers"]["spec"].get("tolerations", [])
        if not any(found["key"] == "nvidia.com/gpu" for found in tolerated):
            yield "workers may not go to nodes with GPUs"
    most = values.get("HEADSTOCK_MAX_REPLICAS") or values.get("HEADSTOCK_REPLICAS") or NUM_REPLICAS
    if int(most) > on_one * group["maxReplicas"]:
        yield f"{group['maxReplicas']} workers have room for {on_one} replicas each"
    if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
        yield "fewer or more workers than allowed"


def _with_autoscaler(objects: Objects) -> dict[str, Object]:
    """Every container, and the one that KubeRay puts beside the head's if Ray may ask for pods."""
    cluster = ray_service(objects)["spec"]["rayClusterConfig"]
    beside = (
        {"autoscaler": cluster["autoscalerOptions"]} if cluster["enableInTreeAutoscaling"] else {}
    )
    return containers(objects) | beside


RULES: tuple[Rule, ...] = (
    runs_without_rights,
    is_confined,
    has_limits,
    is_probed,
    has_exact_images,
    has_no_secret_in_clear,
    ends_in_time,
    is_closed,
    refers_to_what_is_there,
    moves_one_worker_at_a_time,
    gives_the_kubernetes_api_to_the_autoscaler_alone,
    has_room_for_its_replicas,
)
