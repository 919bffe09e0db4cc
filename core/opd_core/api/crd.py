"""`python -m opd_core.api.crd`: the CustomResourceDefinition from the models, so that cluster and `opd validate` agree.

A structural schema: no references, nothing but what an API server prunes, defaults and checks by itself.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from opd_core.api import cel, cel_rule
from opd_core.api.status import Status
from opd_core.api.types import API_VERSION, KIND, Spec

GROUP, VERSION = API_VERSION.split("/")
PLURAL = "opddistillations"
FILE = Path("crds") / f"{GROUP}_{PLURAL}.yaml"

_RULES = "x-kubernetes-validations"
_CONDITION = ".status.conditions[?(@.type=='{}')].{}"
_KEPT = (
    *("description", "type", "format", "default", "enum", "minimum", "maximum", "x-kubernetes-int-or-string"),
    *("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
)
# (name, type, path, priority, description)
_COLUMNS = [
    ("Phase", "string", ".status.phase", 0, "What it is doing."),
    ("Progress", "integer", ".status.progress.percentage", 0, "Rounds done, in percent."),
    ("Teachers", "string", ".status.teachersReady", 0, "Teacher servers that answer, of all."),
    ("Workers", "string", ".status.workersReady", 0, "Training pods that run, of all."),
    ("Score", "string", ".status.student.summary", 0, "Share of each teacher's gain that the student kept."),
    ("URL", "string", ".status.endpoint.url", 0, "Where the image API answers."),
    ("Age", "date", ".metadata.creationTimestamp", 0, "Since the object was made."),
    ("Restarts", "integer", ".status.restarts", 1, "Restarts after failures."),
    ("Student", "string", ".status.student.digest", 1, "Digest of the newest student."),
    ("Reason", "string", _CONDITION.format("Ready", "reason"), 1, "Why it is Ready or not."),
]


def crd() -> dict[str, Any]:
    """The manifest."""
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema()},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.endpoint.replicas",
                "statusReplicasPath": ".status.endpoint.replicas",
                "labelSelectorPath": ".status.endpoint.selector",
            },
        },
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path, "description": description}
            | ({"priority": priority} if priority else {})
            for name, kind, path, priority, description in _COLUMNS
        ],
    }
    names = {
        "kind": KIND,
        "listKind": f"{KIND}List",
        "plural": PLURAL,
        "singular": KIND.lower(),
        "shortNames": ["opd", "opds"],
        "categories": ["all", "ml"],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {"group": GROUP, "scope": "Namespaced", "names": names, "versions": [version]},
    }


def schema() -> dict[str, Any]:
    """Structural schema of the whole object."""
    status = _model(Status)
    status["properties"]["conditions"] |= {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    whole: dict[str, Any] = {
        "description": "A student distilled from several teachers of a text-to-image model, and its endpoint.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": f"{API_VERSION}."},
            "kind": {"type": "string", "description": f"{KIND}."},
            # Bounds the cost of the rule on the name; the API server has this limit anyway.
            "metadata": {"type": "object", "properties": {"name": {"type": "string", "maxLength": 253}}},
            "spec": {"description": "What is wanted.", **_model(Spec)},
            # The default: of an object that no operator has seen, or kstatus (Flux, kpt, Helm) would call it current.
            "status": {
                "description": "What is so; only the operator writes it.",
                "default": {"observedGeneration": -1},
                **status,
            },
        },
    }
    for rule in cel.RULES:
        _node(whole, rule.at).setdefault(_RULES, []).append(rule.validation())
    return whole


def _node(whole: dict[str, Any], path: str) -> dict[str, Any]:
    """The node of a path such as spec.teachers[]; "" is the root."""
    node = whole
    for part in path.split(".") if path else []:
        node = node["properties"][part.removesuffix("[]")]
        node = node["items"] if part.endswith("[]") else node
    return node


def _model(model: type[BaseModel]) -> dict[str, Any]:
    content = model.model_json_schema(by_alias=True)
    return _structural(content, content.get("$defs", {}))


def _structural(part: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """One node of pydantic's schema in the terms of an API server."""
    if "$ref" in part:
        target = definitions[part["$ref"].rsplit("/", 1)[1]]
        return _structural({**target, **{key: value for key, value in part.items() if key != "$ref"}}, definitions)
    if "anyOf" in part:  # X | None: absence stands for None
        (other,) = (item for item in part["anyOf"] if item.get("type") != "null")
        around = {key: value for key, value in part.items() if key not in ("anyOf", "default")}
        found = _structural({**other, **around}, definitions)
        # As a whole, or server-side apply leaves null where its last key goes (kubernetes/kubernetes#135841).
        return {**found, "x-kubernetes-map-type": "atomic"} if found["type"] == "object" else found
    found = {key: part[key] for key in _KEPT if key in part}
    if part.get("x-kubernetes-int-or-string"):
        del found["type"]
    if "pattern" in part:  # as a rule, whose sentence people understand
        if "type" in found:
            found[_RULES] = [cel_rule.pattern(part["pattern"])]
        else:
            found |= {"pattern": part["pattern"], _RULES: [cel_rule.quantity()]}
    if "patternProperties" in part:
        ((form, values),) = part["patternProperties"].items()
        found[_RULES] = cel_rule.keys(part["propertyNames"]["maxLength"], form)
        found["additionalProperties"] = _structural(values, definitions)
    if "const" in part:
        found["enum"] = [part["const"]]
    for side in ("Minimum", "Maximum"):
        if f"exclusive{side}" in part:
            found |= {side.lower(): part[f"exclusive{side}"], f"exclusive{side}": True}
    if part.get("type") == "integer":
        found["format"] = "int64"
    if part.get("type") == "array":
        found |= {"items": _structural(part["items"], definitions), "x-kubernetes-list-type": "atomic"}
    if isinstance(part.get("additionalProperties"), Mapping):
        found["additionalProperties"] = _structural(part["additionalProperties"], definitions)
    if "properties" in part:
        found["properties"] = {name: _property(part, name, definitions) for name in part["properties"]}
        if part.get("required"):
            found["required"] = part["required"]
    return found


def _property(parent: Mapping[str, Any], name: str, definitions: Mapping[str, Any]) -> dict[str, Any]:
    found = _structural(parent["properties"][name], definitions)
    required, optional = name in parent.get("required", []), "anyOf" in parent["properties"][name]
    if not required and not optional and "default" not in found:
        # A part that may be left out is there with its own defaults, as in pydantic. They are written out, because an
        # API server tests the default itself against the rules.
        parts = found.get("properties", {}).items()
        found["default"] = [] if found["type"] == "array" else {key: p["default"] for key, p in parts if "default" in p}
    return found


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True  # a default is written out wherever it stands


def manifest() -> str:
    """The file's content."""
    header = "# Generated by `make generate` from core/opd_core/api: change it there.\n"
    return header + yaml.dump(crd(), Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(manifest())
