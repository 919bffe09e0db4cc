"""Intervals, kept shares, gates and summaries on numbers whose answers are known."""

import tracemalloc

import numpy as np
import pytest
import reproduce
from opd_cli.runner.display import teacher_lines
from opd_core.api.load import check_spec, dump_spec, load_spec
from opd_core.api.types import GateRule
from opd_trainer.evaluation import statistics
from opd_trainer.evaluation.checks import failures, prompts_needed
from opd_trainer.evaluation.gate import check_gate
from opd_trainer.evaluation.statistics import kept_share, mean_score
from opd_trainer.evaluation.summary import summarise
from opd_trainer.evaluation.tags import tags_of
from opd_trainer.prompt_files import PromptRecord


def names(count, images=1):
    """Prompts of `count` images each."""
    return [f"prompt {i}" for i in range(count) for _ in range(images)]


def test_the_bootstrap_interval_is_the_normal_one_for_many_values():
    values = np.random.default_rng(0).normal(0.4, 0.2, 400)
    score = mean_score(values, names(400), seed=1)
    half = 1.96 * values.std() / np.sqrt(400)
    assert score.n == 400
    assert score.mean == pytest.approx(values.mean())
    assert score.low == pytest.approx(values.mean() - half, abs=0.003)
    assert score.high == pytest.approx(values.mean() + half, abs=0.003)
    assert mean_score(values, names(400), seed=1) == score


def test_images_of_one_prompt_are_not_counted_as_independent(monkeypatch):
    """Of 95 % intervals about 95 % must hold the truth: over prompts as hard as they come, not only over noise."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    rng = np.random.default_rng(0)
    prompts, held, held_by_images = names(40, images=6), 0, 0
    for seed in range(200):
        difficulty = np.repeat(rng.normal(0, 1, 40), 6)
        values = difficulty + rng.normal(0, 1, 240)
        clustered, naive = mean_score(values, prompts, seed), mean_score(values, names(240), seed)
        held += clustered.low <= 0 <= clustered.high
        held_by_images += naive.low <= 0 <= naive.high
    assert 0.9 <= held / 200 <= 0.98
    assert held_by_images / 200 < 0.75


def test_repeating_every_image_makes_no_interval_narrower():
    values = np.random.default_rng(0).random(50)
    once, often = mean_score(values, names(50), 3), mean_score(np.repeat(values, 20), names(50, images=20), 3)
    assert (often.mean, often.low, often.high) == pytest.approx((once.mean, once.low, once.high))
    assert often.n == 1000


def test_prompts_with_more_images_weigh_more():
    """The mean is over images; a prompt is drawn with all of its own."""
    score = mean_score([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"], seed=0)
    assert (score.mean, score.low, score.high) == (0.25, 0.0, 1.0)


def test_many_prompts_need_little_memory():
    count = 10_000  # all draws at once would be 800 MB
    tracemalloc.start()
    score = mean_score(np.random.default_rng(0).random(count), names(count), seed=0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150e6
    assert score.high - score.low == pytest.approx(2 * 1.96 / np.sqrt(12 * count), rel=0.05)


def test_pairing_makes_the_kept_share_narrow():
    """Base, teacher and student share the difficulty of a prompt; their difference does not have it."""
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 1, 200)
    base, teacher, student = (difficulty + shift + rng.normal(0, 0.05, 200) for shift in (0.0, 0.5, 0.4))
    kept = kept_share(base, teacher, student, names(200), seed=0)
    assert kept["share"] == pytest.approx(0.8, abs=0.03)
    assert kept["low"] < 0.8 < kept["high"]
    assert kept["high"] - kept["low"] < 0.1
    repeated = kept_share(*(np.repeat(v, 5) for v in (base, teacher, student)), names(200, images=5), seed=0)
    assert repeated == pytest.approx(kept)


def test_a_share_of_no_gain_is_no_number():
    assert kept_share([0.5, 0.5], [0.4, 0.5], [0.5, 0.5], names(2), seed=0)["share"] is None
    barely = kept_share([0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.1, 1.0], [0.5, 0.5, 0.5, 0.5], names(4), seed=0)
    assert barely == {"share": None, "low": None, "high": None}


def constant(**means):
    """Per-image rewards without any spread: chance plays no part."""
    return {model.replace("_", ":"): {"ocr": {"read": [value] * 8}} for model, value in means.items()}


@pytest.mark.parametrize(
    ("rule", "required", "passed"),
    [
        ({"at_least": 0.65}, 0.65, True),
        ({"at_least": 0.7}, 0.7, False),
        ({"of_teacher": 0.5}, 0.5, True),
        ({"of_teacher": 0.9}, 0.74, False),
        ({"of_teacher": 0.0}, 0.2, True),
        ({"of_teacher": 0.75}, 0.65, True),
    ],
)
def test_the_gate_takes_a_number_or_a_share_of_the_gain(rule, required, passed):
    models = constant(base=0.2, teacher_ocr=0.8, student=0.65)
    (check,) = check_gate([GateRule(task="ocr", reward="read", **rule)], models, {"ocr": names(8)}, seed=0, tags={})
    assert check["required"] == pytest.approx(required)
    assert check["passed"] is passed
    words = f"ocr: read is 0.650, {check['rule']} needs {required:.3f} (less 0.000 for chance)"
    assert failures([check]) == ([] if passed else [words])


def test_the_gate_works_for_rewards_below_zero():
    models = constant(base=-2.0, teacher_ocr=-1.0, student=-1.4)
    rule = GateRule(task="ocr", reward="read", of_teacher=0.5)
    (check,) = check_gate([rule], models, {"ocr": names(8)}, seed=0, tags={})
    assert (check["required"], check["passed"]) == (-1.5, True)


def gates(student_share: float, prompts: int, trials: int, spread: float = 0.15, teacher: float = 0.75) -> float:
    """How often a gate is passed by a student that keeps `student_share` of its teacher's gain.

    Rewards are 0 or 1 and depend on the prompt's difficulty, as GenEval's and OCR's do.
    """
    rule = GateRule(task="ocr", reward="read", of_teacher=1.0)
    rng, passed = np.random.default_rng(1), 0
    for trial in range(trials):
        difficulty = rng.normal(0, spread, prompts)

        def drawn(mean, difficulty=difficulty):
            return {"ocr": {"read": (rng.random(prompts) < np.clip(mean + difficulty, 0, 1)).astype(float).tolist()}}

        gain = teacher - 0.45
        models = {"base": drawn(0.45), "teacher:ocr": drawn(teacher), "student": drawn(0.45 + student_share * gain)}
        (check,) = check_gate([rule], models, {"ocr": names(prompts)}, seed=trial, tags={})
        passed += check["passed"]
    return passed / trials


def test_a_student_as_good_as_its_teachers_passes_and_one_that_keeps_little_does_not(monkeypatch):
    """A point estimate passes the first about half of the time."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    assert gates(1.0, prompts=20, trials=400) >= 0.95
    assert gates(1.0, prompts=200, trials=200) >= 0.95
    assert gates(0.5, prompts=512, trials=40) <= 0.1


def test_the_prompts_that_a_gate_is_said_to_need_are_what_it_needs(monkeypatch):
    """Of verdicts that vary as much as they can: refused about 4 times in 5 at that number, and seldom at a quarter."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)
    prompts = prompts_needed(rules=1, deficit=0.2)
    below = {"student_share": -3.0, "teacher": 0.5, "spread": 0.0}  # 0.3, where 0.5 is asked for
    assert 0.12 <= gates(prompts=prompts, trials=300, **below) <= 0.28
    assert gates(prompts=prompts // 4, trials=300, **below) >= 0.5


def test_the_summary_has_every_model_share_and_check(repository):
    spec = load_spec(repository / "examples" / "tiny" / "distill.yaml").spec
    tasks = {teacher.name: teacher.rewards[0] for teacher in spec.teachers}
    rng = np.random.default_rng(0)

    def rewards(shift):
        return {task: {reward: (rng.random(16) * 0.1 + shift).tolist()} for task, reward in tasks.items()}

    models = {"base": rewards(0.2), **{f"teacher:{task}": rewards(0.8) for task in tasks}, "student": rewards(0.7)}
    prompts = dict.fromkeys(tasks, names(16))
    summary = summarise(spec, models, prompts, {})
    assert set(summary["scores"]) == set(models)
    assert set(summary["scores"]["base"]) == set(tasks.values())
    assert set(summary["kept"]) == set(tasks)
    assert all(0.7 < kept["share"] < 0.95 for kept in summary["kept"].values())
    assert [check["passed"] for check in summary["gate"]] == [True] * len(spec.evaluation.gate)
    assert set(summarise(spec, {"base": models["base"]}, prompts, {})) == {"scores"}


def test_a_teacher_below_the_base_at_its_own_task_is_named_before_anybody_trains(repository):
    """Made without guidance and asked with it, say (X-GenGroup/Flow-Factory#85, NVlabs/DiffusionNFT#49)."""
    spec = load_spec(repository / "examples" / "tiny" / "distill.yaml").spec
    rng = np.random.default_rng(0)
    level = {"base": 0.5, "teacher:geneval": 0.8, "teacher:ocr": 0.2, "teacher:aesthetic": 0.495}

    def rewards(mean):
        return {each.name: {each.rewards[0]: mean + 0.1 * rng.standard_normal(64)} for each in spec.teachers}

    prompts = {teacher.name: names(64) for teacher in spec.teachers}
    summary = summarise(spec, {model: rewards(mean) for model, mean in level.items()}, prompts, {})
    assert summary["belowBase"] == ["ocr"]  # the third is within chance
    (line,) = teacher_lines(summary)
    assert line.startswith("teacher ocr is worse than the base at its own task")


# ---------------------------------------------------------------- GenEval's mean of its tasks' means


TAGGED = [*["counting"] * 30, *["position"] * 90]


def test_with_tags_a_mean_is_that_of_the_tags_means():
    """And its interval that of two independent samples: what one tag has more of counts no more."""
    rng = np.random.default_rng(0)
    counting, position = rng.random(30) < 0.9, rng.random(90) < 0.2
    score = mean_score([*counting, *position], names(120), seed=0, tags=TAGGED)
    assert score.mean == pytest.approx((counting.mean() + position.mean()) / 2)
    half = 1.96 * np.sqrt(counting.var() / 30 + position.var() / 90) / 2
    assert (score.low, score.high) == pytest.approx((score.mean - half, score.mean + half), abs=0.01)
    assert score.mean - np.mean([*counting, *position]) > 0.1


def test_scores_shares_and_gate_of_geneval_are_of_its_tasks_means(repository):
    """Without tags, and for any other reward, they are over the images."""
    content = dump_spec(load_spec(repository / "examples" / "tiny" / "distill.yaml"))
    content["spec"]["teachers"] = content["spec"]["teachers"][:1]
    content["spec"]["teachers"][0]["rewards"] = ["geneval", "geneval-partial"]
    rule = {"task": "geneval", "reward": "geneval", "atLeast": 0.45}
    content["spec"]["evaluation"]["gate"] = [rule, {**rule, "reward": "geneval-partial"}]
    spec = check_spec(content).spec

    def rewards(counting, position):
        values = [*[counting] * 30, *[position] * 90]
        return {"geneval": {"geneval": values, "geneval-partial": values}}

    models = {"base": rewards(0, 0), "teacher:geneval": rewards(1.0, 0.2), "student": rewards(0.8, 0.1)}
    prompts = {"geneval": names(120)}
    summary = summarise(spec, models, prompts, {"geneval": TAGGED})
    scores = {model: {name: score["mean"] for name, score in by.items()} for model, by in summary["scores"].items()}
    assert scores["student"] == {"geneval": pytest.approx(0.45), "geneval-partial": pytest.approx(0.275)}
    assert summary["kept"]["geneval"]["share"] == pytest.approx(0.45 / 0.6)
    assert [check["passed"] for check in summary["gate"]] == [True, False]
    assert summary["gate"][0]["actual"] == pytest.approx(0.45)
    assert summary["byTag"]["student"] == {
        "geneval": {"tags": {"counting": pytest.approx(0.8), "position": pytest.approx(0.1)}, "perImage": 0.275}
    }
    untagged = summarise(spec, models, prompts, {"geneval": []})
    assert untagged["scores"]["student"]["geneval"]["mean"] == pytest.approx(0.275)
    assert "byTag" not in untagged


def test_tags_are_those_of_the_records_if_all_have_one():
    tagged = [PromptRecord("a", {"tag": "counting"}), PromptRecord("b", {"tag": "colors"})]
    assert tags_of(tagged) == ["counting", "colors"]
    assert tags_of([*tagged, PromptRecord("c", {})]) == []


# ---------------------------------------------------------------- the page of `make reproduce`


def distilled(seed, student_gain, rng, noise=0.0):
    """A finished run on 100 prompts: base 0, teacher 1 on both tasks, and the student's gain on each."""

    def rewards(level):
        return level + rng.normal(0, noise, 100)

    return reproduce.Finished(
        seed=seed,
        summary={},
        rounds=1,
        learning_rate=1e-3,
        prompts={task: names(100) for task in student_gain},
        rewards={
            task: {"base": np.zeros(100), "teacher": np.ones(100), "student": rewards(gain)}
            for task, gain in student_gain.items()
        },
    )


def test_the_pooled_share_counts_prompts_and_seeds():
    rng = np.random.default_rng(0)
    alike = [distilled(i, {"a": 0.9, "b": 0.7}, rng, noise=0.5) for i in range(3)]
    shares = reproduce.pooled(alike)
    assert list(shares) == ["a", "b", "all"]
    share, low, high = shares["all"]
    assert share == pytest.approx(0.8, abs=0.05)
    assert share == pytest.approx((shares["a"][0] + shares["b"][0]) / 2)
    assert low < share < high
    single = reproduce.pooled(alike[:1])["all"]
    assert high - low < single[2] - single[1]  # three seeds know more than one

    apart = [distilled(0, {"a": gain}, rng) for gain in (0.5, 0.7, 0.9)]
    assert reproduce.pooled(apart)["a"] == pytest.approx((0.7, 0.5, 0.9), abs=0.07)  # no noise but between seeds
    assert reproduce.pooled(apart[:1])["a"] == pytest.approx((0.5, 0.5, 0.5))


def test_scores_of_base_and_teachers_are_carried_over_once(tmp_path):
    known, other = tmp_path / "known", tmp_path / "other"
    for model in ("base", "teacher-ocr", "student", "summary"):
        (known / "images" / model).mkdir(parents=True)
        (known / "images" / model / "0.png").write_text(model)
        (known / f"{model}.json").write_text(model)
    (other / "images").mkdir(parents=True)
    (other / "base.json").write_text("its own")
    reproduce.copy_scores(known, other)
    assert {file.stem: file.read_text() for file in other.glob("*.json")} == {
        "base": "its own", "teacher-ocr": "teacher-ocr",
    }  # fmt: skip
    assert [folder.name for folder in (other / "images").iterdir()] == ["teacher-ocr"]
