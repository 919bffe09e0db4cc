"""What no build shows: the recipes name pinned bases and packages, and keep secrets out."""

import os
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

ROLES = ("operator", "trainer", "teacher", "endpoint")


@pytest.fixture(params=ROLES)
def lines(request: pytest.FixtureRequest, repository: Path) -> list[str]:
    text = (repository / "images" / f"{request.param}.Containerfile").read_text()
    return text.replace("\\\n", " ").splitlines()


def test_the_base_is_pinned_to_a_patch_release(lines: list[str]) -> None:
    bases = [line.partition("=")[2] for line in lines if line.startswith("ARG BASE=")]
    assert len(bases) == 1
    assert re.search(r":\d+\.\d+[.\w-]*-", bases[0])
    assert {line.split()[1] for line in lines if line.startswith("FROM ")} == {"${BASE}"}


def test_packages_come_from_pinned_requirements_alone(lines: list[str]) -> None:
    """Each installed by the step right after its file came in, so that a builder without an eye for mounts sees a change."""
    runs = [line for line in lines if line.startswith("RUN ")]
    assert all(re.search(r" /build/install\.sh (project|packages \w+)$", line) for line in runs)
    steps = [line for line in lines if line.startswith(("COPY ", "RUN "))]
    installed = [(before, line.split()[-1]) for before, line in pairwise(steps) if " packages " in line]
    assert installed
    for copied, name in installed:
        assert f"requirements/{name}.txt" in copied


def test_a_mirror_with_its_password_stays_out_of_layers_and_history(lines: list[str]) -> None:
    runs = [line for line in lines if line.startswith("RUN ")]
    assert all("--mount=type=secret,id=PIP_INDEX_URL" in line for line in runs)
    assert {line.split()[1].partition("=")[0] for line in lines if line.startswith("ARG ")} <= {"BASE", "DEVICE"}


def test_a_change_of_source_reinstalls_no_package(lines: list[str]) -> None:
    """The last stage takes in nothing of it before the packages are there."""
    last = lines[max(at for at, line in enumerate(lines) if line.startswith("FROM ")) :]
    (project,) = [at for at, line in enumerate(last) if line.startswith("COPY --from=project ")]
    assert not any(line.startswith("RUN ") for line in last[project:])
    assert "COPY . " not in "\n".join(last)


def test_trainer_teacher_and_endpoint_share_the_layer_of_pytorch(repository: Path) -> None:
    """Layers are shared by steps that are the same from the base on; on the same base, that is."""
    starts = set()
    for role in ("trainer", "teacher", "endpoint"):
        stage = (repository / "images" / f"{role}.Containerfile").read_text().rpartition("\nFROM ")[2]
        starts.add(stage.partition("packages torch\n")[0])
    assert len(starts) == 1


def test_the_layer_of_pytorch_has_the_pins_of_the_images_on_it(repository: Path) -> None:
    def pins(name: str) -> set[str]:
        text = (repository / "requirements" / f"{name}.txt").read_text()
        return set(re.findall(r"^\S+==\S+", text, re.M))

    assert any(pin.startswith("torch==") for pin in pins("torch"))
    assert pins("torch") <= pins("trainer") & pins("serving")


def test_it_copies_what_the_context_has(lines: list[str], repository: Path) -> None:
    copied = [line.split()[1:-1] for line in lines if line.startswith("COPY ") and "--from" not in line]
    ignored = (repository / ".dockerignore").read_text().splitlines()
    for name in {name for names in copied for name in names} - {"."}:
        assert (repository / name).exists()
        assert f"!{Path(name).parts[0]}" in ignored


def test_it_runs_as_the_pods_user_with_our_python_first(lines: list[str]) -> None:
    assert [line for line in lines if line.startswith("USER ")] == ["USER 65532:65532"]
    assert any(line.startswith("ENV PATH=/opt/opd/bin:") for line in lines)


def test_every_package_is_checked_against_its_digest(repository: Path) -> None:
    text = (repository / "images" / "install.sh").read_text()
    commands = [line.strip() for line in text.splitlines() if re.match(r"\s*(uv |python3 -m pip )", line)]
    assert len(commands) == 3
    for command in commands:
        assert "--require-hashes" in command or command.endswith("/source")
    assert '--build-constraints "$here/build.txt"' in text


def test_the_build_gets_what_the_project_is_built_from(repository: Path) -> None:
    """The context is the repository as .dockerignore leaves it; every package that pyproject.toml lists has to be there."""
    ignored = (repository / ".dockerignore").read_text().splitlines()
    packages = re.search(r"^packages = \[(.*)\]$", (repository / "pyproject.toml").read_text(), re.M)
    assert packages
    for folder in re.findall(r'"([^"/]+)/', packages[1]):
        assert f"!{folder}" in ignored


@pytest.mark.parametrize("workflow", ["ci", "release"])
def test_workflows_build_all_of_them(workflow: str, repository: Path) -> None:
    content = yaml.safe_load((repository / ".github" / "workflows" / f"{workflow}.yaml").read_text())
    job = content["jobs"]["images"]
    assert tuple(job["strategy"]["matrix"]["role"]) == ROLES
    assert "images/${{ matrix.role }}.Containerfile" in str(job["steps"])


@pytest.mark.parametrize("workflow", ["ci", "release"])
def test_an_action_is_a_commit_so_that_a_moved_tag_runs_nothing_here(workflow: str, repository: Path) -> None:
    text = (repository / ".github" / "workflows" / f"{workflow}.yaml").read_text()
    used = re.findall(r"uses: (\S+)(.*)", text)
    assert used
    assert not [name for name, said in used if not re.search(r"@[0-9a-f]{40}$", name) or not re.search(r"# v\d", said)]


def test_a_release_makes_the_chart_name_its_images(repository: Path) -> None:
    """By the lines of values.yaml as they are."""
    release = (repository / ".github" / "workflows" / "release.yaml").read_text()
    (command,) = re.findall(r'sed -i "(.*)" charts/diffusion-opd/values.yaml', release)
    env = {**os.environ, "REGISTRY": "ghcr.io/team", "GITHUB_REF_NAME": "v1.2.3"}
    values = repository / "charts" / "diffusion-opd" / "values.yaml"
    script = f'sed "{command}" {values}'
    done = subprocess.run(["bash", "-euc", script], env=env, capture_output=True, text=True, check=True)
    images = yaml.safe_load(done.stdout)["images"]
    assert (images["registry"], images["tag"]) == ("ghcr.io/team/", "v1.2.3")
