"""The rules of `rules` for the API server, in CEL, and what may not change once a run has begun.

A rule stands at the lowest node that sees all it needs. Where the API server cannot point at the field itself, an item
of a list, the sentence begins with its path.
"""

import json

from opd_core.api import sentences
from opd_core.api.cel_learning import RANKS, TEACHES, student_reinforcement, teachers, warmup
from opd_core.api.cel_pods import pod
from opd_core.api.cel_rule import INDEX, Cel, first, quoted
from opd_core.api.rules import (
    MATCH_DISTRIBUTIONS,
    NEED_NOISE,
    OF_BRANCHES,
    PIXEL_MULTIPLE,
    POLICY_GRADIENTS,
    RENOISING,
)
from opd_core.api.sentences import Sentence


def _samplers(at: str) -> list[Cel]:
    noise = "self.noiseLevel"
    return [
        Cel(at, "self.type != 'ODE' || self.noiseLevel == 0.0", sentences.ODE_NOISE, noise, "noiseLevel"),
        Cel(at, "self.type != 'SDE' || self.noiseLevel > 0.0", sentences.SDE_NO_NOISE, noise, "noiseLevel"),
        Cel(at, "self.type != 'SDE' || self.solver != 'DPM2'", sentences.DPM2_SDE, quoted("self.solver"), "solver"),
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
_PER_RANK = f"(self.imagesPerTask / {RANKS})"
_GATE = "self.evaluation.gate"
_KNOWN_TASK = "self.teachers.exists(t, t.name == g.task)"
_KNOWN_REWARD = "!self.teachers.exists(t, t.name == g.task && !(g.reward in t.rewards))"
_BEGUN = "has(oldSelf.status) && (has(oldSelf.status.begun) || has(oldSelf.status.students))"
_TAKEN = "self.map(t, self.exists_one(o, o.name == t.name)).lastIndexOf(false)"
_WRONG_STEP = first(_STEPS, "x", f"x <= {_LAST}")
_WRONG_TASK = first(_GATE, "g", _KNOWN_TASK)
_WRONG_REWARD = first(_GATE, "g", _KNOWN_REWARD)
_KNOWN_TEACHER = f"!has(g.ofTeacher) || !self.teachers.exists(t, t.name == g.task && !{TEACHES})"
_WRONG_TEACHER = first(_GATE, "g", _KNOWN_TEACHER)
_WITHOUT_LORA = f"self.teachers.filter(t, has(t.model) || !{TEACHES})"
_WHOLE = "self.teachers.filter(t, has(t.model))"
_SERVED = "self.rewardServers"
_ONES_REWARD = "self.teachers.exists(t, s.reward in t.rewards)"
_NO_ONES_REWARD = first(_SERVED, "s", _ONES_REWARD)


def _unchanged(path: str, sentence: Sentence) -> Cel:
    new, old = f"self.{path}", f"oldSelf.{path}"
    return Cel("", f"!({_BEGUN}) || {new} == {old}", sentence, quoted(new), path, {"old": old})


RULES = (
    Cel(
        "",
        f"self.metadata.name.size() <= {sentences.OBJECT_NAME_LENGTH} && "
        f"self.metadata.name.matches({json.dumps(sentences.OBJECT_NAME_PATTERN)})",
        sentences.OBJECT_NAME,
        quoted("self.metadata.name"),
        where="metadata.name",
    ),
    Cel(
        "spec.teachers",
        "self.all(t, self.exists_one(o, o.name == t.name))",
        sentences.TAKEN,
        quoted(f"self[{INDEX}].name"),
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
        quoted(f"{_SERVED}[{INDEX}].reward"),
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
    *teachers(),
    *student_reinforcement(),
    Cel(
        "spec.training",
        f"!{_NEEDS_NOISE} || self.sampler.type != 'ODE'",
        sentences.KL_ODE,
        quoted("self.objective.type"),
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
        f"{_STEPS}[{INDEX}]",
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
        f"!self.selfNormalized || !(self.type in {[*POLICY_GRADIENTS, OF_BRANCHES]})",
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
        f"!self.student.initFromTeachers || self.teachers.size() > 1 || {_WITHOUT_LORA}.size() > 0",
        sentences.NO_MEAN,
        "self.student.initFromTeachers",
        "student.initFromTeachers",
    ),
    Cel(
        "spec",
        f"!self.student.initFromTeachers || {_WITHOUT_LORA}.size() == 0",
        sentences.NO_LORA,
        "self.student.initFromTeachers",
        "student.initFromTeachers",
        {"teacher": f"{_WITHOUT_LORA}[0].name"},
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
        f"!(self.method in ['SFT', 'RL']) || self.objective.type != '{OF_BRANCHES}'",
        sentences.NO_BRANCHES,
        quoted("self.objective.type"),
        "objective.type",
    ),
    Cel(
        "spec.training",
        "self.method != 'SFT' || self.sampler.type != 'SDE'",
        sentences.SFT_SDE,
        quoted("self.sampler.type"),
        "sampler.type",
    ),
    Cel(
        "spec.training",
        f"!{_DISTRIBUTIONS} || self.objective.type == 'X0'",
        sentences.DMD_X0,
        quoted("self.objective.type"),
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
        quoted("self.method"),
        "fakeScore",
    ),
    Cel(
        "spec.training",
        f"self.method == 'RL' || self.imagesPerTask % {RANKS} == 0",
        sentences.RANKS,
        "self.imagesPerTask",
        "imagesPerTask",
        {"ranks": RANKS},
    ),
    Cel(
        "spec.training",
        f"self.method == 'RL' || !has(self.microBatchSize) || self.imagesPerTask % {RANKS} != 0 "
        f"|| {_PER_RANK} % self.microBatchSize == 0",
        sentences.MICRO_BATCH,
        "self.microBatchSize",
        "microBatchSize",
        {"images": _PER_RANK},
    ),
    warmup("spec.training"),
    Cel(
        "spec",
        f"{_GATE}.all(g, {_KNOWN_TASK})",
        sentences.NO_TASK,
        quoted(f"{_GATE}[{INDEX}].task"),
        "evaluation.gate",
        {"tasks": "self.teachers.map(t, t.name)", "index": _WRONG_TASK},
        "spec.evaluation.gate[{index}].task",
    ),
    Cel(
        "spec",
        f"{_GATE}.all(g, {_KNOWN_REWARD})",
        sentences.NO_REWARD,
        quoted(f"{_GATE}[{INDEX}].reward"),
        "evaluation.gate",
        {
            "task": f"{_GATE}[{INDEX}].task",
            "rewards": f"self.teachers.filter(t, t.name == {_GATE}[{INDEX}].task)[0].rewards",
            "index": _WRONG_REWARD,
        },
        "spec.evaluation.gate[{index}].reward",
    ),
    Cel(
        "spec",
        f"{_GATE}.all(g, {_KNOWN_TEACHER})",
        sentences.NO_TEACHER,
        f"{_GATE}[{INDEX}].ofTeacher",
        "evaluation.gate",
        {"task": f"{_GATE}[{INDEX}].task", "index": _WRONG_TEACHER},
        "spec.evaluation.gate[{index}].ofTeacher",
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
        quoted("self.managedBy"),
        "managedBy",
        {"old": "oldSelf.managedBy"},
    ),
    *pod("spec.teacherServing.pod"),
    *pod("spec.training.pod"),
    *pod("spec.evaluation.pod"),
    *pod("spec.endpoint.pod"),
    _unchanged("spec.model.uri", sentences.SAME_BASE),
    _unchanged("spec.student.output.uri", sentences.SAME_FOLDER),
)
