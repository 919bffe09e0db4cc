"""Every field of a spec with values at and around its bounds, of other types and of other forms."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import yaml
from opd_core.api import crd

from tests.operator.live import REPOSITORY

VALID = yaml.safe_load((REPOSITORY / "examples" / "tiny" / "distill.yaml").read_text())

_REQUIRED, _PREFERRED = (f"{kind}DuringSchedulingIgnoredDuringExecution" for kind in ("required", "preferred"))
_GPU = {"key": "gpu", "operator": "In", "values": ["a100", "h100"]}
_NEAR = {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchExpressions": [_GPU]}}

# With every part that can be absent.
FULL = copy.deepcopy(VALID)
FULL["spec"]["endpoint"]["autoscaling"] = {}
FULL["spec"]["endpoint"]["replicas"] = 2
FULL["spec"]["endpoint"]["route"] = {"gateway": "web", "hostnames": ["images.example.com"]}
FULL["spec"]["training"]["microBatchSize"] = 1
FULL["spec"]["rewardServers"] = [{"reward": "tiny-ocr", "urls": ["http://ocr:8500"]}]
FULL["spec"]["training"]["objective"] |= {"trainedSteps": [0, 1], "stepsPerRound": 1}
FULL["spec"]["teachers"][1]["model"] = {"uri": "pvc://models/ocr"}
del FULL["spec"]["teachers"][1]["adapter"]
for _part in ("training", "teacherServing", "endpoint"):
    FULL["spec"][_part]["pod"] = {
        "env": [{"name": "A", "value": "b"}, {"name": "B", "secretKeyRef": {"name": "tokens", "key": "hf"}}],
        "volumes": [{"mountPath": "/models/cache", "claim": "cache", "readOnly": False}],
        "affinity": {
            "nodeAffinity": {
                _REQUIRED: {"nodeSelectorTerms": [{"matchExpressions": [_GPU]}]},
                _PREFERRED: [{"weight": 1, "preference": {"matchExpressions": [_GPU]}}],
            },
            "podAffinity": {_REQUIRED: [_NEAR], _PREFERRED: [{"weight": 100, "podAffinityTerm": _NEAR}]},
            "podAntiAffinity": {_REQUIRED: [_NEAR], _PREFERRED: [{"weight": 100, "podAffinityTerm": _NEAR}]},
        },
        "tolerations": [{"key": "gpu", "effect": "NoExecute", "tolerationSeconds": 5}],
        "resources": {"limits": {"cpu": "2"}, "requests": {"cpu": "500m"}},
        "nodeSelector": {"disk": "ssd"},
    }


_URIS = [
    "pvc://c", "pvc://c/x/", "pvc://c//x", "pvc://C/x", "pvc://c/../x", "hf://a/b@c", "hf://a/b@c/d", "hf://a/b",
    "s3://buc/k", "s3://b", "file:///a", "file://a",
]  # fmt: skip
_seen: set[str] = set()


def leaves(schema: dict[str, Any], path: tuple[Any, ...]) -> Iterator[tuple[tuple[Any, ...], list[Any]]]:
    """Every field, and values at and around its bounds, of other types, of other forms. A part that is there several
    times, description included, is one model of ours, and comes once."""
    kind = schema.get("type", "quantity")
    if kind in ("object", "array"):
        if (whole := json.dumps(schema, sort_keys=True)) in _seen:
            return
        _seen.add(whole)
    if kind == "object" and "properties" in schema:
        yield path, ["text", [], 3]
        for name, part in schema["properties"].items():
            if name == "pod" and path[-1] != "training":
                continue  # the same model again, with another description
            yield from leaves(part, (*path, name))
    elif kind == "object":
        many = {f"k{i}": "1" for i in range(schema["maxProperties"] + 1)}
        yield path, ["text", [], {}, many, {"k" * 253: "1"}, {"k" * 254: "1"}]
        yield from leaves(schema["additionalProperties"], (*path, next(iter(value_at(path)), "k")))
    elif kind == "array":
        item = (value_at(path) or ["x"])[0]
        yield path, ["text", {}, [], [item] * schema["maxItems"], [item] * (schema["maxItems"] + 1), [item, item], [[]]]
        yield from leaves(schema["items"], (*path, 0))
    elif kind == "boolean":
        yield path, [True, False, "true", "yes", 1, 0]
    elif kind in ("integer", "number"):
        bounds = [schema[side] for side in ("minimum", "maximum") if side in schema]
        near = [bound + step for bound in bounds for step in (-1, 0, 1, -0.5, 0.5)]
        yield path, [*near, 0, -1, 1.5, "1", True, 10**30, [1]]
    elif kind == "quantity":
        yield (
            path,
            [
                "1",
                1,
                0,
                -1,
                1.5,
                "1.5",
                ".5",
                "1Ki",
                "1ki",
                "5e3",
                "+1",
                "lots",
                "",
                True,
                "1" * 64,
                "1" * 65,
                "1\n",
                "1e100",
            ],
        )
    elif "enum" in schema:
        yield path, ["", "a", 1, True, [], {}, *schema["enum"], *(value.swapcase() for value in schema["enum"])]
    else:
        longest = schema.get("maxLength", 10)
        text = ["", "a", "A", "a b", "-a", "a-", "a.b", "é", "a\n", "a:b", "sha256:" + "0" * 64, 1, True, [], {}]
        text += ["a" * longest, "a" * (longest + 1), "pvc://c/x"]
        yield path, [*text, *(_URIS if "pvc:" in json.dumps(schema) else [])]


def surroundings(path: tuple[Any, ...]) -> dict[str, Any]:
    """FULL without the pods that a path does not go through: they are more than half of what is checked each time."""
    spec = {
        name: {key: value for key, value in part.items() if key != "pod" or path[1:3] == (name, "pod")}
        if isinstance(part, dict) else part
        for name, part in FULL["spec"].items()
    }  # fmt: skip
    return {**FULL, "spec": spec}


def value_at(path: tuple[Any, ...]) -> Any:
    value: Any = FULL
    for part in path:
        value = value[part] if isinstance(part, int) else value.get(part, {})
    return value


SPEC = crd.schema()["properties"]["spec"]
FIELDS = [(path, value) for path, values in leaves(SPEC, ("spec",)) for value in values]
