"""How each role is started, said once: the operator wraps a recipe into a Pod, `opd run` into a process."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath

from opd_core.api.pod import amount
from opd_core.api.training import Method
from opd_core.api.types import OPDDistillation, Placement, Spec

# Rewards of ours whose weights come from the Hugging Face hub, wherever they are computed.
HUB_REWARDS = frozenset(
    {
        *("aesthetic", "clipscore", "geneval", "geneval-flow-grpo", "geneval-partial"),
        *("hpsv2", "image-reward", "pickscore"),
    }
)

POD_IP = "OPD_POD_IP"  # environment of a teacher server in a pod: the address that others reach the pod at


@dataclass(frozen=True)
class Probe:
    """A command that ends with 0, or an HTTP path that answers 200 on `port`, when the role is able to work.

    Asked every `period` seconds; no answer within `timeout` seconds is a no, and `failures` of them in a row count.
    """

    argv: tuple[str, ...] = ()
    http_path: str = ""
    port: str = ""
    timeout: int = 5
    period: int = 5
    failures: int = 1


@dataclass(frozen=True)
class Recipe:
    """One process of a role: what to run, its environment and named ports, how to see that it works, and that it still
    does: a role without `liveness` is judged by its exit alone."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    readiness: Probe | None = None
    liveness: Probe | None = None


@dataclass(frozen=True)
class Place:
    """Where the roles of one run find things; the same names in a pod and on one machine.

    Args:
        python: interpreter; spec: as JSON; claims: folder with one entry per claim; work: the run's folder.
        host: address to listen on; device: auto, cpu or cuda; threads: CPU threads of each process, 0 leaves it open.
    """

    python: str
    spec: PurePath
    claims: PurePath
    work: PurePath
    host: str = "127.0.0.1"
    device: str = "auto"
    threads: int = 0

    @property
    def env(self) -> dict[str, str]:
        # Threads that spin while they wait take the cores from whoever they wait for.
        # The libraries' remarks about optional packages would fill the last lines that a failure is explained with.
        common = {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1", "TRANSFORMERS_VERBOSITY": "error"}
        return {**common, "OMP_NUM_THREADS": str(self.threads)} if self.threads else common

    @property
    def student(self) -> PurePath:
        return self.work / "student"

    @property
    def evaluation(self) -> PurePath:
        return self.work / "evaluation"


def teacher_servers(spec: Spec) -> tuple[tuple[str, ...], ...]:
    """Which teachers each server holds, all on one model; () is all of the spec's, on the base. No server where
    teachers live inside the trainer, or where nobody asks them."""
    serving = spec.teacher_serving
    if serving.placement == Placement.IN_PROCESS or spec.training.method == Method.RL:
        return ()
    by_model: dict[str, list[str]] = {}
    for teacher in spec.teachers:
        by_model.setdefault(teacher.model.uri if teacher.model else "", []).append(teacher.name)
    groups: Sequence[tuple[str, ...]] = [()] if set(by_model) == {""} else [tuple(of) for of in by_model.values()]
    if serving.placement == Placement.DEDICATED:
        groups = [(teacher.name,) for teacher in spec.teachers]
    return tuple(group for group in groups for _ in range(serving.replicas))


def no_servers(spec: Spec) -> str:
    """Why a spec has none, in words."""
    return (
        "the student learns from rewards" if spec.training.method == Method.RL else "teachers live inside the trainer"
    )


def teacher_server(place: Place, name: str, teachers: Sequence[str], ports: Mapping[str, int]) -> Recipe:
    """A Triton server of `teachers` (empty: all). `ports`: grpc, http (of the loopback), metrics."""
    argv = (
        place.python,
        "-m",
        "opd_serving.teacher",
        *_common(place),
        f"--repository={place.work / name}",
        f"--host={place.host}",
        *(f"--{port}-port={ports[port]}" for port in ("grpc", "http", "metrics")),
        f"--device={place.device}",
        *(f"--teacher={teacher}" for teacher in teachers),
    )
    probe = (place.python, "-m", "opd_serving.teacher.probe", f"--address=127.0.0.1:{ports['http']}")
    ready = Probe(argv=(*probe, "--timeout=5"), timeout=10, failures=3)
    # One row waits behind whole batches: slow is not dead.
    alive = Probe(argv=(*probe, "--timeout=60"), timeout=65, period=15, failures=3)
    return Recipe(name, argv, place.env, ports, ready, alive)


def trainer(place: Place, teachers: Sequence[str], metrics_port: int, *, tensorboard: bool = False) -> Recipe:
    """The ranks of one node under torchrun. `teachers`: gRPC addresses; none where they live inside the trainer."""
    argv = (
        place.python,
        "-m",
        "opd_trainer.launch",
        *_common(place),
        f"--work={place.work}",
        *([f"--teachers={','.join(teachers)}"] if teachers else []),
        f"--metrics-port={metrics_port}",
        f"--metrics-host={place.host}",
        f"--device={place.device}",
        *(["--tensorboard"] if tensorboard else []),
    )
    env = {**place.env, "DS_ACCELERATOR": "cpu"} if place.device == "cpu" else place.env
    return Recipe("trainer", argv, env, {"metrics": metrics_port}, Probe(http_path="/healthz", port="metrics"))


def teacher_trainer(place: Place, teacher: str, metrics_port: int) -> Recipe:
    """The ranks of one node that train a teacher by `spec.teachers[].training`, in its own folder in the output's claim
    (`opd_core.api.teachers.teacher_folder`). Where it is trained already they end at once."""
    argv = (
        place.python,
        "-m",
        "opd_trainer.launch",
        "teach",
        *_common(place),
        f"--teacher={teacher}",
        f"--metrics-port={metrics_port}",
        f"--metrics-host={place.host}",
        f"--device={place.device}",
    )
    env = {**place.env, "DS_ACCELERATOR": "cpu"} if place.device == "cpu" else place.env
    ready = Probe(http_path="/healthz", port="metrics")
    return Recipe(f"teach-{teacher}", argv, env, {"metrics": metrics_port}, ready)


def evaluator_processes(spec: Spec) -> int:
    """Ranks of the evaluator, each with a device of its own: as many as a training pod has, or as `evaluation.pod` asks
    for."""
    if spec.evaluation.pod is None:
        return spec.training.processes_per_node
    # Only devices have a domain in their name.
    limits = spec.evaluation.pod.resources.limits
    return max((int(amount(each)) for name, each in limits.items() if "/" in name), default=1)


def evaluator(place: Place) -> Recipe:
    """Scores base, teachers and the student of this run, by `evaluator_processes` ranks."""
    argv = (
        place.python,
        "-m",
        "opd_trainer.launch",
        "evaluate",
        *_common(place),
        f"--student={place.student}",
        f"--output={place.evaluation}",
        f"--device={place.device}",
    )
    return Recipe("evaluator", argv, place.env)


def endpoint(
    place: Place,
    distillation: OPDDistillation,
    port: int,
    metrics_port: int,
    *,
    leave_seconds: int = 0,
    api_keys: PurePath | None = None,
) -> Recipe:
    """The image API on the student of this run, on `port`; its health and metrics on another, so that the API can be
    published alone.

    Args:
        leave_seconds: until load balancers have noticed that it ends. api_keys: file of the keys' digests, if any.
    """
    settings = distillation.spec.endpoint
    argv = (
        place.python,
        "-m",
        "opd_serving.endpoint",
        f"--student={place.student}",
        f"--claims={place.claims}",
        f"--host={place.host}",
        f"--port={port}",
        f"--metrics-port={metrics_port}",
        *([f"--api-keys={api_keys}"] if api_keys else []),
        f"--served-name={distillation.metadata.name}",
        f"--max-queued-images={settings.max_queued_images}",
        f"--max-batch-size={settings.max_batch_size}",
        *([f"--fixed-rows={settings.fixed_rows}"] if settings.fixed_rows else []),
        *([f"--max-pixels={settings.max_pixels}"] if settings.max_pixels else []),
        f"--leave-seconds={leave_seconds}",
        f"--precision={settings.precision.value}",
        f"--device={place.device}",
    )
    ready = Probe(http_path="/readyz", port="metrics")
    alive = Probe(http_path="/livez", port="metrics", timeout=10, period=15, failures=3)
    return Recipe("endpoint", argv, place.env, {"http": port, "metrics": metrics_port}, ready, alive)


def _common(place: Place) -> tuple[str, str]:
    return f"--spec={place.spec}", f"--claims={place.claims}"
