"""The fields of an `OPDDistillation` (opd.dev/v1alpha1): the one source for YAML, CLI and CRD.

Defaults are the paper's (DiffusionOPD, arXiv 2605.15055, and its published configuration) unless a field says
otherwise. Rules over several fields are in `rules`.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from opd_core import uris
from opd_core.api import sentences
from opd_core.api.base import Guidance, LocalName, Model, OptionalUri, PluginName, ShortText, Uri
from opd_core.api.pod import Pod
from opd_core.api.training import (
    LoRA,
    Precision,
    Sampler,
    TeacherTraining,
    Training,
)
from opd_core.scales import Scales

API_VERSION = "opd.dev/v1alpha1"
KIND = "OPDDistillation"

ClaimFolder = Annotated[str, Field(max_length=uris.MAX_LENGTH, pattern=uris.CLAIM_FOLDER)]
Digest = Annotated[str, Field(max_length=71, pattern=sentences.DIGEST_PATTERN)]
# A task's name becomes part of object names and label values.
Name = Annotated[str, Field(min_length=1, max_length=63, pattern=sentences.NAME_PATTERN)]
ObjectName = Annotated[str, Field(max_length=sentences.OBJECT_NAME_LENGTH, pattern=sentences.OBJECT_NAME_PATTERN)]
Percent = Annotated[int, Field(ge=1, le=100)]


class Placement(StrEnum):
    SHARED = "Shared"
    DEDICATED = "Dedicated"
    IN_PROCESS = "InProcess"


class RolloutStrategy(StrEnum):
    CANARY = "Canary"
    REPLACE = "Replace"


class CleanPodPolicy(StrEnum):
    RUNNING = "Running"
    ALL = "All"


# ---------------------------------------------------------------------------------------------------- model and student


class BaseModelRef(Model):
    uri: Uri = Field(description=f"The frozen base in diffusers' folder format: {uris.FORMS}.")
    max_sequence_length: int = Field(
        default=128,
        ge=1,
        le=512,
        description="Tokens of a prompt that the encoder with the longest window reads, T5 of Stable Diffusion 3; must "
        "be what the teachers were trained with.",
    )


class Output(Model):
    uri: ClaimFolder = Field(
        description="Folder in a claim, pvc://claim/folder: the student that passes its gate. Checkpoints and scores "
        "are beside it, in folder.runs."
    )


class Student(Model):
    adapter: LoRA = Field(default_factory=LoRA, description="The student's adapter on the base.")
    init_from: OptionalUri = Field(
        default="",
        description="A LoRA to start from, in any format that a teacher's may have, with the adapter's rank and alpha, "
        "on layers among its targetModules; empty: start as the base.",
    )
    init_from_teachers: bool = Field(
        default=False,
        description="Start from the mean of the teachers' LoRAs; the adapter's rank is then the sum of theirs.",
    )
    output: Output = Field(description="Where the trained student goes.")


# ---------------------------------------------------------------------------------------------------- of any training


# ---------------------------------------------------------------------------------------------------- teachers


class AdapterRef(Model):
    uri: Uri = Field(description="LoRA of the teacher, whoever wrote it: a safetensors file or its folder.")
    alpha: float | None = Field(
        default=None,
        gt=0,
        le=65536,
        description="Scale of a LoRA whose file does not state it: its change is multiplied by alpha / rank; absent: "
        "the rank, as in diffusers.",
    )


class TeacherModelRef(Model):
    uri: Uri = Field(
        description=f"A whole model in diffusers' folder format, of the base's family, latents and text encoders: "
        f"{uris.FORMS}."
    )


class Prompts(Model):
    uri: Uri = Field(description="Prompt file: JSON lines with a `prompt` key, or one prompt per line (.txt).")
    held_out_uri: OptionalUri = Field(
        default="", description="Prompts for evaluation; empty: some of `uri` are held out of training."
    )


class Teacher(Model):
    """One task: a frozen teacher with its prompts and rewards. For a student that learns from rewards, method RL, the
    teacher may be left out."""

    name: Name = Field(description="Name of the teacher and of its task; unique.")
    adapter: AdapterRef | None = Field(default=None, description="The teacher's LoRA on the base.")
    model: TeacherModelRef | None = Field(
        default=None, description="The teacher as a model of its own, which has servers of its own."
    )
    training: TeacherTraining | None = Field(
        default=None, description="How the teacher is made from the base, where it is not given."
    )
    guidance_scale: Guidance = Field(
        default=4.5,
        description="Guidance of this teacher, as the model's family has it; of Stable Diffusion 3, at most 1 is off.",
    )
    true_cfg_scale: Guidance = Field(
        default=1.0,
        description="Classifier-free guidance of this teacher beside guidanceScale, of FLUX.1; at most 1 is off.",
    )
    weight: float = Field(
        default=1.0, ge=0, le=1000, description="Share of this task in the loss, relative to the others."
    )
    prompts: Prompts = Field(description="The task's prompts.")
    rewards: list[PluginName] = Field(
        min_length=1, max_length=16, description="Rewards of this task: registered names or module:function."
    )

    @property
    def scales(self) -> Scales:
        return Scales(self.guidance_scale, self.true_cfg_scale)

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher, given or trained, and not a task alone."""
        return self.adapter is not None or self.model is not None or self.training is not None


class RewardServers(Model):
    """A reward that is computed behind HTTP, by `python -m opd_trainer.rewards.serve` or whoever answers alike."""

    reward: PluginName = Field(description="One of the teachers' rewards, by the name that its servers know it by.")
    urls: list[Annotated[str, Field(max_length=256, pattern=sentences.URL_PATTERN)]] = Field(
        min_length=1, max_length=64, description="Servers with the same answers, e.g. http://geneval:8500."
    )
    timeout_seconds: int = Field(
        default=120, ge=1, le=3600, description="Seconds until a server that has not answered counts as failed."
    )


class TeacherServing(Model):
    placement: Placement = Field(
        default=Placement.SHARED,
        description="Shared: one copy of a model serves all teachers on it. Dedicated: one copy per teacher. "
        "InProcess: inside the trainer, for comparisons.",
    )
    replicas: int = Field(default=1, ge=1, le=64, description="Teacher servers.")
    precision: Precision = Field(default=Precision.BF16, description="Arithmetic of the teachers' transformer.")
    pod: Pod = Field(default_factory=Pod, description="Pods of the teacher servers.")


# ---------------------------------------------------------------------------------------------------- training


class EvaluationSampler(Sampler):
    steps: int = Field(default=40, ge=1, le=1000, description="Solver steps from noise to image.")


# ---------------------------------------------------------------------------------------------------- evaluation


class GateRule(Model):
    """The student must reach `atLeast`, or the share `ofTeacher` of the teacher's gain over the base; it misses a rule
    that it is below beyond chance."""

    task: Name = Field(description="A task of this object.")
    reward: PluginName = Field(description="One of this task's rewards.")
    at_least: float | None = Field(default=None, description="Smallest mean reward that passes.")
    of_teacher: float | None = Field(
        default=None, ge=-10, le=10, description="Smallest share of the teacher's gain over the base that passes."
    )


class Evaluation(Model):
    every_rounds: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Rounds between two looks at the averaged student on a few held-out prompts; absent: none.",
    )
    prompts_per_task: int = Field(default=128, ge=1, le=100_000, description="Held-out prompts per task.")
    seed: int = Field(
        default=2026, ge=0, le=2**31 - 1, description="Seed of prompts and noise, the same for all models."
    )
    batch_size: int = Field(default=16, ge=1, le=4096, description="Images computed at once.")
    guidance_scale: Guidance | None = Field(
        default=None, description="Guidance of base and student; absent: training's."
    )
    true_cfg_scale: Guidance | None = Field(
        default=None, description="trueCfgScale of base and student; absent: training's."
    )
    sampler: EvaluationSampler = Field(
        default_factory=EvaluationSampler, description="How evaluation images are sampled."
    )
    gate: list[GateRule] = Field(
        default_factory=list, max_length=64, description="What a student must reach to be served."
    )
    pod: Pod | None = Field(
        default=None,
        description="The evaluation's pod; absent: training's. Each of its devices has a rank.",
    )


# ---------------------------------------------------------------------------------------------------- endpoint


class Rollout(Model):
    strategy: RolloutStrategy = Field(
        default=RolloutStrategy.CANARY, description="How a new student replaces the old one."
    )
    steps: list[Percent] = Field(
        default=[10, 50], max_length=16, description="Canary shares of the traffic, in percent."
    )
    interval_seconds: int = Field(default=60, ge=1, le=86_400, description="Seconds between two canary steps.")
    max_surge: int = Field(
        default=1, ge=0, le=1, description="Pods beyond `replicas` during a rollout; 0 where no GPU is to spare."
    )
    max_error_rate: float = Field(
        default=0.02, ge=0, le=1, description="Share of images, of ten or more, that may fail."
    )


class Autoscaling(Model):
    min_replicas: int = Field(default=1, ge=1, le=1000, description="Fewest replicas.")
    max_replicas: int = Field(default=4, ge=1, le=1000, description="Most replicas.")
    target_queued_images: int = Field(
        default=4, ge=1, le=10_000, description="Queued images per replica to aim at; needs a metrics adapter."
    )


class Route(Model):
    """An HTTPRoute (Gateway API) before the endpoint: the shares of a rollout are then its weights, to the percent."""

    gateway: LocalName = Field(description="The Gateway that the route attaches to.")
    gateway_namespace: Name | None = Field(
        default=None, description="Its namespace, whose owner decides who may attach; absent: the object's own."
    )
    section_name: LocalName | None = Field(default=None, description="One listener of the Gateway; absent: all.")
    hostnames: list[Annotated[str, Field(max_length=253, pattern=sentences.HOSTNAME_PATTERN)]] = Field(
        min_length=1, max_length=16, description="Host names under which the image API answers."
    )
    tls: bool = Field(
        default=False, description="Whether the Gateway's listener speaks HTTPS: status.endpoint.url then says so."
    )
    follow_seconds: int = Field(
        default=5,
        ge=0,
        le=600,
        description="Seconds until every proxy follows a route that its controller has taken; a minute or more where "
        "the Gateway is a cloud's load balancer.",
    )


class ApiKeys(Model):
    """A Secret with one key a line: its SHA-256 digest, then its owner's name. Followed without a restart."""

    secret_name: LocalName = Field(description="A Secret of the object's own namespace.")
    key: Annotated[str, Field(max_length=253, pattern=sentences.DATA_KEY_PATTERN)] = Field(
        default="keys", description="The entry of the Secret that holds the digests."
    )


class Endpoint(Model):
    enabled: bool = Field(default=True, description="Whether the student is served.")
    suspend: bool = Field(
        default=False, description="Free the endpoint's pods; false again brings the same revision back."
    )
    student_digest: Digest = Field(
        default="",
        description="Serve this student, gate or not: promotes one that missed it, rolls back to an older one. "
        "Empty: the newest that passed.",
    )
    replicas: int = Field(default=1, ge=0, le=1000, description="Endpoint pods.")
    max_queued_images: int = Field(default=64, ge=1, le=100_000, description="Images waiting per replica before 429.")
    max_batch_size: int = Field(default=16, ge=1, le=1024, description="Images that one tick advances at once.")
    fixed_rows: int = Field(
        default=0,
        ge=0,
        le=256,
        description="Rows of every forward pass, so that a seed gives the same bytes in any company; slower where "
        "there are fewer. 0: as many as there are, rounded up to 2, 4, 8 or 16.",
    )
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        le=1_073_741_824,
        description="Pixels of the largest image that a request may name, in all frames of a video; absent: four times "
        "the student's resolution.",
    )
    precision: Precision = Field(default=Precision.BF16, description="Arithmetic of the endpoint's transformer.")
    rollout: Rollout = Field(default_factory=Rollout, description="How students replace one another.")
    autoscaling: Autoscaling | None = Field(default=None, description="Scaling by queue length; absent: off.")
    route: Route | None = Field(default=None, description="Who reaches it from outside the cluster; absent: nobody.")
    api_keys: ApiKeys | None = Field(default=None, description="Whose requests are taken; absent: everybody's.")
    pod: Pod = Field(default_factory=Pod, description="Endpoint pods.")


# ---------------------------------------------------------------------------------------------------- run policy


class StageDeadlines(Model):
    teachers_trained: int | None = Field(
        default=None, ge=1, le=31_536_000, description="Seconds for making the teachers that are trained; absent: none."
    )
    teachers_ready: int = Field(
        default=1800, ge=1, le=604_800, description="Seconds until the teachers answer; time in a queue does not count."
    )
    trainer_ready: int = Field(
        default=1800,
        ge=1,
        le=604_800,
        description="Seconds until all training pods run; time in a queue does not count, but teachers wait no longer.",
    )
    trained: int | None = Field(
        default=None, ge=1, le=31_536_000, description="Seconds for training since its admission; absent: no limit."
    )
    evaluated: int = Field(default=14_400, ge=1, le=604_800, description="Seconds for the evaluation.")
    deployed: int = Field(default=1800, ge=1, le=604_800, description="Seconds until the endpoint answers.")


class RunPolicy(Model):
    backoff_limit: int = Field(
        default=3,
        ge=0,
        le=100,
        description="Restarts after failures without a new checkpoint between them; disruptions do not count.",
    )
    parallel_teachers: int = Field(
        default=1, ge=1, le=16, description="Teachers that a cluster trains side by side, each in pods like training's."
    )
    active_deadline_seconds: int | None = Field(
        default=None, ge=1, le=31_536_000, description="Limit of the whole run."
    )
    stage_deadlines: StageDeadlines = Field(default_factory=StageDeadlines, description="Limits of the stages.")
    ttl_seconds_after_finished: int | None = Field(
        default=None,
        ge=0,
        le=31_536_000,
        description="Seconds after which an object that has failed, or has finished and has no endpoint or a "
        "suspended one, is deleted; absent: never. What serves is not deleted.",
    )
    clean_pod_policy: CleanPodPolicy = Field(
        default=CleanPodPolicy.RUNNING,
        description="Running: the last finished trainer and evaluator stay for their logs. All: nothing stays.",
    )


class Spec(Model):
    model: BaseModelRef = Field(description="The frozen base model.")
    student: Student = Field(description="What is trained.")
    teachers: list[Teacher] = Field(min_length=1, max_length=64, description="The frozen teachers, one per task.")
    teacher_serving: TeacherServing = Field(default_factory=TeacherServing, description="How the teachers are served.")
    reward_servers: list[RewardServers] = Field(
        default_factory=list, max_length=16, description="Rewards that are not computed where they are asked for."
    )
    training: Training = Field(description="The distillation.")
    evaluation: Evaluation = Field(
        default_factory=Evaluation, description="How base, teachers and student are compared."
    )
    endpoint: Endpoint = Field(default_factory=Endpoint, description="How the student is served.")
    suspend: bool = Field(
        default=False,
        description="Free what trains and evaluates; what serves goes on. False again: on from the last checkpoint.",
    )
    run_policy: RunPolicy = Field(default_factory=RunPolicy, description="Retries, deadlines and cleaning up.")
    managed_by: Literal["opd.dev/operator", "kueue.x-k8s.io/multikueue"] = Field(
        default="opd.dev/operator", description="Who runs this object; with multikueue another cluster does."
    )


class Metadata(BaseModel):
    """Kubernetes metadata; only what is read here is typed, the rest passes through."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: ObjectName
    namespace: ShortText = ""


class OPDDistillation(Model):
    api_version: Literal["opd.dev/v1alpha1"]
    kind: Literal["OPDDistillation"]
    metadata: Metadata
    spec: Spec
