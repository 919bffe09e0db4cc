"""Documentation that is generated is current; commands, make targets, links and specs in the pages are real."""

import re
import shlex

import figures
import pytest
import typer
import yaml
from opd_cli.main import app
from opd_core.api.load import check_spec
from opd_core.api.reference import reference
from opd_core.stages import Reason

ALERTS = "charts/diffusion-opd/files/alerts.yaml"
PAGES = ["README.md", "CONTRIBUTING.md", "examples/tiny/README.md"]


@pytest.fixture(scope="module")
def pages(repository):
    files = [repository / page for page in PAGES] + sorted((repository / "docs").rglob("*.md"))
    return {file: file.read_text() for file in files}


def test_the_spec_reference_is_the_models(repository):
    assert (repository / "docs" / "reference" / "spec.md").read_text() == reference()


def commands(text):
    """Lines of code that start `opd`, with continuations joined and comments cut."""
    for line in text.replace("\\\n", " ").splitlines():
        code = re.match(r"(?:    |)(?:\.venv/bin/)?(opd [a-z].*)$", line)
        if code:
            yield code.group(1)


def test_every_opd_command_in_the_pages_parses(pages):
    root = typer.main.get_command(app)
    checked = 0
    for file, text in pages.items():
        for command in commands(text):
            words = shlex.split(command, comments=True)[1:]
            group = root
            while hasattr(group, "commands"):
                assert words[0] in group.commands, f"{file.name}: {command}"
                group, words = group.commands[words[0]], words[1:]
            known = {option for parameter in group.params for option in (*parameter.opts, *parameter.secondary_opts)}
            used = {word.partition("=")[0] for word in words if word.startswith("-")}
            assert used <= known | {"--help", "..."}, f"{file.name}: {command}"
            checked += 1
    assert checked >= 8


def test_every_make_target_in_the_pages_exists(pages, repository):
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), re.M))
    named = {
        target for text in pages.values() for target in re.findall(r"\bmake ([a-z][a-z-]+)\b(?=`|\s{2,}|$)", text, re.M)
    }
    assert {"quickstart", "test"} <= named
    assert named <= targets


def anchors(text):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_pages_lead_somewhere(pages):
    for file, text in pages.items():
        for link, anchor in re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]+))?\)", text):
            target = file.parent / link if link else file
            assert target.exists(), f"{file.name}: {link}"
            if anchor and target.suffix == ".md":
                assert anchor in anchors(target.read_text()), f"{file.name}: {link}#{anchor}"


def test_every_reason_has_its_page_in_the_runbook(repository):
    text = (repository / "docs" / "runbook.md").read_text()
    sections = re.findall(r"^### (\w+)\n\n(.+)$", text, re.M)
    assert {name for name, _ in sections} == {reason.value for reason in Reason}
    linked = set(re.findall(r"runbook\.md#([a-z-]+)", (repository / ALERTS).read_text()))
    assert linked
    assert linked <= anchors(text)


def test_specs_in_the_pages_are_valid(pages):
    for file, text in pages.items():
        for block in re.findall(r"```ya?ml\n(.*?)```", text, re.S):
            for content in yaml.safe_load_all(block):
                if isinstance(content, dict) and content.get("kind") == "OPDDistillation":
                    assert check_spec(content, file.name)


def test_quoted_figures_are_those_that_a_benchmark_wrote(pages):
    """A figure is a link to its file; `python -m figures` puts the file's text into it."""
    quotes = [(file, found) for file, text in pages.items() for found in figures.QUOTE.finditer(text)]
    assert len(quotes) > 7
    for file, found in quotes:
        assert found[0] == figures.quoted(found[0]), f"{file.name}: {found[0]}; run make generate"
    for file, text in pages.items():
        for table in figures.TABLE.finditer(text):
            assert table[0] == figures.quoted(table[0]), f"{file.name}: table of {table[2]}; run make generate"


# How fast something is, in words or in a cell: a number and what it is a number of.
SPEED = re.compile(r"\d(?:\.\d+)? times (?:as|the|faster)|\d x the|\d(?:\.\d+)? (?:images/s|images (?:per|a) second)")


@pytest.mark.parametrize("words", ["2.4 times the images", "1.5 times as fast", "makes 19.6 images/s", "2 x the speed"])
def test_words_about_speed_are_recognised(words):
    assert SPEED.search(words)


def test_no_speed_is_typed_by_hand(pages):
    for file, text in pages.items():
        said = figures.QUOTE.sub("", figures.TABLE.sub("", re.sub(r"^    .*$", "", text, flags=re.M)))
        assert not SPEED.search(said), f"{file.name}: {SPEED.search(said)[0]}: quote docs/figures"
