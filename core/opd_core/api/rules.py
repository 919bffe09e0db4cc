"""Rules over several fields of a spec, for `opd validate`. Each has its counterpart for the API server in `cel`."""

from collections.abc import Callable, Iterator, Sequence

from opd_core.api import sentences
from opd_core.api.affinity import Affinity, LabelExpression, LabelSelector, NodeExpression
from opd_core.api.pod import EnvVar, Pod, Resources, Toleration, Volume, amount, devices
from opd_core.api.sentences import Problem, shown
from opd_core.api.teachers import FOLDER, completed, trainable_steps
from opd_core.api.training import (
    Algorithm,
    LearningRateSchedule,
    Method,
    ReinforcementLearning,
    Sampler,
    SamplerType,
    TeacherTraining,
    Training,
)
from opd_core.api.types import Spec

# What every pod has already: its own files, the spec, the claims, what the kernel shows.
RESERVED_PATHS = ("/tmp", "/dev", "/proc", "/sys", "/etc", "/opt/opd", "/usr", "/mnt/claims", "/var/run/secrets")  # noqa: S108
RESOURCES = ("cpu", "memory", "ephemeral-storage")  # without a domain in their name
MATCH_DISTRIBUTIONS = (Method.DMD2, Method.TDM)  # of student and teacher, by a fake score
POLICY_GRADIENTS = ("PPO", "PolicyGradient")
OF_BRANCHES = "PDM"  # compares both branches of guidance
NEED_NOISE = ("KL", *POLICY_GRADIENTS)  # objectives without a finite value at a step without noise
RENOISING = ("DDIM", "CPS")  # they give the last sigma, 0, no noise
PIXEL_MULTIPLE = 8  # every supported VAE scales by 8 or more; the model's own multiple is checked when it is loaded


def _unique_teachers(spec: Spec) -> Iterator[Problem]:
    seen: set[str] = set()
    for i, teacher in enumerate(spec.teachers):
        if teacher.name in seen:
            yield sentences.TAKEN.problem(f"spec.teachers[{i}].name", teacher.name)
        seen.add(teacher.name)


def _some_weight(spec: Spec) -> Iterator[Problem]:
    if sum(teacher.weight for teacher in spec.teachers) == 0:
        yield sentences.NO_WEIGHT.problem("spec.teachers", 0)


def _unique_rewards(spec: Spec) -> Iterator[Problem]:
    for i, teacher in enumerate(spec.teachers):
        if len(set(teacher.rewards)) < len(teacher.rewards):
            yield sentences.REWARD_TWICE.problem(f"spec.teachers[{i}].rewards", teacher.rewards)


def _start(spec: Spec) -> Iterator[Problem]:
    if not spec.student.init_from_teachers:
        return
    path = "spec.student.initFromTeachers"
    if spec.student.init_from:
        yield sentences.TWO_STARTS.problem(path, True)
    if without := [teacher.name for teacher in spec.teachers if teacher.model or not teacher.teaches]:
        yield sentences.NO_LORA.problem(path, True, teacher=without[0])
    elif len(spec.teachers) < 2:
        yield sentences.NO_MEAN.problem(path, True)


def _whole(spec: Spec) -> list[str]:
    """Names of the teachers that have a model of their own."""
    return [teacher.name for teacher in spec.teachers if teacher.model]


def _reward_servers(spec: Spec) -> Iterator[Problem]:
    known = {reward for teacher in spec.teachers for reward in teacher.rewards}
    names = [servers.reward for servers in spec.reward_servers]
    for i, name in enumerate(names):
        if name not in known:
            yield sentences.NO_ONES_REWARD.problem(f"spec.rewardServers[{i}].reward", name)
    if len(set(names)) < len(names):
        yield sentences.REWARD_TWICE.problem("spec.rewardServers", names)


def _resolution(spec: Spec) -> Iterator[Problem]:
    for side in ("width", "height"):
        pixels = getattr(spec.training.resolution, side)
        below = pixels - pixels % PIXEL_MULTIPLE
        if pixels != below:
            words = {"multiple": PIXEL_MULTIPLE, "below": below, "above": below + PIXEL_MULTIPLE}
            yield sentences.NOT_DIVISIBLE.problem(f"spec.training.resolution.{side}", pixels, **words)


def samplers(spec: Spec) -> Iterator[tuple[str, Sampler]]:
    """All that the spec states, each with its path."""
    yield "spec.training.sampler", spec.training.sampler
    yield "spec.evaluation.sampler", spec.evaluation.sampler
    for i, teacher in enumerate(spec.teachers):
        if teacher.training and teacher.training.sampler:
            yield f"spec.teachers[{i}].training.sampler", teacher.training.sampler


def _samplers(spec: Spec) -> Iterator[Problem]:
    for path, sampler in samplers(spec):
        if sampler.type == SamplerType.ODE and sampler.noise_level > 0:
            yield sentences.ODE_NOISE.problem(f"{path}.noiseLevel", sampler.noise_level)
        if sampler.type == SamplerType.SDE and sampler.noise_level == 0:
            yield sentences.SDE_NO_NOISE.problem(f"{path}.noiseLevel", sampler.noise_level)
        if sampler.type == SamplerType.SDE and sampler.solver == "DPM2":
            yield sentences.DPM2_SDE.problem(f"{path}.solver", sampler.solver)
        if sampler.solver in RENOISING and sampler.noise_level > 1:
            yield sentences.TOO_NOISY.problem(f"{path}.noiseLevel", sampler.noise_level)


def _objective(spec: Spec) -> Iterator[Problem]:
    sampler, objective = spec.training.sampler, spec.training.objective
    path, last = "spec.training.objective", sampler.steps - 1
    steps, weights = objective.trained_steps, objective.step_weights
    needs_noise = objective.type in NEED_NOISE
    if needs_noise and sampler.type == SamplerType.ODE:
        yield sentences.KL_ODE.problem(f"{path}.type", objective.type)
    last_is_left_out = (steps is not None and last not in steps) or (weights is not None and weights[-1] == 0)
    if needs_noise and sampler.type == SamplerType.SDE and sampler.solver in RENOISING and not last_is_left_out:
        yield sentences.KL_LAST.problem(f"{path}.trainedSteps", steps, last=last)
    for i, step in enumerate(steps or []):
        if step > last:
            yield sentences.NO_STEP.problem(f"{path}.trainedSteps[{i}]", step, last=last)
    if weights is not None:
        if steps is not None:
            yield sentences.STEPS_TWICE.problem(f"{path}.stepWeights", steps)
        if len(weights) != sampler.steps:
            yield sentences.STEP_WEIGHTS.problem(f"{path}.stepWeights", len(weights), steps=sampler.steps)
        if not any(weights):
            yield sentences.NO_STEP_WEIGHT.problem(f"{path}.stepWeights", 0)
        trained = sum(weight > 0 for weight in weights)
    else:
        trained = sampler.steps if steps is None else len(steps)
    if objective.steps_per_round is not None and objective.steps_per_round > trained:
        yield sentences.FEW_STEPS.problem(f"{path}.stepsPerRound", objective.steps_per_round, trained=trained)
    if objective.extrapolation != 1 and (whole := _whole(spec)):
        yield sentences.NO_BASE.problem(f"{path}.extrapolation", objective.extrapolation, teacher=whole[0])
    if objective.self_normalized and objective.type in (*POLICY_GRADIENTS, OF_BRANCHES):
        yield sentences.NOT_NORMALIZED.problem(f"{path}.selfNormalized", objective.self_normalized)


def _method(spec: Spec) -> Iterator[Problem]:
    training = spec.training
    if training.method in (Method.SFT, Method.RL) and training.objective.type == OF_BRANCHES:
        yield sentences.NO_BRANCHES.problem("spec.training.objective.type", training.objective.type)
    if training.method == Method.SFT and training.sampler.type == SamplerType.SDE:
        yield sentences.SFT_SDE.problem("spec.training.sampler.type", training.sampler.type.value)
    if training.method in MATCH_DISTRIBUTIONS:
        if training.objective.type != "X0":
            yield sentences.DMD_X0.problem("spec.training.objective.type", training.objective.type)
        if training.objective.self_normalized:
            yield sentences.DMD_NORMALIZED.problem("spec.training.objective.selfNormalized", True)
    elif training.fake_score is not None:
        yield sentences.NO_FAKE_SCORE.problem("spec.training.fakeScore", training.method.value)


def _teacher_training(spec: Spec) -> Iterator[Problem]:
    ranks = spec.training.world_size
    if spec.student.output.uri.rstrip("/").endswith(f"/{FOLDER}"):
        yield sentences.TEACHERS_FOLDER.problem("spec.student.output.uri", spec.student.output.uri)
    for i, teacher in enumerate(spec.teachers):
        given = {"adapter": teacher.adapter, "model": teacher.model, "training": teacher.training}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1 or (not named and spec.training.method != Method.RL):
            yield sentences.GIVEN_OR_MADE.problem(f"spec.teachers[{i}]", named)
        if teacher.training is None:
            continue
        path, training = f"spec.teachers[{i}].training", teacher.training
        sampler = completed(training).sampler
        assert sampler is not None
        yield from _learning(path, training, path, sampler, ranks)
        yield from _warmup(path, training)
        for j, each in enumerate(training.reward_weights):
            if each.reward not in teacher.rewards:
                words = {"rewards": shown(teacher.rewards)}
                yield sentences.NO_OWN_REWARD.problem(f"{path}.rewardWeights[{j}].reward", each.reward, **words)
        if not _weighs(training, teacher.rewards):
            yield sentences.NO_REWARD_WEIGHT.problem(f"{path}.rewardWeights", 0)


def _student_reinforcement(spec: Spec) -> Iterator[Problem]:
    learning, training = spec.training.reinforcement, spec.training
    path = "spec.training.reinforcement"
    if (learning is not None) != (training.method == Method.RL):
        yield sentences.RL_SETTINGS.problem(path, training.method.value)
    if learning is None:
        return
    yield from _learning(path, learning, "spec.training", training.sampler, training.world_size)
    known = {reward for teacher in spec.teachers for reward in teacher.rewards}
    for j, each in enumerate(learning.reward_weights):
        if each.reward not in known:
            yield sentences.NO_ONES_WEIGHT.problem(f"{path}.rewardWeights[{j}].reward", each.reward)
    if not all(_weighs(learning, teacher.rewards) for teacher in spec.teachers):
        yield sentences.NO_TASKS_WEIGHT.problem(f"{path}.rewardWeights", 0)


def _learning(
    path: str, learning: ReinforcementLearning, sampled: str, sampler: Sampler, ranks: int
) -> Iterator[Problem]:
    """What holds for teachers and student. `sampled`: the path of what has the sampler."""
    nft = learning.algorithm == Algorithm.DIFFUSION_NFT
    if nft and sampler.type == SamplerType.SDE:
        yield sentences.NFT_NOISE.problem(f"{sampled}.sampler.type", sampler.type.value)
    if not nft and sampler.type == SamplerType.ODE:
        yield sentences.GRPO_ODE.problem(f"{sampled}.sampler.type", sampler.type.value)
    if nft and learning.clip_range is not None:
        yield sentences.NFT_CLIP.problem(f"{path}.clipRange", learning.clip_range)
    steps = trainable_steps(sampler.steps)
    if learning.steps_per_image is not None and learning.steps_per_image > steps:
        yield sentences.FEW_TEACHER_STEPS.problem(f"{path}.stepsPerImage", learning.steps_per_image, steps=steps)
    prompts, updates = learning.prompts_per_round, learning.updates_per_round
    if prompts % updates:
        yield sentences.UPDATES.problem(f"{path}.updatesPerRound", updates, prompts=prompts)
    elif prompts // updates * learning.group_size % ranks:
        yield sentences.GROUP_RANKS.problem(f"{path}.groupSize", learning.group_size, ranks=ranks)
    rewards = [each.reward for each in learning.reward_weights]
    if len(set(rewards)) < len(rewards):
        yield sentences.REWARD_TWICE.problem(f"{path}.rewardWeights", rewards)


def _weighs(learning: ReinforcementLearning, rewards: Sequence[str]) -> bool:
    """Whether one of a task's rewards counts."""
    weights = {each.reward: each.weight for each in learning.reward_weights}
    return any(weights.get(reward, 1.0) for reward in rewards)


def _batches(spec: Spec) -> Iterator[Problem]:
    training = spec.training
    if training.method == Method.RL:
        return
    ranks, images = training.world_size, training.images_per_task
    if images % ranks:
        yield sentences.RANKS.problem("spec.training.imagesPerTask", images, ranks=ranks)
    elif training.micro_batch_size and images // ranks % training.micro_batch_size:
        path = "spec.training.microBatchSize"
        yield sentences.MICRO_BATCH.problem(path, training.micro_batch_size, images=images // ranks)


def _students_warmup(spec: Spec) -> Iterator[Problem]:
    yield from _warmup("spec.training", spec.training)


def _warmup(path: str, training: Training | TeacherTraining) -> Iterator[Problem]:
    optimizer, rounds = training.optimizer, training.rounds
    if optimizer.schedule == LearningRateSchedule.COSINE and optimizer.warmup_rounds >= rounds:
        yield sentences.WARMUP.problem(f"{path}.optimizer.warmupRounds", optimizer.warmup_rounds, rounds=rounds)


def _gate(spec: Spec) -> Iterator[Problem]:
    known = {teacher.name: teacher.rewards for teacher in spec.teachers}
    alone = {teacher.name for teacher in spec.teachers if not teacher.teaches}
    for i, rule in enumerate(spec.evaluation.gate):
        path = f"spec.evaluation.gate[{i}]"
        if rule.task not in known:
            yield sentences.NO_TASK.problem(f"{path}.task", rule.task, tasks=shown(list(known)))
        elif rule.reward not in known[rule.task]:
            words = {"task": rule.task, "rewards": shown(known[rule.task])}
            yield sentences.NO_REWARD.problem(f"{path}.reward", rule.reward, **words)
        elif rule.of_teacher is not None and rule.task in alone:
            yield sentences.NO_TEACHER.problem(f"{path}.ofTeacher", rule.of_teacher, task=rule.task)
        given = {"atLeast": rule.at_least, "ofTeacher": rule.of_teacher}
        named = [name for name, value in given.items() if value is not None]
        if len(named) != 1:
            yield sentences.ONE_LIMIT.problem(path, named)


def _autoscaling(spec: Spec) -> Iterator[Problem]:
    scaling = spec.endpoint.autoscaling
    if scaling and scaling.min_replicas > scaling.max_replicas:
        path = "spec.endpoint.autoscaling.minReplicas"
        yield sentences.REPLICA_RANGE.problem(path, scaling.min_replicas, most=scaling.max_replicas)
    if scaling and scaling.min_replicas == 1 and spec.endpoint.rollout.max_surge == 0:
        path = "spec.endpoint.autoscaling.minReplicas"
        yield sentences.NO_SURGE_SCALED.problem(path, scaling.min_replicas)


def _rollout(spec: Spec) -> Iterator[Problem]:
    rollout = spec.endpoint.rollout
    if rollout.steps != sorted(set(rollout.steps)):
        yield sentences.RISING.problem("spec.endpoint.rollout.steps", rollout.steps)
    if rollout.max_surge == 0 and spec.endpoint.replicas == 1:
        yield sentences.NO_SURGE.problem("spec.endpoint.rollout.maxSurge", rollout.max_surge)


def _pods(spec: Spec) -> Iterator[Problem]:
    for role, pod in (
        ("teacherServing", spec.teacher_serving.pod),
        ("training", spec.training.pod),
        ("evaluation", spec.evaluation.pod or Pod()),
        ("endpoint", spec.endpoint.pod),
    ):
        path = f"spec.{role}.pod"
        yield from _variables(f"{path}.env", pod.env)
        yield from _volumes(f"{path}.volumes", pod.volumes)
        if pod.affinity:
            yield from _affinity(f"{path}.affinity", pod.affinity)
        for i, toleration in enumerate(pod.tolerations):
            yield from _toleration(f"{path}.tolerations[{i}]", toleration)
        yield from _resources(f"{path}.resources", pod.resources)


def _variables(path: str, variables: Sequence[EnvVar]) -> Iterator[Problem]:
    seen: set[str] = set()
    for i, variable in enumerate(variables):
        if variable.name in seen:
            yield sentences.VARIABLE_TWICE.problem(f"{path}[{i}].name", variable.name)
        if variable.value and variable.secret_key_ref:
            yield sentences.TWO_VALUES.problem(f"{path}[{i}].value", variable.value)
        seen.add(variable.name)


def _volumes(path: str, volumes: Sequence[Volume]) -> Iterator[Problem]:
    seen: set[str] = set()
    for i, volume in enumerate(volumes):
        sources = {"claim": volume.claim, "secret": volume.secret, "configMap": volume.config_map}
        named = [name for name, source in sources.items() if source is not None]
        if len(named) != 1:
            yield sentences.ONE_SOURCE.problem(f"{path}[{i}]", named)
        place = volume.mount_path
        if any(f"{place}/".startswith(f"{taken}/") or f"{taken}/".startswith(f"{place}/") for taken in RESERVED_PATHS):
            yield sentences.RESERVED_PATH.problem(f"{path}[{i}].mountPath", place)
        if place in seen:
            yield sentences.PATH_TWICE.problem(f"{path}[{i}].mountPath", place)
        seen.add(place)


def _affinity(path: str, affinity: Affinity) -> Iterator[Problem]:
    required, preferred = (f"{kind}DuringSchedulingIgnoredDuringExecution" for kind in ("required", "preferred"))
    if node := affinity.node_affinity:
        place, needed = f"{path}.nodeAffinity", node.required_during_scheduling_ignored_during_execution
        for i, term in enumerate(needed.node_selector_terms if needed else []):
            yield from _expressions(f"{place}.{required}.nodeSelectorTerms[{i}]", term.match_expressions)
        for i, wish in enumerate(node.preferred_during_scheduling_ignored_during_execution):
            yield from _expressions(f"{place}.{preferred}[{i}].preference", wish.preference.match_expressions)
    for name, pods in (("podAffinity", affinity.pod_affinity), ("podAntiAffinity", affinity.pod_anti_affinity)):
        if pods is None:
            continue
        for i, term_ in enumerate(pods.required_during_scheduling_ignored_during_execution):
            yield from _selector(f"{path}.{name}.{required}[{i}]", term_.label_selector)
        for i, wish_ in enumerate(pods.preferred_during_scheduling_ignored_during_execution):
            place = f"{path}.{name}.{preferred}[{i}].podAffinityTerm"
            yield from _selector(place, wish_.pod_affinity_term.label_selector)


def _selector(path: str, selector: LabelSelector) -> Iterator[Problem]:
    yield from _expressions(f"{path}.labelSelector", selector.match_expressions)


def _expressions(path: str, expressions: Sequence[NodeExpression | LabelExpression]) -> Iterator[Problem]:
    for i, expression in enumerate(expressions):
        at, values, words = f"{path}.matchExpressions[{i}].values", expression.values, {"operator": expression.operator}
        if expression.operator in ("Exists", "DoesNotExist") and values:
            yield sentences.NO_VALUES.problem(at, values, **words)
        if expression.operator in ("In", "NotIn") and not values:
            yield sentences.SOME_VALUES.problem(at, values, **words)
        if expression.operator in ("Gt", "Lt") and (len(values) != 1 or not values[0].isdecimal()):
            yield sentences.ONE_NUMBER.problem(at, values, **words)


def _toleration(path: str, toleration: Toleration) -> Iterator[Problem]:
    if toleration.operator == "Exists" and toleration.value:
        yield sentences.EXISTS_VALUE.problem(f"{path}.value", toleration.value)
    if toleration.operator == "Equal" and not toleration.key:
        yield sentences.NO_KEY.problem(f"{path}.key", toleration.key)
    if toleration.toleration_seconds is not None and toleration.effect != "NoExecute":
        yield sentences.NO_WAIT.problem(f"{path}.tolerationSeconds", toleration.toleration_seconds)


def _resources(path: str, resources: Resources) -> Iterator[Problem]:
    for kind, named in (("requests", resources.requests), ("limits", resources.limits)):
        if unknown := [name for name in named if name not in RESOURCES and "/" not in name]:
            yield sentences.NO_RESOURCE.problem(f"{path}.{kind}", unknown, known=", ".join(RESOURCES))
    requests, limits = resources.requests, resources.limits
    asked = {name: devices(request) for name, request in requests.items() if "/" in name}
    if wrong := [name for name, number in asked.items() if number is None or number != devices(limits.get(name))]:
        yield sentences.DEVICE.problem(f"{path}.requests", wrong)
    both = [name for name in RESOURCES if name in requests and name in limits]
    if above := [name for name in both if amount(requests[name]) > amount(limits[name])]:
        yield sentences.ABOVE_LIMIT.problem(f"{path}.requests", above)


RULES: tuple[Callable[[Spec], Iterator[Problem]], ...] = (
    _unique_teachers,
    _some_weight,
    _unique_rewards,
    _start,
    _reward_servers,
    _resolution,
    _samplers,
    _objective,
    _method,
    _teacher_training,
    _student_reinforcement,
    _batches,
    _students_warmup,
    _gate,
    _autoscaling,
    _rollout,
    _pods,
)


def problems(spec: Spec) -> list[Problem]:
    """Every broken rule of a spec whose single fields are valid."""
    return [problem for rule in RULES for problem in rule(spec)]
