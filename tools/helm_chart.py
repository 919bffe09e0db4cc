"""What is generated of the chart: `python -m helm_chart readme` writes the table of its README, `golden` what it renders."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from devcluster.control_plane import build

REPOSITORY = Path(__file__).parents[1]
CHART = REPOSITORY / "charts" / "diffusion-opd"
README = CHART / "README.md"
GOLDEN = REPOSITORY / "tests" / "chart" / "golden"
_BEGIN, _END = "<!-- values -->\n", "<!-- /values -->\n"


def helm(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [str(build("helm") / "helm"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def values_files() -> dict[str, list[Path]]:
    """Name of a golden render -> its values files."""
    files = sorted((CHART / "ci").glob("*-values.yaml"))
    return {"default": [], **{file.name.removesuffix("-values.yaml"): [file] for file in files}}


def golden(files: list[Path]) -> str:
    """What Helm renders of them, but for what it only copies: the type and the dashboards.

    Raises:
        RuntimeError: Helm refuses.
    """
    options = [part for file in files for part in ("--values", file)]
    done = helm("template", "diffusion-opd", CHART, "--namespace", "opd-system", *options)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    documents = re.split(r"^---\n", done.stdout, flags=re.M)
    copied = ("/templates/crd.yaml", "/templates/dashboards.yaml")
    return "---\n".join(text for text in documents if not text.partition("\n")[0].endswith(copied))


def readme() -> str:
    """The README with the table as values.yaml has it now."""
    head, rest = README.read_text().split(_BEGIN)
    rows = [f"| `{path}` | {default} | {about} |" for path, default, about in values()]
    table = "\n".join(["| value | default | meaning |", "|---|---|---|", *rows])
    return f"{head}{_BEGIN}{table}\n{_END}{rest.split(_END)[1]}"


def values() -> Iterator[tuple[str, str, str]]:
    """(path, default as Markdown, comment) of every value and of every commented group, in the order of values.yaml."""
    text = (CHART / "values.yaml").read_text()
    defaults = yaml.safe_load(text)
    above: list[str] = []
    path: list[str] = []
    for line in text.splitlines():
        if comment := re.match(r"\s*# (.*)", line):
            above.append(comment[1])
            continue
        if found := re.match(r"(\s*)(\w+):(.*)", line):
            path = [*path[: len(found[1]) // 2], found[2]]
            beside = re.search(r"\s# (.*)", found[3])
            about = " ".join([*above, *([beside[1]] if beside else [])])
            default = defaults
            for name in path:
                default = default[name]
            group = isinstance(default, dict) and not found[3].partition(" #")[0].strip()
            if about or not group:
                yield ".".join(path), "" if group else f"`{json.dumps(default)}`", about
        above = []


def main() -> None:
    if sys.argv[1:] == ["readme"]:
        README.write_text(readme())
    elif sys.argv[1:] == ["golden"]:
        GOLDEN.mkdir(exist_ok=True)
        for name, files in values_files().items():
            (GOLDEN / f"{name}.yaml").write_text(golden(files))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
