"""The rules of teachers, and of whoever learns from rewards, in CEL."""

from opd_core.api import sentences
from opd_core.api.cel_rule import INDEX, Cel, first, quoted
from opd_core.api.teachers import FOLDER, trainable_steps
from opd_core.api.training import Sampler

RANKS = "(self.nodes * self.processesPerNode)"
TEACHES = "(has(t.adapter) || has(t.model) || has(t.training))"  # of an entry t of spec.teachers
_WRONG_TASK = first("self.teachers", "t", TEACHES)
_USUAL_STEPS = trainable_steps(Sampler().steps)  # of teachers that name none, whatever their algorithm
_SAMPLER_STEPS = "(self.sampler.steps > 1 ? self.sampler.steps - 1 : 1)"
_TEACHER_STEPS = f"(!has(self.sampler) ? {_USUAL_STEPS} : {_SAMPLER_STEPS})"
_ALL_RANKS = "(self.training.nodes * self.training.processesPerNode)"
_GROUPS = f"t.training.promptsPerRound / t.training.updatesPerRound * t.training.groupSize % {_ALL_RANKS} == 0"
_WHOLE_GROUPS = f"!has(t.training) || t.training.promptsPerRound % t.training.updatesPerRound != 0 || {_GROUPS}"
_WRONG_GROUP = first("self.teachers", "t", _WHOLE_GROUPS)
_OWN_REWARD = "w.reward in self.rewards"
_WRONG_OWN = first("self.training.rewardWeights", "w", _OWN_REWARD)


def _learning(at: str, settings: str, steps: str) -> list[Cel]:
    """The rules of reinforcement learning, at what has a sampler. `settings`: the field there that has the rest, or
    '' where it is the same."""
    own, inside = f"self.{settings}".rstrip("."), f"{settings}." if settings else ""
    none = f"!has(self.{settings}) || " if settings else ""
    nft, kind = f"{own}.algorithm == 'DiffusionNFT'", quoted("self.sampler.type")
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
_NO_ONES_WEIGHT = first(_STUDENT_WEIGHTS, "w", _ONES_WEIGHT)


def student_reinforcement() -> list[Cel]:
    """The rules of a student that learns from rewards."""
    return [
        Cel(
            "spec.training",
            "has(self.reinforcement) == (self.method == 'RL')",
            sentences.RL_SETTINGS,
            quoted("self.method"),
            where="spec.training.reinforcement",
        ),
        *_learning("spec.training", "reinforcement", _SAMPLER_STEPS),
        Cel(
            "spec.training",
            "!has(self.reinforcement) || self.reinforcement.promptsPerRound % self.reinforcement.updatesPerRound != 0 "
            f"|| {_SHARE} % {RANKS} == 0",
            sentences.GROUP_RANKS,
            "self.reinforcement.groupSize",
            "reinforcement.groupSize",
            {"ranks": RANKS},
        ),
        Cel(
            "spec",
            f"!has({_LEARNING}) || {_STUDENT_WEIGHTS}.all(w, {_ONES_WEIGHT})",
            sentences.NO_ONES_WEIGHT,
            quoted(f"{_STUDENT_WEIGHTS}[{INDEX}].reward"),
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


def teachers() -> list[Cel]:
    """The rules of teachers that are given or trained."""
    given = " + ".join(f"(has(self.{kind}) ? ['{kind}'] : [])" for kind in ("adapter", "model", "training"))
    at, weights = "spec.teachers[].training", "self.training.rewardWeights"
    return [
        Cel("spec.teachers[]", f"({given}).size() <= 1", sentences.GIVEN_OR_MADE, given),
        Cel(
            "spec",
            f"self.training.method == 'RL' || self.teachers.all(t, {TEACHES})",
            sentences.GIVEN_OR_MADE,
            "[]",
            "teachers",
            {"index": _WRONG_TASK},
            "spec.teachers[{index}]",
        ),
        *_learning(at, "", _TEACHER_STEPS),
        warmup(at),
        Cel(
            "spec",
            f"self.teachers.all(t, {_WHOLE_GROUPS})",
            sentences.GROUP_RANKS,
            f"self.teachers[{INDEX}].training.groupSize",
            "teachers",
            {"ranks": _ALL_RANKS, "index": _WRONG_GROUP},
            "spec.teachers[{index}].training.groupSize",
        ),
        Cel(
            "spec.teachers[]",
            f"!has(self.training) || {weights}.all(w, {_OWN_REWARD})",
            sentences.NO_OWN_REWARD,
            quoted(f"{weights}[{INDEX}].reward"),
            "training.rewardWeights",
            {"rewards": "self.rewards", "index": _WRONG_OWN},
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
            quoted("self.uri"),
            "uri",
        ),
    ]


def warmup(at: str) -> Cel:
    return Cel(
        at,
        "self.optimizer.schedule != 'Cosine' || self.optimizer.warmupRounds < self.rounds",
        sentences.WARMUP,
        "self.optimizer.warmupRounds",
        "optimizer.warmupRounds",
        {"rounds": "self.rounds"},
    )
