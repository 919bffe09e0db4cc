"""The rules of `rules` for the API server, in CEL, and what may not change once a run has begun.

A rule stands at the lowest node that sees all it needs. Where the API server cannot point at the field itself, an item
of a list, the sentence begins with its path.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from opd_core.api import sentences
from opd_core.api.rules import (
    MATCH_DISTRIBUTIONS,
    NEED_NOISE,
    PIXEL_MULTIPLE,
    POLICY_GRADIENTS,
    RENOISING,
    RESERVED_PATHS,
    RESOURCES,
)
from opd_core.api.sentences import Sentence
from opd_core.api.teachers import FOLDER, trainable_steps
from opd_core.api.types import Sampler


@dataclass(frozen=True)
class Cel:
    """One rule. `got` and `words` are CEL expressions; a rule with `oldSelf` is about a change."""

    at: str
    holds: str
    sentence: Sentence
    got: str
    path: str = ""  # below `at`
    words: Mapping[str, str] = field(default_factory=dict)
    where: str = ""  # template of the whole path, if the API server cannot say it

    def validation(self) -> dict[str, Any]:
        """An entry of x-kubernetes-validations."""
        template = f"{self.sentence.message} (got {{got}}); {self.sentence.remedy}"
        template = f"{self.where}: {template}" if self.where else template
        return {
            "rule": self.holds,
            "messageExpression": _formatted(template, {**self.words, "got": self.got}),
            **({"fieldPath": f".{self.path}"} if self.path else {}),
        }


def _formatted(template: str, words: Mapping[str, str]) -> str:
    """A template as a CEL expression. `format` is cheap for the API server's estimate; a sum of texts is not."""
    text, values = "", []
    for literal, name, _, _ in Formatter().parse(template):
        text += literal.replace("%", "%%")
        if name is not None:
            text += "%s"
            values.append(words[name])
    return f"{json.dumps(text, ensure_ascii=False)}.format([{', '.join(values)}])"


def _quoted(expression: str) -> str:
    return f"strings.quote({expression})"


def pattern(expression: str) -> dict[str, Any]:
    """The rule for text of one form."""
    matches = f"self.matches({json.dumps(expression)})"
    return Cel("", matches, sentences.PATTERNS[expression], _quoted("self")).validation()


def quantity() -> dict[str, Any]:
    """The rule for a number or a number with a unit, in cheaper words than its pattern, which the schema has as well.

    Up to Kubernetes 1.33 no maxLength bounds the estimate of what is x-kubernetes-int-or-string
    (https://github.com/kubernetes/kubernetes/pull/131977), and a pattern over three million characters is too dear.
    """
    text = "isQuantity(self) && !self.startsWith('-') && !self.startsWith('+')"
    sentence = sentences.PATTERNS[sentences.QUANTITY_PATTERN]
    return Cel("", f"type(self) == int ? self >= 0 : {text}", sentence, _quoted("string(self)")).validation()


def keys(length: int, expression: str) -> list[dict[str, Any]]:
    """The rules for the keys of a map, which no schema can bound."""
    longest = f"self.filter(k, k.size() > {length})[0].size()"
    form = f"k.matches({json.dumps(expression)})"
    wrong = f"self.filter(k, k.size() <= {length} && !{form})"
    return [
        Cel("", f"self.all(k, k.size() <= {length})", sentences.LONG_KEY, longest).validation(),
        Cel("", f"{wrong}.size() == 0", sentences.PATTERNS[expression], _quoted(f"{wrong}[0]")).validation(),
    ]


def _samplers(at: str) -> list[Cel]:
    noise = "self.noiseLevel"
    return [
        Cel(at, "self.type != 'ODE' || self.noiseLevel == 0.0", sentences.ODE_NOISE, noise, "noiseLevel"),
        Cel(at, "self.type != 'SDE' || self.noiseLevel > 0.0", sentences.SDE_NO_NOISE, noise, "noiseLevel"),
        Cel(at, "self.type != 'SDE' || self.solver != 'DPM2'", sentences.DPM2_SDE, _quoted("self.solver"), "solver"),
        Cel(
            at,
            f"!(self.solver in {list(RENOISING)}) || self.noiseLevel <= 1.0",
            sentences.TOO_NOISY,
            noise,
            "noiseLevel",
        ),
    ]


def _divisible(side: str) -> Cel:
    pixels, multiple = f"self.{side}", PIXEL_MULTIPLE
    below = f"{pixels} - {pixels} % {multiple}"
    words = {"multiple": f"{multiple}", "below": below, "above": f"{below} + {multiple}"}
    at = "spec.training.resolution"
    return Cel(at, f"{pixels} % {multiple} == 0", sentences.NOT_DIVISIBLE, pixels, side, words)


def _warmup(at: str) -> Cel:
    return Cel(
        at,
        "self.optimizer.schedule != 'Cosine' || self.optimizer.warmupRounds < self.rounds",
        sentences.WARMUP,
        "self.optimizer.warmupRounds",
        "optimizer.warmupRounds",
        {"rounds": "self.rounds"},
    )


_STEPS, _LAST = "self.objective.trainedSteps", "self.sampler.steps - 1"
_WEIGHTS = "self.objective.stepWeights"
_DISTRIBUTIONS = f"(self.method in {[method.value for method in MATCH_DISTRIBUTIONS]})"
_NEEDS_NOISE = f"(self.objective.type in {list(NEED_NOISE)})"
_KL_LAST = (
    f"!{_NEEDS_NOISE} || self.sampler.type != 'SDE' || !(self.sampler.solver in {list(RENOISING)})"
    f" || (has({_STEPS}) && !({_LAST} in {_STEPS})) || (has({_WEIGHTS}) && {_WEIGHTS}[size({_WEIGHTS}) - 1] == 0.0)"
)
_TRAINED = (
    f"(has({_WEIGHTS}) ? size({_WEIGHTS}.filter(w, w > 0.0)) : has({_STEPS}) ? size({_STEPS}) : self.sampler.steps)"
)
_RANKS = "(self.nodes * self.processesPerNode)"
_PER_RANK = f"(self.imagesPerTask / {_RANKS})"
_GATE = "self.evaluation.gate"
_KNOWN_TASK = "self.teachers.exists(t, t.name == g.task)"
_KNOWN_REWARD = "!self.teachers.exists(t, t.name == g.task && !(g.reward in t.rewards))"
_BEGUN = "has(oldSelf.status) && (has(oldSelf.status.begun) || has(oldSelf.status.students))"


def _first(items: str, item: str, holds: str) -> str:
    """Index of the first item for which a rule does not hold. Of truth values: texts would be too dear to compare."""
    return f"{items}.map({item}, {holds}).indexOf(false)"


_TAKEN = "self.map(t, self.exists_one(o, o.name == t.name)).lastIndexOf(false)"
_WRONG_STEP = _first(_STEPS, "x", f"x <= {_LAST}")
_WRONG_TASK = _first(_GATE, "g", _KNOWN_TASK)
_WRONG_REWARD = _first(_GATE, "g", _KNOWN_REWARD)
_WHOLE = "self.teachers.filter(t, has(t.model))"
_SERVED = "self.rewardServers"
_ONES_REWARD = "self.teachers.exists(t, s.reward in t.rewards)"
_NO_ONES_REWARD = _first(_SERVED, "s", _ONES_REWARD)


def _unchanged(path: str, sentence: Sentence) -> Cel:
    new, old = f"self.{path}", f"oldSelf.{path}"
    return Cel("", f"!({_BEGUN}) || {new} == {old}", sentence, _quoted(new), path, {"old": old})


def _amount(quantity: str) -> str:
    return f"(type({quantity}) == int ? double({quantity}) : quantity({quantity}).asApproximateFloat())"


_USUAL_STEPS = trainable_steps(Sampler().steps)  # of teachers that name none, whatever their algorithm
_SAMPLER_STEPS = "(self.sampler.steps > 1 ? self.sampler.steps - 1 : 1)"
_TEACHER_STEPS = f"(!has(self.sampler) ? {_USUAL_STEPS} : {_SAMPLER_STEPS})"
_ALL_RANKS = "(self.training.nodes * self.training.processesPerNode)"
_GROUPS = f"t.training.promptsPerRound / t.training.updatesPerRound * t.training.groupSize % {_ALL_RANKS} == 0"
_WHOLE_GROUPS = f"!has(t.training) || t.training.promptsPerRound % t.training.updatesPerRound != 0 || {_GROUPS}"
_WRONG_GROUP = _first("self.teachers", "t", _WHOLE_GROUPS)
_OWN_REWARD = "w.reward in self.rewards"
_WRONG_OWN = _first("self.training.rewardWeights", "w", _OWN_REWARD)


def _learning(at: str, settings: str, steps: str) -> list[Cel]:
    """The rules of reinforcement learning, at what has a sampler. `settings`: the field there that has the rest, or
    '' where it is the same."""
    own, inside = f"self.{settings}".rstrip("."), f"{settings}." if settings else ""
    none = f"!has(self.{settings}) || " if settings else ""
    nft, kind = f"{own}.algorithm == 'DiffusionNFT'", _quoted("self.sampler.type")
    unsampled = f"{none}!has(self.sampler) || " if not settings else none
    weights = f"{own}.rewardWeights"
    return [
        Cel(
            at,
            f"{unsampled}!({nft}) || self.sampler.type != 'SDE'",
            sentences.NFT_NOISE,
            kind,
            "sampler.type",
        ),
        Cel(
            at,
            f"{unsampled}{nft} || self.sampler.type != 'ODE'",
            sentences.GRPO_ODE,
            kind,
            "sampler.type",
        ),
        Cel(
            at,
            f"{none}!({nft}) || !has({own}.clipRange)",
            sentences.NFT_CLIP,
            f"{own}.clipRange",
            f"{inside}clipRange",
        ),
        Cel(
            at,
            f"{none}!has({own}.stepsPerImage) || {own}.stepsPerImage <= {steps}",
            sentences.FEW_TEACHER_STEPS,
            f"{own}.stepsPerImage",
            f"{inside}stepsPerImage",
            {"steps": steps},
        ),
        Cel(
            at,
            f"{none}{own}.promptsPerRound % {own}.updatesPerRound == 0",
            sentences.UPDATES,
            f"{own}.updatesPerRound",
            f"{inside}updatesPerRound",
            {"prompts": f"{own}.promptsPerRound"},
        ),
        Cel(
            at,
            f"{none}{weights}.all(w, {weights}.exists_one(o, o.reward == w.reward))",
            sentences.REWARD_TWICE,
            f"{weights}.map(w, w.reward)",
            f"{inside}rewardWeights",
        ),
    ]


_LEARNING = "self.training.reinforcement"
_STUDENT_WEIGHTS = f"{_LEARNING}.rewardWeights"
_SHARE = "self.reinforcement.promptsPerRound / self.reinforcement.updatesPerRound * self.reinforcement.groupSize"
_ONES_WEIGHT = "self.teachers.exists(t, w.reward in t.rewards)"
_NO_ONES_WEIGHT = _first(_STUDENT_WEIGHTS, "w", _ONES_WEIGHT)


def _student_reinforcement() -> list[Cel]:
    """The rules of a student that learns from rewards."""
    return [
        Cel(
            "spec.training",
            "has(self.reinforcement) == (self.method == 'RL')",
            sentences.RL_SETTINGS,
            _quoted("self.method"),
            where="spec.training.reinforcement",
        ),
        *_learning("spec.training", "reinforcement", _SAMPLER_STEPS),
        Cel(
            "spec.training",
            "!has(self.reinforcement) || self.reinforcement.promptsPerRound % self.reinforcement.updatesPerRound != 0 "
            f"|| {_SHARE} % {_RANKS} == 0",
            sentences.GROUP_RANKS,
            "self.reinforcement.groupSize",
            "reinforcement.groupSize",
            {"ranks": _RANKS},
        ),
        Cel(
            "spec",
            f"!has({_LEARNING}) || {_STUDENT_WEIGHTS}.all(w, {_ONES_WEIGHT})",
            sentences.NO_ONES_WEIGHT,
            _quoted(f"{_STUDENT_WEIGHTS}[{_NO_ONES_WEIGHT}].reward"),
            "training.reinforcement.rewardWeights",
            {"index": _NO_ONES_WEIGHT},
            "spec.training.reinforcement.rewardWeights[{index}].reward",
        ),
        Cel(
            "spec",
            f"!has({_LEARNING}) || self.teachers.all(t, t.rewards.exists(r, "
            f"!{_STUDENT_WEIGHTS}.exists(w, w.reward == r && w.weight == 0.0)))",
            sentences.NO_TASKS_WEIGHT,
            "0",
            "training.reinforcement.rewardWeights",
        ),
    ]


def _teachers() -> list[Cel]:
    """The rules of teachers that are given or trained."""
    given = " + ".join(f"(has(self.{kind}) ? ['{kind}'] : [])" for kind in ("adapter", "model", "training"))
    at, weights = "spec.teachers[].training", "self.training.rewardWeights"
    return [
        Cel("spec.teachers[]", f"({given}).size() == 1", sentences.GIVEN_OR_MADE, given),
        *_learning(at, "", _TEACHER_STEPS),
        _warmup(at),
        Cel(
            "spec",
            f"self.teachers.all(t, {_WHOLE_GROUPS})",
            sentences.GROUP_RANKS,
            f"self.teachers[{_WRONG_GROUP}].training.groupSize",
            "teachers",
            {"ranks": _ALL_RANKS, "index": _WRONG_GROUP},
            "spec.teachers[{index}].training.groupSize",
        ),
        Cel(
            "spec.teachers[]",
            f"!has(self.training) || {weights}.all(w, {_OWN_REWARD})",
            sentences.NO_OWN_REWARD,
            _quoted(f"{weights}[{_WRONG_OWN}].reward"),
            "training.rewardWeights",
            {"rewards": "self.rewards"},
        ),
        Cel(
            "spec.teachers[]",
            f"!has(self.training) || self.rewards.exists(r, !{weights}.exists(w, w.reward == r && w.weight == 0.0))",
            sentences.NO_REWARD_WEIGHT,
            "0",
            "training.rewardWeights",
        ),
        Cel(
            "spec.student.output",
            f"!self.uri.endsWith('/{FOLDER}') && !self.uri.endsWith('/{FOLDER}/')",
            sentences.TEACHERS_FOLDER,
            _quoted("self.uri"),
            "uri",
        ),
    ]


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
        Cel(f"{at}[]", _FREE, sentences.RESERVED_PATH, _quoted("self.mountPath"), "mountPath"),
        Cel(
            at,
            "self.all(v, self.exists_one(o, o.mountPath == v.mountPath))",
            sentences.PATH_TWICE,
            _quoted(f"self[{twice}].mountPath"),
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


def _pod(at: str) -> list[Cel]:
    twice = "self.env.map(v, self.env.exists_one(o, o.name == v.name)).lastIndexOf(false)"
    item = f"{at}.tolerations[]"
    known = ", ".join(RESOURCES)
    return [
        Cel(
            at,
            "self.env.all(v, self.env.exists_one(o, o.name == v.name))",
            sentences.VARIABLE_TWICE,
            _quoted(f"self.env[{twice}].name"),
            "env",
            {"index": twice},
            f"{at}.env[{{index}}].name",
        ),
        Cel(
            f"{at}.env[]",
            "self.value == '' || !has(self.secretKeyRef)",
            sentences.TWO_VALUES,
            _quoted("self.value"),
            "value",
        ),
        *_volumes(f"{at}.volumes"),
        *_affinity(f"{at}.affinity"),
        Cel(
            item,
            "self.operator != 'Exists' || self.value == ''",
            sentences.EXISTS_VALUE,
            _quoted("self.value"),
            "value",
        ),
        Cel(item, "self.operator != 'Equal' || self.key != ''", sentences.NO_KEY, _quoted("self.key"), "key"),
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


RULES = (
    Cel(
        "",
        f"self.metadata.name.size() <= {sentences.OBJECT_NAME_LENGTH} && "
        f"self.metadata.name.matches({json.dumps(sentences.OBJECT_NAME_PATTERN)})",
        sentences.OBJECT_NAME,
        _quoted("self.metadata.name"),
        where="metadata.name",
    ),
    Cel(
        "spec.teachers",
        "self.all(t, self.exists_one(o, o.name == t.name))",
        sentences.TAKEN,
        _quoted(f"self[{_TAKEN}].name"),
        words={"index": _TAKEN},
        where="spec.teachers[{index}].name",
    ),
    Cel(
        "spec.teachers",
        "self.size() == 0 || self.exists(t, t.weight > 0.0)",
        sentences.NO_WEIGHT,
        "0",
    ),
    Cel(
        "spec.teachers[]",
        "self.rewards.all(r, self.rewards.exists_one(o, o == r))",
        sentences.REWARD_TWICE,
        "self.rewards",
        "rewards",
    ),
    Cel(
        "spec",
        f"{_SERVED}.all(s, {_ONES_REWARD})",
        sentences.NO_ONES_REWARD,
        _quoted(f"{_SERVED}[{_NO_ONES_REWARD}].reward"),
        "rewardServers",
        {"index": _NO_ONES_REWARD},
        "spec.rewardServers[{index}].reward",
    ),
    Cel(
        "spec.rewardServers",
        "self.all(s, self.exists_one(o, o.reward == s.reward))",
        sentences.REWARD_TWICE,
        "self.map(s, s.reward)",
    ),
    _divisible("width"),
    _divisible("height"),
    *_samplers("spec.training.sampler"),
    *_samplers("spec.evaluation.sampler"),
    *_samplers("spec.teachers[].training.sampler"),
    *_teachers(),
    *_student_reinforcement(),
    Cel(
        "spec.training",
        f"!{_NEEDS_NOISE} || self.sampler.type != 'ODE'",
        sentences.KL_ODE,
        _quoted("self.objective.type"),
        "objective.type",
    ),
    Cel(
        "spec.training",
        _KL_LAST,
        sentences.KL_LAST,
        f"has({_STEPS}) ? dyn({_STEPS}) : dyn('nothing')",
        "objective.trainedSteps",
        {"last": _LAST},
    ),
    Cel(
        "spec.training",
        f"!has({_STEPS}) || {_STEPS}.all(x, x <= {_LAST})",
        sentences.NO_STEP,
        f"{_STEPS}[{_WRONG_STEP}]",
        "objective.trainedSteps",
        {"last": _LAST, "index": _WRONG_STEP},
        "spec.training.objective.trainedSteps[{index}]",
    ),
    Cel(
        "spec.training.objective",
        "!has(self.trainedSteps) || !has(self.stepWeights)",
        sentences.STEPS_TWICE,
        "self.trainedSteps",
        "stepWeights",
    ),
    Cel(
        "spec.training",
        f"!has({_WEIGHTS}) || size({_WEIGHTS}) == self.sampler.steps",
        sentences.STEP_WEIGHTS,
        f"size({_WEIGHTS})",
        "objective.stepWeights",
        {"steps": "self.sampler.steps"},
    ),
    Cel(
        "spec.training.objective",
        "!has(self.stepWeights) || self.stepWeights.exists(w, w > 0.0)",
        sentences.NO_STEP_WEIGHT,
        "0",
        "stepWeights",
    ),
    Cel(
        "spec.training",
        f"!has(self.objective.stepsPerRound) || self.objective.stepsPerRound <= {_TRAINED}",
        sentences.FEW_STEPS,
        "self.objective.stepsPerRound",
        "objective.stepsPerRound",
        {"trained": _TRAINED},
    ),
    Cel(
        "spec.training.objective",
        f"!self.selfNormalized || !(self.type in {list(POLICY_GRADIENTS)})",
        sentences.NOT_NORMALIZED,
        "self.selfNormalized",
        "selfNormalized",
    ),
    Cel(
        "spec.student",
        "!self.initFromTeachers || !has(self.initFrom) || self.initFrom == ''",
        sentences.TWO_STARTS,
        "self.initFromTeachers",
        "initFromTeachers",
    ),
    Cel(
        "spec",
        f"!self.student.initFromTeachers || self.teachers.size() > 1 || {_WHOLE}.size() > 0",
        sentences.NO_MEAN,
        "self.student.initFromTeachers",
        "student.initFromTeachers",
    ),
    Cel(
        "spec",
        f"!self.student.initFromTeachers || {_WHOLE}.size() == 0",
        sentences.NO_LORA,
        "self.student.initFromTeachers",
        "student.initFromTeachers",
        {"teacher": f"{_WHOLE}[0].name"},
    ),
    Cel(
        "spec",
        f"self.training.objective.extrapolation == 1.0 || {_WHOLE}.size() == 0",
        sentences.NO_BASE,
        "self.training.objective.extrapolation",
        "training.objective.extrapolation",
        {"teacher": f"{_WHOLE}[0].name"},
    ),
    Cel(
        "spec.training",
        "self.method != 'SFT' || self.sampler.type != 'SDE'",
        sentences.SFT_SDE,
        _quoted("self.sampler.type"),
        "sampler.type",
    ),
    Cel(
        "spec.training",
        f"!{_DISTRIBUTIONS} || self.objective.type == 'X0'",
        sentences.DMD_X0,
        _quoted("self.objective.type"),
        "objective.type",
    ),
    Cel(
        "spec.training",
        f"!{_DISTRIBUTIONS} || !self.objective.selfNormalized",
        sentences.DMD_NORMALIZED,
        "self.objective.selfNormalized",
        "objective.selfNormalized",
    ),
    Cel(
        "spec.training",
        f"!has(self.fakeScore) || {_DISTRIBUTIONS}",
        sentences.NO_FAKE_SCORE,
        _quoted("self.method"),
        "fakeScore",
    ),
    Cel(
        "spec.training",
        f"self.method == 'RL' || self.imagesPerTask % {_RANKS} == 0",
        sentences.RANKS,
        "self.imagesPerTask",
        "imagesPerTask",
        {"ranks": _RANKS},
    ),
    Cel(
        "spec.training",
        f"self.method == 'RL' || !has(self.microBatchSize) || self.imagesPerTask % {_RANKS} != 0 "
        f"|| {_PER_RANK} % self.microBatchSize == 0",
        sentences.MICRO_BATCH,
        "self.microBatchSize",
        "microBatchSize",
        {"images": _PER_RANK},
    ),
    _warmup("spec.training"),
    Cel(
        "spec",
        f"{_GATE}.all(g, {_KNOWN_TASK})",
        sentences.NO_TASK,
        _quoted(f"{_GATE}[{_WRONG_TASK}].task"),
        "evaluation.gate",
        {"tasks": "self.teachers.map(t, t.name)", "index": _WRONG_TASK},
        "spec.evaluation.gate[{index}].task",
    ),
    Cel(
        "spec",
        f"{_GATE}.all(g, {_KNOWN_REWARD})",
        sentences.NO_REWARD,
        _quoted(f"{_GATE}[{_WRONG_REWARD}].reward"),
        "evaluation.gate",
        {
            "task": f"{_GATE}[{_WRONG_REWARD}].task",
            "rewards": f"self.teachers.filter(t, t.name == {_GATE}[{_WRONG_REWARD}].task)[0].rewards",
            "index": _WRONG_REWARD,
        },
        "spec.evaluation.gate[{index}].reward",
    ),
    Cel(
        "spec.evaluation.gate[]",
        "has(self.atLeast) != has(self.ofTeacher)",
        sentences.ONE_LIMIT,
        "has(self.atLeast) ? ['atLeast', 'ofTeacher'] : []",
    ),
    Cel(
        "spec.endpoint.autoscaling",
        "self.minReplicas <= self.maxReplicas",
        sentences.REPLICA_RANGE,
        "self.minReplicas",
        "minReplicas",
        {"most": "self.maxReplicas"},
    ),
    Cel(
        "spec.endpoint",
        "self.rollout.maxSurge != 0 || !has(self.autoscaling) || self.autoscaling.minReplicas > 1",
        sentences.NO_SURGE_SCALED,
        "self.autoscaling.minReplicas",
        "autoscaling.minReplicas",
    ),
    Cel(
        "spec.endpoint.rollout",
        "self.steps.all(x, self.steps.exists_one(o, o == x)) && self.steps.isSorted()",
        sentences.RISING,
        "self.steps",
        "steps",
    ),
    Cel(
        "spec.endpoint",
        "self.rollout.maxSurge != 0 || self.replicas != 1",
        sentences.NO_SURGE,
        "self.rollout.maxSurge",
        "rollout.maxSurge",
    ),
    Cel(
        "spec",
        "self.managedBy == oldSelf.managedBy",
        sentences.SAME_MANAGER,
        _quoted("self.managedBy"),
        "managedBy",
        {"old": "oldSelf.managedBy"},
    ),
    *_pod("spec.teacherServing.pod"),
    *_pod("spec.training.pod"),
    *_pod("spec.evaluation.pod"),
    *_pod("spec.endpoint.pod"),
    _unchanged("spec.model.uri", sentences.SAME_BASE),
    _unchanged("spec.student.output.uri", sentences.SAME_FOLDER),
)
