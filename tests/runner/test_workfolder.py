"""One work folder, one distillation, one runner."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from opd_cli.runner.workfolder import WorkFolder
from opd_core.api.digests import weights_digest
from opd_core.api.load import check_spec
from opd_core.api.types import OPDDistillation
from opd_core.errors import InvalidError, StorageError

Change = Callable[..., OPDDistillation]


@pytest.fixture(scope="module")
def spec_file(repository: Path) -> Path:
    return repository / "examples" / "tiny" / "distill.yaml"


@pytest.fixture
def change(spec_file: Path) -> Change:
    """The tiny spec with some values replaced, by path."""
    content = yaml.safe_load(spec_file.read_text())

    def make(**values: Any) -> OPDDistillation:
        changed = copy.deepcopy(content)
        for path, value in values.items():
            *parents, last = path.split("__")
            place = changed["spec"]
            for parent in parents:
                place = place[int(parent)] if parent.isdigit() else place.setdefault(parent, {})
            place[last] = value
        return check_spec(changed)

    return make


@pytest.fixture
def work(tmp_path: Path) -> WorkFolder:
    folder = WorkFolder(tmp_path / "work")
    folder.path.mkdir()
    return folder


def test_claims_are_folders_beside_the_spec(work: WorkFolder, change: Change, spec_file: Path) -> None:
    work.prepare(change(), spec_file, {})
    assert (work.claims / "tiny-world" / "base" / "model_index.json").is_file()
    assert (work.claims / "students").resolve() == work.path / "outputs" / "students"
    assert json.loads(work.spec.read_text())["metadata"]["name"] == "tiny-three-tasks"


def test_claims_may_be_named(work: WorkFolder, change: Change, spec_file: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    work.prepare(change(), spec_file, {"students": tmp_path / "elsewhere"})
    assert (work.claims / "students").resolve() == tmp_path / "elsewhere"
    work.prepare(change(), spec_file, {})
    assert (work.claims / "students").resolve() != tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("claims", "message"),
    [({"tiny-world": "missing"}, "claim tiny-world has no folder"), ({"typo": "."}, "the spec names no such claim")],
)
def test_claim_without_use_or_folder_is_refused_and_nothing_written(
    claims: dict[str, str], message: str, work: WorkFolder, change: Change, spec_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(InvalidError, match=message):
        work.prepare(change(), spec_file, {name: tmp_path / folder for name, folder in claims.items()})
    assert list(work.path.iterdir()) == []


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"training__seed": 5}, "spec.training.seed"),
        ({"training__rounds": 300}, "spec.training.rounds"),
        ({"teachers__1__guidanceScale": 1.0}, r"spec.teachers\[1\].guidanceScale"),
        ({"teacherServing__precision": "FP16"}, "spec.teacherServing.precision"),
        ({"model__uri": "pvc://tiny-world/other"}, "spec.model.uri"),
    ],
)
def test_folder_with_weights_of_another_distillation_is_refused(
    values: dict[str, Any], named: str, work: WorkFolder, change: Change, spec_file: Path
) -> None:
    work.prepare(change(), spec_file, {})
    work.checkpoints.mkdir()
    before = work.spec.read_text()
    with pytest.raises(InvalidError, match=rf"another spec; it differs in {named} .*--work"):
        work.prepare(change(**values), spec_file, {})
    assert work.spec.read_text() == before


def test_spec_may_change_while_nothing_is_trained(work: WorkFolder, change: Change, spec_file: Path) -> None:
    work.prepare(change(), spec_file, {})
    work.prepare(change(training__seed=5), spec_file, {})
    assert json.loads(work.spec.read_text())["spec"]["training"]["seed"] == 5


@pytest.mark.parametrize(
    "values",
    [
        {"evaluation__promptsPerTask": 12},
        {"endpoint__enabled": False},
        {"teacherServing__placement": "Dedicated"},
        {"teachers__0__rewards": ["tiny-geneval", "tiny-ocr"]},
        {"training__checkpoint": {"everyRounds": 7}},
        {"student__output__uri": "pvc://tiny-world/out"},
    ],
)
def test_what_no_weight_depends_on_may_change(
    values: dict[str, Any], work: WorkFolder, change: Change, spec_file: Path
) -> None:
    work.prepare(change(), spec_file, {})
    work.checkpoints.mkdir()
    work.prepare(change(**values), spec_file, {})
    assert weights_digest(change(**values)) == weights_digest(change())


def test_more_rounds_go_on_at_a_constant_learning_rate(work: WorkFolder, change: Change, spec_file: Path) -> None:
    constant = {"training__optimizer__schedule": "Constant"}
    work.prepare(change(**constant), spec_file, {})
    work.checkpoints.mkdir()
    longer = change(**constant, training__rounds=999)
    work.prepare(longer, spec_file, {})
    assert weights_digest(longer) != weights_digest(change(**constant))


def test_evaluation_may_not_change_where_its_prompts_are_held_out_of_training(
    work: WorkFolder, change: Change, spec_file: Path
) -> None:
    prompts = {"teachers__0__prompts": {"uri": "pvc://tiny-world/prompts/geneval.train.jsonl"}}
    work.prepare(change(**prompts), spec_file, {})
    work.checkpoints.mkdir()
    with pytest.raises(InvalidError, match=r"spec\.evaluation\.seed"):
        work.prepare(change(**prompts, evaluation__seed=1), spec_file, {})


def test_second_runner_is_kept_out(work: WorkFolder) -> None:
    with work.locked(), pytest.raises(InvalidError, match=rf"process {os.getpid()}\) uses"), work.locked():
        pass
    with work.locked():
        pass


def test_lock_waits_for_the_programs_of_a_killed_runner(work: WorkFolder) -> None:
    source = (
        "import os, subprocess, sys\nfrom pathlib import Path\nfrom opd_cli.runner.workfolder import WorkFolder\n"
        "with (folder := WorkFolder(Path(sys.argv[1]))).locked():\n"
        "    subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1.5)'], pass_fds=folder.lock_descriptors)\n"
        "    os._exit(1)\n"
    )
    subprocess.run([sys.executable, "-c", source, str(work.path)], check=False)
    with work.locked():
        pass


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match=r"cannot write to .*--work"),
        WorkFolder(tmp_path / "file" / "work").locked(),
    ):
        pass


def test_finished_stages_are_remembered(work: WorkFolder) -> None:
    assert work.done("Trained") is None
    work.finish("Trained", digest="a", seconds=1.5)
    work.finish("Evaluated", key="b")
    assert WorkFolder(work.path).done("Trained") == {"digest": "a", "seconds": 1.5}
