"""What of Prometheus' operator the manifests use, as schemas that take nothing else.

By the CRDs of prometheus-operator 0.91 (`monitoring.coreos.com/v1`), of which these are the part
that is used here.
"""

from __future__ import annotations

from tests.k8s.manifests import Object

NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"}
DURATION = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h))+$"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: Object, **optional: Object) -> Object:
    return {
        "type": "object",
        "properties": required | optional,
        "required": list(required),
        "additionalProperties": False,
    }


def _custom(kind: str, spec: Object) -> Object:
    return _object(
        {
            "apiVersion": {"const": "monitoring.coreos.com/v1"},
            "kind": {"const": kind},
            "metadata": {"type": "object"},
            "spec": spec,
        }
    )


SECRET_KEY = _object({"name": NAME, "key": {"type": "string"}})
ENDPOINT = _object(
    {"port": NAME},
    path={"type": "string", "pattern": "^/"},
    interval=DURATION,
    authorization=_object({"credentials": SECRET_KEY}),
)
ALERT = _object(
    {"alert": {"type": "string"}, "expr": {"type": "string"}},
    **{"for": DURATION, "labels": TEXTS, "annotations": TEXTS},
)
RULES = {"type": "array", "items": ALERT}
SCHEMAS = {
    "PodMonitor": _custom(
        "PodMonitor",
        _object(
            {
                "selector": _object({"matchLabels": TEXTS}),
                "podMetricsEndpoints": {"type": "array", "items": ENDPOINT},
            }
        ),
    ),
    "PrometheusRule": _custom(
        "PrometheusRule",
        _object(
            {"groups": {"type": "array", "items": _object({"name": NAME, "rules": RULES})}},
        ),
    ),
}
