"""What a real API server makes of the CustomResourceDefinition: it refuses what `opd validate` refuses, and no more."""

import copy
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from devcluster.control_plane import ControlPlane
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opd_core.api import crd
from opd_core.api.load import SpecError, check_spec, dump_spec
from opd_core.api.status import Status

from tests.api.refusals import CASES, SDE, S, T, changed
from tests.operator.crd_fields import FIELDS, FULL, VALID, surroundings
from tests.operator.live import CRD, REPOSITORY, Api, wait_for
from tests.operator.test_crashes import life
from tests.operator.world import World

NAMESPACE = "crd"
EXAMPLES = [REPOSITORY / "examples" / name / "distill.yaml" for name in ("tiny", "sd35")]
# What an API server adds to a sentence of its own about a single field, or ours.
REMEDIES = ("should ", "supported values", "Required value", "unknown field", "must be", "write ", "use ", "name each",
            "give ", "leave ", "does not match")  # fmt: skip


@pytest.fixture(scope="module")
def api(control_plane: ControlPlane) -> Iterator[Api]:
    wait_for(lambda: "opds" in control_plane.kubectl("api-resources", "--api-group=opd.dev", "--cached=false"))
    control_plane.kubectl("create", "namespace", NAMESPACE)
    yield Api(control_plane, NAMESPACE)
    control_plane.kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def refusal(api: Api, content: dict[str, Any]) -> str:
    """What the API server says to a new object; empty if it takes it."""
    path = api.path("opddistillations") + "?dryRun=All&fieldValidation=Strict"
    answer = api.http.post(path, content=json.dumps(content), headers={"Content-Type": "application/json"})
    assert answer.status_code in (201, 400, 422), answer.text
    return "" if answer.status_code == 201 else str(answer.json()["message"])


def problems(content: dict[str, Any]) -> list[str]:
    try:
        check_spec(content)
    except SpecError as error:
        return [str(problem) for problem in error.problems]
    return []


def test_the_file_is_what_the_models_say() -> None:
    assert CRD.read_text() == crd.manifest(), "run `make generate`"


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("where", "value", "path", "words"), CASES, ids=[f"{c[2]}-{i}" for i, c in enumerate(CASES)])
def test_a_bad_spec_is_refused_by_field_value_and_remedy(
    api: Api, where: Any, value: Any, path: str, words: str
) -> None:
    content = changed(VALID, where, value)
    said = refusal(api, content)
    assert said, "the API server takes it"
    assert path.rsplit("[", 1)[0].rsplit(".", 1)[-1] in said or path in ("apiVersion", "kind")
    assert any(remedy in said for remedy in REMEDIES), said
    (ours,) = [problem for problem in problems(content) if problem.startswith(f"{path}: ")]
    if " should " not in ours and not path.startswith(("apiVersion", "kind")):
        sentence = ours.removeprefix(f"{path}: ")
        assert any(text in said for text in (sentence, "Required value", "unknown field")), (ours, said)


def test_several_broken_rules_are_told_at_once(api: Api) -> None:
    content = changed(VALID, (*T, "resolution", "width"), 36)
    content = changed(content, (*T, "sampler"), {**SDE, "solver": "DPM2"})
    content = changed(content, (*S, "endpoint", "rollout", "steps"), [50, 10])
    said = refusal(api, content)
    expected = problems(content)
    assert len(expected) == 3
    assert all(problem.split(": ", 1)[1] in said for problem in expected), said


def test_rules_over_lists_name_the_item(api: Api) -> None:
    content = copy.deepcopy(VALID)
    content["spec"]["evaluation"]["gate"][2]["reward"] = "tiny-ocr"
    content["spec"]["training"]["objective"] = {"type": "Velocity", "trainedSteps": [0, 3, 7]}
    content["spec"]["teachers"].append({**content["spec"]["teachers"][1], "weight": 0})
    said, expected = refusal(api, content), problems(content)
    paths = {problem.split(":")[0] for problem in expected}
    assert paths == {
        "spec.evaluation.gate[2].reward",
        "spec.training.objective.trainedSteps[2]",
        "spec.teachers[3].name",
    }
    assert all(problem in said for problem in expected), said


# ---------------------------------------------------------------------------------------------------- the same set


def agree(api: Api, content: dict[str, Any]) -> None:
    said, ours = refusal(api, content), problems(content)
    assert bool(said) == bool(ours), f"API server: {said or 'takes it'}; opd validate: {ours or 'takes it'}"


def test_the_full_spec_is_valid(api: Api) -> None:
    assert problems(FULL) == []
    assert refusal(api, FULL) == ""


def test_every_field_has_the_same_bounds_in_both(api: Api) -> None:
    """Each of some hundreds of fields at its bounds and beyond, one at a time."""

    def difference(field: tuple[tuple[Any, ...], Any]) -> str:
        path, value = field
        try:
            agree(api, changed(surroundings(path), path, value))
        except AssertionError as error:
            return f"{path} = {str(value)[:60]!r}: {error}"
        return ""

    with ThreadPoolExecutor(4) as pool:
        assert [found for found in pool.map(difference, FIELDS) if found] == []
    assert len(FIELDS) > 1000


def test_what_the_api_server_takes_with_a_point_we_take(api: Api) -> None:
    """Its rules refuse 4.0 where they compute with a whole number, and elsewhere it stores 4.0."""
    taken = 0
    for path, value in FIELDS:
        if isinstance(value, int) and not isinstance(value, bool):
            content = changed(surroundings(path), path, float(value))
            if not refusal(api, content):
                assert problems(content) == [], path
                taken += 1
    assert taken > 50


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(FIELDS), min_size=2, max_size=4))
def test_the_api_server_takes_what_opd_validate_takes(api: Api, changes: list[tuple[tuple[Any, ...], Any]]) -> None:
    content = copy.deepcopy(FULL)
    for path, value in changes:
        try:
            content = changed(content, path, value)
        except (AttributeError, TypeError, IndexError, KeyError):
            continue  # an earlier change took the place away
    agree(api, content)


@st.composite
def trainings(draw: st.DrawFn) -> dict[str, Any]:
    """Valid fields throughout, so that the rules over several of them decide."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    content = copy.deepcopy(VALID)
    spec = content["spec"]
    spec["training"] |= {
        "rounds": pick(5, 10, 11, 500),
        "imagesPerTask": pick(1, 2, 3, 4, 24),
        "nodes": pick(1, 2, 3),
        "processesPerNode": pick(1, 2),
        "resolution": {"width": pick(16, 20, 32), "height": pick(16, 24, 33)},
        "sampler": {
            "type": pick("ODE", "SDE"), "solver": pick("Flow", "Dance", "DDIM", "CPS", "DPM2"),
            "steps": pick(1, 2, 6), "noiseLevel": pick(0, 0.7, 1, 1.5),
        },
        "method": pick("OPD", "SFT", "DMD2", "TDM", "RL"),
        "objective": {
            "type": pick("KL", "MeanMatching", "X0", "PPO", "PDM", "other:LOSS"),
            "selfNormalized": pick(False, True), "extrapolation": pick(1, 1, 1.5),
        },
        "optimizer": {"schedule": pick("Constant", "Cosine"), "warmupRounds": pick(0, 10)},
    }  # fmt: skip
    spec["student"] |= {"initFromTeachers": pick(False, True), "initFrom": pick("", "pvc://a/b")}
    if draw(st.booleans()):
        spec["training"]["objective"]["trainedSteps"] = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    if draw(st.booleans()):
        spec["training"]["objective"]["stepWeights"] = draw(
            st.lists(st.sampled_from([0, 0.5, 2]), min_size=1, max_size=6)
        )
    if draw(st.booleans()):
        spec["training"]["objective"]["stepsPerRound"] = pick(1, 2, 3)
    if draw(st.booleans()):
        spec["training"]["microBatchSize"] = pick(1, 2, 3)
    if draw(st.booleans()):
        spec["training"]["reinforcement"] = {
            "algorithm": pick("DiffusionNFT", "FlowGRPO"), "groupSize": pick(2, 3), "promptsPerRound": pick(1, 4),
            "updatesPerRound": pick(1, 2), "stepsPerImage": pick(1, 6),
            "rewardWeights": pick([], [{"reward": "r", "weight": 0}], [{"reward": "t", "weight": 1}]),
        }  # fmt: skip
    for teacher in spec["teachers"]:
        if pick(False, False, True):
            teacher |= {"model": {"uri": "pvc://a/b"}}
            if pick(True, True, False):
                teacher.pop("adapter", None)
        elif spec["training"]["method"] == "RL" and pick(False, True):
            teacher.pop("adapter", None)
        teacher |= {
            "name": pick("a", "b", "c", "d"),
            "weight": pick(0, 1),
            "rewards": pick(["r"], ["r", "s"], ["s", "s"]),
        }
    spec["evaluation"]["gate"] = [
        {"task": pick("a", "b", "c"), "reward": pick("r", "s"), **pick({"atLeast": 1}, {"ofTeacher": 1}, {})}
        for _ in range(pick(0, 1, 2))
    ]
    spec["endpoint"]["replicas"] = pick(0, 1, 2)
    spec["endpoint"]["rollout"] = {"maxSurge": pick(0, 1), "steps": pick([], [10], [10, 50], [50, 10], [10, 10])}
    return content


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trainings())
def test_rules_over_several_fields_decide_alike_and_say_the_same(api: Api, content: dict[str, Any]) -> None:
    said, ours = refusal(api, content), problems(content)
    assert bool(said) == bool(ours), (said, ours)
    sentences = {problem.split(": ", 1)[1] for problem in ours}
    # Of several wrong items of one list the API server names one.
    assert not sentences or any(sentence in said for sentence in sentences), (said, ours)


# ---------------------------------------------------------------------------------------------------- defaults


@pytest.mark.parametrize(
    "content", [*(yaml.safe_load(path.read_text()) for path in EXAMPLES), FULL], ids=["tiny", "sd35", "full"]
)
def test_both_fill_in_the_same_defaults(api: Api, content: dict[str, Any]) -> None:
    stored = api.call("POST", api.path("opddistillations") + "?dryRun=All", content)
    assert stored["spec"] == dump_spec(check_spec(content))["spec"]


# ---------------------------------------------------------------------------------------------------- changes


@pytest.fixture
def running(api: Api) -> Iterator[str]:
    """An object of which a trainer has run."""
    name = f"running-{next(_numbers)}"
    api.submit(name)
    api.patch("opddistillations", name, {"status": {"run": {"key": "k"}, "begun": True}}, "status")
    yield name
    api.delete("opddistillations", name)


_numbers = itertools.count()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model": {"uri": "pvc://other/base"}},
            'a trainer has run, and students of this object are adapters of pvc://tiny-world/base '
            '(got "pvc://other/base"); write pvc://tiny-world/base, or make another object',
        ),
        (
            {"student": {"output": {"uri": "pvc://students/b"}}},
            'a trainer has run, and its students are in pvc://students/tiny-three-tasks '
            '(got "pvc://students/b"); write pvc://students/tiny-three-tasks, or make another object',
        ),
        (
            {"managedBy": "kueue.x-k8s.io/multikueue"},
            "who manages an object never changes",
        ),
    ],
)  # fmt: skip
def test_some_fields_stay_once_a_trainer_has_run(api: Api, running: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises(RuntimeError) as refused:
        api.edit(running, **change)
    assert words in str(refused.value)


def test_training_may_change_once_a_trainer_has_run(api: Api, running: str) -> None:
    api.edit(running, training={"rounds": 700}, endpoint={"studentDigest": "sha256:" + "0" * 64})


def test_an_object_that_no_operator_has_seen_is_not_current_for_kstatus(api: Api) -> None:
    """Flux, kpt and Helm 4 wait for status.observedGeneration to reach the generation."""
    api.submit("unseen")
    assert api.get("unseen")["status"] == {"observedGeneration": -1}


# ---------------------------------------------------------------------------------------------------- status


def test_the_api_server_keeps_every_status_that_the_operator_writes(api: Api) -> None:
    """Nothing is pruned and nothing refused, over a life with failures, a canary and a held-back student."""
    seen: list[dict[str, Any]] = []

    class Recorded(World):
        def written(self) -> None:
            super().written()
            if self.obj.get("status") and self.obj["status"] not in seen[-1:]:
                seen.append(copy.deepcopy(self.obj["status"]))

    life(Recorded(endpoint__replicas=2))
    held_back = Recorded().evaluated(passed=False)
    held_back.edit(endpoint__studentDigest="sha256:" + "0" * 64)
    api.submit("status")
    assert len(seen) > 30
    for status in seen:
        Status.model_validate_json(json.dumps(status))
        api.patch("opddistillations", "status", {"status": None}, "status")
        kept = api.patch("opddistillations", "status", {"status": status}, "status")["status"]
        assert kept == status


def test_a_map_may_lose_its_last_key(api: Api) -> None:
    """As the operator writes, by server-side apply, under which an emptied map is null unless it is atomic."""
    api.submit("emptied")
    obj = {"apiVersion": crd.API_VERSION, "kind": crd.KIND, "metadata": {"name": "emptied"}}
    for status in (
        {"observedGeneration": 1, "stageTimes": {"Trained": {}}, "run": {"images": {"a": "b"}}},
        {"observedGeneration": 1, "stageTimes": {}, "run": {"images": {}}},
    ):
        path = api.path("opddistillations", "emptied", "status") + "?fieldManager=opd-operator&force=true"
        kept = api.call("PATCH", path, {**obj, "status": status}, "application/apply-patch+yaml")
        assert kept["status"] == status
    for scaling in ({"minReplicas": 2, "maxReplicas": 3, "targetQueuedImages": 4}, {}):
        spec = {**VALID["spec"], "endpoint": {"autoscaling": scaling}}
        path = api.path("opddistillations", "emptied") + "?fieldManager=someone&force=true"
        api.call("PATCH", path, {**obj, "spec": spec}, "application/apply-patch+yaml")
    assert api.get("emptied")["spec"]["endpoint"]["autoscaling"]["minReplicas"] == 1


def test_replicas_scale_through_the_subresource(api: Api, control_plane: ControlPlane) -> None:
    api.submit("scaled")
    status = {"endpoint": {"replicas": 1, "selector": "opd.dev/role=endpoint"}}
    api.patch("opddistillations", "scaled", {"status": status}, "status")
    control_plane.kubectl("scale", "-n", NAMESPACE, "opd/scaled", "--replicas=3")
    scale = api.call("GET", api.path("opddistillations", "scaled", "scale"))
    assert (scale["spec"]["replicas"], scale["status"]) == (3, {"replicas": 1, "selector": "opd.dev/role=endpoint"})


# ---------------------------------------------------------------------------------------------------- for people


@pytest.mark.parametrize("example", EXAMPLES, ids=["tiny", "sd35"])
def test_the_examples_apply(control_plane: ControlPlane, api: Api, example: Any) -> None:
    for options in ([], ["--server-side"]):
        said = control_plane.kubectl("apply", "-n", NAMESPACE, "-f", example, "--dry-run=server", *options)
        assert "serverside-applied" in said or "created" in said


def test_kubectl_explains_every_field(control_plane: ControlPlane, api: Api) -> None:
    text = control_plane.kubectl("explain", "opd.spec.training")
    assert "imagesPerTask\t<integer>\n    Images per task and round, over all ranks." in text
    whole = control_plane.kubectl("explain", "opd", "--recursive")
    assert "trafficPercent" in whole

    def undescribed(schema: dict[str, Any], path: str) -> Iterator[str]:
        for name, part in schema.get("properties", {}).items():
            if not part.get("description"):
                yield f"{path}.{name}"
            yield from undescribed(part.get("items", part), f"{path}.{name}")

    whole_schema = crd.schema()["properties"]
    assert [*undescribed(whole_schema["spec"], "spec"), *undescribed(whole_schema["status"], "status")] == []


def test_kubectl_get_has_the_columns_of_a_run(control_plane: ControlPlane, api: Api) -> None:
    world = life(World(endpoint__replicas=2))
    api.submit("shown")
    api.patch("opddistillations", "shown", {"status": world.status}, "status")
    head, row = control_plane.kubectl("get", "opd", "-n", NAMESPACE, "shown").splitlines()
    assert head.split() == ["NAME", "PHASE", "PROGRESS", "TEACHERS", "WORKERS", "SCORE", "URL", "AGE"]
    assert row.split()[:3] == ["shown", "Ready", "100"]
    assert "http://tiny-endpoint.team.svc:8000" in row
    wide = control_plane.kubectl("get", "opds", "-n", NAMESPACE, "-o", "wide").splitlines()
    assert wide[0].split()[-3:] == ["RESTARTS", "STUDENT", "REASON"]
    assert any("sha256:bbb" in line and line.endswith("Completed") for line in wide)
    assert "shown" in control_plane.kubectl("get", "ml", "-n", NAMESPACE)
