"""The words in which a spec is refused, the same in `opd validate` and in the API server's rules (`cel`)."""

import json
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from opd_core import uris


@dataclass(frozen=True)
class Problem:
    """One reason to refuse a spec: `path` of the field, the `value` found there, what is wrong, what to write."""

    path: str
    value: Any
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message} (got {shown(self.value)}); {self.remedy}"


@dataclass(frozen=True)
class Sentence:
    """What is wrong and what to write, with `{words}` that are known when it is said."""

    message: str
    remedy: str

    def problem(self, path: str, value: Any, **words: object) -> Problem:
        return Problem(path, value, self.message.format(**words), self.remedy.format(**words))


def shown(value: Any) -> str:
    """A value as a rule of the API server can write it, too."""
    if value is None:
        return "nothing"
    if isinstance(value, list):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, float) and abs(value) < float("inf"):
        text = format(Decimal(repr(value)), "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return json.dumps(value, ensure_ascii=False, default=str)


# ------------------------------------------------------------------------------------------------- one field's form

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
OBJECT_NAME_PATTERN = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"  # Services are named after it: no digit first, no dot
OBJECT_NAME_LENGTH = 40  # names of children are this name and at most 23 characters
PLUGIN_PATTERN = r"^[A-Za-z0-9_][A-Za-z0-9_.-]*(:[A-Za-z0-9_]+)?$"
MODULE_PATTERN = r"^[A-Za-z0-9_.]+$"
DIGEST_PATTERN = r"^$|^sha256:[0-9a-f]{64}$"
VARIABLE_PATTERN = r"^[A-Za-z_][A-Za-z0-9_]*$"
QUANTITY_PATTERN = r"^([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?$"
_PORT = "(6553[0-5]|655[0-2][0-9]|65[0-4][0-9]{2}|6[0-4][0-9]{3}|[1-5][0-9]{4}|[1-9][0-9]{0,3})"
URL_PATTERN = rf"^https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(:{_PORT})?(/[A-Za-z0-9._~-]+)*/?$"
_DOMAIN = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
_LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
LABEL_VALUE_PATTERN = f"^({_LABEL})?$"
LABEL_KEY_PATTERN = f"^({_DOMAIN}/)?{_LABEL}$"
TAINT_KEY_PATTERN = f"^(({_DOMAIN}/)?{_LABEL})?$"
LOCAL_NAME_PATTERN = f"^{_DOMAIN}$"
HOSTNAME_PATTERN = rf"^(\*\.)?{_DOMAIN}$"
DATA_KEY_PATTERN = r"^\.?[-_A-Za-z0-9][-._A-Za-z0-9]*$"
MOUNT_PATTERN = r"^(/[A-Za-z0-9_-][A-Za-z0-9._-]*)+$"
CLASS_PATTERN = f"^({_DOMAIN})?$"
OPTIONAL_URI_PATTERN = f"^$|{uris.PATTERN}"

OBJECT_NAME = Sentence(
    "not a name for this object and what belongs to it",
    f"use lower-case letters, digits and -, a letter first, at most {OBJECT_NAME_LENGTH}",
)
_URI = Sentence("not a URI that can be read here", f"write {uris.FORMS}")
PATTERNS = {
    uris.PATTERN: _URI,
    OPTIONAL_URI_PATTERN: _URI,
    uris.CLAIM_FOLDER: Sentence("not a folder in a claim", "write pvc://claim/folder"),
    NAME_PATTERN: Sentence("not a valid name", "use lower-case letters, digits and -, at most 63"),
    PLUGIN_PATTERN: Sentence("not a plug-in's name", "write a registered name or module:function"),
    MODULE_PATTERN: Sentence("not the name of a layer", "use letters, digits, _ and ., e.g. attn.to_q"),
    DIGEST_PATTERN: Sentence("not a digest", "write sha256: and 64 hexadecimal digits, or leave it empty"),
    URL_PATTERN: Sentence("not a server's URL", "write e.g. http://rewards:8500"),
    VARIABLE_PATTERN: Sentence("not the name of a variable", "use letters, digits and _, no digit first"),
    LABEL_VALUE_PATTERN: Sentence("not the value of a label", "use letters, digits, -, _ and ., at most 63"),
    LABEL_KEY_PATTERN: Sentence(
        "not the key of a label or resource", "write a name or domain/name, e.g. nvidia.com/gpu"
    ),
    TAINT_KEY_PATTERN: Sentence("not the key of a taint", "write a name or domain/name, e.g. nvidia.com/gpu"),
    LOCAL_NAME_PATTERN: Sentence("not the name of an object here", "use lower-case letters, digits, - and ."),
    HOSTNAME_PATTERN: Sentence("not a host name", "write e.g. images.example.com or *.example.com"),
    DATA_KEY_PATTERN: Sentence("not the key of a Secret", "use letters, digits, -, _ and ."),
    MOUNT_PATTERN: Sentence("not a path for a volume", "write e.g. /models/cache"),
    CLASS_PATTERN: Sentence("not the name of a class", "use lower-case letters, digits, - and ."),
    QUANTITY_PATTERN: Sentence("not a quantity", "write a number and its unit, e.g. 500m, 2 or 16Gi"),
}

LONG_KEY = Sentence("a key has too many characters", "write at most 253")

# ------------------------------------------------------------------------------------------------- several fields

TAKEN = Sentence("this name is taken", "give every teacher its own name")
GIVEN_OR_MADE = Sentence(
    "a teacher is given or trained; only a student that learns from rewards needs none",
    "write exactly one of adapter, model and training, or training.method: RL and none",
)
NO_OWN_REWARD = Sentence("this teacher has no such reward", "write one of {rewards}")
RL_SETTINGS = Sentence(
    "method: RL and reinforcement belong together", "write both, or leave reinforcement out and write another method"
)
NO_ONES_WEIGHT = Sentence("no task has this reward", "name one of a teacher's, or leave it out")
NO_TASKS_WEIGHT = Sentence("no reward of a task has a larger weight", "give every task a reward with a weight above 0")
NO_REWARD_WEIGHT = Sentence("no reward has a larger weight", "give at least one reward a weight above 0")
UPDATES = Sentence("does not divide promptsPerRound {prompts}", "write a divisor of {prompts}")
GROUP_RANKS = Sentence(
    "not divisible by the {ranks} ranks (nodes x processesPerNode) of training", "write a multiple of {ranks}"
)
NFT_NOISE = Sentence("DiffusionNFT learns from images that are sampled without noise", "write type: ODE")
GRPO_ODE = Sentence("a policy gradient needs noise", "write type: SDE with noiseLevel: 0.7")
FEW_TEACHER_STEPS = Sentence("more than the {steps} steps that can be trained", "write 1 to {steps}")
NFT_CLIP = Sentence("DiffusionNFT clips no ratio", "leave it out, or write another algorithm")
TEACHERS_FOLDER = Sentence("this folder holds trained teachers", "write another name, e.g. students")
NO_WEIGHT = Sentence("the weights sum to zero", "give at least one teacher a weight above 0")
REWARD_TWICE = Sentence("a reward is named twice", "name each reward once")
NO_ONES_REWARD = Sentence("no teacher has this reward", "name one of a teacher's, or leave its servers out")
NOT_DIVISIBLE = Sentence("not divisible by {multiple}", "write {below} or {above}")
ODE_NOISE = Sentence("an ODE has no noise", "write 0, or type: SDE")
SDE_NO_NOISE = Sentence("an SDE needs noise", "write 0.7 (the paper's), or type: ODE")
DPM2_SDE = Sentence("DPM2 is deterministic", "write Flow, Dance, DDIM or CPS, or type: ODE")
TOO_NOISY = Sentence("DDIM and CPS cannot add more noise than there is", "write at most 1")
KL_ODE = Sentence(
    "KL and policy gradients have no finite value on a deterministic sampler",
    "write objective.type: MeanMatching, or sampler.type: SDE with noiseLevel: 0.7",
)
KL_LAST = Sentence(
    "DDIM and CPS take their last step without noise, where KL and policy gradients have no finite value",
    "leave step {last} out of trainedSteps, or write objective.type: MeanMatching",
)
NO_STEP = Sentence("no such step", "write 0 to {last}")
STEPS_TWICE = Sentence("both trainedSteps and stepWeights say which steps are trained", "write one of them")
STEP_WEIGHTS = Sentence("another number of weights than the {steps} solver steps", "write {steps} numbers")
NO_STEP_WEIGHT = Sentence("no step has a larger weight", "give at least one step a weight above 0")
FEW_STEPS = Sentence("more than the {trained} trained steps", "write 1 to {trained}, or leave it out")
NOT_NORMALIZED = Sentence(
    "policy gradients and PDM have no self-normalised form", "write selfNormalized: false, or objective.type: KL"
)
NO_BRANCHES = Sentence(
    "SFT and RL ask no teacher for the branches of guidance", "write method: OPD, or objective.type: Velocity"
)
TWO_STARTS = Sentence("initFrom names another start", "write one of the two")
NO_MEAN = Sentence("one teacher has no mean with others", "write initFrom: the teacher's URI")
NO_LORA = Sentence("task {teacher} has no LoRA to start from", "leave it out")
NO_BASE = Sentence(
    "teacher {teacher} has a model of its own, which is no change of the base", "write 1, or give its LoRA on the base"
)
SFT_SDE = Sentence("SFT learns from images that its teachers sample without noise", "write sampler.type: ODE")
DMD_X0 = Sentence(
    "DMD2 and TDM move clean images along a difference of scores, which is the objective X0", "write objective.type: X0"
)
DMD_NORMALIZED = Sentence("DMD2 and TDM divide by their own distance", "write selfNormalized: false")
NO_FAKE_SCORE = Sentence("only DMD2 and TDM have a fake score", "remove fakeScore, or write method: DMD2")
RANKS = Sentence("not divisible by the {ranks} ranks (nodes x processesPerNode)", "write a multiple of {ranks}")
MICRO_BATCH = Sentence(
    "does not divide the {images} images per task of a rank", "write a divisor of {images}, or leave it out"
)
WARMUP = Sentence("the warm-up leaves no round for the cosine", "write less than {rounds}")
NO_TASK = Sentence("no such task", "write one of {tasks}")
NO_REWARD = Sentence("task {task} has no such reward", "write one of {rewards}")
NO_TEACHER = Sentence("task {task} has no teacher to compare with", "write atLeast, or give its teacher")
ONE_LIMIT = Sentence("needs one of atLeast and ofTeacher", "write exactly one of the two")
REPLICA_RANGE = Sentence("more than maxReplicas {most}", "write at most maxReplicas")
RISING = Sentence("canary shares must grow", "write them in rising order, e.g. [10, 50]")
NO_SURGE_SCALED = Sentence("a rollout of the only replica would lose requests", "write 2 or more, or maxSurge: 1")
NO_SURGE = Sentence("replacing the only replica would lose requests", "write 1, or replicas: 2 or more")

# ------------------------------------------------------------------------------------------------- pods

VARIABLE_TWICE = Sentence("this variable is set above", "name each variable once")
TWO_VALUES = Sentence("the variable has a value and a secretKeyRef", "write one of the two")
ONE_SOURCE = Sentence("needs one of claim, secret and configMap", "write exactly one of the three")
RESERVED_PATH = Sentence("this path is in use", "write another path, e.g. /models/cache")
PATH_TWICE = Sentence("this path is taken above", "give every volume its own path")
NO_VALUES = Sentence("{operator} compares no values", "leave them out, or write operator: In")
SOME_VALUES = Sentence("{operator} needs values", "write some, or operator: Exists")
ONE_NUMBER = Sentence("{operator} compares with one whole number", 'write one, e.g. ["40"]')
EXISTS_VALUE = Sentence("Exists compares no value", "leave it out, or write operator: Equal")
NO_KEY = Sentence("without a key only Exists matches", "write a key, or operator: Exists")
NO_WAIT = Sentence("only the effect NoExecute waits", "leave it out, or write effect: NoExecute")
NO_RESOURCE = Sentence("not a resource of containers", "write {known} or domain/name, e.g. nvidia.com/gpu")
ABOVE_LIMIT = Sentence("more than the limit", "write at most what limits says")
DEVICE = Sentence("devices are asked for by their limit", "write the same number as limit, or no request")

# ------------------------------------------------------------------------------------------------- changes

SAME_BASE = Sentence(
    "a trainer has run, and students of this object are adapters of {old}", "write {old}, or make another object"
)
SAME_FOLDER = Sentence("a trainer has run, and its students are in {old}", "write {old}, or make another object")
SAME_MANAGER = Sentence("who manages an object never changes", "write {old}, or make another object")
