"""The recipes for images that cannot be built here: what can be checked without a registry."""

import os
import re
import subprocess
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
    assert {line for line in lines if line.startswith("FROM ")} == {"FROM ${BASE} AS wheels", "FROM ${BASE}"}


def test_packages_come_from_pinned_requirements_alone(lines: list[str], repository: Path) -> None:
    runs = [line for line in lines if line.startswith("RUN ")]
    assert not any("pip" in line or "apt" in line for line in runs)
    (name,) = re.findall(r"wheels\.sh packages (\w+)", "\n".join(runs))
    assert (repository / "requirements" / f"{name}.txt").exists()
    assert any(line.startswith("COPY ") and f"requirements/{name}.txt" in line for line in lines)


def test_a_mirror_of_packages_can_be_named(lines: list[str]) -> None:
    """Where packages are fetched, which is the first stage alone."""
    assert lines.index("FROM ${BASE} AS wheels") < lines.index("ARG PIP_INDEX_URL") < lines.index("FROM ${BASE}")


def test_it_copies_what_exists(lines: list[str], repository: Path) -> None:
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1] if name != "."]
    bound = [found for line in lines for found in re.findall(r"type=bind,source=([\w./-]+)", line)]
    ignored = (repository / ".dockerignore").read_text().splitlines()
    for name in (*copied, *bound):
        assert (repository / name).exists()
        assert f"!{Path(name).parts[0]}" in ignored


def test_it_runs_as_the_pods_user_with_our_python_first(lines: list[str]) -> None:
    assert [line for line in lines if line.startswith("USER ")] == ["USER 65532:65532"]
    assert any(line.startswith("ENV PATH=/opt/opd/bin:") for line in lines)


@pytest.mark.parametrize("script", ["wheels.sh", "install.sh"])
def test_every_package_is_checked_against_its_digest(script: str, repository: Path) -> None:
    text = (repository / "images" / script).read_text()
    commands = [line for line in text.splitlines() if re.search(r"\bpip\b.* (install|wheel) ", line)]
    assert commands
    for command in commands:
        assert "--require-hashes" in command or "--no-index" in command or command.endswith("/source")
        assert "--no-deps" in command or "build.txt" in command


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
