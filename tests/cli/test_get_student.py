"""`opd get-student`: the very student, whole or not at all."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from opd_cli.cluster import Distillations
from opd_cli.cluster.download import find_source
from opd_core.artifacts import CARD, WEIGHTS, SamplingDefaults, Source, StudentManifest, read_student, write_student
from opd_core.errors import InvalidError, UnavailableError
from opd_core.exit_codes import ExitCode
from opd_core.model_card import model_card

from tests.cli.conftest import POD, Done, say
from tests.cli.kubelet import Kubelet
from tests.operator.live import Api

Opd = Callable[..., Done]


@pytest.fixture
def student(tmp_path: Path) -> StudentManifest:
    """In the folder that is mounted as the claim `students`."""

    def weights(folder: Path) -> Path:
        file = folder / WEIGHTS
        file.write_bytes(bytes(range(256)) * 1000)
        return file

    def describe(digest: str) -> StudentManifest:
        sampling = SamplingDefaults(width=32, height=32, steps=4, guidance_scale=4.5, max_sequence_length=10)
        base = Source(uri="pvc://tiny-world/base", fingerprint="f")
        return StudentManifest(
            name="tiny", digest=digest, base=base, teachers=[], spec_digest="s", round=7, sampling=sampling, license="x"
        )

    return write_student(tmp_path / "claim" / "tiny.runs" / "k" / "student", weights, describe)


@pytest.fixture
def served(api: Api, node: tuple[str, Kubelet], student: StudentManifest, tmp_path: Path) -> Kubelet:
    """An object with a student, and an endpoint pod that mounts it."""
    api.submit()
    newest = {"digest": student.digest, "uri": "pvc://students/tiny.runs/k/student"}
    say(api, conditions={"Trained": ("True", "Completed")}, student=newest)
    container = {
        **POD["spec"]["containers"][0], "name": "endpoint", "command": [sys.executable, "-m", "opd_serving.endpoint"],
        "volumeMounts": [{"name": "claim-0", "mountPath": str(tmp_path / "claim"), "readOnly": True}],
    }  # fmt: skip
    volumes = [{"name": "tmp", "emptyDir": {}}, {"name": "claim-0", "persistentVolumeClaim": {"claimName": "students"}}]
    labels = {"opd.dev/distillation": "tiny", "opd.dev/role": "endpoint"}
    spec = {**POD["spec"], "nodeName": node[0], "containers": [container], "volumes": volumes}
    api.call("POST", api.path("pods"), {"metadata": {"name": "tiny-endpoint", "labels": labels}, "spec": spec})
    api.patch("pods", "tiny-endpoint", {"status": {"phase": "Running"}}, "status")
    return node[1]


def test_the_newest_student_is_copied(opd: Opd, served: Kubelet, student: StudentManifest, tmp_path: Path) -> None:
    target = tmp_path / "a copy" / "tiny"
    card = tmp_path / "claim" / "tiny.runs" / "k" / "student" / CARD
    card.write_text("what the pod says")
    done = opd("get-student", "tiny", "--out", target)
    assert (done.code, done.out) == (0, f"{target}: student {student.digest}, round 7\n")
    manifest, weights = read_student(target)
    assert manifest == student
    assert weights.read_bytes() == bytes(range(256)) * 1000
    assert (target / CARD).read_text() == model_card(student)
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]
    done = opd("get-student", "tiny", "--out", target)
    assert (done.code, "is there already" in done.err) == (ExitCode.INVALID, True)


def test_a_student_can_be_chosen(opd: Opd, served: Kubelet, student: StudentManifest, tmp_path: Path) -> None:
    start = student.digest.removeprefix("sha256:")[:7]
    assert opd("get-student", "tiny", start, "--out", tmp_path / "copy").code == 0
    assert "no student of tiny" in opd("get-student", "tiny", "0000000", "--out", tmp_path / "other").err


def test_another_student_in_the_folder_is_no_copy(opd: Opd, api: Api, served: Kubelet, tmp_path: Path) -> None:
    say(api, student={"digest": "sha256:" + "c" * 64, "uri": "pvc://students/tiny.runs/k/student"})
    done = opd("get-student", "tiny", "--out", tmp_path / "copy")
    assert done.code == ExitCode.REFUSED
    assert f"and sha256:{'c' * 64} was asked for" in done.err
    assert not (tmp_path / "copy").exists()


def test_a_manifest_that_names_another_base_is_no_student(
    opd: Opd, served: Kubelet, student: StudentManifest, tmp_path: Path
) -> None:
    """Its digest is of the weights alone, and the base is what `opd serve` loads."""
    manifest = tmp_path / "claim" / "tiny.runs" / "k" / "student" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("pvc://tiny-world/base", "hf://somebody/else@main"))
    done = opd("get-student", "tiny", "--out", tmp_path / "copy")
    assert done.code == ExitCode.REFUSED
    assert "names hf://somebody/else@main as its base, and the spec pvc://tiny-world/base" in done.err
    assert not (tmp_path / "copy").exists()


def test_a_folder_that_is_gone_is_told_in_the_pods_words(opd: Opd, served: Kubelet, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "claim" / "tiny.runs")
    done = opd("get-student", "tiny", "--out", tmp_path / "copy")
    assert done.code == ExitCode.UNAVAILABLE
    assert "FileNotFoundError" in done.err
    assert not (tmp_path / "copy").exists()


def test_a_connection_that_breaks_leaves_nothing(cluster: Distillations, served: Kubelet, tmp_path: Path) -> None:
    served.breaks_after = 60_000
    with pytest.raises(UnavailableError, match="try again|no result"):
        cluster.get_student("tiny", tmp_path / "copies" / "tiny")
    assert not list((tmp_path / "copies").iterdir())


def test_without_a_pod_it_says_what_to_do(opd: Opd, api: Api, tmp_path: Path) -> None:
    api.submit()
    assert "has no student yet" in opd("get-student", "tiny", "--out", tmp_path / "copy").err
    say(api, student={"digest": "sha256:" + "c" * 64, "uri": "pvc://students/tiny.runs/k/student"})
    done = opd("get-student", "tiny", "--out", tmp_path / "copy")
    assert done.code == ExitCode.INVALID
    for words in ("spec.endpoint.enabled: true", "mount the claim students", "copy the folder tiny.runs/k/student"):
        assert words in done.err


def test_a_pod_that_ends_or_mounts_something_else_is_no_source() -> None:
    pod = {
        "metadata": {"name": "p", "namespace": "n"}, "status": {"phase": "Running"},
        "spec": {
            "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "students"}}],
            "containers": [{"name": "c", "command": ["python"], "volumeMounts": [{"name": "v", "mountPath": "/m"}]}],
        },
    }  # fmt: skip
    assert find_source([pod], "pvc://students/a/b").folder == "/m/a/b"
    ended = {**pod, "status": {"phase": "Succeeded"}}
    leaving = {**pod, "metadata": {**pod["metadata"], "deletionTimestamp": "now"}}
    with pytest.raises(InvalidError):
        find_source([ended, leaving], "pvc://students/a/b")
    with pytest.raises(InvalidError):
        find_source([json.loads(json.dumps(pod))], "pvc://others/a/b")
