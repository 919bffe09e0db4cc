"""The report of a run with fifty teachers: what matters first, all of it there, and a page that can be read."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from opd_cli.charts import COLOURS
from opd_cli.report import write_report
from opd_core.api.load import check_spec
from opd_trainer.evaluation.summary import summarise
from PIL import Image

from tests.browser import browsing

TINY = Path(__file__).parents[2] / "examples" / "tiny" / "distill.yaml"
PROMPTS, ROUNDS, STEPS = 24, 40, 3


def finished(work: Path, count: int) -> list[str]:
    """A work folder as a run with `count` teachers leaves it, of random rewards. The tasks, that of which least is kept
    last."""
    tasks = [f"task-{i:02}" for i in range(count)]
    told = yaml.safe_load(TINY.read_text())
    first = told["spec"]["teachers"][0]
    told["spec"]["teachers"] = [{**first, "name": task, "rewards": ["tiny-ocr"]} for task in tasks]
    told["spec"]["evaluation"]["gate"] = [{"task": task, "reward": "tiny-ocr", "ofTeacher": 0.9} for task in tasks]
    told["spec"].pop("endpoint", None)
    distillation = check_spec(told)
    work.mkdir()
    (work / "spec.json").write_text(distillation.model_dump_json(by_alias=True, exclude_unset=True))

    draw = np.random.default_rng(0)
    noise = draw.normal(0, 0.004, (count, 3, PROMPTS))
    kept = np.linspace(1.0, 0.3, count)
    base, teacher, student = ({} for _ in range(3))
    for i, task in enumerate(tasks):
        for model, gain, own in zip((base, teacher, student), (0.0, 0.5, 0.5 * kept[i]), noise[i], strict=True):
            model[task] = {"tiny-ocr": (0.2 + gain + own).tolist()}
    models = {"base": base, **{f"teacher:{task}": teacher for task in tasks}, "student": student}
    prompts = {task: [f"prompt {i} of {task}" for i in range(PROMPTS)] for task in tasks}
    summary = summarise(distillation.spec, models, prompts, dict.fromkeys(tasks, ()))
    summary |= {
        "name": "fifty", "student": {"digest": "sha256:1"}, "specDigest": "sha256:2", "versions": {"torch": "2"},
        "stageSeconds": {"Trained": 60.0},
    }  # fmt: skip
    (work / "summary.json").write_text(json.dumps(summary))
    for model in ("base", *(f"teacher-{task}" for task in tasks), "student"):
        for task in tasks if not model.startswith("teacher") else [model.removeprefix("teacher-")]:
            folder = work / "evaluation" / "images" / model / task
            folder.mkdir(parents=True)
            Image.new("RGB", (8, 8), (200, 30, 30)).save(folder / "0.png")
        content = {"prompts": prompts, "rewards": teacher}
        (work / "evaluation" / f"{model}.json").write_text(json.dumps(content))
    log = [line(number, tasks, kept, validated=number % 20 == 0) for number in range(1, ROUNDS + 1)]
    (work / "train").mkdir()
    (work / "train" / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in log))
    return tasks


def line(number: int, tasks: list[str], kept: Any, *, validated: bool) -> dict[str, Any]:
    """Of the log, a task's loss the larger the less of it is kept."""
    losses = (0.1 + 1 - kept) * 0.97**number
    rewards = {task: {"tiny-ocr": 0.5} for task in tasks}
    return {
        "round": number, "images_per_second": 5.0,
        "tasks": {
            task: {"loss": loss, "velocity_mse": loss, "loss_per_step": [loss / STEPS] * STEPS, "kl_per_step": []}
            for task, loss in zip(tasks, losses, strict=True)
        },
        **{f"{phase}_seconds": 1.0 for phase in ("rollout", "teacher_wait", "update")},
        **({"rewards": rewards} if validated else {}),
    }  # fmt: skip


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    work = tmp_path_factory.mktemp("runs") / "fifty"
    tasks = finished(work, 50)
    return write_report(work), tasks


def test_a_table_has_all_tasks_the_worst_first(fifty: tuple[Path, list[str]]) -> None:
    page, tasks = fifty
    table = re.findall(r"<h2>Tasks</h2>.*?</table>", page.read_text(), re.S)[0]
    assert re.findall(r"<tr><td>(task-\d\d)</td>", table) == tasks[::-1]
    gate = re.findall(r"<h2>Gate</h2>.*?</table>", page.read_text(), re.S)[0]
    verdicts = re.findall(r"(passed|missed)</td>", gate)
    assert len(verdicts) == 50
    assert verdicts == sorted(verdicts)  # m before p
    assert {"passed", "missed"} == set(verdicts)


def test_curves_of_the_worst_are_in_colour_and_the_others_behind_them(fifty: tuple[Path, list[str]]) -> None:
    page, tasks = fifty
    figures = dict(re.findall(r"<figcaption><b>([^<]*)</b>(.*?)</figure>", page.read_text(), re.S))
    loss = figures["Loss per task"]
    assert loss.count("<polyline") == 50
    assert loss.count('class="faint"') == 50 - COLOURS + 1  # and the legend's
    assert len(set(re.findall(r'<polyline fill="none" stroke="(#\w+)"', loss))) == COLOURS
    assert re.findall(r"</i>([^<]*)</span>", loss) == [*tasks[:-7:-1], "44 others"]
    assert "6 tasks of 50, with the largest loss" in figures["Loss per step"]
    assert figures["Loss per step"].count("<polyline") == 2 * COLOURS


def test_what_each_task_has_of_its_own_is_shown_of_the_worst_and_folded_of_the_others(
    fifty: tuple[Path, list[str]],
) -> None:
    page, tasks = fifty
    text = page.read_text()
    open_, folded = text.split("<summary>44 charts of the other tasks</summary>")
    assert [task for task in tasks[::-1] if f"<b>Reward: {task}</b>" in open_] == tasks[:-7:-1]
    assert len(re.findall("<b>Reward: ", folded)) == 44
    assert re.findall(r"<h3>(.*?)</h3>", text) == tasks[:-7:-1]
    assert "Of the first 6 of the 50 tasks above; all are in the run's folder, in evaluation/images" in text
    assert len(re.findall(r"<img ", text)) == 6 * 3


def test_a_browser_shows_it_no_wider_than_its_window_and_unfolds_the_rest(fifty: tuple[Path, list[str]]) -> None:
    page, _ = fifty
    with browsing() as (browser, wrong):
        browser.goto(page.as_uri())
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than its window"
        shown = browser.locator("figure").locator("visible=true").count()
        assert shown == 4 + COLOURS
        legends = browser.locator(".legend").locator("visible=true")
        assert max(legends.nth(i).bounding_box()["height"] for i in range(shown)) < 120  # type: ignore[index]
        for fold in browser.locator("summary").all():
            fold.click()
        assert browser.locator("figure").locator("visible=true").count() == shown + 44
        assert browser.locator("td", has_text="teacher:task-49").is_visible()
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "wider than its window"
        assert not wrong


def test_few_tasks_are_all_open(tmp_path: Path) -> None:
    tasks = finished(tmp_path / "six", COLOURS)
    text = write_report(tmp_path / "six").read_text()
    assert "<h2>Tasks</h2>" not in text
    assert "<details>" not in text
    assert 'class="faint"' not in text
    assert re.findall(r'<div class="card">(\S+)', text) == re.findall(r"<h3>(.*?)</h3>", text) == tasks
