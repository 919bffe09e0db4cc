"""The rules of pods, in CEL."""

import json

from opd_core.api import sentences
from opd_core.api.cel_rule import Cel, quoted
from opd_core.api.rules import RESERVED_PATHS, RESOURCES


def _amount(quantity: str) -> str:
    return f"(type({quantity}) == int ? double({quantity}) : quantity({quantity}).asApproximateFloat())"


_NAMED = json.dumps(RESOURCES)
_DEVICE = "!k.contains('/') || (k in self.limits && int(self.requests[k]) == int(self.limits[k]))"
_ABOVE = f"k in self.requests && k in self.limits && {_amount('self.requests[k]')} > {_amount('self.limits[k]')}"


_SOURCES = ("claim", "secret", "configMap")
_FREE = " && ".join(
    f"!(self.mountPath + '/').startsWith('{taken}/') && !'{taken}/'.startsWith(self.mountPath + '/')"
    for taken in RESERVED_PATHS
)


def _volumes(at: str) -> list[Cel]:
    twice = "self.map(v, self.exists_one(o, o.mountPath == v.mountPath)).lastIndexOf(false)"
    given = " + ".join(f"(has(self.{source}) ? ['{source}'] : [])" for source in _SOURCES)
    return [
        Cel(f"{at}[]", f"({given}).size() == 1", sentences.ONE_SOURCE, given),
        Cel(f"{at}[]", _FREE, sentences.RESERVED_PATH, quoted("self.mountPath"), "mountPath"),
        Cel(
            at,
            "self.all(v, self.exists_one(o, o.mountPath == v.mountPath))",
            sentences.PATH_TWICE,
            quoted(f"self[{twice}].mountPath"),
            words={"index": twice},
            where=f"{at}[{{index}}].mountPath",
        ),
    ]


def _affinity(at: str) -> list[Cel]:
    required, preferred = (f"{kind}DuringSchedulingIgnoredDuringExecution" for kind in ("required", "preferred"))
    nodes = (f"{required}.nodeSelectorTerms[]", f"{preferred}[].preference")
    pods = (f"{required}[].labelSelector", f"{preferred}[].podAffinityTerm.labelSelector")
    places = [f"{at}.nodeAffinity.{place}" for place in nodes]
    places += [f"{at}.{kind}.{place}" for kind in ("podAffinity", "podAntiAffinity") for place in pods]
    rules = (
        ("!(self.operator in ['Exists', 'DoesNotExist']) || self.values.size() == 0", sentences.NO_VALUES),
        ("!(self.operator in ['In', 'NotIn']) || self.values.size() > 0", sentences.SOME_VALUES),
        (
            "!(self.operator in ['Gt', 'Lt']) || (self.values.size() == 1 && self.values[0].matches('^[0-9]+$'))",
            sentences.ONE_NUMBER,
        ),
    )
    return [
        Cel(f"{place}.matchExpressions[]", holds, sentence, "self.values", "values", {"operator": "self.operator"})
        for place in places
        for holds, sentence in rules
        if sentence is not sentences.ONE_NUMBER or ".nodeAffinity." in place
    ]


def pod(at: str) -> list[Cel]:
    twice = "self.env.map(v, self.env.exists_one(o, o.name == v.name)).lastIndexOf(false)"
    item = f"{at}.tolerations[]"
    known = ", ".join(RESOURCES)
    return [
        Cel(
            at,
            "self.env.all(v, self.env.exists_one(o, o.name == v.name))",
            sentences.VARIABLE_TWICE,
            quoted(f"self.env[{twice}].name"),
            "env",
            {"index": twice},
            f"{at}.env[{{index}}].name",
        ),
        Cel(
            f"{at}.env[]",
            "self.value == '' || !has(self.secretKeyRef)",
            sentences.TWO_VALUES,
            quoted("self.value"),
            "value",
        ),
        *_volumes(f"{at}.volumes"),
        *_affinity(f"{at}.affinity"),
        Cel(
            item,
            "self.operator != 'Exists' || self.value == ''",
            sentences.EXISTS_VALUE,
            quoted("self.value"),
            "value",
        ),
        Cel(item, "self.operator != 'Equal' || self.key != ''", sentences.NO_KEY, quoted("self.key"), "key"),
        Cel(
            item,
            "!has(self.tolerationSeconds) || self.effect == 'NoExecute'",
            sentences.NO_WAIT,
            "self.tolerationSeconds",
            "tolerationSeconds",
        ),
        *(
            Cel(
                f"{at}.resources.{kind}",
                f"self.all(k, k in {_NAMED} || k.contains('/'))",
                sentences.NO_RESOURCE,
                f"self.filter(k, !(k in {_NAMED}) && !k.contains('/'))",
                words={"known": json.dumps(known)},
            )
            for kind in ("requests", "limits")
        ),
        Cel(
            f"{at}.resources",
            f"self.requests.all(k, {_DEVICE})",
            sentences.DEVICE,
            f"self.requests.filter(k, !({_DEVICE}))",
            "requests",
        ),
        Cel(
            f"{at}.resources",
            f"{_NAMED}.all(k, !({_ABOVE}))",
            sentences.ABOVE_LIMIT,
            f"{_NAMED}.filter(k, {_ABOVE})",
            "requests",
        ),
    ]
