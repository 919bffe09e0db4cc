"""From `kubectl apply` to an image, to a better student, past a worse one, and back to nothing."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from devcluster import images, node
from devcluster.control_plane import build
from opd_core.artifacts import read_student, read_trained_teacher

from .kit import Namespace, refusals, wait_until, writes
from .load import Load, connect, image
from .prometheus import Prometheus, prometheus
from .walk import Walker

pytestmark = pytest.mark.timeout(1500)

STAGES = ("Accepted", "TeachersReady", "Trained", "Evaluated", "Deployed", "Serving", "Ready")


# Panels of what the documented run does not have: a stochastic sampler, a validation between rounds, a teacher that is
# trained.
QUIET = {
    f"Diffusion OPD / Training / {panel}"
    for panel in (
        *("KL", "KL by solver step", "Reward of the validation"),
        *("Reward of the images", "Deviation among the images of a prompt", "Prompts without any"),
        "Policy ratios that were clipped",
    )
}


def url(namespace: Namespace, name: str) -> str:
    address = namespace.kubectl("get", "service", f"{name}-endpoint", "-o", "jsonpath={.spec.clusterIP}")
    return f"http://{address}:8000"


@pytest.fixture
def research(cluster: node.Node, world: Path, tmp_path: Path) -> Iterator[Namespace]:
    """The namespace of docs/first-distillation.md; volumes wait for its claims, since nobody makes any here."""
    for claim in ("tiny-world", "students"):
        folder = tmp_path / claim
        folder.mkdir()
        os.chown(folder, images.USER, images.USER)
        cluster.make_volume(claim, "research", folder)
    yield Namespace(cluster, "research", tmp_path / "students")
    cluster.kubectl("delete", "namespace", "research", "--wait=false", "--ignore-not-found")


@pytest.fixture
def watching(cluster: node.Node, operator: str, tmp_path: Path) -> Iterator[Prometheus]:
    with prometheus(cluster, tmp_path) as running:
        yield running


@pytest.fixture
def walker(research: Namespace, repository: Path, world: Path, tmp_path: Path, example: dict[str, Any]) -> Walker:
    """In a folder that looks like a checkout, with the shortened example."""
    folder = tmp_path / "checkout"
    (folder / "examples").mkdir(parents=True)
    (folder / "charts").symlink_to(repository / "charts")
    shutil.copytree(
        repository / "examples" / "tiny", folder / "examples" / "tiny", ignore=shutil.ignore_patterns("grids")
    )
    (folder / "examples" / "tiny" / "quickstart.yaml").write_text(yaml.safe_dump(example))
    kubeconfig = Path(shutil.copyfile(research.cluster.kubeconfig, tmp_path / "kubeconfig"))
    build("helm")  # beside kubectl
    path = f"{research.cluster.binaries}:{Path(sys.executable).parent}"
    return Walker(folder, kubeconfig, path, example["metadata"]["name"])


def test_the_documented_way_a_better_student_and_a_worse_one(
    research: Namespace, watching: Prometheus, example: dict[str, Any], walker: Walker, repository: Path
) -> None:
    namespace, name, docs = research, example["metadata"]["name"], repository / "docs"
    example["spec"]["training"]["nodes"] = 2
    example["spec"]["endpoint"]["rollout"] = {"steps": [50], "intervalSeconds": 5}
    (walker.folder / "examples" / "tiny" / "quickstart.yaml").write_text(yaml.safe_dump(example))
    walker.run(docs / "install.md", after="A namespace for distillations")
    assert walker.run(docs / "first-distillation.md", before="A better student") == 7
    for stage in STAGES:
        namespace.kubectl("wait", f"opd/{name}", f"--for=condition={stage}", "--timeout=10s")
    status = namespace.status(name)
    first = status["student"]["digest"]
    assert status["student"]["gatePassed"]
    assert status["progress"]["round"] == 10
    roles = {pod["metadata"]["labels"]["opd.dev/role"] for pod in namespace.pods()}
    assert roles == {"endpoint"}, "a GPU is held"

    client = connect(url(namespace, name))
    picture = image(client, name, 1)
    assert picture.startswith(b"\x89PNG")
    assert image(client, name, 1) == picture
    every_rank = namespace.opd("logs", name, "trainer", "--all-ranks")
    assert f"{name}-trainer-1-0-1-" in every_rank, "the second rank's log is kept, too"

    before = writes(namespace)
    time.sleep(15)
    assert writes(namespace) == before, "the operator writes although nothing changed"

    # A longer training: its student takes over under load, without a lost request.
    with Load(url(namespace, name), name) as load:
        wait_until(lambda: load.answered > 5, "the first answers")
        namespace.edit(name, training={"rounds": 16})
        namespace.until(name, "Deployed", "False", "Canary", seconds=600)
        assert namespace.status(name)["endpoint"]["stable"]["digest"] == first
        namespace.until(name, "Ready", "True", seconds=300)
        second = namespace.status(name)["student"]["digest"]
        assert namespace.status(name)["endpoint"]["stable"]["digest"] == second != first
        wait_until(lambda: len(namespace.pods("endpoint")) == 1, "the end of the old student")
        answered = load.answered
        wait_until(lambda: load.answered > answered + 5, "answers of the new student")
    assert load.lost == []
    assert image(client, name, 1) != picture

    # A single round: its student misses the gate, and the good one goes on serving.
    namespace.edit(name, training={"rounds": 1})
    message = namespace.until(name, "Failed", "True", "GateMissed", seconds=600)
    assert "aesthetic" in message
    assert namespace.condition(name, "Serving")[0] == "True"
    assert namespace.status(name)["endpoint"]["stable"]["digest"] == second
    assert {pod["metadata"]["labels"]["opd.dev/role"] for pod in namespace.pods()} == {"endpoint"}

    # It can be promoted all the same, by name.
    worse = namespace.status(name)["student"]["digest"]
    namespace.opd("promote", name, worse.removeprefix("sha256:")[:10])
    namespace.until(name, "Ready", "True")
    assert namespace.status(name)["endpoint"]["stable"]["digest"] == worse

    # Prometheus has seen all of it.
    assert watching.silent_panels(namespace.name, name) == QUIET
    assert watching.ever('ALERTS{alertname="OPDFailed"}')
    rules = [rule for group in watching.get("api/v1/rules")["groups"] for rule in group["rules"]]
    assert rules
    assert {rule["health"] for rule in rules} == {"ok"}

    # The other pages while it serves; the end of the first one deletes it.
    walker.run(docs / "install.md", before="A namespace for distillations")
    for page in ("upgrade.md", "concepts.md", "security.md", "runbook.md"):
        walker.run(docs / page)
    walker.run(docs / "first-distillation.md", after="Pausing, taking it home, the end")
    assert read_student(walker.folder / "student")[0].digest == worse
    wait_until(lambda: not namespace.children(), "everything to go")
    assert not refusals(namespace.cluster), "the chart's role lacks a verb"


def test_a_run_followed_with_opd_goes_on_from_its_checkpoint_after_a_suspension(
    namespace: Namespace, operator: str, example: dict[str, Any], tmp_path: Path
) -> None:
    example["spec"]["training"]["rounds"] = 20
    example["spec"]["endpoint"]["enabled"] = False
    name = example["metadata"]["name"]
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump(example))
    namespace.opd("submit", tmp_path / "distill.yaml")
    wait_until(lambda: namespace.rounds(name) >= 5, "five rounds", 300)
    namespace.opd("suspend", name)
    namespace.opd("wait", name, "--for=Suspended", "--timeout=2m")
    assert not namespace.pods()
    namespace.opd("resume", name)
    followed = namespace.opd("logs", name, "trainer", "-f")
    assert "continuing after round" in followed
    assert "student sha256:" in followed, "followed from before the pod's start to its end"
    assert "passed its gate" in namespace.opd("status", name, "-w"), "it ends with the run"
    assert namespace.status(name)["restarts"] == 0, "a suspension is no failure"
    assert "Pod/" in namespace.opd("events", name)
    namespace.opd("delete", name, "--wait", "--timeout=5m")
    assert not namespace.pods()


def test_pods_train_a_teacher_from_the_base_which_then_teaches(
    namespace: Namespace, operator: str, example: dict[str, Any]
) -> None:
    """A change of the distillation trains the student again, and not the teacher."""
    spec = example["spec"]
    spec["endpoint"]["enabled"] = False
    spec["evaluation"].update(promptsPerTask=4, gate=[])
    spec["training"].update(rounds=4)
    spec["teachers"][2].pop("adapter")
    spec["teachers"][2].update(
        guidanceScale=1.0,
        training={
            "algorithm": "DiffusionNFT",
            "rounds": 3,
            "groupSize": 4,
            "promptsPerRound": 2,
            "sampler": {"steps": 4},
            "mustBeatBase": False,
        },
    )
    name = example["metadata"]["name"]
    namespace.apply(example)
    namespace.until(name, "TeachersTrained", "True", seconds=600)
    assert not namespace.pods("endpoint")
    namespace.until(name, "Evaluated", "True", seconds=600)
    (folder,) = (namespace.students / "opd-teachers").iterdir()
    teacher = read_trained_teacher(folder / "adapter")
    assert teacher is not None
    assert (teacher.name, teacher.round) == ("aesthetic", 3)
    log = (folder / "train" / "log.jsonl").stat().st_mtime_ns

    namespace.edit(name, training={"rounds": 3})
    wait_until(lambda: namespace.running("trainer"), "the new run's trainer", 600)
    assert namespace.condition(name, "TeachersTrained")[0] == "True"
    assert (folder / "train" / "log.jsonl").stat().st_mtime_ns == log
    namespace.opd("delete", name, "--wait", "--timeout=5m")
