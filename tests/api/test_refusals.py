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


@pytest.mark.parametrize("text", ["1e99999999999999999999", "1e-100", "9" * 64 + "E", "1" * 64 + "e99"])
def test_a_quantity_of_any_size_is_taken_or_refused(valid, text):
    """And never an error of the arithmetic behind the rules."""
    resources = {"requests": {"memory": "1"}, "limits": {"memory": text}}
    try:
        check_spec(changed(valid, (*T, "pod", "resources"), resources))
    except SpecError as error:
        assert [problem.path for problem in error.problems] == ["spec.training.pod.resources.limits.memory"]


@pytest.mark.parametrize(
    ("request_", "limit", "taken"), [("8", 8, True), (8, 8, True), (8, 4, False), ("1.5", "1.5", False)]
)
def test_devices_are_asked_for_as_whole_numbers(valid, request_, limit, taken):
    resources = {"requests": {"nvidia.com/gpu": request_}, "limits": {"nvidia.com/gpu": limit}}
    content = changed(valid, (*T, "pod", "resources"), resources)
    if taken:
        assert check_spec(content)
    else:
        with pytest.raises(SpecError, match=r"write the same number as limit"):
            check_spec(content)
