"""Whether an object is what Kubernetes or an operator's CRD takes; unknown fields are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from tests.k8s.manifests import Object

KUBERNETES = "1.32"


def check_core(found: Object) -> None:
    """An object of Kubernetes itself.

    Raises:
        kubernetes_validate.ValidationError: a field is unknown or wrong.
    """
    kubernetes_validate.validate(found, KUBERNETES, strict=True)


def crd_schema(file: Path) -> Object:
    """The schema of a CRD's served version, such that a field it does not name is an error."""
    # A megabyte takes the loader in Python half a minute.
    crd = yaml.load(file.read_text(), Loader=yaml.CSafeLoader)
    (version,) = [v for v in crd["spec"]["versions"] if v["served"] and not v.get("deprecated")]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {
        "type": "object"
    }  # Kubernetes' own, which the CRD leaves out
    return schema


def check_custom(found: Object, schema: Object) -> None:
    """An object of an operator.

    Raises:
        jsonschema.ValidationError: a field is unknown or wrong.
    """
    jsonschema.validate(found, schema)


def strict(schema: Any) -> Any:
    """A schema that refuses what it does not name, and knows numbers that may be text."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(part) for key, part in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    names_all = isinstance(schema.get("properties"), dict) and schema.get("type") == "object"
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if names_all and not is_open:
        made["additionalProperties"] = False
    return made
