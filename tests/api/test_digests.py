"""What a change of the spec repeats: nothing but what depends on it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from opd_core.api.digests import digest, evaluation_digest, said, weights_digest, weights_fields
from opd_core.api.load import check_spec, dump_spec, parse_spec
from opd_core.api.teachers import adapter_of, teacher_digest, teacher_folder
from opd_core.api.types import OPDDistillation

CONSTANT = {"training__optimizer": {"schedule": "Constant"}}
STUDENT = "sha256:" + "a" * 64


@pytest.fixture
def spec(repository: Path):
    content = yaml.safe_load((repository / "examples" / "tiny" / "distill.yaml").read_text())

    def make(**changes: Any) -> OPDDistillation:
        """`a__0__b=v` sets spec.a[0].b."""
        copy = yaml.safe_load(yaml.safe_dump(content))
        for path, value in changes.items():
            *parents, last = path.split("__")
            place = copy["spec"]
            for part in parents:
                place = place[int(part)] if part.isdecimal() else place.setdefault(part, {})
            place[last] = value
        return check_spec(copy)

    return make


@pytest.mark.parametrize(
    "change",
    [
        {"evaluation__promptsPerTask": 9},
        {"evaluation__everyRounds": 10},
        {"endpoint__enabled": False},
        {"teacherServing__placement": "Dedicated"},
        {"teacherServing__replicas": 2},
        {"training__checkpoint": {"everyRounds": 1, "keep": 1}},
        {"training__passes": "Two"},
        {"training__gradientCheckpointing": True},
        {"training__pod": {"nodeSelector": {"a": "b"}}},
        {"runPolicy": {"backoffLimit": 9}},
        {"student__output__uri": "pvc://elsewhere/student"},
        {"teachers__0__rewards": ["tiny-geneval", "tiny-ocr"]},
        {"training__ema": {"decay": 0.9}},  # the default, written out
    ],
)
def test_the_weights_do_not_depend_on_it(spec, change) -> None:
    assert weights_digest(spec(**change)) == weights_digest(spec())
    assert weights_fields(spec(**change)) == weights_fields(spec())


@pytest.mark.parametrize(
    "change",
    [
        {"training__seed": 1},
        {"training__rounds": 90},
        {"training__sampler__steps": 7},
        {"training__nodes": 2},
        {"training__ema": {"decay": 0.5}},
        {"teachers__0__guidanceScale": 1.0},
        {"teachers__0__name": "other", "evaluation__gate": []},
        {"teachers__0__prompts__uri": "pvc://tiny-world/other.jsonl"},
        {"student__adapter": {"rank": 4, "alpha": 8}},
        {"teacherServing__precision": "FP16"},
        {"model__maxSequenceLength": 11},
    ],
)
def test_the_weights_depend_on_it(spec, change) -> None:
    assert weights_digest(spec(**change)) != weights_digest(spec())


def test_rounds_may_be_added_while_the_learning_rate_does_not_depend_on_them(spec) -> None:
    longer = {"training__rounds": 999}
    assert weights_fields(spec(**CONSTANT, **longer)) == weights_fields(spec(**CONSTANT))
    assert weights_fields(spec(**longer)) != weights_fields(spec())
    assert weights_digest(spec(**CONSTANT, **longer)) != weights_digest(spec(**CONSTANT))


def test_prompts_held_out_of_training_bind_the_evaluation(spec) -> None:
    shared = {"teachers__0__prompts": {"uri": "pvc://tiny-world/prompts/geneval.train.jsonl"}}
    assert weights_digest(spec(**shared, evaluation__seed=1)) != weights_digest(spec(**shared))
    assert weights_digest(spec(evaluation__seed=1)) == weights_digest(spec())


def test_scores_depend_on_student_prompts_rewards_and_gate(spec) -> None:
    known = evaluation_digest(spec(), STUDENT)
    assert evaluation_digest(spec(endpoint__replicas=3, evaluation__everyRounds=10), STUDENT) == known
    for change in ({"evaluation__gate": []}, {"evaluation__seed": 1}, {"teachers__0__rewards": ["tiny-ocr"]}):
        other = {**change, "evaluation__gate": []}
        assert evaluation_digest(spec(**other), STUDENT) != known
    assert evaluation_digest(spec(), "sha256:" + "b" * 64) != known


def test_what_is_said_is_all_that_is_needed(spec) -> None:
    whole = spec()
    assert dump_spec(check_spec({**dump_spec(whole), "spec": said(whole.spec)})) == dump_spec(whole)


STORED = """
apiVersion: opd.dev/v1alpha1
kind: OPDDistillation
metadata: {name: stored}
spec:
  model: {uri: hf://org/base@main}
  student: {output: {uri: pvc://students/stored}}
  teachers:
  - {name: ocr, adapter: {uri: pvc://teachers/ocr}, prompts: {uri: pvc://prompts/ocr.txt}, rewards: [ocr]}
  training: {rounds: 100, nodes: 2, imagesPerTask: 8}
  endpoint: {replicas: 2, maxBatchSize: 8}
"""


def test_names_stay_what_they_were_in_released_versions() -> None:
    """An operator that names this object otherwise trains every object of a cluster again when it is upgraded."""
    stored = parse_spec(STORED)
    assert weights_digest(stored)[:12] == "74d5021e1aa8"
    assert evaluation_digest(stored, STUDENT)[:12] == "387bd970f423"
    assert digest(said(stored.spec.endpoint))[:12] == "acb16f8f74b2"


# ---------------------------------------------------------------------------------------------------- trained teachers

MADE = {
    "teachers__0__adapter": None,
    "teachers__0__training": {"algorithm": "DiffusionNFT", "rounds": 9},
}


def made(spec, **changes: Any) -> tuple[str, str]:
    """Digest and place of the trained teacher."""
    found = spec(**{**MADE, **changes}).spec
    return teacher_digest(found, found.teachers[0]), teacher_folder(found, found.teachers[0])


@pytest.mark.parametrize(
    "change",
    [
        {"training__rounds": 90},
        {"training__guidanceScale": 1.0},
        {"teachers__0__weight": 5.0},
        {"teachers__1__guidanceScale": 1.0},
        {"teacherServing__precision": "BF16"},
        {"evaluation__promptsPerTask": 9},
        {"student__output__uri": "pvc://students/beside"},
        {"teachers__0__training": {"algorithm": "DiffusionNFT", "rounds": 9, "mustBeatBase": False}},
        {"teachers__0__training": {"algorithm": "DiffusionNFT", "rounds": 9, "checkpoint": {"everyRounds": 3}}},
        {"teachers__0__training": {"algorithm": "DiffusionNFT", "rounds": 9, "groupSize": 24}},  # the default
    ],
)
def test_a_teacher_is_not_trained_again_for_it(spec, change) -> None:
    assert made(spec, **change) == made(spec)


@pytest.mark.parametrize(
    "change",
    [
        {"teachers__0__training": {"algorithm": "DiffusionNFT", "rounds": 10}},
        {"teachers__0__rewards": ["tiny-geneval", "tiny-ocr"]},
        {"teachers__0__guidanceScale": 1.0},
        {"teachers__0__prompts__uri": "pvc://tiny-world/other.jsonl"},
        {"training__resolution": {"width": 64, "height": 64}},
        {"training__precision": "BF16"},
        {"model__uri": "pvc://tiny-world/another"},
    ],
)
def test_a_teacher_is_another_one_for_it(spec, change) -> None:
    assert made(spec, **change)[0] != made(spec)[0]
    assert weights_digest(spec(**{**MADE, **change})) != weights_digest(spec(**MADE)), "and so is its student"


def test_prompts_held_out_of_a_teachers_own_are_part_of_it(spec) -> None:
    own = {"teachers__0__prompts": {"uri": "pvc://tiny-world/prompts/geneval.train.jsonl"}}
    assert made(spec, **own)[0] != made(spec, **own, evaluation__promptsPerTask=9)[0]


def test_a_trained_teacher_lies_beside_the_students(spec) -> None:
    digest_, place = made(spec)
    assert place == f"pvc://students/opd-teachers/geneval-{digest_[:12]}"
    found = spec(**MADE).spec
    assert adapter_of(found, found.teachers[0]).uri == f"{place}/adapter"
    assert adapter_of(found, found.teachers[1]).uri == "pvc://tiny-world/teachers/ocr"
