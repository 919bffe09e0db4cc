"""How a model is trained: by distillation or from rewards, student and teacher."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from opd_core.api import sentences
from opd_core.api.base import Guidance, Model, OptionalUri, PluginName
from opd_core.api.pod import Pod
from opd_core.scales import Scales


class SamplerType(StrEnum):
    ODE = "ODE"
    SDE = "SDE"


class Method(StrEnum):
    OPD = "OPD"
    SFT = "SFT"
    DMD2 = "DMD2"
    TDM = "TDM"
    RL = "RL"


class Algorithm(StrEnum):
    DIFFUSION_NFT = "DiffusionNFT"
    GRPO_GUARD = "GRPOGuard"
    FLOW_GRPO = "FlowGRPO"


class OldPolicy(StrEnum):
    COPY = "Copy"
    LINEAR = "Linear"
    DELAYED = "Delayed"


class AdvantageScale(StrEnum):
    ROUND = "Round"
    GROUP = "Group"


class Passes(StrEnum):
    ONE = "One"
    TWO = "Two"


class Precision(StrEnum):
    BF16 = "BF16"
    FP16 = "FP16"
    FP32 = "FP32"


class LearningRateSchedule(StrEnum):
    CONSTANT = "Constant"
    COSINE = "Cosine"


class LoRA(Model):
    type: Literal["LoRA"] = Field(default="LoRA", description="Kind of adapter.")
    rank: int = Field(default=32, ge=1, le=512, description="Rank of the update.")
    alpha: int = Field(default=64, ge=1, le=2048, description="Scale: the update is multiplied by alpha / rank.")
    target_modules: (
        list[Annotated[str, Field(min_length=1, max_length=128, pattern=sentences.MODULE_PATTERN)]] | None
    ) = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="Linear layers that get an update, by the end of their name, e.g. attn.to_q. Absent: those that "
        "the model's family usually adapts.",
    )


class Sampler(Model):
    type: SamplerType = Field(default=SamplerType.ODE, description="ODE: deterministic. SDE: with noise at every step.")
    solver: PluginName = Field(
        default="Flow",
        description="Flow: Flow-GRPO's SDE, and Euler without noise. Dance, DDIM, CPS: other noise. DPM2: of second "
        "order, for ODE. Or another registered name, or module:function.",
    )
    steps: int = Field(default=10, ge=1, le=1000, description="Solver steps from noise to image.")
    noise_level: float = Field(default=0.0, ge=0, le=10, description="The paper's a: 0 with ODE, more with SDE.")


class Optimizer(Model):
    """AdamW."""

    learning_rate: float = Field(default=3e-4, gt=0, le=1, description="Peak learning rate.")
    schedule: LearningRateSchedule = Field(
        default=LearningRateSchedule.CONSTANT, description="How it falls after warm-up."
    )
    warmup_rounds: int = Field(default=0, ge=0, le=1_000_000, description="Rounds of linear warm-up.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the second moment.")
    epsilon: float = Field(default=1e-8, gt=0, le=1, description="Added to the root of the second moment.")
    weight_decay: float = Field(default=1e-4, ge=0, le=10, description="Decoupled weight decay.")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6, description="Gradients are clipped to this norm.")


class Ema(Model):
    decay: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="Decay per round of the averaged weights; 0 turns it off. The published code's is 0.961 a round.",
    )


class Checkpoint(Model):
    every_rounds: int = Field(default=30, ge=1, le=1_000_000, description="Rounds between two checkpoints.")
    keep: int = Field(default=3, ge=1, le=100, description="Newest checkpoints that are kept.")


class RewardWeight(Model):
    """What one reward counts in the sum that a teacher is trained on."""

    reward: PluginName = Field(description="One of this teacher's rewards.")
    weight: float = Field(ge=0, le=1e6, description="What its score is multiplied by.")


class ReinforcementLearning(Model):
    """Learning from rewards of the model's own images."""

    algorithm: Algorithm = Field(
        description="DiffusionNFT: the forward process on clean images, arXiv 2509.16117. FlowGRPO: clipped policy "
        "gradient along an SDE, arXiv 2505.05470. GRPOGuard: the same with a ratio of mean 1 and equal steps, arXiv "
        "2510.22319.",
    )
    group_size: int = Field(
        default=24, ge=2, le=1024, description="Images of a prompt, which are compared with each other."
    )
    prompts_per_round: int = Field(default=48, ge=1, le=65_536, description="Prompts of a round.")
    updates_per_round: int = Field(
        default=1, ge=1, le=64, description="Optimiser steps of a round, each on its share of the prompts."
    )
    steps_per_image: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Steps of an image that are trained; absent: all but the last. DiffusionNFT draws them; the others "
        "draw a window in the first half of the path, and sample without noise outside it.",
    )
    advantage_clip: float = Field(
        default=5.0, gt=0, le=1000, description="Largest advantage, in standard deviations of the reward."
    )
    advantage_scale: AdvantageScale = Field(
        default=AdvantageScale.ROUND, description="Whose standard deviation divides: all images', or their group's."
    )
    reward_weights: list[RewardWeight] = Field(
        default_factory=list, max_length=16, description="Weights of the rewards; a reward that is not here has 1."
    )
    normalize_rewards: bool = Field(
        default=False, description="Normalise each reward in its group before they are weighted (GDPO)."
    )
    kl_weight: float | None = Field(
        default=None,
        ge=0,
        le=1e6,
        description="Weight of the distance to the base; absent: 0.0001 for DiffusionNFT, 0.04 for FlowGRPO, 0 for "
        "GRPOGuard.",
    )
    clip_range: float | None = Field(
        default=None,
        gt=0,
        le=1e6,
        description="Of the policy ratio at 65,536 numbers per latent, scaled by the root for other sizes; absent: "
        "0.0001 for FlowGRPO, 0.000002 for GRPOGuard. DiffusionNFT has none.",
    )
    beta: float = Field(default=1.0, gt=0, le=100, description="DiffusionNFT: how far its two policies are apart.")
    old_policy: OldPolicy = Field(
        default=OldPolicy.LINEAR,
        description="DiffusionNFT: how the sampling policy follows the trained one. Copy: at once. Linear: ever "
        "slower, decay up to 0.5. Delayed: at once for 75 steps, then ever slower, up to 0.999.",
    )

    @property
    def images_per_round(self) -> int:
        return self.prompts_per_round * self.group_size


class TeacherTraining(ReinforcementLearning):
    """Reinforcement learning of a teacher on its task's prompts and rewards. Every image is sampled with the teacher's
    guidanceScale, at the resolution, precision and number of ranks of spec.training."""

    rounds: int = Field(ge=1, le=10_000_000, description="Rounds of sampling, rewards and optimiser steps.")
    sampler: Sampler | None = Field(
        default=None,
        description="How images are sampled; absent: 10 steps, by DPM2 for DiffusionNFT, by Flow with noise 0.7 for "
        "the others.",
    )
    adapter: LoRA = Field(default_factory=LoRA, description="The teacher's adapter on the base.")
    init_from: OptionalUri = Field(
        default="",
        description="A LoRA to start from, another task's teacher say, with the adapter's rank and alpha; empty: start "
        "as the base.",
    )
    optimizer: Optimizer = Field(default_factory=Optimizer, description="AdamW.")
    ema: Ema = Field(default_factory=Ema, description="Averaged weights: what becomes the teacher.")
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="Seed of prompts, noise and adapter.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="When to save, how much to keep.")
    validate_every_rounds: int | None = Field(
        default=None,
        ge=1,
        le=10_000_000,
        description="Rounds between two looks at the averaged teacher on a few held-out prompts; absent: none.",
    )
    must_beat_base: bool = Field(
        default=True, description="Refuse a teacher that is no better than the base on its own held-out prompts."
    )


class StudentReinforcement(ReinforcementLearning):
    """The student learns the tasks from their rewards, in turn, without teachers: what distillation is compared to."""

    rounds_per_turn: int = Field(
        default=1,
        ge=1,
        le=10_000_000,
        description="Rounds of a task before the next has its turn. 1: joint training. All of its rounds at once: a "
        "cascade.",
    )


class Resolution(Model):
    width: int = Field(default=512, ge=16, le=4096, description="Image width in pixels.")
    height: int = Field(default=512, ge=16, le=4096, description="Image height in pixels.")
    frames: int = Field(
        default=1, ge=1, le=1025, description="Frames of a video, of a model that makes some; 1: an image."
    )

    @property
    def size(self) -> tuple[int, int, int]:
        """Width, height, frames."""
        return self.width, self.height, self.frames


class Objective(Model):
    type: PluginName = Field(
        default="MeanMatching",
        description="MeanMatching: paper Eq. 12. KL: closed form on an SDE, Eq. 11. Velocity, X0: distance of "
        "velocities, of clean images. PPO: Eq. 21. PolicyGradient: the KL from sampled actions. PDM: positive "
        "prediction and guidance direction apart, arXiv 2607.24731. Or another registered name, or module:function.",
    )
    self_normalized: bool = Field(
        default=False, description="Divide every image's loss by its mean absolute distance; of squared distances."
    )
    direction_weight: float = Field(
        default=1.0,
        gt=0,
        le=1e6,
        description="What the guidance direction counts beside the positive prediction; of PDM alone.",
    )
    trained_steps: Annotated[list[Annotated[int, Field(ge=0, le=999)]], Field(min_length=1, max_length=1000)] | None = (
        Field(default=None, description="Indices of the solver steps in the loss; absent: all of them.")
    )
    step_weights: (
        Annotated[list[Annotated[float, Field(ge=0, le=1e6)]], Field(min_length=1, max_length=1000)] | None
    ) = Field(
        default=None,
        description="What every solver step's loss is multiplied by, one number a step, 0 to leave it out; absent: 1.",
    )
    extrapolation: float = Field(
        default=1.0,
        gt=0,
        le=10,
        description="The student learns v_base + extrapolation (v_teacher - v_base): above 1 it goes beyond its "
        "teachers. Other than 1 it asks the base, too, at every step.",
    )
    steps_per_round: int | None = Field(
        default=None,
        ge=1,
        le=1000,
        description="Trained steps of a round, drawn for it and weighted for the rest; absent: all. 1: one teacher "
        "query per trajectory.",
    )


class FakeScore(Model):
    """Of DMD2 and TDM: a second adapter that follows the student's images."""

    updates_per_round: int | None = Field(
        default=None, ge=1, le=100, description="Its optimiser steps in a round; absent: 5 of DMD2, 1 of TDM."
    )
    optimizer: Optimizer | None = Field(default=None, description="AdamW; absent: the student's.")


class DeepSpeed(Model):
    zero_stage: int = Field(
        default=1, ge=0, le=2, description="ZeRO stage; a LoRA leaves nothing for stage 3 to shard."
    )


class Training(Model):
    rounds: int = Field(ge=1, le=10_000_000, description="Optimiser steps; each sees every task.")
    images_per_task: int = Field(default=24, ge=1, le=65536, description="Images per task and round, over all ranks.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        le=65536,
        description="Images that one rank computes at once; absent: as many as its GPU holds.",
    )
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="Seed of prompts, noise and adapter.")
    resolution: Resolution = Field(default_factory=Resolution, description="Size of the training images or videos.")
    guidance_scale: Guidance = Field(
        default=4.5,
        description="Guidance of the student, as the model's family has it; of Stable Diffusion 3, 1 is off.",
    )
    true_cfg_scale: Guidance = Field(
        default=1.0,
        description="Classifier-free guidance of the student beside guidanceScale, of FLUX.1 alone; at most 1 is off.",
    )
    method: Method = Field(
        default=Method.OPD,
        description="OPD: match the teachers along the student's own trajectories. SFT: learn the teachers' images. "
        "DMD2, TDM: make images, states of the trajectory, that have the teachers' distribution. RL: raise the tasks' "
        "rewards, without teachers.",
    )
    sampler: Sampler = Field(default_factory=Sampler, description="How the student rolls out its trajectory.")
    objective: Objective = Field(default_factory=Objective, description="What is minimised along the trajectory.")
    fake_score: FakeScore | None = Field(
        default=None, description="What DMD2 and TDM train beside the student; absent: all defaults."
    )
    reinforcement: StudentReinforcement | None = Field(
        default=None, description="How RL learns; its images a round are promptsPerRound x groupSize."
    )
    passes: Passes = Field(
        default=Passes.ONE,
        description="One: OPD trains the rollout's own graph. Two: it rolls out first, then trains. Equal gradients.",
    )
    optimizer: Optimizer = Field(default_factory=Optimizer, description="AdamW.")
    ema: Ema = Field(default_factory=Ema, description="Averaged weights: what is evaluated and served.")
    precision: Precision = Field(default=Precision.BF16, description="Arithmetic of the student's transformer.")
    gradient_checkpointing: bool | None = Field(
        default=None, description="Recompute activations to save memory; absent: where nothing else makes them fit."
    )
    nodes: int = Field(default=1, ge=1, le=1024, description="Training pods.")
    processes_per_node: int = Field(default=1, ge=1, le=64, description="Ranks per pod; one per GPU.")
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed, description="DeepSpeed engine.")
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="When to save, how much to keep.")
    pod: Pod = Field(default_factory=Pod, description="Training pods.")

    @property
    def scales(self) -> Scales:
        return Scales(self.guidance_scale, self.true_cfg_scale)

    @property
    def world_size(self) -> int:
        return self.nodes * self.processes_per_node
