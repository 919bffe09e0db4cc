"""Recipes say exactly what the real programs understand."""

import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from opd_core import roles
from opd_core.api.load import check_spec, dump_spec, load_spec
from opd_core.api.training import Method
from opd_core.api.types import OPDDistillation
from opd_core.exit_codes import ExitCode
from opd_serving.endpoint import __main__ as endpoint_program
from opd_serving.teacher import arguments as teacher_arguments
from opd_serving.teacher import probe
from opd_trainer import arguments as trainer_arguments

POD = roles.Place(
    python="python3",
    spec=PurePosixPath("/etc/opd/spec.json"),
    claims=PurePosixPath("/mnt/claims"),
    work=PurePosixPath("/mnt/work"),
    host="::",
    device="cuda",
)
PORTS = {"grpc": 8001, "http": 8000, "metrics": 8002}


@pytest.fixture(scope="module")
def distillation(repository: Path) -> OPDDistillation:
    return load_spec(repository / "examples" / "tiny" / "distill.yaml")


def options(recipe: roles.Recipe, module: str) -> list[str]:
    assert recipe.argv[:3] == ("python3", "-m", module)
    return list(recipe.argv[3:])


def test_teacher_server() -> None:
    recipe = roles.teacher_server(POD, "teachers-0", ["ocr", "geneval"], PORTS)
    parsed = teacher_arguments.parse(options(recipe, "opd_serving.teacher"))
    assert (parsed.spec, parsed.claims) == (Path("/etc/opd/spec.json"), Path("/mnt/claims"))
    assert parsed.repository == Path("/mnt/work/teachers-0")
    assert (parsed.host, parsed.grpc_port, parsed.http_port, parsed.metrics_port) == ("::", 8001, 8000, 8002)
    assert (parsed.device, parsed.teacher) == ("cuda", ["ocr", "geneval"])
    assert recipe.ports == PORTS


def test_teacher_probes_ask_the_server_itself(free_port) -> None:
    recipe = roles.teacher_server(POD, "teachers-0", [], {**PORTS, "http": free_port()})
    for check in (recipe.readiness, recipe.liveness):
        assert check
        assert check.argv[:3] == ("python3", "-m", "opd_serving.teacher.probe")
        assert probe.main(list(check.argv[3:])) == ExitCode.UNAVAILABLE  # understood, and nobody answers
        assert float(check.argv[-1].removeprefix("--timeout=")) < check.timeout
    assert recipe.liveness
    assert recipe.readiness
    assert recipe.liveness.timeout > 5 * recipe.readiness.timeout


def test_trainer() -> None:
    recipe = roles.trainer(POD, ["teachers-0:8001", "teachers-1:8001"], 9090)
    parsed = trainer_arguments.trainer().parse_args(options(recipe, "opd_trainer.launch"))
    assert (parsed.spec, parsed.claims, parsed.work) == (POD.spec, POD.claims, POD.work)
    assert parsed.teachers == "teachers-0:8001,teachers-1:8001"
    assert (parsed.metrics_host, parsed.metrics_port, parsed.device) == ("::", 9090, "cuda")
    assert "DS_ACCELERATOR" not in recipe.env
    assert not parsed.tensorboard
    curves = roles.trainer(POD, [], 9090, tensorboard=True)
    assert trainer_arguments.trainer().parse_args(options(curves, "opd_trainer.launch")).tensorboard


def test_trainer_with_teachers_inside_and_no_gpu() -> None:
    here = roles.Place("python3", POD.spec, POD.claims, POD.work, device="cpu", threads=3)
    recipe = roles.trainer(here, [], 9090)
    assert trainer_arguments.trainer().parse_args(options(recipe, "opd_trainer.launch")).teachers == ""
    assert recipe.env["DS_ACCELERATOR"] == "cpu"
    assert recipe.env["OMP_NUM_THREADS"] == "3"


def test_evaluator() -> None:
    recipe = roles.evaluator(POD)
    assert recipe.argv[:4] == ("python3", "-m", "opd_trainer.launch", "evaluate")
    parsed = trainer_arguments.evaluator().parse_args(list(recipe.argv[4:]))
    assert (parsed.student, parsed.output) == (POD.work / "student", POD.work / "evaluation")
    assert parsed.models == "base,teachers,student"
    assert parsed.device == "cuda"


def test_the_evaluator_has_a_rank_for_every_gpu_of_its_pod(distillation: OPDDistillation) -> None:
    content = dump_spec(distillation)
    content["spec"]["training"] |= {"processesPerNode": 8, "imagesPerTask": 8}
    assert roles.evaluator_processes(check_spec(content).spec) == 8
    content["spec"]["evaluation"]["pod"] = {"resources": {"limits": {"nvidia.com/gpu": "2", "memory": "64Gi"}}}
    assert roles.evaluator_processes(check_spec(content).spec) == 2
    content["spec"]["evaluation"]["pod"] = {"image": "here:1"}
    assert roles.evaluator_processes(check_spec(content).spec) == 1


def test_endpoint(distillation: OPDDistillation) -> None:
    recipe = roles.endpoint(POD, distillation, 8080, 9090, api_keys=PurePosixPath("/etc/keys/keys"))
    parsed = endpoint_program.parser().parse_args(options(recipe, "opd_serving.endpoint"))
    assert (parsed.student, parsed.claims) == ("/mnt/work/student", POD.claims)
    assert (parsed.host, parsed.port, parsed.metrics_port, parsed.device) == ("::", 8080, 9090, "cuda")
    assert str(parsed.api_keys) == "/etc/keys/keys"
    assert parsed.served_name == ["tiny-three-tasks"]
    assert recipe.readiness
    assert recipe.liveness
    assert recipe.readiness.port == recipe.liveness.port == "metrics"
    assert "--api-keys" not in " ".join(roles.endpoint(POD, distillation, 8080, 9090).argv)


def test_rows_and_pixels_of_the_endpoint_are_the_spec_s_and_its_own_where_that_says_nothing(
    distillation: OPDDistillation,
) -> None:
    """And a pod of an earlier version, which knew neither, stays what it is."""
    assert not {"fixed_rows", "max_pixels"} & distillation.spec.endpoint.model_fields_set
    silent = roles.endpoint(POD, distillation, 8080, 9090)
    assert not [word for word in silent.argv if word.startswith(("--fixed-rows", "--max-pixels"))]
    content = dump_spec(distillation)
    content["spec"]["endpoint"].update(fixedRows=8, maxPixels=1024)
    recipe = roles.endpoint(POD, check_spec(content), 8080, 9090)
    settings = endpoint_program.settings(endpoint_program.parser().parse_args(options(recipe, "opd_serving.endpoint")))
    assert (settings.limits.fixed_rows, settings.max_pixels) == (8, 1024)


@pytest.mark.parametrize(
    ("placement", "replicas", "groups"),
    [
        ("Shared", 1, ((),)),
        ("Shared", 2, ((), ())),
        ("Dedicated", 1, (("geneval",), ("ocr",), ("aesthetic",))),
        ("Dedicated", 2, (("geneval",), ("geneval",), ("ocr",), ("ocr",), ("aesthetic",), ("aesthetic",))),
        ("InProcess", 1, ()),
    ],
)
def test_teachers_by_placement(
    placement: str, replicas: int, groups: tuple[tuple[str, ...], ...], distillation: OPDDistillation
) -> None:
    serving = distillation.spec.teacher_serving.model_copy(update={"placement": placement, "replicas": replicas})
    assert roles.teacher_servers(distillation.spec.model_copy(update={"teacher_serving": serving})) == groups


def test_nobody_serves_teachers_to_a_student_that_learns_from_rewards(distillation: OPDDistillation) -> None:
    training = distillation.spec.training.model_copy(update={"method": Method.RL})
    spec = distillation.spec.model_copy(update={"training": training})
    assert roles.teacher_servers(spec) == ()
    assert "rewards" in roles.no_servers(spec)


@pytest.mark.parametrize(
    ("models", "placement", "groups"),
    [
        ({"ocr": "pvc://a/ocr"}, "Shared", (("geneval", "aesthetic"), ("ocr",))),
        ({"geneval": "pvc://a/big", "ocr": "pvc://a/big"}, "Shared", (("geneval", "ocr"), ("aesthetic",))),
        (dict.fromkeys(("geneval", "ocr", "aesthetic"), "pvc://a/big"), "Shared", (("geneval", "ocr", "aesthetic"),)),
        ({"ocr": "pvc://a/ocr"}, "Dedicated", (("geneval",), ("ocr",), ("aesthetic",))),
        ({"ocr": "pvc://a/ocr"}, "InProcess", ()),
    ],
)
def test_a_server_computes_with_one_model(
    models: dict[str, str], placement: str, groups: tuple[tuple[str, ...], ...], distillation: OPDDistillation
) -> None:
    content = dump_spec(distillation)
    content["spec"]["teacherServing"]["placement"] = placement
    for teacher in content["spec"]["teachers"]:
        if uri := models.get(teacher["name"]):
            teacher["model"] = {"uri": uri}
            del teacher["adapter"]
    assert roles.teacher_servers(check_spec(content).spec) == groups


def test_recipes_need_no_torch() -> None:
    source = (
        "import sys, opd_core.roles, opd_core.stages; assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0
