"""How students replace one another, decided on paper."""

import itertools
from typing import Any

import pytest
from opd_operator import names
from opd_operator.observe import Requests
from opd_operator.rollout import too_many_failed

from tests.operator.world import STUDENT, World, answer

NEXT = "sha256:" + "b" * 64


def replacing(**endpoint) -> World:
    """A student serves with two replicas, and its successor has just passed the gate."""
    settings = {f"endpoint__{key}": value for key, value in {"replicas": 2, **endpoint}.items()}
    world = World(**settings).served()
    world.edit(**settings, training__seed=7)
    return world.up(names.TEACHERS).run().finish(names.TRAINER, digest=NEXT).finish(
        names.EVALUATOR, digest=NEXT, gatePassed=True, scores=[]
    )  # fmt: skip


def replicas(world: World) -> dict[str, int]:
    """Replicas by student."""
    status = world.status["endpoint"]
    names_ = {status[kind]["revision"]: status[kind]["digest"] for kind in ("stable", "canary") if kind in status}
    found = {}
    for deployment in world.of("Deployment", names.ENDPOINT):
        digest = names_.get(deployment["metadata"]["labels"][names.REVISION], "gone")
        found[{STUDENT: "old", NEXT: "new"}.get(digest, digest)] = deployment["spec"]["replicas"]
    return found


def test_the_first_student_needs_no_canary():
    world = World(endpoint__replicas=2).evaluated()
    (deployment,) = world.of("Deployment", names.ENDPOINT)
    assert deployment["spec"]["replicas"] == 2
    assert world.condition("Deployed") == ("False", "Starting")
    assert world.up(names.ENDPOINT).condition("Deployed") == ("True", "Completed")


def test_a_successor_grows_only_as_it_becomes_ready_and_the_old_one_shrinks_after_it():
    world = replacing()
    assert world.condition("Deployed") == ("False", "Canary")
    assert world.condition("Serving")[0] == "True"
    assert replicas(world) == {"old": 2, "new": 1}
    world.up(names.ENDPOINT)
    assert replicas(world) == {"old": 1, "new": 1}
    assert world.status["endpoint"]["canary"]["trafficPercent"] in (33, 50)
    steps = [replicas(world)]
    for _ in range(12):
        world.wait(61).up(names.ENDPOINT)
        steps.append(replicas(world))
        if "canary" not in world.status["endpoint"]:
            break
    assert world.condition("Deployed") == ("True", "Completed")
    assert world.status["endpoint"]["stable"]["digest"] == NEXT
    assert replicas(world) == {"new": 2}
    assert all(sum(step.values()) >= 2 for step in steps), steps
    assert all(sum(step.values()) <= 3 for step in steps), "maxSurge is 1"


def test_without_surge_never_more_pods_than_replicas_and_never_none():
    world = replacing(rollout={"maxSurge": 0})
    steps = [replicas(world)]
    for _ in range(16):
        world.wait(61).up(names.ENDPOINT)
        steps.append(replicas(world))
        if "canary" not in world.status["endpoint"]:
            break
    assert replicas(world) == {"new": 2}
    assert all(1 <= sum(step.values()) <= 2 for step in steps), steps


def test_the_only_replica_is_replaced_by_a_second_one():
    world = replacing(replicas=1)
    assert replicas(world) == {"old": 1, "new": 1}
    for _ in range(6):
        world.up(names.ENDPOINT).wait(61)
    assert replicas(world) == {"new": 1}


def test_failing_requests_roll_back_and_the_old_student_stays():
    world = replacing().up(names.ENDPOINT)
    world.requests = Requests(failed=5, total=10)
    world.settle()
    assert world.condition("Deployed") == ("False", "RolledBack")
    assert "5 of its 10 requests failed" in world.message("Deployed")
    assert world.condition("Failed") == ("True", "RolledBack")
    assert world.condition("Serving")[0] == "True"
    assert replicas(world) == {"old": 2}
    world.requests = None  # its pods are gone
    before = world.writes
    world.wait(1e6)
    assert world.writes == before, "it is not tried again by itself"


def test_a_crashing_canary_rolls_back():
    world = replacing()
    (deployment,) = [d for d in world.of("Deployment", names.ENDPOINT) if not d["status"]]
    waiting = {"reason": "CrashLoopBackOff", "message": "back-off"}
    world.pod(deployment, "canary-0", "Running", waiting=waiting, restarts=3)
    world.settle()
    assert world.condition("Deployed") == ("False", "RolledBack")
    assert replicas(world) == {"old": 2}


def test_a_canary_that_never_becomes_ready_rolls_back():
    world = replacing()
    for _ in range(5):
        world.wait(1800)
    assert world.condition("Deployed") == ("False", "RolledBack")
    assert replicas(world) == {"old": 2}


def test_rolling_back_by_name_is_a_rollout_too():
    world = replacing()
    for _ in range(12):
        world.up(names.ENDPOINT).wait(61)
    assert replicas(world) == {"new": 2}
    world.edit(endpoint__replicas=2, training__seed=7, endpoint__studentDigest=STUDENT)
    assert world.condition("Deployed") == ("False", "Canary")
    for _ in range(12):
        world.up(names.ENDPOINT).wait(61)
    assert world.status["endpoint"]["stable"]["digest"] == STUDENT
    assert world.condition("Deployed")[0] == "True"


def test_a_change_of_the_pods_alone_rolls_the_endpoint_and_nothing_else():
    world = World(endpoint__replicas=2).served()
    world.edit(endpoint__replicas=2, endpoint__maxQueuedImages=5)
    assert world.condition("Deployed") == ("False", "Canary")
    assert world.condition("Trained") == ("True", "Completed")
    assert not world.jobs()


def test_more_replicas_are_no_new_revision():
    world = World(endpoint__replicas=2).served()
    revision = world.status["endpoint"]["stable"]["revision"]
    world.edit(endpoint__replicas=4)
    assert world.status["endpoint"]["stable"]["revision"] == revision
    assert replicas(world) == {"old": 4}
    assert world.of("PodDisruptionBudget")


def test_a_first_student_that_never_answers_is_removed_and_told():
    world = World().evaluated().wait(1801)
    assert world.condition("Failed") == ("True", "DeadlineExceeded")
    assert not world.of("Deployment", names.ENDPOINT)
    before = world.writes
    assert world.wait(1e6).writes == before


@pytest.mark.parametrize("enabled", [True, False])
def test_without_an_endpoint_the_evaluation_is_the_end(enabled):
    world = World(endpoint__enabled=enabled).evaluated()
    assert world.condition("Ready")[0] == ("False" if enabled else "True")
    assert bool(world.of("Deployment", names.ENDPOINT)) == enabled


def test_pods_that_go_away_later_are_told_by_serving():
    world = World().served()
    (deployment,) = world.of("Deployment", names.ENDPOINT)
    deployment["status"] = {"observedGeneration": 1, "readyReplicas": 0, "updatedReplicas": 1}
    world.settle()
    assert world.condition("Serving") == ("False", "Unavailable")
    assert world.condition("Ready")[0] == "False"
    assert world.up(names.ENDPOINT).condition("Ready")[0] == "True"


# ---------------------------------------------------------------------------------------------------- never without


@pytest.mark.parametrize(("replicas_", "surge"), [(1, 1), (2, 0), (2, 1), (3, 0), (5, 0), (5, 1), (10, 1)])
def test_enough_pods_are_ready_at_every_moment_and_the_old_one_stays_until_the_end(replicas_, surge):
    world = replacing(replicas=replicas_, rollout={"maxSurge": surge, "steps": [10, 50, 90]})
    for _ in range(60):
        if "canary" not in world.status["endpoint"]:
            break
        assert replicas(world).get("old", 0) >= 1
        assert sum(replicas(world).values()) <= replicas_ + surge
        ready = sum(d["status"].get("readyReplicas", 0) for d in world.of("Deployment", names.ENDPOINT))
        assert ready >= replicas_ - (1 - surge)
        world.up(names.ENDPOINT)
        if "canary" in world.status["endpoint"]:
            world.wait(61)
    assert replicas(world) == {"new": replicas_}
    assert world.up(names.ENDPOINT).condition("Deployed") == ("True", "Completed")


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("surge", [0, 1])
def test_a_rollback_at_any_step_leaves_the_old_student_in_service(steps, surge):
    world = replacing(rollout={"maxSurge": surge})
    for _ in range(steps):
        world.up(names.ENDPOINT)
        if "canary" in world.status["endpoint"]:
            world.wait(61)
    assert "canary" in world.status["endpoint"]
    world.requests = Requests(failed=50, total=100)
    world.settle()
    assert world.condition("Deployed") == ("False", "RolledBack")
    assert world.condition("Serving")[0] == "True"
    assert replicas(world) == {"old": 2}


def template(world: World, revision: str) -> Any:
    """Of the pods of a revision."""
    found = {d["metadata"]["labels"][names.REVISION]: d for d in world.of("Deployment", names.ENDPOINT)}
    return found[revision]["spec"]["template"]


def test_a_revision_keeps_its_settings_whatever_the_spec_tries_on_another():
    world = World(endpoint__replicas=2, endpoint__maxBatchSize=4).served()
    old = world.status["endpoint"]["stable"]["revision"]
    before = template(world, old)
    pod = {"env": [{"name": "BROKEN", "value": "yes"}]}
    world.edit(endpoint__replicas=2, endpoint__maxBatchSize=8, endpoint__pod=pod).up(names.ENDPOINT)
    new = world.status["endpoint"]["canary"]["revision"]
    assert template(world, old) == before
    assert template(world, new) != before
    world.requests = Requests(failed=50, total=100)
    world.settle()
    assert world.condition("Deployed") == ("False", "RolledBack")
    assert template(world, old) == before
    world.remove("Deployment", names.endpoint("tiny", old))
    world.settle()
    assert template(world, old) == before, "somebody deleted it: it comes back as it was"
    world.requests = None
    world.edit(endpoint__replicas=2, endpoint__maxBatchSize=8, endpoint__suspend=True)
    world.edit(endpoint__replicas=2, endpoint__maxBatchSize=8).up(names.ENDPOINT)
    assert world.status["endpoint"]["stable"]["revision"] == old
    assert template(world, old) == before, "a pause changes nothing of it"


def test_settings_that_served_well_stay_with_their_revision():
    world = World(endpoint__replicas=2).served()
    world.edit(endpoint__replicas=2, endpoint__maxBatchSize=8).up(names.ENDPOINT)
    for _ in range(4):
        if "canary" in world.status["endpoint"]:
            world.wait(61).up(names.ENDPOINT)
    assert "canary" not in world.status["endpoint"]
    promoted = world.status["endpoint"]["stable"]["revision"]
    before = template(world, promoted)
    world.edit(endpoint__replicas=2, endpoint__maxBatchSize=16).up(names.ENDPOINT)
    assert "canary" in world.status["endpoint"]
    assert template(world, promoted) == before


def test_a_canary_that_loses_its_pods_gets_its_time_anew_and_then_goes():
    world = replacing().up(names.ENDPOINT).wait(30)
    (canary,) = [d for d in world.of("Deployment", names.ENDPOINT) if d["metadata"]["labels"][names.REVISION]
                 == world.status["endpoint"]["canary"]["revision"]]  # fmt: skip
    canary["status"]["readyReplicas"] = 0
    world.settle().wait(1700)
    assert world.condition("Deployed") == ("False", "Canary")
    world.wait(200)
    assert world.condition("Deployed") == ("False", "RolledBack")


# ---------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("failed", "total", "allowed", "expected"),
    [
        (0, 0, 0.02, False),
        (1, 1, 0.02, False),  # one of one: it may be an accident
        (9, 9, 0.02, False),  # too few to speak of a rate
        (10, 10, 0.02, True),
        (1, 20, 0.02, False),
        (4, 20, 0.02, True),
        (30, 1000, 0.02, False),
        (40, 1000, 0.02, True),
        (1, 1000, 0.0, True),
        (1000, 1000, 1.0, False),
        (30_000, 1_000_000, 0.02, True),
    ],
)
def test_so_many_failures_are_no_accident(failed, total, allowed, expected):
    assert too_many_failed(Requests(failed, total), allowed) == expected


# ---------------------------------------------------------------------------------------------------- a first student


def test_a_broken_first_student_is_replaced_without_a_canary():
    """With one GPU its pod would hold the place that the mended one needs."""
    world = World(endpoint__pod={"image": "typo:1"}).evaluated()
    world.edit(endpoint__pod={"image": "endpoint:2"})
    (deployment,) = world.of("Deployment", names.ENDPOINT)
    assert deployment["spec"]["template"]["spec"]["containers"][0]["image"] == "endpoint:2"
    assert "canary" not in world.status["endpoint"]
    assert world.up(names.ENDPOINT).condition("Ready")[0] == "True"


def test_a_first_student_that_was_suspended_gets_its_whole_time_again():
    world = World().evaluated().wait(1700).edit(endpoint__suspend=True).wait(1e5).edit()
    assert world.condition("Failed")[0] == "False"
    assert world.up(names.ENDPOINT).condition("Ready")[0] == "True"


def test_a_first_student_that_was_rejected_does_not_stop_its_successor():
    """Nothing serves, and the run is at its beginning."""
    world = World().evaluated().wait(1801)
    assert world.condition("Failed") == ("True", "DeadlineExceeded")
    world.edit(training__seed=7)
    assert world.condition("Failed")[0] == "False"
    assert world.of("Deployment", names.TEACHERS)


def test_a_rejected_student_does_not_fail_the_run_that_trains_its_successor():
    world = replacing().up(names.ENDPOINT)
    world.requests = Requests(failed=50, total=100)
    world.settle()
    world.requests = None
    world.edit(endpoint__replicas=2, training__seed=8, runPolicy={"ttlSecondsAfterFinished": 60})
    world.up(names.TEACHERS).run().wait(600)
    assert world.condition("Failed")[0] == "False"
    assert world.condition("Trained") == ("False", "Running")
    assert not world.plan.delete


def test_disabled_and_enabled_again_the_last_good_student_comes_back():
    world = World().served().edit(endpoint__enabled=False)
    assert not world.of("Deployment")
    assert world.condition("Ready")[0] == "True"
    world.edit()
    assert world.up(names.ENDPOINT).condition("Ready")[0] == "True"
    assert world.status["endpoint"]["stable"]["digest"] == STUDENT


def test_old_students_are_forgotten_but_not_the_one_in_service():
    world = World(endpoint__studentDigest=STUDENT).evaluated().up(names.ENDPOINT)
    for seed in range(12):
        digest = "sha256:" + f"{seed:064x}"
        world.edit(endpoint__studentDigest=STUDENT, training__seed=100 + seed).up(names.TEACHERS).run()
        world.finish(names.TRAINER, digest=digest).finish(names.EVALUATOR, digest=digest, gatePassed=True, scores=[])
    known = [student["digest"] for student in world.status["students"]]
    assert len(known) == 10
    assert STUDENT in known
    assert digest in known


# ---------------------------------------------------------------------------------------------------- routes


ROUTE = {"gateway": "web", "gatewayNamespace": "gateways", "hostnames": ["images.example.com"]}


def weights(world: World) -> dict[str, int]:
    (route,) = world.of("HTTPRoute")
    backends = {b["name"]: b["weight"] for b in route["spec"]["rules"][0]["backendRefs"]}
    assert sum(backends.values()) == 100
    services = {service["metadata"]["name"]: service for service in world.of("Service", names.ENDPOINT)}
    digests = {world.status["endpoint"][kind]["revision"]: world.status["endpoint"][kind]["digest"]
               for kind in ("stable", "canary") if kind in world.status["endpoint"]}  # fmt: skip
    return {
        {STUDENT: "old", NEXT: "new"}[digests[services[name]["spec"]["selector"][names.REVISION]]]: weight
        for name, weight in backends.items()
    }


def test_a_route_publishes_the_api_alone_and_health_and_metrics_are_on_another_port():
    (route,) = World(endpoint__route=ROUTE).evaluated().up(names.ENDPOINT).of("HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]
    assert {backend["port"] for backend in rule["backendRefs"]} == {names.ENDPOINT_HTTP}
    assert names.ENDPOINT_METRICS != names.ENDPOINT_HTTP


def test_the_keys_are_a_secret_that_the_endpoint_alone_mounts_and_reads():
    world = World(endpoint__apiKeys={"secretName": "digits-keys"}).evaluated().up(names.ENDPOINT)
    (deployment,) = world.of("Deployment", names.ENDPOINT)
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (volume,) = [volume for volume in pod["volumes"] if "secret" in volume]
    assert volume["secret"] == {"secretName": "digits-keys"}
    (mount,) = [mount for mount in container["volumeMounts"] if mount["name"] == volume["name"]]
    assert mount["readOnly"]
    assert f"--api-keys={mount['mountPath']}/keys" in container["command"]
    assert "subPath" not in mount, "Kubernetes would not follow the Secret"


def test_a_route_gives_the_canary_its_share_to_the_percent_and_nothing_before_it_is_ready():
    world = replacing(route=ROUTE)
    assert weights(world) == {"old": 100, "new": 0}
    assert weights(world.up(names.ENDPOINT)) == {"old": 100, "new": 0}, "no gateway knows its pods yet"
    assert weights(world.wait(5)) == {"old": 90, "new": 10}
    assert world.status["endpoint"]["canary"]["trafficPercent"] == 10
    assert weights(world.wait(60).up(names.ENDPOINT).wait(5)) == {"old": 50, "new": 50}
    for _ in range(4):
        world.wait(65).up(names.ENDPOINT)
    assert weights(world) == {"new": 100}
    assert world.status["endpoint"]["url"] == "http://images.example.com"
    (route,) = world.of("HTTPRoute")
    assert route["spec"]["parentRefs"] == [{"name": "web", "namespace": "gateways"}]
    assert route["spec"]["hostnames"] == ["images.example.com"]
    assert route["spec"]["rules"][0]["timeouts"] == {"request": "0s"}, "a gateway's own limit is shorter than an image"


def at_ten_percent() -> World:
    world = replacing(route=ROUTE).up(names.ENDPOINT).wait(5)
    assert weights(world) == {"old": 90, "new": 10}
    return world


@pytest.mark.parametrize(
    ("replicas_", "surge", "steps"),
    [
        *itertools.product((2, 3, 10), (0, 1), ([10, 50], [5, 33, 90])),
        (1, 1, [10, 50]),
        (10, 1, [100]),
        (101, 1, [100]),  # more pods than percents
    ],
)
def test_at_every_moment_both_have_the_pods_for_every_weight_that_a_gateway_may_still_follow(replicas_, surge, steps):
    """Gateways follow a route up to 5 s late."""
    world = replacing(
        replicas=replicas_, route=ROUTE, rollout={"maxSurge": surge, "steps": steps, "intervalSeconds": 10}
    )
    followed: list[int] = [0]  # weights of the new one, of the last 5 s
    for _ in range(30 * replicas_ + 200):
        if "canary" not in world.status["endpoint"]:
            break
        followed = [*followed, weights(world)["new"]][-6:]
        pods = replicas(world)
        a_percent = (replicas_ - 1) // 100
        assert pods["old"] >= replicas_ * (100 - min(followed)) / 100 - (1 - surge) - a_percent
        assert pods["old"] >= 1
        assert sum(pods.values()) <= replicas_ + surge
        assert pods["new"] > replicas_ * max(followed) / 100 - 1 - a_percent
        if any(d["status"].get("observedGeneration") != d["metadata"]["generation"] for d in world.of("Deployment")):
            world.up(names.ENDPOINT)
        if "canary" in world.status["endpoint"]:
            world.wait(1)
    assert weights(world) == {"new": 100}
    assert replicas(world.wait(6)) == {"new": replicas_}


def test_a_canary_that_loses_pods_loses_their_weight_at_once():
    world = replacing(replicas=4, route=ROUTE, rollout={"steps": [50]})
    while weights(world)["new"] < 50:
        world.up(names.ENDPOINT).wait(1)
    world.wait(6)
    assert replicas(world) == {"old": 2, "new": 2}
    name = names.endpoint("tiny", world.status["endpoint"]["canary"]["revision"])
    (canary,) = [each for each in world.of("Deployment") if each["metadata"]["name"] == name]
    canary["status"]["readyReplicas"] = 1
    assert weights(world.settle()) == {"old": 75, "new": 25}
    assert replicas(world) == {"old": 3, "new": 2}
    assert weights(world.up(names.ENDPOINT).wait(5)) == {"old": 50, "new": 50}


def test_a_rollback_takes_the_weight_back_at_once():
    world = at_ten_percent()
    world.requests = Requests(failed=50, total=100)
    assert weights(world.settle()) == {"old": 100}


def test_what_has_left_the_route_stays_until_every_gateway_has_seen_that():
    """Its Service, too: a backend that is not there is answered with 500."""

    def there(world: World, revision: str) -> tuple[bool, bool, int]:
        name = names.endpoint("tiny", revision)
        deployments = [each for each in world.of("Deployment") if each["metadata"]["name"] == name]
        services = [each for each in world.of("Service") if each["metadata"]["name"] == name]
        return bool(deployments), bool(services), sum(each["spec"]["replicas"] for each in deployments)

    rolled_back = at_ten_percent()
    canary = rolled_back.status["endpoint"]["canary"]["revision"]
    rolled_back.requests = Requests(failed=50, total=100)
    assert there(rolled_back.settle(), canary) == (True, True, 1)
    assert there(rolled_back.wait(4), canary) == (True, True, 1)
    assert there(rolled_back.wait(2), canary) == (False, False, 0)
    assert "leaving" not in rolled_back.status["endpoint"]

    promoted = at_ten_percent()
    stable = promoted.status["endpoint"]["stable"]["revision"]
    while "canary" in promoted.status["endpoint"]:
        promoted.wait(1).up(names.ENDPOINT)
    assert weights(promoted) == {"new": 100}
    assert there(promoted, stable)[:2] == (True, True)
    assert there(promoted.wait(6), stable) == (False, False, 0)


def test_a_route_may_come_and_go_without_a_rollout():
    world = World().served().edit(endpoint__route=ROUTE)
    assert world.condition("Deployed")[0] == "True"
    assert weights(world) == {"old": 100}
    assert not world.edit().of("HTTPRoute")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, "no controller of a Gateway has answered for HTTPRoute tiny-endpoint yet"),
        (answer(Accepted="False"), "Gateway web does not use HTTPRoute tiny-endpoint: Why: because of Accepted"),
        (answer(Accepted="True", ResolvedRefs="False"), "because of ResolvedRefs"),
    ],
)
def test_an_endpoint_that_no_gateway_reaches_is_not_called_ready(said: dict[str, Any], told: str):
    world = World().served()
    world.gateway = said
    world.edit(endpoint__route=ROUTE)
    for kind in ("Deployed", "Serving", "Ready"):
        assert world.condition(kind) == ("False", "NotRouted")
        assert told in world.message(kind)
    (route,) = world.of("HTTPRoute")
    route["status"] = answer(Accepted="True")
    world.settle()
    for kind in ("Deployed", "Serving", "Ready"):
        assert world.condition(kind)[0] == "True"


def test_students_that_were_in_service_are_marked():
    world = replacing()
    assert [student.get("served") for student in world.status["students"]] == [True, None]
    for _ in range(6):
        world.up(names.ENDPOINT).wait(61)
    assert [student.get("served") for student in world.status["students"]] == [True, True]


# ---------------------------------------------------------------------------------------------------- without figures


def test_a_canary_of_which_nobody_can_tell_how_its_requests_end_goes_no_further_and_says_so():
    """A mesh with strict mTLS, or a policy, keeps the operator from its pods."""
    world = replacing()
    world.requests = None
    world.up(names.ENDPOINT)
    assert world.condition("Deployed") == ("False", "Canary"), "its interval is not over"
    world.wait(61)
    for _ in range(20):
        world.up(names.ENDPOINT).wait(61)
    assert world.condition("Deployed") == ("False", "NoFigures")
    for told in ("/metrics", "opd promote"):
        assert told in world.message("Deployed")
    assert world.status["endpoint"]["canary"]["step"] == 0
    assert world.condition("Serving")[0] == "True"
    world.requests = Requests(failed=0, total=3)
    for _ in range(6):
        world.settle().up(names.ENDPOINT).wait(61)
    assert world.status["endpoint"]["stable"]["digest"] == NEXT


@pytest.mark.parametrize("change", [{"endpoint__studentDigest": NEXT}, {"endpoint__rollout": {"strategy": "Replace"}}])
def test_who_names_the_student_or_the_strategy_needs_no_figures(change):
    world = replacing()
    world.requests = None
    world.up(names.ENDPOINT).wait(200)
    world.edit(endpoint__replicas=2, training__seed=7, **change)
    for _ in range(8):
        world.up(names.ENDPOINT).wait(61)
    assert world.status["endpoint"]["stable"]["digest"] == NEXT
    assert world.condition("Deployed")[0] == "True"


# ---------------------------------------------------------------------------------------------------- slow gateways


def test_a_route_that_its_controller_has_not_taken_yet_is_not_followed():
    world = replacing(route=ROUTE).up(names.ENDPOINT)
    (route,) = world.of("HTTPRoute")
    behind = answer(Accepted="True")
    behind["parents"][0]["conditions"][0]["observedGeneration"] = route["metadata"]["generation"] - 1
    route["status"] = behind
    world.settle()
    for _ in range(10):
        world.wait(5).settle()
    assert weights(world) == {"old": 100, "new": 0}
    behind["parents"][0]["conditions"][0]["observedGeneration"] += 1
    assert weights(world.settle().wait(6)) == {"old": 90, "new": 10}


def test_a_gateway_may_need_longer_than_others():
    world = replacing(route={**ROUTE, "followSeconds": 90}).up(names.ENDPOINT)
    assert weights(world.wait(80)) == {"old": 100, "new": 0}
    assert weights(world.wait(11)) == {"old": 90, "new": 10}


@pytest.mark.parametrize(
    ("route", "url"),
    [
        ({"tls": True}, "https://images.example.com"),
        ({"hostnames": ["*.example.com", "images.example.com"]}, "http://images.example.com"),
        ({"hostnames": ["*.example.com"]}, "http://tiny-endpoint.team.svc:8000"),
    ],
)
def test_the_url_is_one_that_can_be_asked(route: dict[str, Any], url: str):
    world = World(endpoint__route={**ROUTE, **route}).served()
    assert world.status["endpoint"]["url"] == url
