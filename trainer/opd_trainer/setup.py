"""From a spec to everything that a round needs."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path
from threading import Event

import torch
from opd_core.api.training import FakeScore as FakeScoreSettings
from opd_core.api.training import Precision, Training
from opd_core.api.types import Placement, Spec
from opd_core.conditioning import Conditioning
from opd_core.diffusion.transitions import Transition, transitions
from opd_core.errors import InvalidError
from opd_core.models.adapter_file import AdapterFile, read_adapter_file
from opd_core.models.adapter_layers import fit
from opd_core.models.adapters import adapter_parameters, add_student_adapter, model_layers, start_adapter
from opd_core.models.merge import merge
from opd_core.models.pipeline import Model, load_model
from opd_core.models.preflight import model_notes, refuse, start_problems
from opd_core.models.teacher_files import TeacherFiles, teacher_files
from opd_core.precision import TORCH_DTYPES
from opd_core.roles import teacher_servers
from opd_core.teachers.agreement import check_identity, self_test
from opd_core.teachers.client import TeacherClient
from opd_core.teachers.grpc_client import connect
from opd_core.teachers.local import LocalTeachers
from opd_core.uris import resolve
from torch import Tensor

from opd_trainer.batches import Task, rank_rows
from opd_trainer.ema import Ema
from opd_trainer.encoders import PromptCache, encoders_on_device
from opd_trainer.engine import Engine, World, maximum
from opd_trainer.memory import Footprint, Plan, free_bytes, measure, plan
from opd_trainer.methods.distillation import FAKE_UPDATES, Distillation
from opd_trainer.methods.fake_score import FAKE, FakeScore
from opd_trainer.methods.method import Method
from opd_trainer.objectives.registry import branch_problems, find_objective, load_loss, step_weights
from opd_trainer.precision import GradientScale
from opd_trainer.prompt_files import PromptRecord
from opd_trainer.prompts import task_prompts
from opd_trainer.rewards.registry import RewardFn, load_rewards
from opd_trainer.run import STUDENT, Run
from opd_trainer.trajectories import student_prompts
from opd_trainer.validation import build_validation, validation_prompts

# What two answers to one question may differ by, relative to the answer; float16 on the wire is 3e-4 of it.
_ROUNDING = {Precision.FP32: 1e-3, Precision.FP16: 2e-3, Precision.BF16: 1e-2}
_PROMPT_CACHE_BYTES = 2 << 30


def build_run(spec: Spec, claims: Path, addresses: Sequence[str], device: str, world: World) -> Run:
    """The run of a distillation: as `build`, with the teachers connected."""
    training = spec.training
    trained = [FAKE] if training.method in FAKE_UPDATES else []
    branched = find_objective(training.objective.type).of_branches is not None

    def method(model: Model, path: Sequence[Transition]) -> Distillation:
        objective = training.objective
        refuse(list(branch_problems(spec, model.guidance)), "the objective")
        loss, weights = load_loss(objective, path), step_weights(objective, len(path))
        fake = fake_score(training, model) if trained else None
        return Distillation(loss, weights, open_teachers(spec, claims, addresses, device), fake, branched)

    validated = spec.evaluation.every_rounds is not None
    # First of all: a wrong name ends here and not at the first validation.
    hurry = Event()
    prompts, rewards = (validation_prompts(spec, claims), load_rewards(spec, device, hurry)) if validated else ({}, {})
    return build(spec, claims, device, world, method, prompts, rewards, hurry, trained=trained, branched=branched)


def fake_score(training: Training, model: Model) -> FakeScore:
    parameters = adapter_parameters(model.transformer, FAKE)
    settings = training.fake_score or FakeScoreSettings()
    optimizer = settings.optimizer or training.optimizer
    engine = Engine(parameters, optimizer, training.deepspeed.zero_stage)
    return FakeScore(engine, optimizer, settings.updates_per_round or FAKE_UPDATES[training.method])


def build(
    spec: Spec,
    claims: Path,
    device: str,
    world: World,
    make_method: Callable[[Model, Sequence[Transition]], Method],
    prompts: Mapping[str, Sequence[PromptRecord]],
    rewards: Mapping[str, Mapping[str, RewardFn]],
    hurry: Event,
    *,
    trained: Sequence[str] = (),
    frozen: Sequence[str] = (),
    at_once: int | None = None,
    branched: bool = False,
) -> Run:
    """Load the base, put the student on it, hand its parameters to DeepSpeed.

    Args:
        make_method: called with the model, the student on it, and the sampler's path.
        prompts: those of the validation, by task; none, and no `rewards`: there is no validation.
        hurry: of the rewards that are servers, for the run.
        trained, frozen: names of further adapters that begin as the student does.
        at_once: images that are computed together at most; None: all that one rank has in a round.
        branched: the student answers with both branches of guidance.
    """
    training = spec.training
    tasks = load_tasks(spec, claims)
    base = resolve(spec.model.uri, claims)
    parts = {"text", "transformer", *(["vae"] if rewards else [])}
    model = load_model(base, device=device, dtype=TORCH_DTYPES[training.precision], parts=parts)
    if world.rank == 0:
        for note in model_notes(spec, model):
            print(f"note: {note}", flush=True)
    path = sampler_path(spec, model)
    encode = cached_encoder(model, spec.model.max_sequence_length)
    with encoders_on_device(model):
        (negative,) = model.encode([""], spec.model.max_sequence_length, negative=True)
    validation = build_validation(spec, prompts, rewards, model) if prompts else None
    add_student(spec, model, claims, trained, frozen)
    parameters = adapter_parameters(model.transformer, STUDENT)
    all_trained = [each for name in (STUDENT, *trained) for each in adapter_parameters(model.transformer, name)]
    # Before DeepSpeed, whose own hooks must see gradients without their scale.
    scale = GradientScale(all_trained) if training.precision == Precision.FP16 else None
    engine = Engine(parameters, training.optimizer, training.deepspeed.zero_stage)
    ema = Ema(parameters, training.ema.decay)
    method = make_method(model, path)
    # After all that lives on the device.
    at_once = at_once or len(tasks) * training.images_per_task // world.size
    plan = plan_round(spec, model, negative, world, at_once, branched)
    return Run(
        training=training,
        tasks=tasks,
        model=model,
        path=path,
        method=method,
        encode=encode,
        negative=negative,
        scale=scale,
        engine=engine,
        ema=ema,
        world=world,
        plan=plan,
        batches=rank_rows(len(tasks), training.images_per_task, world.rank, world.size, plan.micro_batch_size),
        hurry=hurry,
        validation=validation,
    )


def plan_round(
    spec: Spec, model: Model, negative: Conditioning, world: World, images: int, branched: bool = False
) -> Plan:
    """How `images` of one rank are computed: what fits beside all that is on the device already, the same on all ranks;
    the student is on the model by now."""
    training = spec.training
    measured = measure(model, partial(student_graph, model, training, negative, branched=branched))
    # Equal on all ranks whatever their cards are: with ZeRO they meet at every backward pass.
    footprint = Footprint(*(int(maximum(float(part), world)) for part in astuple(measured)))
    room = free_bytes(model.device)
    if room is not None:
        room = -int(maximum(-float(room), world))
    chosen = plan(footprint, images, room, training.passes, training.micro_batch_size, training.gradient_checkpointing)
    if chosen.gradient_checkpointing:
        model.transformer.enable_gradient_checkpointing()
    if world.rank == 0:
        print(f"{images} images of a rank: {chosen}", flush=True)
    return chosen


def student_graph(
    model: Model, training: Training, prompt: Conditioning, images: int, branched: bool = False
) -> Tensor:
    """The student's answer to `images` images at the first solver step, with its graph: a velocity, or both branches of
    guidance."""
    shape = model.latent_shape(*training.resolution.size)
    x = torch.zeros((images, *shape), device=model.device)
    answer = model.branches if branched else model.velocity
    return answer(x, 1.0, student_prompts(model, training, [prompt] * images, prompt))


def load_tasks(spec: Spec, claims: Path) -> list[Task]:
    """In the order of the spec."""
    total = sum(teacher.weight for teacher in spec.teachers)
    return [
        Task(
            name=teacher.name,
            scales=teacher.scales,
            share=teacher.weight / total,
            prompts=task_prompts(teacher, spec.evaluation, claims).training,
        )
        for teacher in spec.teachers
    ]


def cached_encoder(model: Model, max_sequence_length: int) -> PromptCache:
    def encode(prompts: Sequence[str]) -> list[Conditioning]:
        with encoders_on_device(model):
            return model.encode(prompts, max_sequence_length)

    size = encode([""])[0].nbytes
    return PromptCache(encode, max(1024, _PROMPT_CACHE_BYTES // size))


def sampler_path(spec: Spec, model: Model) -> tuple[Transition, ...]:
    training = spec.training
    schedule = model.schedule(training.sampler.steps, training.resolution.width, training.resolution.height)
    return transitions(schedule, training.sampler.solver, training.sampler.noise_level)


def add_student(
    spec: Spec, model: Model, claims: Path, trained: Sequence[str] = (), frozen: Sequence[str] = ()
) -> None:
    """Put the trainable adapter on the base, with the numbers that it starts from, if there are some; float32 whatever
    the base is. `trained`, `frozen`: names of further adapters that begin as it does."""
    adapter = spec.student.adapter
    names = (*frozen, *trained, STUDENT)
    with student_start(spec, model, claims) as start:
        if start is not None:
            refuse(list(start_problems(adapter, start, model.family.targets)), "the student's start")
        for name in names:  # the student last: it is what the model computes with
            add_student_adapter(
                model.transformer,
                rank=adapter.rank,
                alpha=adapter.alpha,
                target_modules=adapter.target_modules or model.family.targets,
                seed=spec.training.seed,
                name=name,
            )
            for parameter in adapter_parameters(model.transformer, name):
                parameter.data = parameter.data.float()  # before it gets numbers that the base's precision would round
            if start is not None:
                start_adapter(model.transformer, start, name)
    for name in names:
        for parameter in adapter_parameters(model.transformer, name):
            parameter.requires_grad_(name not in frozen)


@contextmanager
def student_start(spec: Spec, model: Model, claims: Path) -> Iterator[AdapterFile | None]:
    """The LoRA that the student starts from, with the model's names of layers, readable inside; None: it starts as the
    base."""
    linear = model_layers(model.transformer)
    if spec.student.init_from_teachers:
        with tempfile.TemporaryDirectory() as mean:
            found = all_teachers(spec, claims).values()
            merge([fit(files, linear) for files in found if isinstance(files, AdapterFile)], Path(mean))
            yield read_adapter_file(Path(mean))
    elif spec.student.init_from:
        yield fit(read_adapter_file(resolve(spec.student.init_from, claims)), linear)
    else:
        yield None


def open_teachers(spec: Spec, claims: Path, addresses: Sequence[str], device: str) -> TeacherClient:
    """A client of the servers at `addresses`, or of teachers in this process, as the placement says."""
    if spec.teacher_serving.placement == Placement.IN_PROCESS:
        return LocalTeachers(
            resolve(spec.model.uri, claims),
            all_teachers(spec, claims),
            precision=spec.teacher_serving.precision,
            max_sequence_length=spec.model.max_sequence_length,
            device=device,
        )
    if not addresses:
        raise InvalidError(
            f"teacherServing.placement is {spec.teacher_serving.placement}, which needs --teachers HOST:PORT,...; "
            "give them, or use placement InProcess"
        )
    return connect(addresses)


def all_teachers(spec: Spec, claims: Path) -> dict[str, TeacherFiles]:
    """What the teachers are on disk, by name."""
    return {each.name: teacher_files(spec, each, partial(resolve, claims=claims)) for each in spec.teachers}


def agree(run: Run, teachers: TeacherClient, spec: Spec, claims: Path) -> None:
    """Check that the teachers are those of the spec, and that an answer does not depend on who else asks.

    Raises:
        RefusedError: with what differs.
    """
    check_identity(
        teachers,
        base=resolve(spec.model.uri, claims),
        teachers=all_teachers(spec, claims),
        max_sequence_length=spec.model.max_sequence_length,
    )
    resolution = spec.training.resolution
    shape = run.model.latent_shape(*resolution.size)
    prompt = run.encode(["a"])[0]
    rounding = _ROUNDING[spec.teacher_serving.precision]
    prompts = student_prompts(run.model, spec.training, [prompt], run.negative)

    @torch.no_grad()
    def student(latents: Tensor, sigma: float) -> Tensor:
        return run.model.velocity(latents.to(run.model.device), sigma, prompts).cpu()

    scales = {teacher.name: teacher.scales for teacher in spec.teachers}
    servers = dict.fromkeys(teacher_servers(spec)) or [()]  # in this process: one
    tried = [(holds or tuple(scales))[0] for holds in servers]
    self_test(teachers, scales, tried, shape, prompt, run.negative, student, rounding)
