"""Every refusal names the field, the value and what to write instead; all problems of a file come at once."""

import copy

import pytest
import yaml
from opd_core.api.load import SpecError, check_spec, load_spec, parse_spec
from opd_core.errors import InvalidError
from opd_core.exit_codes import ExitCode

from tests.api.refusals import CASES, FIRST, SDE, S, T, changed


@pytest.fixture(scope="module")
def valid(repository):
    return yaml.safe_load((repository / "examples" / "tiny" / "distill.yaml").read_text())


@pytest.mark.parametrize(("where", "value", "path", "words"), CASES, ids=[f"{c[2]}-{i}" for i, c in enumerate(CASES)])
def test_a_bad_field_is_named_with_a_remedy(valid, where, value, path, words):
    with pytest.raises(SpecError) as refusal:
        check_spec(changed(valid, where, value))
    problems = {problem.path: problem for problem in refusal.value.problems}
    assert path in problems, refusal.value
    problem = problems[path]
    assert words in f"{problem.message}; {problem.remedy}"
    assert problem.remedy
    assert path in str(refusal.value)


def test_a_number_that_is_none_is_refused(valid):
    with pytest.raises(SpecError, match=r"spec.teachers\[0\].guidanceScale: .*finite"):
        check_spec(changed(valid, (*FIRST, "guidanceScale"), float("nan")))


@pytest.mark.parametrize("solver", ["DDIM", "CPS"])
def test_an_infinite_kl_is_refused_with_the_step_to_leave_out(valid, solver):
    content = changed(valid, (*T, "sampler"), {**SDE, "solver": solver})
    content = changed(content, (*T, "objective"), {"type": "KL"})
    with pytest.raises(SpecError, match=r"trainedSteps: .*leave step 5 out"):
        check_spec(content)
    content = changed(content, (*T, "objective"), {"type": "KL", "trainedSteps": [0, 1, 2, 3, 4]})
    assert check_spec(content)


def test_weights_that_sum_to_zero_are_refused(valid):
    content = copy.deepcopy(valid)
    for teacher in content["spec"]["teachers"]:
        teacher["weight"] = 0
    with pytest.raises(SpecError, match="weights sum to zero"):
        check_spec(content)


def test_all_problems_come_at_once(valid):
    content = changed(valid, (*T, "rounds"), 0)
    content = changed(content, (*S, "model", "uri"), "x")
    content = changed(content, (*FIRST, "weight"), -1)
    with pytest.raises(SpecError) as refusal:
        check_spec(content)
    assert {p.path for p in refusal.value.problems} == {
        "spec.training.rounds", "spec.model.uri", "spec.teachers[0].weight",
    }  # fmt: skip
    assert str(refusal.value).startswith("spec: 3 problems")
    assert refusal.value.exit_code == ExitCode.INVALID


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "line 1"),
        ("a: b: c", "line 1, column 5"),
        ("", "0 documents"),
        ("{}\n---\n{}", "2 documents"),
        ("- a", "list"),
        ("just text", "str"),
        ("!!python/object:os.system x", "could not determine a constructor"),
    ],
)
def test_text_that_is_no_object_is_refused(text, words):
    with pytest.raises(SpecError, match=words):
        parse_spec(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidError, match=r"cannot read .*absent\.yaml"):
        load_spec(tmp_path / "absent.yaml")
