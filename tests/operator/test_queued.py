"""Jobs and pods that a queue such as Kueue admits, takes out of work and admits again, decided on paper.

Kueue suspends a Job to keep it waiting, and again to preempt it; Deployments it holds back by gates on their pods.
"""

import copy
from typing import Any

from opd_operator import names

from tests.operator.world import STUDENT, World

QUEUE = {"kueue.x-k8s.io/queue-name": "gpus"}
LONG = 30 * 24 * 3600.0


def queued(**spec: Any) -> World:
    """An object of a queue: its teachers answer, its trainer's Job waits for its admission."""
    world = World(**spec)
    world.obj["metadata"]["labels"] = QUEUE
    world.queues = True
    return world.settle().up(names.TEACHERS)


def working(**spec: Any) -> World:
    world = queued(**spec).admit(names.TRAINER).run()
    assert world.condition("Trained") == ("False", "Running")
    return world


def gate(world: World) -> None:
    """The pods of the teachers wait for their admission."""
    gated = {"type": "PodScheduled", "status": "False", "reason": "SchedulingGated", "message": "gated"}
    for deployment in world.of("Deployment", names.TEACHERS):
        name = f"{deployment['metadata']['name']}-0"
        world.pod(deployment, name, "Pending", conditions=(gated,), waiting={"reason": ""})
        world.children["Pod", name]["spec"]["schedulingGates"] = [{"name": "kueue.x-k8s.io/admission"}]


def test_what_holds_devices_has_the_queue_of_its_object():
    world = queued()
    for kind in ("Deployment", "Job"):
        (child,) = world.of(kind)
        assert QUEUE.items() <= child["metadata"]["labels"].items()


def test_time_in_a_queue_is_no_deadline_and_teachers_wait_no_longer_than_they_may():
    world = queued(runPolicy={"activeDeadlineSeconds": 7200})
    assert world.condition("Trained") == ("False", "Queued")
    assert "LocalQueue gpus" in world.message("Trained")
    assert world.of("Deployment", names.TEACHERS), "it may be admitted any moment"
    world.wait(1801)
    assert not world.of("Deployment"), "trainerReady: they would hold what the trainer may wait for"
    assert world.condition("TeachersReady") == ("False", "Queued")
    world.wait(LONG)
    assert world.condition("Failed")[0] == "False"
    assert [job["metadata"]["name"] for job in world.jobs()] == ["tiny-trainer-1-0"], "it keeps its place"
    world.admit(names.TRAINER)
    assert world.of("Deployment", names.TEACHERS)
    world.run().up(names.TEACHERS)
    assert world.condition("Trained") == ("False", "Running")
    assert world.finish(names.TRAINER, digest=STUDENT).condition("Trained")[0] == "True"
    assert (world.status["restarts"], world.status["disruptions"]) == (0, 0)


def test_deadlines_run_again_from_the_admission_on():
    world = queued().wait(LONG).admit(names.TRAINER).up(names.TEACHERS)
    world.wait(1700)
    assert world.condition("Failed")[0] == "False"
    world.wait(200)
    assert world.condition("Failed") == ("True", "DeadlineExceeded")
    teachers = queued().wait(LONG).admit(names.TRAINER).run().wait(1801)
    assert teachers.condition("Failed") == ("True", "DeadlineExceeded"), "its teachers never came back"
    whole = queued(runPolicy={"activeDeadlineSeconds": 7200}).wait(LONG).admit(names.TRAINER).run().up(names.TEACHERS)
    assert whole.wait(7100).condition("Failed")[0] == "False"
    assert whole.wait(200).condition("Failed") == ("True", "DeadlineExceeded")


def test_a_preempted_trainer_frees_its_teachers_and_comes_back():
    world = working()
    world.suspend_job(names.TRAINER)
    assert world.condition("Trained") == ("False", "Queued")
    assert not world.of("Deployment"), "the preemptor may be waiting for them"
    assert not world.of("Pod")
    assert (world.status["restarts"], world.status["disruptions"]) == (0, 1)
    before = world.writes
    assert world.wait(LONG).writes == before
    world.admit(names.TRAINER).up(names.TEACHERS).run()
    assert world.condition("Trained") == ("False", "Running")
    world.suspend_job(names.TRAINER).admit(names.TRAINER).up(names.TEACHERS).run()
    assert world.status["disruptions"] == 2
    assert world.finish(names.TRAINER, digest=STUDENT).condition("Trained")[0] == "True"


def test_a_preempted_trainer_has_the_settings_that_waited_for_it_to_end():
    """Its Job would have waited for its admission with the settings of before until something else happened."""
    world = working().edit(training__pod={"nodeSelector": {"disk": "ssd"}})
    assert world.condition("Trained") == ("False", "Running")
    world.suspend_job(names.TRAINER).up(names.TEACHERS)
    (job,) = world.jobs(names.TRAINER)
    assert job["metadata"]["name"] == "tiny-trainer-1-1"
    assert job["spec"]["template"]["spec"]["nodeSelector"] == {"disk": "ssd"}
    assert world.status["disruptions"] == 1


def test_the_teachers_of_a_preempted_trainer_stay_until_it_has_saved_its_checkpoint():
    world = working()
    world.linger = True
    world.suspend_job(names.TRAINER)
    assert world.of("Deployment", names.TEACHERS), "it finishes its round, and asks them"
    world.leave()
    assert not world.of("Deployment")


def test_nothing_is_written_to_a_job_that_a_queue_plays_with():
    world = queued()
    seen = copy.deepcopy(world.job(names.TRAINER))
    for _ in range(3):
        world.admit(names.TRAINER).up(names.TEACHERS).run().suspend_job(names.TRAINER).wait(60)
    job = world.job(names.TRAINER)
    assert job["metadata"]["name"] == seen["metadata"]["name"]
    assert job["spec"]["template"]["spec"]["nodeSelector"] == {"flavor": "spot"}, "as the queue wants it"


def test_a_job_that_is_suspended_when_some_pods_have_ended_starts_anew():
    """Admitted again it would make the missing pods alone (kubernetes-sigs/kueue#10487)."""
    world = working(training__nodes=2)
    job = world.job(names.TRAINER)
    name = f"{job['metadata']['name']}-1"
    world.pod(job, name, "Succeeded", ended={"exitCode": 0, "message": ""}, index=1)
    job["status"]["succeeded"] = 1
    world.settle().suspend_job(names.TRAINER).wait(60)
    (fresh,) = world.jobs()
    assert fresh["metadata"]["name"] != job["metadata"]["name"]
    assert (world.status["restarts"], world.status["disruptions"]) == (0, 1)


def test_gated_teachers_have_no_deadline_and_their_queue_is_told():
    world = World()
    world.obj["metadata"]["labels"] = QUEUE
    world.settle()
    gate(world)
    world.settle()
    assert world.condition("TeachersReady") == ("False", "Queued")
    for told in ("LocalQueue gpus", "kueue.x-k8s.io/admission"):
        assert told in world.message("TeachersReady")
    world.wait(LONG)
    assert world.condition("Failed")[0] == "False"
    assert world.up(names.TEACHERS).jobs()
    late = World().settle()
    gate(late)
    late.settle().wait(LONG)
    late.remove_pods("tiny-teachers-0")
    assert late.settle().wait(1801).condition("Failed") == ("True", "DeadlineExceeded"), (
        "admitted, they have their time"
    )


def test_a_queued_evaluator_has_no_deadline():
    world = working().finish(names.TRAINER, digest=STUDENT)
    assert world.condition("Evaluated") == ("False", "Queued")
    world.wait(LONG)
    assert world.condition("Failed")[0] == "False"
    world.admit(names.EVALUATOR).run(names.EVALUATOR).wait(14000)
    assert world.condition("Evaluated") == ("False", "Running")
    world.wait(500)
    assert world.condition("Failed") == ("True", "DeadlineExceeded")


def test_pods_that_wait_in_a_queue_can_be_mended():
    world = queued(training__pod={"image": "typo:1"})
    world.edit(training__pod={"image": "trainer:2"}).up(names.TEACHERS)
    (job,) = world.jobs()
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "trainer:2"
    world.edit(training__pod={"image": "trainer:2"}, student__output={"uri": "pvc://students/other"})
    (job,) = world.up(names.TEACHERS).jobs()
    assert "/students/other.runs/" in " ".join(job["spec"]["template"]["spec"]["containers"][0]["command"])


def test_a_user_may_suspend_what_a_queue_has_suspended():
    world = working().suspend_job(names.TRAINER).edit(suspend=True)
    assert not world.children
    assert world.condition("Suspended")[0] == "True"
    world.edit().up(names.TEACHERS).admit(names.TRAINER).run()
    assert world.condition("Trained") == ("False", "Running")
