"""Teachers that the spec trains: one Job each, before anything else; then they teach."""

import copy
import json
import signal
from collections.abc import Callable
from typing import Any

import pytest
from opd_core.api.load import check_spec
from opd_core.api.status import Status
from opd_core.api.teachers import teacher_folder
from opd_core.exit_codes import ExitCode
from opd_core.stages import Stage
from opd_operator import names
from opd_operator.context import read_by

from tests.operator.live import Api, Operator, quiet, to_student, wait_for
from tests.operator.world import STUDENT, World, adapter, example, teachers

BOTH = ("geneval", "ocr")


def world(*trained: str, **spec: Any) -> World:
    return World(teachers=teachers(*trained), **spec).settle()


def container(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["template"]["spec"]["containers"][0]
    return found


def at_work(of: World) -> list[str]:
    """Teachers whose Job has not ended."""
    return [job["metadata"]["labels"][names.TEACHER] for job in of.jobs(names.TEACH)]


def known(of: World) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in of.status["teaching"]}


# ---------------------------------------------------------------------------------------------------- the way


def test_teachers_are_trained_one_after_the_other_and_nothing_else_holds_a_device() -> None:
    it = world(*BOTH)
    assert at_work(it) == ["geneval"]
    assert not it.of("Deployment")
    assert not it.jobs(names.TRAINER)
    assert it.condition("TeachersTrained") == ("False", "Starting")
    assert it.status["phase"] == "TrainingTeachers"
    assert "waiting: ocr" in it.message("TeachersTrained")
    it.run(names.TEACH)
    assert it.condition("TeachersTrained") == ("False", "Running")
    it.finish(names.TEACH, digest=adapter("geneval"), message="better than the base: gain 0.3")
    assert at_work(it) == ["ocr"]
    assert known(it)["geneval"]["verdict"] == "better than the base: gain 0.3"
    assert it.message("TeachersTrained").startswith("1 of 2 teachers are trained; ocr: ")
    assert not it.of("Deployment")
    it.taught("ocr")
    assert it.condition("TeachersTrained") == ("True", "Completed")
    assert it.message("TeachersTrained") == "geneval, ocr"
    assert {name: row["digest"] for name, row in known(it).items()} == {name: adapter(name) for name in BOTH}
    it.up(names.TEACHERS).run().finish(names.TRAINER, digest=STUDENT)
    it.finish(names.EVALUATOR, digest=STUDENT, gatePassed=True, scores=[]).up(names.ENDPOINT)
    assert it.condition("Ready") == ("True", "Completed")
    assert it.status["restarts"] == 0
    Status.model_validate(it.status)


def test_where_all_teachers_are_given_none_is_trained() -> None:
    it = World().settle()
    assert it.condition("TeachersTrained") == ("True", "Disabled")
    assert "teaching" not in it.status
    assert it.of("Deployment", names.TEACHERS)
    it.evaluated(passed=False)
    assert it.condition("TeachersTrained") == ("True", "Disabled")
    assert it.edit(suspend=True).condition("TeachersTrained") == ("True", "Disabled")


def test_several_train_side_by_side_in_the_specs_order() -> None:
    it = world("geneval", "ocr", "aesthetic", runPolicy={"parallelTeachers": 2})
    first = [each["name"] for each in teachers()]
    assert sorted(at_work(it)) == sorted(first[:2])
    it.run(names.TEACH, first[0]).taught(first[1])
    assert sorted(at_work(it)) == sorted([first[0], first[2]])
    it.taught(first[0])
    assert not it.of("Deployment")
    it.taught(first[2])
    assert it.of("Deployment", names.TEACHERS)


def test_the_job_of_a_teacher_runs_its_training_in_trainings_pods() -> None:
    pod = {"resources": {"limits": {"nvidia.com/gpu": "8"}}, "nodeSelector": {"gpu": "h200"}}
    it = world("ocr", training__nodes=2, training__pod=pod)
    (job,) = it.jobs(names.TEACH)
    index = [each["name"] for each in teachers()].index("ocr")
    assert job["metadata"]["name"] == f"tiny-teach-{index}-1-0"
    assert (job["spec"]["completions"], job["spec"]["parallelism"], job["spec"]["backoffLimit"]) == (2, 2, 0)
    spec = job["spec"]["template"]["spec"]
    assert spec["nodeSelector"] == {"gpu": "h200"}
    main = container(job)
    assert main["name"] == "teach"
    assert main["image"] == "trainer:1"
    assert main["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert {"teach", "--teacher=ocr", "--metrics-port=9090"} <= set(main["command"])
    env = {each["name"]: each.get("value") for each in main["env"]}
    assert env["PET_NNODES"] == "2"
    assert env["PET_MASTER_ADDR"] == f"tiny-teach-{index}-1-0-0.tiny-teach-{index}.team.svc"
    (service,) = it.of("Service", names.TEACH)
    assert service["metadata"]["name"] == spec["subdomain"] == f"tiny-teach-{index}"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["selector"][names.TEACHER] == "ocr"
    (policy,) = it.of("NetworkPolicy", names.TEACH)
    assert policy["spec"]["ingress"][0] == {
        "from": [{"podSelector": {"matchLabels": names.selector("tiny", names.TEACH)}}]
    }
    mounts = {mount["mountPath"]: mount for mount in main["volumeMounts"]}
    assert not mounts["/mnt/claims/students"].get("readOnly"), "the teacher is written beside the student"


def test_whoever_uses_a_trained_teacher_reads_the_claim_it_is_in() -> None:
    def claims(pod: dict[str, Any]) -> dict[str, bool]:
        mounts = pod["spec"]["template"]["spec"]["containers"][0]["volumeMounts"]
        return {each["mountPath"]: bool(each.get("readOnly")) for each in mounts}

    (given,) = World().settle().of("Deployment", names.TEACHERS)
    assert "/mnt/claims/students" not in claims(given)
    it = world("ocr").taught("ocr")
    (servers,) = it.of("Deployment", names.TEACHERS)
    assert claims(servers)["/mnt/claims/students"], "read only"
    it.up(names.TEACHERS)
    assert "/mnt/claims/students" in claims(it.job(names.TRAINER))
    it.run().finish(names.TRAINER, digest=STUDENT)
    assert "/mnt/claims/students" in claims(it.job(names.EVALUATOR))


@pytest.mark.parametrize("role", [names.TEACH, names.TEACHERS, names.TRAINER, names.EVALUATOR])
def test_every_role_finds_a_trained_teacher_in_the_same_folder(role: str) -> None:
    """Each reads a part of the spec, and the folder is named by what the teacher depends on."""
    spec = {"training__resolution": {"width": 64, "height": 32}, "evaluation": {"promptsPerTask": 7, "seed": 9}}
    obj = example(teachers=teachers("ocr"), **spec)
    for teacher in obj["spec"]["teachers"]:
        teacher["prompts"].pop("heldOutUri", None)
    whole = check_spec(obj).spec
    part = check_spec({**obj, "spec": read_by(role, whole)}).spec
    (here,) = [teacher_folder(whole, each) for each in whole.teachers if each.training]
    (there,) = [teacher_folder(part, each) for each in part.teachers if each.training]
    assert here == there


METHODS: list[dict[str, Any]] = [
    {"method": "DMD2", "objective": {"type": "X0"}, "fakeScore": {"updatesPerRound": 2}},
    {"method": "RL", "reinforcement": {"algorithm": "DiffusionNFT"}},
]


@pytest.mark.parametrize("role", [names.TEACH, names.TEACHERS, names.TRAINER, names.EVALUATOR])
@pytest.mark.parametrize("training", METHODS, ids=lambda each: each["method"])
def test_what_a_role_reads_is_a_spec(role: str, training: dict[str, Any]) -> None:
    """No part of it refers to one that the role does not read."""
    obj = example(**{f"training__{field}": value for field, value in training.items()})
    check_spec({**obj, "spec": read_by(role, check_spec(obj).spec)})


@pytest.mark.parametrize("given", [True, False], ids=["with teachers", "tasks alone"])
def test_who_learns_from_rewards_has_no_teacher_servers_and_trains_at_once(given: bool) -> None:
    tasks = [{key: value for key, value in each.items() if given or key != "adapter"} for each in teachers()]
    learning = {f"training__{field}": value for field, value in METHODS[1].items()}
    it = World(teachers=tasks, evaluation__gate=[], **learning).settle()
    assert it.of("Deployment", names.TEACHERS) == []
    assert it.condition("TeachersReady") == ("True", "Disabled")
    it.run().finish(names.TRAINER, digest=STUDENT)
    assert it.condition("Trained")[0] == "True"


@pytest.mark.parametrize("seconds", [0.0, 600.0])
def test_nothing_is_written_while_a_teacher_is_trained_and_nothing_happens(seconds: float) -> None:
    it = world(*BOTH).run(names.TEACH)
    before = it.writes
    assert it.wait(seconds).settle().writes == before


# ---------------------------------------------------------------------------------------------------- what is known


def test_a_trained_teacher_is_not_trained_again_for_another_distillation_of_it() -> None:
    it = world(*BOTH).taught(*BOTH).up(names.TEACHERS).run().finish(names.TRAINER, digest=STUDENT)
    before = known(it)
    it.edit(teachers=teachers(*BOTH), training__seed=7)
    assert it.status["run"]["attempt"] == 2
    assert not it.jobs(names.TEACH)
    assert it.condition("TeachersTrained") == ("True", "UpToDate")
    assert it.of("Deployment", names.TEACHERS)
    assert known(it) == before


def test_another_training_of_a_teacher_trains_it_alone_and_its_servers_change() -> None:
    it = world(*BOTH).taught(*BOTH)
    (before,) = it.of("Deployment", names.TEACHERS)
    revision, uri = before["metadata"]["labels"][names.REVISION], known(it)["ocr"]["uri"]
    changed = teachers(*BOTH)
    next(each for each in changed if each["name"] == "ocr")["training"] |= {"rounds": 200}
    it.edit(teachers=changed)
    assert at_work(it) == ["ocr"]
    assert not it.of("Deployment"), "their devices are free for it"
    assert "teachersReady" not in it.status
    assert known(it)["ocr"]["uri"] != uri
    assert "digest" in known(it)["geneval"]
    it.taught("ocr")
    (after,) = it.of("Deployment", names.TEACHERS)
    assert after["metadata"]["labels"][names.REVISION] != revision


def test_what_no_weight_of_a_teacher_depends_on_leaves_its_job_alone() -> None:
    it = world("ocr").run(names.TEACH)
    before = copy.deepcopy(it.job(names.TEACH))
    changed = teachers("ocr")
    next(each for each in changed if each["name"] == "ocr")["training"] |= {"mustBeatBase": False}
    it.edit(teachers=changed, endpoint__replicas=3)
    assert it.job(names.TEACH) == before


def test_a_new_run_in_the_midst_of_a_teachers_training_goes_on_at_its_checkpoint() -> None:
    it = world("ocr").run(names.TEACH)
    it.progress_of["ocr"] = {"round": 40, "totalRounds": 100, "percentage": 40, "checkpoint": {"round": 30}}
    it.settle()
    it.linger = True
    it.edit(teachers=teachers("ocr"), training__seed=7)
    assert not it.jobs(names.TEACH), "never two in one folder"
    assert it.condition("TeachersTrained") == ("False", "Stopping")
    it.leave()
    assert it.job(names.TEACH)["metadata"]["name"].endswith("-2-0")
    assert known(it)["ocr"]["checkpoint"] == 30


def test_base_and_output_stay_from_the_first_teacher_that_is_trained_on() -> None:
    it = world("ocr")
    assert "begun" not in it.status
    assert it.run(names.TEACH).status["begun"]


def test_progress_is_of_all_teachers_that_are_trained_then_of_the_student() -> None:
    it = world(*BOTH).taught("geneval").run(names.TEACH)
    figures = [{"task": "ocr", "reward": 0.25}]
    it.progress_of["ocr"] = {"round": 50, "totalRounds": 100, "percentage": 50, "metrics": figures}
    it.settle()
    progress = it.status["progress"]
    assert (progress["round"], progress["totalRounds"], progress["percentage"]) == (150, 200, 75)
    assert progress["metrics"] == [{"name": "reward/ocr", "value": "0.25"}]
    assert known(it)["ocr"]["round"] == 50
    assert it.message("TeachersTrained") == "1 of 2 teachers are trained; ocr: 100 rounds"
    it.progress_of.clear()
    it.finish(names.TEACH, digest=adapter("ocr"))
    assert "progress" not in it.status


# ---------------------------------------------------------------------------------------------------- failures


def test_a_failed_teacher_starts_again_later_then_the_run_fails() -> None:
    it = world("ocr", runPolicy={"backoffLimit": 1}).run(names.TEACH).fail(names.TEACH, 1)
    assert it.status["restarts"] == 1
    assert it.condition("TeachersTrained") == ("False", "Restarting")
    assert not it.jobs()
    it.wait(60)
    assert it.job(names.TEACH)["metadata"]["name"].endswith("-1-1")
    assert it.condition("TeachersTrained") == ("False", "Resumed")
    it.run(names.TEACH).fail(names.TEACH, 1)
    assert it.condition("Failed") == ("True", "BackoffLimitExceeded")
    assert it.condition("TeachersTrained") == ("False", "BackoffLimitExceeded")
    assert it.status["lastFailure"]["stage"] == Stage.TEACHERS_TRAINED
    before = it.writes
    assert it.wait(1e6).writes == before


def test_each_teacher_has_its_own_failures_and_checkpoints_forgive_them() -> None:
    it = world(*BOTH, runPolicy={"backoffLimit": 1, "parallelTeachers": 2})
    for teacher in BOTH:
        it.run(names.TEACH, teacher).fail(names.TEACH, 1, message=f"{teacher} broke", teacher=teacher)
    said = dict(part.split(": ", 1) for part in it.message("TeachersTrained").split("; ")[1:])
    assert "geneval" not in said["ocr"]
    assert "ocr" not in said["geneval"]
    assert said["ocr"].endswith("ocr broke")
    it.wait(60)
    assert it.status["restarts"] == 2
    assert it.condition("Failed")[0] == "False"
    it.run(names.TEACH, "ocr")
    it.progress_of["ocr"] = {"round": 40, "totalRounds": 100, "percentage": 40, "checkpoint": {"round": 30}}
    it.settle().fail(names.TEACH, 1, teacher="ocr")
    assert it.condition("Failed")[0] == "False"
    it.wait(60).run(names.TEACH, "ocr").fail(names.TEACH, 1, teacher="ocr")
    assert it.condition("Failed") == ("True", "BackoffLimitExceeded")


def test_a_teacher_no_better_than_the_base_ends_the_run_with_its_figures() -> None:
    it = world(*BOTH, runPolicy={"parallelTeachers": 2})
    it.run(names.TEACH, "geneval").run(names.TEACH, "ocr")
    words = json.dumps({"exitCode": 3, "message": "ocr: 0.31, the base has 0.33 on 128 held-out prompts"})
    it.linger = True
    it.fail(names.TEACH, ExitCode.REFUSED, message=words, teacher="ocr")
    assert it.condition("Failed") == ("False", "Stopping"), "the other one saves its checkpoint"
    it.leave()
    assert it.condition("Failed") == ("True", "UserError")
    assert "0.31, the base has 0.33" in it.message("TeachersTrained")
    assert it.status["restarts"] == 0
    for stage in ("TeachersReady", "Trained", "Evaluated"):
        assert it.condition(stage) == ("False", "Waiting")
    assert not it.jobs()
    assert [job["metadata"]["labels"][names.TEACHER] for job in it.of("Job")] == ["ocr"], "kept for its log"
    it.edit(teachers=teachers(*BOTH), suspend=True).edit(teachers=teachers(*BOTH))
    assert it.condition("Failed")[0] == "False"
    assert at_work(it) == ["geneval"]


def test_a_teacher_no_better_than_the_base_is_judged_when_the_spec_minds() -> None:
    """It taught while mustBeatBase was false; one that is better is not looked at again."""
    lenient, strict = teachers(*BOTH), teachers(*BOTH)
    for each in lenient:
        if each["name"] in BOTH:
            each["training"] |= {"mustBeatBase": False}
    it = World(teachers=lenient).settle()
    for teacher, better in (("geneval", True), ("ocr", False)):
        words = {"digest": adapter(teacher), "message": f"{teacher}: {better}", "beatsBase": better}
        it.run(names.TEACH, teacher).finish(names.TEACH, teacher, **words)
    assert it.condition("TeachersTrained") == ("True", "Completed")
    it.edit(teachers=strict)
    assert it.condition("Failed") == ("True", "UserError")
    assert "ocr: False; it must not teach" in it.message("TeachersTrained")
    assert not it.of("Deployment"), "what would have asked it is gone"
    it.edit(teachers=lenient, suspend=True).edit(teachers=lenient)
    assert it.condition("TeachersTrained")[0] == "True"
    assert it.condition("Failed")[0] == "False"


def test_disruptions_of_a_teachers_training_do_not_count() -> None:
    it = world("ocr", training__nodes=2, runPolicy={"backoffLimit": 0})
    for _ in range(3):
        it.run(names.TEACH).fail(names.TEACH, 0, peers=ExitCode.UNAVAILABLE, gone=True).wait(400)
    assert (it.status["restarts"], it.status["disruptions"]) == (0, 3)
    it.fail(names.TEACH, 0, peers=ExitCode.UNAVAILABLE, gone=True)
    assert it.condition("Failed") == ("True", "BackoffLimitExceeded"), "its second pod was never there"


def test_a_result_that_is_lost_is_asked_for_again() -> None:
    it = world("ocr").run(names.TEACH).finish(names.TEACH)
    assert it.condition("TeachersTrained") == ("False", "Restarting")
    assert it.wait(60).job(names.TEACH)["metadata"]["name"].endswith("-1-1")
    assert it.finish(names.TEACH, digest=adapter("ocr")).condition("TeachersTrained") == ("True", "Completed")


def test_servers_that_miss_a_trained_teacher_have_the_next_start_look_for_it() -> None:
    it = world("ocr").taught("ocr")
    (servers,) = it.of("Deployment", names.TEACHERS)
    words = json.dumps({"exitCode": 2, "message": "no adapter in pvc://students/opd-teachers"})
    before = {"exitCode": 2, "reason": "Error", "message": words}
    it.pod(servers, "t", "Running", waiting={"reason": "CrashLoopBackOff", "message": ""}, before=before, restarts=1)
    it.settle()
    assert it.condition("Failed") == ("True", "UserError")
    it.edit(teachers=teachers("ocr"), suspend=True).edit(teachers=teachers("ocr"))
    assert at_work(it) == ["ocr"]
    assert it.finish(names.TEACH, digest=adapter("ocr")).of("Deployment", names.TEACHERS)


# ---------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("policy", "field", "seconds"),
    [
        ({"stageDeadlines": {"teachersTrained": 5000}}, "stageDeadlines.teachersTrained", 5000),
        ({"activeDeadlineSeconds": 5000}, "activeDeadlineSeconds", 5000),
        ({}, "stageDeadlines.trainerReady", 1800),
    ],
)
def test_a_limit_ends_the_run(policy: dict[str, Any], field: str, seconds: int) -> None:
    it = world(*BOTH, runPolicy=policy)
    if "trainerReady" not in field:
        it.run(names.TEACH)
    it.wait(seconds - 10)
    assert it.condition("Failed")[0] == "False"
    it.wait(20)
    assert it.condition("Failed") == ("True", "DeadlineExceeded")
    assert it.condition("TeachersTrained") == ("False", "DeadlineExceeded")
    assert f"{field} = {seconds} s" in it.message("Failed")
    assert not it.jobs()


def test_without_limits_a_teacher_may_train_for_weeks() -> None:
    assert world("ocr").run(names.TEACH).wait(30 * 86_400).condition("TeachersTrained") == ("False", "Running")


def test_suspend_keeps_nothing_but_checkpoints_and_resume_goes_on_there() -> None:
    it = world(*BOTH).taught("geneval").run(names.TEACH)
    it.edit(teachers=teachers(*BOTH), suspend=True)
    assert not it.children
    assert it.condition("Suspended") == ("True", "Suspended")
    assert it.condition("TeachersTrained") == ("False", "Suspended")
    it.edit(teachers=teachers(*BOTH))
    assert at_work(it) == ["ocr"]
    assert it.job(names.TEACH)["metadata"]["name"].endswith("-1-1")
    it.taught("ocr").edit(teachers=teachers(*BOTH), suspend=True)
    assert it.condition("TeachersTrained") == ("True", "Completed")


def queued(*trained: str, **spec: Any) -> World:
    it = World(teachers=teachers(*trained), **spec)
    it.obj["metadata"]["labels"] = {names.QUEUE_LABELS[0]: "gpus"}
    it.queues = True
    return it.settle()


def test_a_job_that_waits_for_admission_has_no_deadline() -> None:
    it = queued("ocr", runPolicy={"activeDeadlineSeconds": 7200, "stageDeadlines": {"teachersTrained": 5000}})
    assert it.condition("TeachersTrained") == ("False", "Queued")
    assert "LocalQueue gpus" in it.message("TeachersTrained")
    before = it.writes
    assert it.wait(30 * 86_400).writes == before
    it.admit(names.TEACH).run(names.TEACH).wait(4900)
    assert it.condition("TeachersTrained") == ("False", "Running")
    it.wait(200)
    assert it.condition("Failed") == ("True", "DeadlineExceeded")


def test_a_teacher_that_is_preempted_comes_back_and_nobody_writes_to_its_job() -> None:
    it = queued("ocr").admit(names.TEACH).run(names.TEACH).suspend_job(names.TEACH)
    assert it.condition("TeachersTrained") == ("False", "Queued")
    assert (it.status["restarts"], it.status["disruptions"]) == (0, 1)
    it.admit(names.TEACH).run(names.TEACH)
    assert it.condition("TeachersTrained") == ("False", "Running")
    assert it.job(names.TEACH)["metadata"]["name"].endswith("-1-0")
    assert it.finish(names.TEACH, digest=adapter("ocr")).of("Deployment", names.TEACHERS)


def test_a_teacher_that_is_preempted_has_the_settings_that_waited_for_it_to_end() -> None:
    """Its Job would have waited for its admission with the settings of before until something else happened."""
    it = queued("ocr").admit(names.TEACH).run(names.TEACH)
    it.edit(teachers=teachers("ocr"), training__pod={"nodeSelector": {"disk": "ssd"}}).suspend_job(names.TEACH)
    job = it.job(names.TEACH)
    assert job["metadata"]["name"] == "tiny-teach-1-1-1"
    assert job["spec"]["template"]["spec"]["nodeSelector"] == {"disk": "ssd"}
    assert it.status["disruptions"] == 1


def test_while_one_teacher_trains_another_in_the_queue_stops_no_clock() -> None:
    it = queued(*BOTH, runPolicy={"parallelTeachers": 2, "activeDeadlineSeconds": 7200})
    it.admit(names.TEACH, "geneval").run(names.TEACH, "geneval")
    assert it.condition("TeachersTrained") == ("False", "Queued")
    it.wait(7300)
    assert it.condition("Failed") == ("True", "DeadlineExceeded")


def test_a_finished_object_keeps_the_logs_of_its_teachers_or_none() -> None:
    for policy, kept in (("Running", set(BOTH)), ("All", set())):
        it = world(*BOTH, runPolicy={"cleanPodPolicy": policy}).taught(*BOTH)
        assert {job["metadata"]["labels"][names.TEACHER] for job in it.of("Job", names.TEACH)} == kept


def test_the_longest_names_fit() -> None:
    assert len({names.teach("n" * 40, 15, 999, number) for number in range(50)}) == 50
    for attempt, number in ((1, 0), (999, 99_999)):
        assert len(f"{names.teach('n' * 40, 15, attempt, number)}-1023") <= 63


# ---------------------------------------------------------------------------------------------------- a real cluster


def test_trained_then_they_teach_and_an_operator_that_dies_meanwhile_goes_on(
    api: Api, start: Callable[..., Operator]
) -> None:
    first = start(api, "--no-leader-election").ready()
    api.submit(teachers=teachers(*BOTH))
    api.run("teach")
    api.until("TeachersTrained", "False", "Running")
    first.stop(signal.SIGKILL)
    api.end("teach", digest=adapter("geneval"))
    start(api, "--no-leader-election").ready()
    wait_for(lambda: [pod["metadata"]["labels"][names.TEACHER] for pod in api.pods("teach")] == ["ocr"], "the next one")
    assert not api.find("deployments")
    assert {job["metadata"]["labels"][names.ROLE] for job in api.find("jobs")} == {"teach"}
    api.run("teach")
    api.end("teach", digest=adapter("ocr"))
    api.until("TeachersTrained", "True", "Completed")
    to_student(api)
    api.run("endpoint")
    api.until("Ready", "True")
    assert [row["digest"] for row in api.status()["teaching"]] == [adapter(name) for name in BOTH]
    quiet(api)
    api.edit(training={"seed": 7})
    api.until("TeachersTrained", "True", "UpToDate")
    api.run("teachers")
    assert not api.pods("teach")


def test_a_refused_teacher_ends_the_run_and_one_that_is_suspended_frees_its_nodes(api: Api, operator: Operator) -> None:
    spec = {"teachers": teachers("ocr"), "training__nodes": 2, "student__output": {"uri": "pvc://students/new"}}
    api.submit(**spec)
    api.run("teach", 2)
    api.until("TeachersTrained", "False", "Running")
    api.edit(suspend=True)

    def free() -> bool:
        api.sweep()
        return not api.find("pods") and not api.find("jobs") and api.condition("Suspended")[0] == "True"

    wait_for(free, "everything to be free")
    api.edit(suspend=False)
    api.run("teach", 2)
    api.end("teach", ExitCode.REFUSED, "ocr: 0.31, the base has 0.33", reason="Error")

    def failed() -> bool:
        api.sweep()
        return api.condition("Failed") == ("True", "UserError")

    wait_for(failed, "the verdict")
    (message,) = [c["message"] for c in api.status()["conditions"] if c["type"] == "TeachersTrained"]
    assert "ocr: 0.31, the base has 0.33" in message
    events = [event for event in api.find("events") if event["message"].startswith("TeachersTrained: ")]
    assert {("Warning", "UserError"), ("Normal", "Running")} <= {(each["type"], each["reason"]) for each in events}
    quiet(api)
