"""From a spec to a run that learns from rewards: a teacher's, or that of a student without teachers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event

from opd_core.api.teachers import completed_for
from opd_core.api.training import Algorithm, ReinforcementLearning
from opd_core.api.types import Spec
from opd_core.diffusion.transitions import Transition, transitions
from opd_core.models.adapters import adapter_parameters
from opd_core.models.pipeline import Model

from opd_trainer.engine import World
from opd_trainer.methods.grpo import GRPO
from opd_trainer.methods.nft import OLD, DiffusionNFT
from opd_trainer.methods.reinforcement import Reinforcement
from opd_trainer.prompt_files import PromptRecord
from opd_trainer.rewards.registry import RewardFn, load_rewards
from opd_trainer.run import STUDENT, Run
from opd_trainer.setup import build
from opd_trainer.validation import validation_prompts


def build_student_run(spec: Spec, claims: Path, device: str, world: World) -> Run:
    """The run of a student that is trained by `spec.training.reinforcement`."""
    learning = spec.training.reinforcement
    assert learning is not None
    images = {"images_per_task": learning.images_per_round}
    spec = spec.model_copy(update={"training": spec.training.model_copy(update=images)})
    settings = completed_for(learning, spec.training.sampler.steps)
    # First of all: a wrong name ends here and not at the first image.
    hurry = Event()
    rewards = load_rewards(spec, device, hurry)
    prompts = validation_prompts(spec, claims) if spec.evaluation.every_rounds is not None else {}
    return build_reinforcement(
        spec, claims, device, world, settings, prompts, rewards, hurry, rounds_per_turn=learning.rounds_per_turn
    )


def build_reinforcement(
    spec: Spec,
    claims: Path,
    device: str,
    world: World,
    settings: ReinforcementLearning,
    prompts: Mapping[str, Sequence[PromptRecord]],
    rewards: Mapping[str, Mapping[str, RewardFn]],
    hurry: Event,
    *,
    rounds_per_turn: int = 1,
) -> Run:
    """As `setup.build`. `settings`: complete; what samples and trains is in spec.training."""
    nft = settings.algorithm == Algorithm.DIFFUSION_NFT

    def method(model: Model, path: Sequence[Transition]) -> Reinforcement:
        student, old = (adapter_parameters(model.transformer, name) for name in (STUDENT, OLD))
        algorithm = DiffusionNFT(settings, student, old) if nft else GRPO(settings)
        return Reinforcement(settings, algorithm, rewards, _quiet(spec, model), rounds_per_turn)

    frozen, size = [OLD] if nft else [], settings.group_size
    return build(spec, claims, device, world, method, prompts, rewards, hurry, frozen=frozen, at_once=size)


def _quiet(spec: Spec, model: Model) -> tuple[Transition, ...]:
    sampler, resolution = spec.training.sampler, spec.training.resolution
    return transitions(model.schedule(sampler.steps, resolution.width, resolution.height), sampler.solver, 0.0)
