"""The stages of a distillation, decided on paper."""

import json
from collections.abc import Callable

import pytest
from opd_core.api.status import Status
from opd_core.exit_codes import ExitCode
from opd_core.stages import Condition
from opd_core.termination import fit
from opd_operator import names
from opd_operator.words import printable

from tests.operator.world import STUDENT, World, example, with_models

OTHER = "sha256:" + "b" * 64


def kinds(world: World) -> set[tuple[str, str]]:
    return {(child["kind"], child["metadata"]["labels"][names.ROLE]) for child in world.children.values()}


def test_teachers_come_first_and_the_trainer_only_when_all_of_them_answer():
    world = World(teacherServing={"placement": "Dedicated"}).settle()
    assert len(world.of("Deployment", names.TEACHERS)) == 3
    assert not world.of("Job")
    world.up(names.TEACHERS, only="teachers-0")
    assert world.status["teachersReady"] == "1/3"
    assert not world.of("Job")
    world.up(names.TEACHERS)
    assert world.condition("TeachersReady") == ("True", "Completed")
    assert [job["metadata"]["name"] for job in world.of("Job")] == ["tiny-trainer-1-0"]
    assert world.status["workersReady"] == "0/1"


def test_a_teacher_with_a_model_of_its_own_has_servers_of_its_own():
    """With the pod of the others, all claims, and an address that the trainer knows; its model is of the run's spec."""
    pod = {"resources": {"limits": {"nvidia.com/gpu": "1"}, "requests": {"nvidia.com/gpu": "1"}}}
    serving = {"replicas": 2, "pod": pod}
    world = World(teachers=with_models(ocr="pvc://big-models/ocr"), teacherServing=serving).settle()
    servers = world.of("Deployment", names.TEACHERS)
    assert [server["metadata"]["name"] for server in servers] == [f"tiny-teachers-{i}" for i in range(4)]
    assert len(world.of("Service", names.TEACHERS)) == 4
    templates = [server["spec"]["template"]["spec"] for server in servers]
    held = [
        [word for word in template["containers"][0]["command"] if word.startswith("--teacher=")]
        for template in templates
    ]
    assert held == [["--teacher=geneval", "--teacher=aesthetic"]] * 2 + [["--teacher=ocr"]] * 2
    for template in templates:
        assert template["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        claims = {
            each["persistentVolumeClaim"]["claimName"]
            for each in template["volumes"]
            if "persistentVolumeClaim" in each
        }
        assert claims == {"tiny-world", "big-models"}
    world.up(names.TEACHERS)
    (trainer,) = world.of("Job")
    (teachers,) = (word for word in _words(trainer) if word.startswith("--teachers="))
    assert teachers.count(":8001") == 4
    world.edit(teachers=with_models(ocr="pvc://big-models/ocr-2"))
    assert world.condition("TeachersReady")[0] == "False", "another model is another teacher"


def _words(job):
    return job["spec"]["template"]["spec"]["containers"][0]["command"]


def test_the_whole_way_to_a_student_in_service():
    world = World().trained()
    assert world.condition("Trained") == ("True", "Completed")
    assert world.condition("TeachersReady") == ("True", "Freed")
    assert not world.of("Deployment", names.TEACHERS)
    assert not world.of("NetworkPolicy", names.TEACHERS)
    assert world.condition("Evaluated")[1] == "Running"
    world = World().evaluated()
    assert world.status["student"]["summary"] == "geneval 0.90, ocr 0.90, aesthetic 0.90"
    assert world.condition("Ready") == ("False", "Starting")
    assert {job["metadata"]["name"][:14] for job in world.of("Job")} == {"tiny-trainer-1", "tiny-evaluator"}, (
        "for their logs"
    )
    world.up(names.ENDPOINT)
    for kind in ("Accepted", "TeachersReady", "Trained", "Evaluated", "Deployed", "Serving", "Ready"):
        assert world.condition(kind)[0] == "True", kind
    assert world.condition("Failed") == ("False", "NotFailed")
    assert world.status["phase"] == "Ready"
    assert world.status["endpoint"]["url"] == "http://tiny-endpoint.team.svc:8000"
    assert world.status["completionTime"]
    assert {event[0] for event in world.events} >= {"Starting", "Running", "Completed", "Freed", "Available"}


@pytest.mark.parametrize("stage", ["settle", "trained", "evaluated", "served"])
def test_nothing_is_written_when_nothing_happens(stage):
    world = World()
    getattr(world, stage)()
    before = world.writes
    world.wait(600)
    assert world.writes == before


@pytest.mark.parametrize("stage", ["settle", "trained", "served"])
def test_every_condition_is_always_there_with_the_generation_of_its_object(stage):
    world = World()
    getattr(world, stage)()
    world.obj["metadata"]["generation"] = 7
    world.settle()
    assert [c["type"] for c in world.status["conditions"]] == [kind.value for kind in Condition]
    assert {c["observedGeneration"] for c in world.status["conditions"]} == {7}
    assert world.status["observedGeneration"] == 7


# ---------------------------------------------------------------------------------------------------- failures


def test_a_failed_trainer_starts_again_later_and_later_then_the_run_fails():
    world = World(runPolicy={"backoffLimit": 2}).settle().up(names.TEACHERS)
    for restart in (1, 2):
        world.run().fail(names.TRAINER, 1)
        assert world.status["restarts"] == restart
        assert world.condition("Trained") == ("False", "Restarting")
        assert not world.jobs(), "not before the pause is over"
        assert world.of("Deployment", names.TEACHERS), "the teachers wait for it"
        world.wait(60)
        assert world.job(names.TRAINER)["metadata"]["name"] == f"tiny-trainer-1-{restart}"
    world.run().fail(names.TRAINER, 1)
    assert world.condition("Failed") == ("True", "BackoffLimitExceeded")
    assert world.condition("Ready") == ("False", "BackoffLimitExceeded")
    assert world.status["lastFailure"]["exitCode"] == 1
    assert world.status["lastFailure"]["message"] == "it broke"
    assert not world.of("Deployment")
    before = world.writes
    world.wait(1e6)
    assert world.writes == before, "what is over makes nothing again"


@pytest.mark.parametrize(
    ("code", "reason", "expected"),
    [
        (ExitCode.INVALID, "Error", "UserError"),
        (ExitCode.REFUSED, "Error", "UserError"),
        (ExitCode.DIVERGED, "Error", "Failed"),
        (ExitCode.STORAGE, "Error", "Failed"),
        (ExitCode.OUT_OF_MEMORY, "Error", "OutOfMemory"),
    ],
)
def test_what_a_new_start_cannot_help_fails_at_once(code, reason, expected):
    world = World().settle().up(names.TEACHERS).run().fail(names.TRAINER, code, reason, "prompts: no such file")
    assert world.condition("Failed") == ("True", expected)
    assert "prompts: no such file" in world.message("Failed")
    assert world.status["restarts"] == 0
    assert not world.of("Deployment")
    assert world.of("Job"), "kept for its log"
    world = (
        World(runPolicy={"cleanPodPolicy": "All"}).settle().up(names.TEACHERS).run().fail(names.TRAINER, code, reason)
    )
    assert not world.of("Job")


@pytest.mark.parametrize(
    ("code", "reason", "more", "cause"),
    [
        (ExitCode.TERMINATED, "Error", {}, "disruptions"),
        (137, "Error", {"conditions": ({"type": "DisruptionTarget", "status": "True"},)}, "disruptions"),
        (137, "OOMKilled", {}, "restarts"),
        (ExitCode.UNAVAILABLE, "Error", {}, "restarts"),
    ],
)
def test_disruptions_and_failures_are_counted_apart(code, reason, more, cause):
    world = World().settle().up(names.TEACHERS).run().fail(names.TRAINER, code, reason, **more)
    assert world.status[cause] == 1
    assert world.status[{"restarts": "disruptions", "disruptions": "restarts"}[cause]] == 0
    assert world.wait(60).job(names.TRAINER)["metadata"]["name"] == "tiny-trainer-1-1"


def test_a_trainer_on_a_lost_node_is_awaited_and_the_condition_says_what_to_do():
    world = World().settle().up(names.TEACHERS).run()
    job = world.job(names.TRAINER)
    job["status"] = {"active": 1, "ready": 0, "terminating": 1}
    lost = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager"}
    world.pod(job, "tiny-trainer-1-0-0", "Running", conditions=(lost,), leaving=True)
    world.settle().wait(3600)
    assert world.condition("Trained") == ("False", "Disrupted")
    assert "kubectl taint node machine-1 node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in world.message(
        "Trained"
    )
    assert [each["metadata"]["name"] for each in world.jobs()] == ["tiny-trainer-1-0"], "never two in one folder"


def test_disruptions_never_use_up_the_limit():
    world = World(runPolicy={"backoffLimit": 0}).settle().up(names.TEACHERS)
    for _ in range(5):
        world.run().fail(names.TRAINER, ExitCode.TERMINATED).wait(400)
    assert world.status["disruptions"] == 5
    assert world.condition("Failed")[0] == "False"


@pytest.mark.parametrize("consequence", [ExitCode.TERMINATED, ExitCode.UNAVAILABLE])
def test_the_cause_is_the_pod_that_failed_by_itself(consequence):
    world = World(training__nodes=2).settle().up(names.TEACHERS).run()
    job = world.job(names.TRAINER)
    job["status"] = {"failed": 2, "conditions": [{"type": "Failed", "status": "True"}]}
    told = {"exitCode": int(consequence), "reason": "Error", "finishedAt": "2026-01-01T00:00:00Z"}
    broke = {"exitCode": 2, "reason": "Error", "message": "bad prompt", "finishedAt": "2026-01-01T00:00:01Z"}
    world.pod(job, "tiny-trainer-1-0-0", "Failed", ended=told, index=0)
    world.pod(job, "tiny-trainer-1-0-1", "Failed", ended=broke, index=1)
    world.settle()
    assert world.status["lastFailure"]["pod"] == "tiny-trainer-1-0-1"
    assert world.condition("Failed") == ("True", "UserError")


@pytest.mark.parametrize(
    ("limit", "seconds", "stage", "prepare"),
    [
        ("teachersReady", 1800, "TeachersReady", lambda world: world.settle()),
        ("trainerReady", 1800, "Trained", lambda world: world.settle().up(names.TEACHERS)),
        ("evaluated", 14400, "Evaluated", lambda world: world.trained()),
    ],
)
def test_a_deadline_removes_the_pods_before_it_says_failed(limit, seconds, stage, prepare):
    world = prepare(World())
    world.linger = True
    world.now += seconds + 1
    world.settle()
    assert world.condition("Failed") == ("False", "Stopping") or not world.active(), "something may still hold a GPU"
    assert not world.of("Deployment")
    assert not world.jobs()
    world.leave()
    assert world.condition("Failed") == ("True", "DeadlineExceeded")
    assert world.condition(stage) == ("False", "DeadlineExceeded")
    assert f"stageDeadlines.{limit} = {seconds} s" in world.message("Failed")


def test_an_unschedulable_trainer_is_told_and_frees_the_teachers_at_its_deadline():
    world = World().settle().up(names.TEACHERS)
    full = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/1 nodes: no GPU"}
    world.pod(world.job(names.TRAINER), "tiny-trainer-1-0-0", "Pending", conditions=(full,))
    world.settle()
    assert world.condition("Trained") == ("False", "Unschedulable")
    assert "no GPU" in world.message("Trained")
    world.wait(1801)
    assert world.condition("Failed") == ("True", "DeadlineExceeded")
    assert "no GPU" in world.message("Failed")
    assert not world.of("Deployment")


def test_an_image_that_cannot_be_pulled_is_told():
    world = World().settle()
    (teachers,) = world.of("Deployment", names.TEACHERS)
    world.pod(teachers, "t", "Pending", waiting={"reason": "ImagePullBackOff", "message": "no such image"})
    world.settle()
    assert world.condition("TeachersReady") == ("False", "ImagePullFailed")
    assert "no such image" in world.message("TeachersReady")


def test_the_deadline_of_the_whole_run():
    world = World(runPolicy={"activeDeadlineSeconds": 100}).settle().up(names.TEACHERS).run()
    world.wait(101)
    assert world.condition("Failed") == ("True", "DeadlineExceeded")
    assert not world.jobs()
    served = World(runPolicy={"activeDeadlineSeconds": 100}).served()
    assert served.wait(1000).condition("Ready")[0] == "True", "it limits the work, not the service"


def test_what_the_cluster_refuses_is_told():
    world = World().settle()
    world.rejected = {names.TEACHERS: "Deployment tiny-teachers-0: exceeded quota: gpus"}
    world.settle()
    assert world.condition("TeachersReady") == ("False", "Rejected")
    assert "exceeded quota" in world.message("TeachersReady")


def test_a_refusal_is_told_of_the_role_that_it_is_about():
    """Of the others it says nothing; without what all pods need, none comes up."""
    world = World().served()
    world.rejected = {names.TRAINER: "Job tiny-trainer-2-0: exceeded quota"}
    assert world.settle().condition("Serving") == ("True", "Available")
    world = World().settle()
    world.rejected = {names.SHARED: "ServiceAccount tiny-workload: taken"}
    assert world.settle().condition("TeachersReady") == ("False", "Rejected")


@pytest.mark.parametrize(
    ("changes", "remote"),
    [
        ({}, False),
        ({"training__pod": {"env": [{"name": "MIRROR", "value": "hf://"}]}}, False),
        ({"student__initFrom": "hf://a/b@" + "c" * 40}, True),
        ({"teachers": with_models(ocr="hf://a/b@" + "c" * 40)}, True),
    ],
)
def test_the_network_is_open_to_the_outside_where_a_uri_of_the_spec_is(changes, remote):
    """Not where a text happens to look like one: that opened all roles."""
    world = World(**changes).settle()
    (policy,) = world.of("NetworkPolicy", names.TEACHERS)
    ports = {port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]}
    assert (443 in ports) == remote


STEERING = "a\x1b]52;c;cm0gLXJm\x07b\x9b2J\u202ec\ud800d\ne"


def test_no_control_character_of_a_pod_reaches_the_status():
    """Whoever reads it may sit at a terminal; and a lone surrogate never comes back from the API server as it went."""
    world = World().settle().up(names.TEACHERS).run()
    world.progress = {
        "round": 1, "totalRounds": 5, "percentage": 1, "metrics": [{"task": STEERING, STEERING: 1.0}],
    }  # fmt: skip
    seen = [world.settle().status]
    seen.append(world.fail(names.TRAINER, 1, reason=STEERING, message=STEERING).status)
    world = World().settle().up(names.TEACHERS)
    job = world.job(names.TRAINER)
    for more in (
        {"waiting": {"reason": "ErrImagePull", "message": STEERING}},
        {"waiting": {"reason": "CrashLoopBackOff"}, "before": {"exitCode": 1, "message": STEERING}},
        {"conditions": ({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": STEERING},)},
    ):
        world.pod(job, "tiny-trainer-1-0-0", "Pending", **more)
        seen.append(world.settle().status)
    world = World().settle()
    world.rejected = {names.TEACHERS: STEERING}
    seen.append(world.settle().status)
    for status in seen:
        assert "\ufffd" in json.dumps(status, ensure_ascii=False)
    world = World().settle()
    world.obj["spec"]["training"]["sampler"] = {"type": STEERING}
    for status in (*seen, world.settle().status):
        assert texts(status) == [printable(text) for text in texts(status)]


def texts(value):
    """Every text in it."""
    if isinstance(value, dict | list):
        return [
            text for each in ([*value, *value.values()] if isinstance(value, dict) else value) for text in texts(each)
        ]
    return [value] if isinstance(value, str) else []


# ---------------------------------------------------------------------------------------------------- gate and history


def test_a_student_that_misses_its_gate_is_not_served():
    world = World().evaluated(passed=False)
    assert world.condition("Evaluated") == ("False", "GateMissed")
    assert world.condition("Failed") == ("True", "GateMissed")
    assert world.condition("Serving")[0] == "False"
    assert not world.of("Deployment")


def test_a_lower_gate_judges_again_without_training():
    world = World().evaluated(passed=False)
    world.edit(evaluation__gate=[])
    assert world.condition("Failed")[0] == "False"
    assert not world.jobs(names.TRAINER)
    world.finish(names.EVALUATOR, digest=STUDENT, gatePassed=True, scores=[]).up(names.ENDPOINT)
    assert world.condition("Ready")[0] == "True"


def test_naming_a_student_promotes_it_although_it_missed_the_gate():
    world = World().evaluated(passed=False).edit(endpoint__studentDigest=STUDENT).up(names.ENDPOINT)
    assert world.condition("Deployed")[0] == "True"
    assert world.condition("Ready")[0] == "True"
    assert world.condition("Failed")[0] == "False"


def test_a_name_of_no_student_is_told_and_changes_nothing():
    world = World().served().edit(endpoint__studentDigest=OTHER)
    assert world.condition("Deployed") == ("False", "UnknownStudent")
    assert world.condition("Serving")[0] == "True"
    assert len(world.of("Deployment", names.ENDPOINT)) == 1


# ---------------------------------------------------------------------------------------------------- suspend, edits, end


@pytest.mark.parametrize("stage", ["settle", "trained", "evaluated", "served"])
def test_suspend_frees_the_run_and_resume_goes_on(stage):
    world = World()
    getattr(world, stage)()
    attempt = world.status["run"]["attempt"]
    world.edit(suspend=True)
    assert {role for _, role in kinds(world)} <= {names.ENDPOINT, "workload"}
    assert not world.of("Job")
    assert world.condition("Serving")[0] == ("True" if stage == "served" else "False"), "what serves goes on serving"
    assert bool(world.of("Pod")) == (stage == "served")
    assert world.condition("Suspended") == ("True", "Suspended")
    assert world.condition("Ready") == ("False", "Suspended")
    if stage == "evaluated":  # its endpoint starts, and has its deadline
        world.up(names.ENDPOINT)
    before = world.writes
    assert world.wait(1e6).writes == before
    world.edit(suspend=False)
    assert world.condition("Suspended")[0] == "False"
    assert world.status["run"]["attempt"] == attempt
    if stage == "settle":
        world.up(names.TEACHERS)
        assert world.job(names.TRAINER)["metadata"]["name"] == "tiny-trainer-1-1"
    elif stage in ("evaluated", "served"):
        assert world.condition("Ready")[0] == "True"


@pytest.mark.parametrize("paused", [False, True])
def test_a_suspended_endpoint_frees_its_pods_and_comes_back_as_the_same_revision(paused: bool):
    world = World(endpoint__replicas=2).served()
    before = world.status["endpoint"]["stable"]
    world.linger = True
    world.edit(endpoint__replicas=2, endpoint__suspend=True, suspend=paused)
    assert world.condition("Serving") == ("False", "Stopping")
    world.leave()
    assert not world.of("Deployment")
    for kind in ("Deployed", "Serving", "Ready"):
        assert world.condition(kind) == ("False", "Suspended")
    assert world.condition("Trained")[0] == world.condition("Evaluated")[0] == "True"
    assert (world.status["endpoint"]["replicas"], world.status["endpoint"]["readyReplicas"]) == (0, 0)
    writes = world.writes
    assert world.wait(1e6).writes == writes
    world.linger = False
    world.edit(endpoint__replicas=2).up(names.ENDPOINT)
    assert world.status["endpoint"]["stable"] == before
    assert world.condition("Ready")[0] == "True"


def test_a_run_goes_on_while_its_endpoint_is_suspended_and_its_student_then_replaces_the_old_one():
    world = World().served().edit(endpoint__suspend=True, training__seed=7)
    world.up(names.TEACHERS).run().finish(names.TRAINER, digest=OTHER)
    world.finish(names.EVALUATOR, digest=OTHER, gatePassed=True, scores=[])
    assert world.condition("Evaluated")[0] == "True"
    assert not world.of("Deployment")
    world.edit(training__seed=7)
    assert world.status["endpoint"]["stable"]["digest"] == STUDENT
    assert world.condition("Deployed") == ("False", "Canary")


def test_suspend_and_resume_is_the_way_to_try_again():
    world = World().settle().up(names.TEACHERS).run().fail(names.TRAINER, 2)
    assert world.condition("Failed")[0] == "True"
    world.edit(suspend=True).edit(suspend=False)
    assert world.condition("Failed")[0] == "False"
    world.up(names.TEACHERS).run()
    assert world.condition("Trained") == ("False", "Running")


def test_an_edit_of_the_training_begins_a_new_run_and_the_old_student_serves_on():
    world = World().served()
    world.edit(training__seed=7)
    assert world.status["run"]["attempt"] == 2
    assert world.condition("Serving")[0] == "True"
    assert world.condition("Ready")[0] == "False"
    assert world.of("Deployment", names.TEACHERS)
    assert len(world.of("Deployment", names.ENDPOINT)) == 1
    world.up(names.TEACHERS).run().fail(names.TRAINER, 2)
    assert world.condition("Failed")[0] == "True"
    assert world.condition("Serving")[0] == "True"


def test_going_back_to_a_known_spec_needs_no_training():
    world = World().served()
    world.edit(training__seed=7).up(names.TEACHERS).run().finish(names.TRAINER, digest=OTHER)
    world.edit()
    assert world.status["run"]["attempt"] == 3
    assert world.status["student"]["digest"] == STUDENT
    assert not world.jobs(names.TRAINER)


def test_an_edit_of_the_policy_alone_changes_no_child():
    world = World().settle().up(names.TEACHERS).run()
    before = {key: child for key, child in world.children.items() if child["kind"] != "Pod"}
    world.edit(runPolicy={"backoffLimit": 9})
    assert {key: child for key, child in world.children.items() if child["kind"] != "Pod"} == before


TTL = {"runPolicy": {"ttlSecondsAfterFinished": 60}}


@pytest.mark.parametrize(
    ("end", "goes"),
    [
        (lambda: World(**TTL).served(), False),
        (lambda: World(**TTL, endpoint__replicas=0).evaluated(), False),  # scaled to nothing, not over
        (lambda: World(**TTL, endpoint__enabled=False).evaluated(), True),
        (lambda: World(**TTL).served().edit(**TTL, endpoint__suspend=True), True),
        (lambda: World(**TTL).served().edit(**TTL, suspend=True, endpoint__suspend=True), False),
        (lambda: World(**TTL).evaluated(passed=False), True),
        (lambda: World(**TTL).settle().up(names.TEACHERS).run().fail(names.TRAINER, 2), True),
        # Failed, and an older student serves.
        (
            lambda: World(**TTL).served().edit(**TTL, training__seed=7).up(names.TEACHERS).run().fail(names.TRAINER, 2),
            False,
        ),
    ],
    ids=["serves", "scaled-to-0", "no-endpoint", "put-away", "paused", "gate", "failed", "failed-and-serves"],
)
def test_a_finished_object_goes_after_its_time_unless_it_serves(end: Callable[[], World], goes: bool):
    world = end()
    assert world.plan
    assert not world.plan.delete
    world.now += 61
    world.look()
    assert world.plan.delete == goes


def test_a_spec_that_cannot_be_run_touches_nothing():
    world = World().served()
    before = dict(world.children)
    world.edit(training__sampler={"type": "ODE", "noiseLevel": 0.5})
    assert world.condition("Accepted") == ("False", "Invalid")
    assert "spec.training.sampler.noiseLevel" in world.message("Accepted")
    assert world.children == before


def test_a_lost_result_is_asked_for_again():
    world = World().settle().up(names.TEACHERS).run()
    world.job(names.TRAINER)["status"] = {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
    del world.children["Pod", "tiny-trainer-1-0-0"]
    world.settle()
    assert world.condition("Trained") == ("False", "Restarting")
    assert not world.jobs()
    assert world.wait(60).job(names.TRAINER)["metadata"]["name"] == "tiny-trainer-1-1"
    assert (world.status["restarts"], world.status["disruptions"]) == (0, 1), "its pod was deleted; it did not fail"


def test_progress_is_shown_while_it_trains():
    world = World().settle().up(names.TEACHERS)
    world.progress = {
        "round": 30, "totalRounds": 500, "percentage": 6.0, "remainingSeconds": 360.4,
        "metrics": [{"task": "ocr", "loss": 1.25, "velocityMse": 0.5}], "checkpoint": {"round": 20, "path": "p"},
    }  # fmt: skip
    world.run()
    progress = world.status["progress"]
    assert (progress["round"], progress["percentage"], progress["remainingSeconds"]) == (30, 6, 360)
    assert {"name": "loss/ocr", "value": "1.25"} in progress["metrics"]
    assert world.status["checkpoint"] == {"round": 20}


def test_progress_has_room_for_every_task():
    world = World().settle().up(names.TEACHERS)
    figures = {"loss": 1.25, "kl": 0.5, "velocityMse": 0.5, "reward/ocr": 0.5}
    rows = [{"task": f"task-{i}", **figures} for i in range(64)]
    world.progress = {"round": 30, "totalRounds": 500, "percentage": 6.0, "metrics": rows}
    world.run()
    assert len(world.status["progress"]["metrics"]) == 64 * len(figures)


# ---------------------------------------------------------------------------------------------------- pods that linger


def test_suspended_is_true_only_when_every_pod_is_gone():
    world = World().settle().up(names.TEACHERS).run()
    world.linger = True
    world.edit(suspend=True)
    assert world.condition("Suspended") == ("False", "Stopping")
    assert world.status["phase"] == "Suspending"
    assert world.of("Deployment", names.TEACHERS), "a trainer that was told to stop finishes its round"
    assert not world.jobs()
    world.leave()  # the trainer; then the teachers
    assert world.leave().condition("Suspended") == ("True", "Suspended")


@pytest.mark.parametrize(
    "change", [{"training__seed": 7}, {"suspend": True}, {"training__pod": {"nodeSelector": {"disk": "ssd"}}}]
)
def test_no_second_trainer_while_the_first_one_is_ending(change):
    """Both would write checkpoints into one folder."""
    world = World().settle().up(names.TEACHERS)
    world.pod(world.job(names.TRAINER), "tiny-trainer-1-0-0", "Pending")
    world.settle().linger = True
    world.edit(**change).edit(**{key: value for key, value in change.items() if key != "suspend"})
    world.up(names.TEACHERS)
    assert not world.jobs(names.TRAINER)
    assert world.condition("Trained") == ("False", "Stopping")
    world.leave()
    assert len(world.jobs(names.TRAINER)) == 1


def test_no_second_trainer_beside_a_job_whose_pods_nobody_has_seen_yet():
    """It was made a moment ago, and the watch of pods is behind that of Jobs."""
    world = World().settle().up(names.TEACHERS)
    world.linger = True
    assert not world.of("Pod", names.TRAINER)
    world.edit(training__seed=7).up(names.TEACHERS)
    assert not world.jobs(names.TRAINER)
    assert world.condition("Trained") == ("False", "Stopping")
    assert "tiny-trainer-1-0 of an earlier start" in world.message("Trained")
    assert world.leave().job(names.TRAINER)["metadata"]["name"] == "tiny-trainer-2-0"


def test_a_job_deleted_by_hand_waits_for_its_pods_too():
    world = World().settle().up(names.TEACHERS).run()
    world.linger = True
    world.remove("Job", "tiny-trainer-1-0")
    assert not world.settle().jobs()
    assert world.leave().job(names.TRAINER)["metadata"]["name"] == "tiny-trainer-1-0"


@pytest.mark.parametrize(("code", "expected"), [(2, ("True", "UserError")), (1, ("False", "NotFailed"))])
def test_a_failed_job_is_judged_when_its_pods_have_spoken(code, expected):
    """Jobs and pods come by two watches, in any order."""
    world = World().settle().up(names.TEACHERS).run()
    job = world.job(names.TRAINER)
    job["status"] = {"failed": 1, "conditions": [{"type": "Failed", "status": "True", "message": "BackoffLimit"}]}
    world.settle()
    assert world.status["restarts"] == world.status["disruptions"] == 0
    ended = {"exitCode": code, "reason": "Error", "message": "it broke"}
    world.pod(job, "tiny-trainer-1-0-0", "Failed", ended=ended)
    world.settle()
    assert world.condition("Failed") == expected
    assert world.status["lastFailure"]["exitCode"] == code


def test_a_finished_job_is_read_when_its_pod_has_spoken():
    world = World().settle().up(names.TEACHERS).run()
    job = world.job(names.TRAINER)
    job["status"] = {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
    world.settle()
    assert world.condition("Trained")[0] == "False"
    words = json.dumps({"exitCode": 0, "digest": STUDENT})
    world.pod(job, "tiny-trainer-1-0-0", "Succeeded", ended={"exitCode": 0, "message": words})
    assert world.settle().condition("Trained")[0] == "True"


# ---------------------------------------------------------------------------------------------------- edits on the way


def test_a_wrong_pod_can_be_mended_while_the_trainer_does_not_run():
    world = World(training__pod={"image": "typo:1"}).settle().up(names.TEACHERS)
    world.edit(training__pod={"image": "trainer:2"})
    (job,) = world.jobs(names.TRAINER)
    assert job["metadata"]["name"] == "tiny-trainer-1-1"
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "trainer:2"
    world.run().edit(training__pod={"image": "trainer:3"})
    assert [job["metadata"]["name"] for job in world.jobs()] == ["tiny-trainer-1-1"], "what runs is left alone"


def test_a_pending_job_keeps_the_spec_that_it_was_made_with():
    world = World().settle().up(names.TEACHERS)
    (name,) = _spec_of(world.job(names.TRAINER))
    world.edit(training__checkpoint={"everyRounds": 7})
    assert ("ConfigMap", name) in world.children
    world.run().fail(names.TRAINER, 1).wait(60)
    (fresh,) = _spec_of(world.job(names.TRAINER))
    assert fresh != name
    assert '"everyRounds": 7' in world.children["ConfigMap", fresh]["data"]["distill.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"training__checkpoint": {"everyRounds": 7}},
        {"evaluation__gate": []},
        {"evaluation__everyRounds": 50},
        {"training__pod": {"nodeSelector": {"disk": "ssd"}}},
        {"runPolicy": {"backoffLimit": 9}},
    ],
)
def test_what_teachers_do_not_read_does_not_restart_them(change):
    world = World().settle().up(names.TEACHERS).run()
    before = world.of("Deployment", names.TEACHERS)[0]["spec"]
    world.edit(**change)
    assert world.of("Deployment", names.TEACHERS)[0]["spec"] == before


def test_what_is_left_out_of_the_spec_leaves_the_pods():
    world = World(teacherServing={"pod": {"nodeSelector": {"disk": "ssd"}}}).settle()
    before = world.of("Deployment", names.TEACHERS)[0]["metadata"]["annotations"][names.MANIFEST]
    world.edit(teacherServing={})
    (deployment,) = world.of("Deployment", names.TEACHERS)
    assert "nodeSelector" not in deployment["spec"]["template"]["spec"]
    assert deployment["metadata"]["annotations"][names.MANIFEST] != before


# ---------------------------------------------------------------------------------------------------- the gate again


@pytest.mark.parametrize("enabled", [True, False])
def test_a_missed_gate_stays_missed_after_a_suspension(enabled):
    world = World(endpoint__enabled=enabled).evaluated(passed=False)
    world.edit(endpoint__enabled=enabled, suspend=True).edit(endpoint__enabled=enabled)
    assert world.condition("Evaluated") == ("False", "GateMissed")
    assert world.condition("Failed") == ("True", "GateMissed")
    assert world.condition("Ready")[0] == "False"


def test_a_student_that_is_judged_again_later_has_its_whole_time_again():
    world = World(runPolicy={"activeDeadlineSeconds": 86_400}).evaluated(passed=False).wait(1e6)
    world.edit(runPolicy={"activeDeadlineSeconds": 86_400}, evaluation__gate=[]).wait(14_000)
    assert world.condition("Evaluated") == ("False", "Running")
    assert world.condition("Failed")[0] == "False"
    assert world.wait(500).condition("Failed") == ("True", "DeadlineExceeded")


def test_an_edit_of_the_gate_and_back_does_not_pass_it():
    world = World().evaluated(passed=False).edit(evaluation__gate=[]).edit()
    assert world.condition("Failed") == ("True", "GateMissed")
    assert not world.of("Deployment")


def test_a_stricter_gate_that_the_serving_student_misses_leaves_it_in_service():
    world = World().served()
    world.edit(training__seed=7).up(names.TEACHERS).run().finish(names.TRAINER, digest=OTHER)
    world.finish(names.EVALUATOR, digest=OTHER, gatePassed=True, scores=[])
    for _ in range(6):
        world.up(names.ENDPOINT).wait(61)
    world.edit(training__seed=7, evaluation__gate=[{"task": "ocr", "reward": "tiny-ocr", "atLeast": 1.0}])
    world.finish(names.EVALUATOR, digest=OTHER, gatePassed=False, scores=[])
    assert world.condition("Failed") == ("True", "GateMissed")
    assert world.status["endpoint"]["stable"]["digest"] == OTHER, "the older one was never judged by this gate"
    assert "canary" not in world.status["endpoint"]


# ---------------------------------------------------------------------------------------------------- the evaluator


def test_a_failed_evaluator_starts_again_and_its_failures_are_its_own():
    world = World(runPolicy={"backoffLimit": 1}).trained()
    for _ in range(3):  # suspensions are no failures
        world.edit(runPolicy={"backoffLimit": 1}, suspend=True).edit(runPolicy={"backoffLimit": 1})
    world.fail(names.EVALUATOR, 1)
    assert world.condition("Evaluated") == ("False", "Restarting")
    world.wait(60)
    world.fail(names.EVALUATOR, 1)
    assert world.condition("Failed") == ("True", "BackoffLimitExceeded")


def test_a_lost_score_is_asked_for_again():
    world = World().trained()
    job = world.job(names.EVALUATOR)
    job["status"] = {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
    world.settle()
    assert not world.jobs()
    assert world.wait(60).job(names.EVALUATOR)["metadata"]["name"].endswith("-1")


# ---------------------------------------------------------------------------------------------------- teachers


def test_teachers_that_refuse_their_adapters_end_the_run_at_once():
    world = World().settle()
    (teachers,) = world.of("Deployment", names.TEACHERS)
    words = json.dumps({"exitCode": 2, "message": "teachers[0].adapter: rank 8 does not fit"})
    before = {"exitCode": 2, "reason": "Error", "message": words}
    world.pod(
        teachers, "t", "Running", waiting={"reason": "CrashLoopBackOff", "message": ""}, before=before, restarts=1
    )
    world.settle()
    assert world.condition("Failed") == ("True", "UserError")
    assert "rank 8 does not fit" in world.message("Failed")
    assert not world.of("Deployment")


def test_pods_that_a_quota_refuses_are_told():
    world = World().settle()
    (teachers,) = world.of("Deployment", names.TEACHERS)
    refused = {"type": "ReplicaFailure", "status": "True", "message": "pods is forbidden: exceeded quota: gpus"}
    teachers["status"] = {"observedGeneration": 1, "conditions": [refused]}
    world.settle()
    assert world.condition("TeachersReady") == ("False", "Rejected")
    assert "exceeded quota: gpus" in world.message("TeachersReady")


def test_a_job_that_gets_no_pods_is_told():
    world = World().settle().up(names.TEACHERS)
    assert "`kubectl describe job tiny-trainer-1-0`" in world.message("Trained")


# ---------------------------------------------------------------------------------------------------- outcome


def test_completion_is_forgotten_when_work_begins_again():
    world = World(runPolicy={"ttlSecondsAfterFinished": 60}).evaluated(passed=False)
    assert "completionTime" in world.status
    world.edit(runPolicy={"ttlSecondsAfterFinished": 60}, training__seed=7)
    assert "completionTime" not in world.status
    world.up(names.TEACHERS).run()
    assert not world.wait(600).plan.delete


def test_a_pod_over_its_own_limit_is_no_disruption():
    world = World().settle().up(names.TEACHERS).run()
    job = world.job(names.TRAINER)
    job["status"] = {"failed": 1, "conditions": [{"type": "Failed", "status": "True"}]}
    world.pod(job, "tiny-trainer-1-0-0", "Failed")
    pod = world.children["Pod", "tiny-trainer-1-0-0"]
    message = "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. "
    pod["status"].update(reason="Evicted", message=message, containerStatuses=[])
    world.settle()
    assert (world.status["restarts"], world.status["disruptions"]) == (1, 0)
    assert "ephemeral local storage" in world.status["lastFailure"]["message"]


@pytest.mark.parametrize(
    "words",
    [
        '{"exitCode": null, "digest": 5}',
        '{"exitCode": "x"}',
        "[1, 2]",
        '{"message": {"a": 1}}',
        '{"exitCode": 1e400}',
        '{"digest": "sha256:x", "scores": [{"task": 1}]}',
        "\x00" * 5000,
    ],
)
def test_whatever_a_pod_says_is_survived(words):
    world = World().settle().up(names.TEACHERS).run()
    world.fail(names.TRAINER, 1, message=words)
    assert world.status["restarts"] == 1
    Status.model_validate_json(json.dumps(world.status))
    world.wait(60).run()
    job = world.job(names.TRAINER)
    job["status"] = {"succeeded": 1, "conditions": [{"type": "Complete", "status": "True"}]}
    world.pod(job, f"{job['metadata']['name']}-0", "Succeeded", ended={"exitCode": 0, "message": words})
    world.settle()
    assert world.condition("Trained") == ("False", "Restarting")
    assert world.status["restarts"] == 2
    assert world.wait(60).job(names.TRAINER), "its result cannot be read, so it is asked again"


@pytest.mark.parametrize(("role", "stage"), [(names.TRAINER, "Trained"), (names.EVALUATOR, "Evaluated")])
def test_a_program_that_ends_well_and_says_nothing_is_asked_again_after_pauses_and_not_for_ever(role, stage):
    """An image of another release, say."""
    world = World().trained() if role == names.EVALUATOR else World().settle().up(names.TEACHERS)
    starts = 0
    while world.condition("Failed")[0] == "False":
        world.finish(role)
        starts += 1
        assert starts < 10
        world.wait(100)
    assert starts == 4, "backoffLimit 3"
    assert world.condition("Failed") == ("True", "BackoffLimitExceeded")
    assert "no result of this release" in world.message("Failed")
    assert world.condition(stage)[0] == "False"


def test_every_status_fits_its_schema_even_with_the_longest_words():
    many = [{**example()["spec"]["teachers"][0], "name": f"{'t' * 60}{i}"} for i in range(16)]
    gate = [{"task": task["name"], "reward": "tiny-geneval", "atLeast": 1.0} for task in many]
    spec = {"teachers": many, "teacherServing": {"placement": "Dedicated", "replicas": 64}, "evaluation__gate": gate}
    world = World(**spec).settle()
    Status.model_validate_json(json.dumps(world.status))
    world.up(names.TEACHERS).run().finish(names.TRAINER, digest=STUDENT)
    scores = [{"task": task["name"], "reward": "tiny-geneval", "kept": 0.5} for task in many]
    message = "; ".join(f"{task['name']}: tiny-geneval is 0.1, needs 1.0" for task in many)
    world.finish(names.EVALUATOR, digest=STUDENT, gatePassed=False, scores=scores, message=message)
    assert world.condition("Failed") == ("True", "GateMissed")
    Status.model_validate_json(json.dumps(world.status))


def test_scores_that_no_last_words_hold_are_missed_aloud():
    """The words are what a kubelet keeps of an evaluation of 64 tasks."""
    many = [{**example()["spec"]["teachers"][0], "name": f"task-{i}"} for i in range(64)]
    world = World(teachers=many, evaluation__gate=[]).settle().up(names.TEACHERS).run()
    world.finish(names.TRAINER, digest=STUDENT)
    row = {"reward": "tiny-geneval", "base": 0.1234, "teacher": 0.6789, "student": 0.5432, "kept": 0.7654}
    scores = [{"task": task["name"], **row} for task in many]
    said = json.loads(fit({"exitCode": 0, "message": "", "gatePassed": True, "scores": scores}))["scores"]
    assert 0 < len(said) < 64
    world.finish(names.EVALUATOR, digest=STUDENT, gatePassed=True, scores=said)
    assert world.message("Evaluated").startswith(f"{64 - len(said)} of 64 tasks did not fit into the pod's last words")
    assert "task-0 0.77" in world.message("Evaluated")


def test_of_many_shares_the_condition_has_the_least():
    many = [{**example()["spec"]["teachers"][0], "name": f"task-{i}"} for i in range(20)]
    world = World(teachers=many, evaluation__gate=[]).settle().up(names.TEACHERS).run()
    world.finish(names.TRAINER, digest=STUDENT)
    scores = [{"task": each["name"], "reward": "tiny-geneval", "kept": 1 - i / 100} for i, each in enumerate(many)]
    world.finish(names.EVALUATOR, digest=STUDENT, gatePassed=True, scores=scores)
    least = ", ".join(f"task-{i} {1 - i / 100:.2f}" for i in range(19, 11, -1))
    assert world.message("Evaluated") == f"{least}, and of 12 others no less"


@pytest.mark.parametrize(("attempt", "number", "index"), [(1, 9, 1023), (999, 99999, 1023), (99999, 1, 1023)])
def test_the_names_of_pods_fit_however_often_they_were_started(attempt: int, number: int, index: int):
    seen = {names.trainer("n" * 40, attempt, number + i) for i in range(3)}
    assert len(seen) == 3
    assert all(len(f"{name}-{index}") <= 63 for name in seen)
    assert len(f"{names.evaluator('n' * 40, 'k' * 12, 100 * number)}-0") <= 63


def test_the_longest_names_fit():
    world = World()
    world.obj["metadata"]["name"] = "n" * 40
    world.settle().up(names.TEACHERS)
    for start in range(12):
        assert len(f"{world.run().jobs()[0]['metadata']['name']}-0") <= 63, start
        world.fail(names.TRAINER, 143).wait(500)
    world.run().finish(names.TRAINER, digest=STUDENT)
    for _ in range(12):
        world.fail(names.EVALUATOR, 143).wait(500)
    world.finish(names.EVALUATOR, digest=STUDENT, gatePassed=True, scores=[]).up(names.ENDPOINT)
    assert world.condition("Ready")[0] == "True"
    assert all(len(name) + len("-0") <= 63 for kind, name in world.children if kind != "Pod")


def _spec_of(job):
    volumes = job["spec"]["template"]["spec"]["volumes"]
    return [volume["configMap"]["name"] for volume in volumes if "configMap" in volume]


# ---------------------------------------------------------------------------------------------------- stale children


@pytest.mark.parametrize("change", [{"training__seed": 7}, {"teacherServing__pod": {"nodeSelector": {"disk": "ssd"}}}])
def test_teachers_of_the_spec_before_are_not_ready_for_the_new_one(change):
    """A Deployment that is not applied yet, or that its controller has not seen, is available with its old pods."""
    base = {"teachers": [{**each, "guidanceScale": 2.0} for each in example()["spec"]["teachers"]]}
    world = World().settle().up(names.TEACHERS).edit(**base, **change)
    assert world.condition("TeachersReady")[0] == "False"
    assert not any(event == ("Completed", "1 of 1 servers answer") for event in world.events[4:])
    assert not world.jobs(names.TRAINER), "it would greet the old servers"
    world.up(names.TEACHERS)
    assert world.condition("TeachersReady") == ("True", "Completed")
    assert world.jobs(names.TRAINER)


def test_the_look_that_applies_new_teachers_does_not_call_the_old_ones_ready():
    world = World().settle().up(names.TEACHERS)
    teachers = [{**each, "guidanceScale": 2.0} for each in example()["spec"]["teachers"]]
    world.obj["spec"] = example(teachers=teachers)["spec"]
    world.obj["metadata"]["generation"] += 1
    for _ in range(3):
        world.look()
        assert world.condition("TeachersReady")[0] == "False"
    assert "completionTime" not in world.status["stageTimes"]["TeachersReady"]
    assert world.wait(1801).condition("Failed") == ("True", "DeadlineExceeded"), "their deadline still ends it"


def test_a_trainer_that_starts_again_waits_for_teachers_that_are_being_replaced():
    pod = {"teacherServing__pod": {"nodeSelector": {"disk": "ssd"}}}
    world = World().settle().up(names.TEACHERS).run().fail(names.TRAINER, 1)
    world.edit(**pod).wait(100)
    assert world.condition("Trained") == ("False", "Waiting")
    assert not world.jobs()
    world.up(names.TEACHERS)
    assert world.job(names.TRAINER)["metadata"]["name"] == "tiny-trainer-1-1"


def test_teachers_and_trainer_that_are_deleted_by_hand_begin_again_in_one_look():
    world = World().settle().up(names.TEACHERS).run()
    world.remove("Job", "tiny-trainer-1-0")
    world.remove("Deployment", "tiny-teachers-0")
    assert world.settle().condition("TeachersReady") == ("False", "Starting")
    assert world.condition("Trained") == ("False", "Waiting")


def test_a_running_trainer_goes_on_while_its_teachers_are_replaced():
    world = World().settle().up(names.TEACHERS).run()
    world.edit(teacherServing__pod={"nodeSelector": {"disk": "ssd"}})
    assert world.condition("TeachersReady") == ("False", "Restarting")
    assert world.condition("Trained") == ("False", "Running")
    assert world.job(names.TRAINER)["metadata"]["name"] == "tiny-trainer-1-0"


# ---------------------------------------------------------------------------------------------------- what is frozen


def test_base_and_output_stay_from_the_first_trainer_that_runs_on():
    """The rule itself is the API server's; what it looks at is status.begun."""
    suspended = World(suspend=True).settle()
    assert "begun" not in suspended.status
    world = World().settle().up(names.TEACHERS)
    world.pod(world.job(names.TRAINER), "tiny-trainer-1-0-0", "Pending")
    assert "begun" not in world.settle().status, "it waits for a node"
    assert world.run().status["begun"]
    assert world.edit(training__seed=7).status["begun"], "of the object, not of one run"


def test_a_wrong_base_is_mended_before_the_first_trainer_runs():
    world = World(model__uri="pvc://typo/base").settle()
    (teachers,) = world.of("Deployment", names.TEACHERS)
    before = {"exitCode": 2, "reason": "Error", "message": json.dumps({"exitCode": 2, "message": "no such base"})}
    world.pod(teachers, "t", "Running", waiting={"reason": "CrashLoopBackOff"}, before=before, restarts=1)
    world.settle()
    assert world.condition("Failed") == ("True", "UserError")
    assert "begun" not in world.status
    assert world.edit().up(names.TEACHERS).jobs()


# ---------------------------------------------------------------------------------------------------- kstatus


def test_what_has_failed_or_cannot_be_run_is_stalled():
    """Flux, Argo CD and Helm end their wait at it; nothing else tells them that it is over."""
    world = World().settle()
    assert world.condition("Stalled") == ("False", "NotFailed")
    world.up(names.TEACHERS).run().fail(names.TRAINER, 2)
    assert world.condition("Stalled") == ("True", "UserError")
    assert world.edit(training__seed=7).condition("Stalled")[0] == "False"
    world.edit(training__sampler={"type": "ODE", "noiseLevel": 0.5})
    assert world.condition("Stalled") == ("True", "Invalid")
    assert world.edit(training__seed=7).condition("Stalled")[0] == "False"
