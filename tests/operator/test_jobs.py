"""What a Job's pods have come to: several of them, some of which vanish, and containers that others put beside ours."""

from typing import Any

import pytest
from opd_core.exit_codes import ExitCode
from opd_operator import names

from tests.operator.world import STUDENT, World


def training(nodes: int = 2, **spec: Any) -> World:
    return World(training__nodes=nodes, **spec).settle().up(names.TEACHERS).run()


# ---------------------------------------------------------------------------------------------------- disruptions


def test_a_lost_node_is_a_disruption_although_its_pod_is_gone_when_the_job_has_failed():
    """The garbage collector deletes the pod; a peer that lost it ends with 75; then the Job says that it has failed."""
    world = training().disrupt(names.TRAINER)
    world.fail(names.TRAINER, 0, peers=ExitCode.UNAVAILABLE, gone=True)
    assert (world.status["restarts"], world.status["disruptions"]) == (0, 1)
    assert world.status["lastFailure"]["reason"] == "Disrupted"
    assert world.status["lastFailure"]["pod"] == "tiny-trainer-1-0-0"
    world.wait(60).run().fail(names.TRAINER, 1)
    assert world.status["restarts"] == 1, "what was remembered is of the start before"


@pytest.mark.parametrize("peers", [ExitCode.UNAVAILABLE, ExitCode.TERMINATED])
def test_a_pod_that_nobody_saw_go_was_deleted_if_its_peers_only_lost_it(peers: int):
    world = training().fail(names.TRAINER, 0, peers=peers, gone=True)
    assert (world.status["restarts"], world.status["disruptions"]) == (0, 1)
    assert "1 of 2 pods were deleted" in world.status["lastFailure"]["message"]


def test_a_peer_that_failed_by_itself_is_the_cause_although_another_pod_is_gone():
    world = training().fail(names.TRAINER, 0, peers=ExitCode.INVALID, gone=True)
    assert world.condition("Failed") == ("True", "UserError")


def test_ranks_that_wait_in_vain_for_one_that_was_never_there_have_failed():
    """A quota refuses the second pod, and the first gives up: without a count that would never end."""
    world = World(training__nodes=2).settle().up(names.TEACHERS)
    world.fail(names.TRAINER, 0, peers=ExitCode.UNAVAILABLE, gone=True)
    assert (world.status["restarts"], world.status["disruptions"]) == (1, 0)


def test_lost_nodes_never_use_up_the_limit():
    world = training(runPolicy={"backoffLimit": 0})
    for _ in range(6):
        world.disrupt(names.TRAINER).fail(names.TRAINER, 0, gone=True).wait(400).run()
    assert world.status["disruptions"] == 6
    assert world.condition("Failed")[0] == "False"


def test_an_eviction_that_was_called_off_is_forgotten():
    world = training()
    pod = world.children["Pod", "tiny-trainer-1-0-0"]
    pod["status"]["conditions"].append({"type": "DisruptionTarget", "status": "True"})
    world.settle()
    pod["status"]["conditions"].pop()
    world.settle().fail(names.TRAINER, 1)
    assert (world.status["restarts"], world.status["disruptions"]) == (1, 0)


def test_the_limit_is_for_failures_without_a_new_checkpoint_between_them():
    world = World(runPolicy={"backoffLimit": 1}).settle().up(names.TEACHERS)
    for checkpoint in (20, 40, 60):
        world.progress = {
            "round": checkpoint + 1, "totalRounds": 500, "percentage": 5, "checkpoint": {"round": checkpoint}
        }  # fmt: skip
        world.run().fail(names.TRAINER, 1).wait(60)
    assert world.status["restarts"] == 3
    assert world.condition("Failed")[0] == "False"
    world.run().fail(names.TRAINER, 1)
    assert world.condition("Failed") == ("True", "BackoffLimitExceeded")


def test_checkpoints_beyond_the_last_round_are_none():
    """What a pod says bounds nothing."""
    world = World(runPolicy={"backoffLimit": 1}).settle().up(names.TEACHERS)
    for checkpoint in range(10**6, 10**6 + 4):
        world.progress = {
            "round": 1, "totalRounds": 500, "percentage": 5, "checkpoint": {"round": checkpoint}
        }  # fmt: skip
        if world.jobs():
            world.run().fail(names.TRAINER, 1).wait(60)
    assert world.condition("Failed") == ("True", "BackoffLimitExceeded")


# ------------------------------------------------------------------------------------------------ injected containers


@pytest.mark.parametrize("other", ["istio-proxy", "a-sidecar", "zz-sidecar"])
def test_last_words_are_those_of_our_own_container(other: str):
    """The kubelet sorts by name, and a mesh's container comes before ours."""
    world = World()
    world.injected = (other,)
    world.trained()
    assert world.status["student"]["digest"] == STUDENT
    failed = training(1)
    failed.injected = (other,)
    failed.fail(names.TRAINER, ExitCode.INVALID, message="no such prompts")
    assert failed.condition("Failed") == ("True", "UserError")
    assert "no such prompts" in failed.message("Failed")


def held(world: World, code: int, message: str) -> World:
    """Our container has ended, and the Job does not: an injected one runs on."""
    job = world.job(names.TRAINER)
    for i in range(job["spec"]["completions"]):
        ended = {"exitCode": code, "reason": "Error", "message": message if i == 0 else ""}
        world.pod(job, f"{job['metadata']['name']}-{i}", "Running", ended=ended, index=i)
        statuses = world.children["Pod", f"{job['metadata']['name']}-{i}"]["status"]["containerStatuses"]
        statuses.insert(0, {"name": "istio-proxy", "state": {"running": {}}})
    return world.settle()


def test_a_trainer_whose_pod_is_kept_by_another_container_is_done_and_its_pod_goes():
    """kubeflow/trainer#1577"""
    world = held(training(), 0, f'{{"exitCode": 0, "digest": "{STUDENT}"}}')
    assert world.condition("Trained") == ("True", "Completed")
    assert not world.active()


def test_a_trainer_that_failed_in_a_pod_that_is_kept_starts_again():
    world = training()
    world.linger = True
    held(world, 1, "it broke")
    assert world.status["restarts"] == 1
    assert world.status["lastFailure"]["message"] == "it broke"
    world.wait(60)
    assert not world.jobs(), "not while the first one is there"
    world.linger = False
    world.leave()
    assert world.job(names.TRAINER)["metadata"]["name"] == "tiny-trainer-1-1"


def test_an_init_container_that_fails_is_told():
    """Of a pod that then has no last words of ours."""
    world = World().settle().up(names.TEACHERS)
    job = world.job(names.TRAINER)
    world.pod(job, "tiny-trainer-1-0-0", "Pending", waiting={"reason": "PodInitializing"})
    pod = world.children["Pod", "tiny-trainer-1-0-0"]
    crashing = {"waiting": {"reason": "CrashLoopBackOff"}}
    last = {"terminated": {"exitCode": 7, "message": "no CA"}}
    pod["status"]["initContainerStatuses"] = [{"name": "certificates", "state": crashing, "lastState": last}]
    world.settle()
    assert world.condition("Trained") == ("False", "Crashing")
    assert "certificates ended with exit code 7: no CA" in world.message("Trained")
    pod["status"]["initContainerStatuses"] = [{"name": "certificates", "state": last}]
    pod["status"].update(phase="Failed", containerStatuses=[])
    job["status"] = {"failed": 1, "conditions": [{"type": "Failed", "status": "True"}]}
    world.settle()
    assert world.status["lastFailure"]["container"] == "certificates"
    assert "ended with exit code 7: no CA" in world.status["lastFailure"]["message"]


def test_a_pod_that_waits_for_its_volumes_says_where_to_look():
    """Only an event says that another node holds a claim."""
    world = World().settle().up(names.TEACHERS)
    job = world.job(names.TRAINER)
    world.pod(job, "tiny-trainer-1-0-0", "Pending", waiting={"reason": "ContainerCreating"})
    world.settle()
    assert world.condition("Trained") == ("False", "Starting")
    assert "waits on node machine-1 for volumes" in world.message("Trained")
    assert "`kubectl describe pod tiny-trainer-1-0-0`" in world.message("Trained")
    assert "for volumes" in world.wait(1801).message("Failed")


# ---------------------------------------------------------------------------------------------------- the evaluator


def devices(world: World, role: str) -> dict[str, str]:
    (job,) = world.jobs(role)
    resources: dict[str, str] = job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    return resources


def test_the_evaluator_asks_for_the_devices_that_it_uses():
    limits = {"nvidia.com/gpu": "8", "rdma/hca": "1", "memory": "64Gi"}
    spec: dict[str, Any] = {
        "training__processesPerNode": 8,
        "training__imagesPerTask": 8,
        "training__pod": {"resources": {"limits": limits}},
    }
    world = World(**spec).settle().up(names.TEACHERS)
    assert devices(world, names.TRAINER) == limits
    world.run().finish(names.TRAINER, digest=STUDENT)
    assert devices(world, names.EVALUATOR) == limits  # one rank for each GPU


def test_the_evaluator_may_have_a_pod_of_its_own_which_names_nothing():
    limits = {"nvidia.com/gpu": "1"}
    spec: dict[str, Any] = {"evaluation__pod": {"image": "evaluator:1", "resources": {"limits": limits}}}
    world = World(**spec).trained()
    assert devices(world, names.EVALUATOR) == limits
    (job,) = world.jobs(names.EVALUATOR)
    assert job["spec"]["template"]["spec"]["containers"][0]["image"] == "evaluator:1"
    (config,) = [c for c in world.of("ConfigMap", names.EVALUATOR) if names.EVALUATOR in c["metadata"]["name"]]
    assert '"nvidia.com/gpu": "1"' in config["data"]["distill.json"], "the launcher counts its ranks by them"
    run = world.status["run"]["key"]
    scored = world.finish(names.EVALUATOR, digest=STUDENT, gatePassed=True, scores=[]).up(names.ENDPOINT)
    scored.edit(evaluation__pod={"image": "evaluator:2"})
    assert scored.condition("Ready")[0] == "True", "nothing is trained, scored or rolled out again"
    assert scored.status["run"]["key"] == run
