"""The evaluator on the tiny world, and the report of a run."""

import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from opd_cli.report import write_report
from opd_core.api.load import check_spec, dump_spec, load_spec
from opd_core.api.teachers import teacher_folder
from opd_core.artifacts import SamplingDefaults, Source, StudentManifest, read_student, write_student
from opd_core.errors import InvalidError
from opd_core.models.adapter_file import read_adapter_file
from opd_core.models.adapters import load_adapter, save_adapter
from opd_core.models.pipeline import load_model
from opd_core.scales import Scales
from opd_core.uris import claim_path
from opd_trainer import evaluate as program
from opd_trainer.engine import World
from opd_trainer.evaluate import GRID_IMAGES, evaluate
from opd_trainer.evaluation import looks_of
from opd_trainer.evaluation.pictures import save_look
from opd_trainer.evaluation.sampling import Candidate, sample_images
from opd_trainer.evaluation.summary import task_means
from opd_trainer.prompts import held_out_prompts
from opd_trainer.record import RoundRecord, TaskRecord
from PIL import Image

from tests.forks import Program


@pytest.fixture(scope="module")
def distillation(repository):
    content = dump_spec(load_spec(repository / "examples" / "tiny" / "distill.yaml"))
    content["spec"]["evaluation"].update(promptsPerTask=4, batchSize=4, sampler={"steps": 2}, gate=[])
    return check_spec(content)


@pytest.fixture(scope="module")
def student(tmp_path_factory, tiny_base, tiny_world):
    """A student directory that holds the ocr teacher: its scores are known by then."""
    directory = tmp_path_factory.mktemp("work") / "student"
    model = load_model(tiny_base, parts={"transformer"})
    load_adapter(model.transformer, read_adapter_file(tiny_world / "teachers" / "ocr"), "student")
    write_student(
        directory,
        lambda folder: save_adapter(model.transformer, folder),
        lambda digest: StudentManifest(
            name="s", digest=digest, base=Source(uri="pvc://tiny-world/base", fingerprint="x"), teachers=[], spec_digest="y",
            round=1, license="z",
            sampling=SamplingDefaults(width=32, height=32, steps=2, guidance_scale=4.5, max_sequence_length=10),
        ),
    )  # fmt: skip
    return directory


@pytest.fixture(scope="module")
def evaluated(distillation, student, tiny_claims):
    output = student.parent / "evaluation"
    summary = evaluate(
        distillation.spec,
        claims=tiny_claims,
        student=student,
        kinds=["base", "teachers", "student"],
        output=output,
        device="cpu",
    )
    return output, summary


def test_every_model_is_scored_on_every_task(evaluated, student):
    output, summary = evaluated
    models = ["base", "teacher:geneval", "teacher:ocr", "teacher:aesthetic", "student"]
    assert list(summary["scores"]) == models
    for model in models:
        scored = json.loads((output / f"{model.replace(':', '-')}.json").read_text())
        assert {task: len(values) for task, by in scored["rewards"].items() for values in by.values()} == dict.fromkeys(
            ("geneval", "ocr", "aesthetic"), 4
        )
        assert len(list((output / "images" / model.replace(":", "-") / "ocr").glob("*.png"))) == min(4, GRID_IMAGES)
    # The student is the ocr teacher here: same weights, same prompts, same noise, so the same images.
    assert summary["scores"]["student"] == summary["scores"]["teacher:ocr"]
    assert summary["kept"]["ocr"]["share"] in (1.0, None)
    manifest, _ = read_student(student)
    assert manifest.scores["tiny-ocr"].mean == summary["scores"]["student"]["tiny-ocr"]["mean"]
    known = {task: share for task, share in summary["kept"].items() if share["share"] is not None}
    assert {task: share.model_dump() for task, share in manifest.kept.items()} == known


def test_a_teacher_with_a_model_of_its_own_scores_as_the_lora_that_it_was_made_of(
    distillation, evaluated, whole_claims, tmp_path
):
    """And the base is what it was, after it has made room."""
    content = dump_spec(distillation)
    del content["spec"]["teachers"][1]["adapter"]
    content["spec"]["teachers"][1]["model"] = {"uri": "pvc://models/ocr"}
    spec = check_spec(content).spec
    found = evaluate(
        spec, claims=whole_claims, student=None, kinds=["base", "teachers"], output=tmp_path, device="cpu", quiet=True
    )
    assert found["scores"] == {name: of for name, of in evaluated[1]["scores"].items() if name != "student"}
    for name in ("teacher-ocr", "teacher-aesthetic"):
        ours, theirs = (
            np.asarray(Image.open(output / "images" / name / "ocr" / "0.png")).astype(int)
            for output in (tmp_path, evaluated[0])
        )
        assert np.abs(ours - theirs).max() <= 1, name


def test_a_task_without_a_teacher_is_scored_and_judged_without_one(distillation, evaluated, student, tiny_claims):
    """Base and student are compared on it as ever; shares are kept of the gains that there are."""
    output, summary = evaluated
    content = dump_spec(distillation)
    for i in (0, 2):
        del content["spec"]["teachers"][i]["adapter"]
    content["spec"]["training"] |= {"method": "RL", "reinforcement": {"algorithm": "DiffusionNFT"}}
    rules = [
        {"task": "geneval", "reward": "tiny-geneval", "atLeast": 0},
        {"task": "ocr", "reward": "tiny-ocr", "ofTeacher": 0.9},
    ]
    content["spec"]["evaluation"]["gate"] = rules
    found = evaluate(
        check_spec(content).spec, claims=tiny_claims, student=student, kinds=["base", "teachers", "student"],
        output=output, device="cpu", quiet=True,
    )  # fmt: skip
    assert found["scores"] == {name: summary["scores"][name] for name in ("base", "teacher:ocr", "student")}
    assert set(found["kept"]) == {"ocr"}
    assert [(check["task"], check["passed"]) for check in found["gate"]] == [("geneval", True), ("ocr", True)]
    rows = task_means(check_spec(content).spec, found)
    assert ["teacher" in row for row in rows] == [False, True, False]


def test_a_second_evaluation_reads_what_is_known(evaluated, distillation, student, tiny_claims, monkeypatch):
    output, summary = evaluated

    def fail(*_):
        raise AssertionError("sampled again")

    monkeypatch.setattr(program, "sample_images", fail)
    arguments = {"claims": tiny_claims, "student": student, "kinds": ["base", "teachers", "student"], "device": "cpu"}
    assert evaluate(distillation.spec, output=output, **arguments) == summary
    with pytest.raises(AssertionError, match="sampled again"):
        evaluate(distillation.spec, output=output / "elsewhere", **arguments)


@pytest.mark.parametrize("content", ['{"key": ', "[]", "{}", "\\ufffd"])
def test_a_score_that_is_damaged_is_computed_anew(content, evaluated, distillation, tiny_claims, tmp_path, capsys):
    _, summary = evaluated
    (tmp_path / "base.json").write_text(content)
    again = evaluate(
        distillation.spec, claims=tiny_claims, student=None, kinds=["base"], output=tmp_path, device="cpu", quiet=True
    )
    assert again["scores"]["base"] == summary["scores"]["base"]
    assert json.loads((tmp_path / "base.json").read_text())["rewards"]
    assert f"{tmp_path / 'base.json'} cannot be read; scoring again" in capsys.readouterr().out


def test_noise_depends_on_the_prompts_number_alone(distillation, tiny_base):
    model = load_model(tiny_base)
    conditioning = model.encode(["a red 7", "two blue 3", "a lovely picture of 5"], 10)
    negative = model.encode([""], 10)[0]
    candidate = Candidate("base", None, Scales(4.5), "x")

    def images(numbers=(0, 1, 2), **changes):
        evaluation = distillation.spec.evaluation.model_copy(update=changes)
        spec = distillation.spec.model_copy(update={"evaluation": evaluation})
        chosen = [conditioning[number] for number in numbers]
        parts = list(sample_images(model, candidate, spec, "ocr", numbers, chosen, negative))
        assert [number for part, _ in parts for number in part] == list(numbers)
        return torch.cat([batch for _, batch in parts])

    whole = images()
    torch.testing.assert_close(whole, images(batch_size=2), rtol=0, atol=1e-4)
    torch.testing.assert_close(whole[[2, 0]], images(numbers=(2, 0)), rtol=0, atol=1e-4)
    assert not torch.allclose(whole, images(seed=1), atol=1e-2)


def test_held_out_prompts_are_fixed_by_the_spec(distillation, tiny_claims):
    first, again = (held_out_prompts(distillation.spec, tiny_claims) for _ in range(2))
    assert first == again
    assert all(len(records) == 4 for records in first.values())
    many = distillation.spec.evaluation.model_copy(update={"prompts_per_task": 9999})
    with pytest.raises(InvalidError, match="holds out 256 prompts, evaluation.promptsPerTask asks for 9999"):
        held_out_prompts(distillation.spec.model_copy(update={"evaluation": many}), tiny_claims)


def test_bad_arguments_of_the_program_are_refused(distillation, tiny_claims, tmp_path, capsys):
    spec = tmp_path / "spec.yaml"
    spec.write_text(yaml.safe_dump(dump_spec(distillation)))
    common = [f"--spec={spec}", f"--claims={tiny_claims}", f"--output={tmp_path / 'out'}", "--device=cpu"]
    assert program.main([*common, "--models=students"]) == 2
    assert "--models names 'students'" in capsys.readouterr().err
    assert program.main([*common, "--models=student"]) == 2
    assert "give its directory with --student" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("models", "needs"),
    [("student", ["base", "teacher:ocr"]), ("base,student", ["teacher:ocr"]), ("teachers,student", ["base"])],
)
def test_a_gate_that_cannot_be_judged_is_told_and_lets_nobody_pass(
    distillation, evaluated, student, tiny_claims, tmp_path, monkeypatch, capsys, models, needs
):
    """With the program, as the pod runs it; what was scored before is read back."""
    content = dump_spec(distillation)
    content["spec"]["evaluation"]["gate"] = [
        {"task": "ocr", "reward": "tiny-ocr", "ofTeacher": 0.5},
        {"task": "ocr", "reward": "tiny-ocr", "atLeast": 0.0},
    ]
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(content))
    monkeypatch.setattr(program, "publish_student", lambda *_: pytest.fail("a student was published"))
    monkeypatch.setenv("OPD_TERMINATION_LOG", str(tmp_path / "words"))
    common = [f"--spec={spec}", f"--claims={tiny_claims}", f"--student={student}", "--device=cpu"]
    assert program.main([*common, f"--output={evaluated[0]}", f"--models={models}"]) == 0
    assert f"the gate is not judged, it needs {', '.join(needs)} as well" in capsys.readouterr().out
    summary = json.loads((evaluated[0] / "summary.json").read_text())
    assert summary["gateNeeds"] == needs
    assert "gate" not in summary
    assert not (tmp_path / "words").exists()


@pytest.fixture
def process_group():
    """A process group that somebody else opened."""
    ours = not torch.distributed.is_initialized()
    if ours:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    if ours:
        torch.distributed.destroy_process_group()


def test_the_last_words_of_a_judged_student_carry_its_scores(
    distillation, evaluated, student, tiny_claims, tmp_path, monkeypatch, process_group
):
    """Of `main`, with a gate that is passed, one that is missed, and one that needs no other model; a process group in
    whose process it runs stays."""
    published = []
    monkeypatch.setattr(program, "publish_student", lambda *arguments: published.append(arguments))
    for i, (rule, models, passed) in enumerate(
        [
            ({"ofTeacher": -10.0}, "base,teachers,student", True),
            ({"atLeast": 2.0}, "base,teachers,student", False),
            ({"atLeast": -1.0}, "student", True),
        ]
    ):
        content = dump_spec(distillation)
        content["spec"]["evaluation"]["gate"] = [{"task": "ocr", "reward": "tiny-ocr", **rule}]
        spec, words = tmp_path / f"{i}.json", tmp_path / f"words{i}"
        spec.write_text(json.dumps(content))
        monkeypatch.setenv("OPD_TERMINATION_LOG", str(words))
        arguments = [f"--spec={spec}", f"--claims={tiny_claims}", f"--student={student}", f"--models={models}"]
        assert program.main([*arguments, f"--output={evaluated[0]}", "--device=cpu"]) == 0
        said = json.loads(words.read_text())
        assert said["gatePassed"] is passed
        assert bool(published) is passed
        published.clear()
        assert [row["task"] for row in said["scores"]] == ["geneval", "ocr", "aesthetic"]
        assert all(("base" in row) is ("base" in models) for row in said["scores"])
        assert said["digest"] == read_student(student)[0].digest
    assert torch.distributed.group.WORLD is process_group


def test_batches_are_dealt_out_whole_and_none_twice():
    counts = {"a": 10, "b": 3, "c": 8}
    for size in (1, 2, 5):
        dealt = [program.shares(counts, 4, World(rank, size, rank)) for rank in range(size)]
        for task, count in counts.items():
            assert sorted(number for share in dealt for number in share[task]) == list(range(count))
            for share in dealt:  # cut into fours again, they are the batches of one rank
                starts = share[task][::4]
                assert all(start % 4 == 0 for start in starts)
    assert program.shares(counts, 4, World(1, 2, 1)) == {"a": [4, 5, 6, 7], "b": [0, 1, 2], "c": [4, 5, 6, 7]}


def test_two_ranks_find_what_one_finds(distillation, evaluated, student, tiny_claims, tmp_path):
    """Real processes over gloo under the launcher: every image, score and the summary are equal to the bit."""
    content = dump_spec(distillation)
    content["spec"]["training"] |= {"processesPerNode": 2, "nodes": 2, "imagesPerTask": 4}  # the evaluator has one pod
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(content))
    copied = tmp_path / "student"
    shutil.copytree(student, copied)
    options = ["evaluate", f"--spec={spec}", f"--claims={tiny_claims}", f"--student={copied}", "--device=cpu"]
    options += [f"--output={tmp_path / 'out'}"]
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "OPD_TERMINATION_LOG": str(tmp_path / "w")}
    launcher = Program("opd_trainer.launch", options, tmp_path / "log", env)
    output, _ = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, output
    assert output.count("evaluator: base") == 1, "rank 0 speaks for all"
    one, two = evaluated[0], tmp_path / "out"
    for file in sorted(one.glob("[bts]*.json")):
        if file.name != "summary.json":
            assert json.loads((two / file.name).read_text())["rewards"] == json.loads(file.read_text())["rewards"]
    pictures = sorted(path.relative_to(one) for path in one.rglob("*.png"))
    assert pictures
    assert all((two / picture).read_bytes() == (one / picture).read_bytes() for picture in pictures)
    assert json.loads((two / "summary.json").read_text())["scores"] == evaluated[1]["scores"]
    assert json.loads((tmp_path / "w").read_text())["gatePassed"] is True


# ---------------------------------------------------------------- the report


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.images, self.text = [], 0, ""

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("src", "href"):
                self.links.append(value)
        self.images += tag == "img"

    def handle_data(self, data):
        self.text += data


TASKS = ("geneval", "ocr", "aesthetic")


def line(round_, kl=(), rewards=None):
    tasks = {task: TaskRecord(1 / round_, 1 / round_, [1.0, 0.5], list(kl)) for task in TASKS}
    record = RoundRecord(
        round=round_, seconds=2.0, tasks=tasks, loss=1 / round_, grad_norm=1.0, learning_rate=1e-3, images=18,
        phases={"rollout": 1.0, "teacher_wait": 0.0, "update": 1.0}, teacher_requests=1, teacher_retries=0,
        rewards=rewards or {},
    )  # fmt: skip
    return record.line()


@pytest.fixture
def report(evaluated, distillation, student):
    """Writes the report of a run with these lines in its log, and reads it."""
    _, summary = evaluated
    work = student.parent
    (work / "spec.json").write_text(json.dumps(dump_spec(distillation)))
    (work / "summary.json").write_text(
        json.dumps(
            {
                "name": "<tiny>", "specDigest": "sha256:0", "versions": {"torch": "2"}, "stageSeconds": {"Trained": 12.0},
                "student": {"digest": "sha256:1", "path": str(student)}, **summary,
            }
        )
    )  # fmt: skip
    (work / "train").mkdir(exist_ok=True)

    def make(lines):
        (work / "train" / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        source = write_report(work).read_text()
        page = Links()
        page.feed(source)
        return source, page

    return make


def test_the_report_is_one_page_without_outside_resources(report, evaluated):
    _, summary = evaluated
    source, page = report([line(i) for i in range(1, 30)])
    assert page.images == 3 * 3 * 4
    assert all(link.startswith("data:image/png") for link in page.links)
    assert "http" not in source.replace("http://www.w3.org", "")
    assert "<script" not in source
    for words in (
        "<tiny>",
        "teacher:aesthetic",
        "Loss per step: Velocity, what each solver step adds",
        "kind: OPDDistillation",
        f"{summary['scores']['base']['tiny-ocr']['mean']:.3f}",
    ):
        assert words in page.text
    # A deterministic sampler has no KL, and nothing was validated.
    assert "KL" not in page.text.partition("Spec")[0]
    assert "Reward: " not in page.text


def test_the_report_has_the_kl_where_there_is_noise(report):
    """The last step of this sampler has none."""
    source, page = report([line(i, kl=(2.0, 0.25, None)) for i in range(1, 30)])
    assert "KL per step: closed form, at the steps with noise" in page.text
    chart = source.partition("KL per step")[2].partition("</figure>")[0]
    assert chart.count("<polyline") == 6
    assert all(len(points.split()) == 2 for points in re.findall(r'points="([^"]*)"', chart))


def test_the_report_shows_rewards_over_time_beside_base_and_teacher(report, evaluated):
    output, _ = evaluated
    rewards = {task: {f"tiny-{task}": 0.25} for task in TASKS}
    source, page = report([line(i, rewards=rewards if i % 10 == 0 else None) for i in range(1, 41)])
    assert "Reward: ocr: tiny-ocr of the first 4 held-out prompts" in page.text
    chart = source.partition("Reward: ocr")[2].partition("</figure>")[0]
    student, base, teacher = (
        [float(point.split(",")[1]) for point in points.split()] for points in re.findall(r'points="([^"]*)"', chart)
    )
    assert len(student) == 4
    scored = {
        name: sum(json.loads((output / f"{name}.json").read_text())["rewards"]["ocr"]["tiny-ocr"]) / 4
        for name in ("base", "teacher-ocr")
    }
    # Higher rewards are drawn higher, which is a smaller y.
    heights = {0.25: student[0], scored["base"]: base[0], scored["teacher-ocr"]: teacher[0]}
    assert [heights[value] for value in sorted(heights)] == sorted(heights.values(), reverse=True)
    assert base[0] == base[1]
    assert "teacher ocr" in page.text


def test_the_report_shows_how_teachers_were_trained(report, distillation, student):
    content = dump_spec(distillation)
    own = content["spec"]["teachers"][2]
    own.pop("adapter")
    own["training"] = {"algorithm": "GRPOGuard", "rounds": 9}
    spec = check_spec(content).spec
    folder = claim_path(teacher_folder(spec, spec.teachers[2]), student.parent / "claims")
    (folder / "train").mkdir(parents=True)
    figures = {"reward": 0.25, "reward_error": 0.01, "group_std": 0.1, "flat_groups": 0.0, "ratio": 1.0, "clipped": 0.5}
    lines = [{**line(i), "figures": {**figures, "reward": i / 20}} for i in range(1, 10)]
    for i in (3, 6):
        lines[i - 1]["rewards"] = {"aesthetic": {"tiny-aesthetic": i / 20}}
        save_look(torch.full([3, 300, 150], i / 10), looks_of(folder) / str(i) / "aesthetic" / "0", 1)
    video = torch.linspace(0, 1, 5).view(5, 1, 1, 1).expand(5, 3, 300, 150)
    save_look(video, looks_of(folder) / "6" / "aesthetic" / "1", 16)
    (folder / "train" / "log.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (student.parent / "spec.json").write_text(json.dumps(content))
    source = write_report(student.parent).read_text()
    for title in ("reward", "held-out reward", "way from the base", "groups", "ratio", "clipped"):
        assert f"Teacher aesthetic: {title}" in source
    assert "old_distance" not in source
    assert re.findall(r"<h3>teacher aesthetic</h3>|<tr><td>(round \d)</td><td><img", source) == [
        "",
        "round 3",
        "round 6",
    ]
    with Image.open(looks_of(folder) / "6" / "aesthetic" / "1.webp") as played:
        assert (played.n_frames, played.size) == (5, (128, 256))
    assert source.count("data:image/webp;base64,") == 1
    kept = Image.open(looks_of(folder) / "6" / "aesthetic" / "0.png")
    assert (kept.size, kept.getpixel((0, 0))) == ((128, 256), (153, 153, 153))
    chart = source.partition("Teacher aesthetic: reward")[2].partition("</figure>")[0]
    mean, low, high = (
        [float(point.split(",")[1]) for point in points.split()] for points in re.findall(r'points="([^"]*)"', chart)
    )
    assert mean == sorted(mean, reverse=True), "a reward that rises is drawn ever higher"
    assert all(h < m < lo for h, m, lo in zip(high, mean, low, strict=True))
