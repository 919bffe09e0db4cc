"""Wrong clocks, other clients, many objects, another operator: each ends in the right state."""

import json
import signal
import time
from collections.abc import Callable

import pytest

from tests.operator.live import STUDENT, Api, Operator, quiet, to_student, wait_for
from tests.operator.world import World

Start = Callable[..., Operator]


# ---------------------------------------------------------------------------------------------------- the clock

AHEAD = "import time\nreal = time.time\ntime.time = lambda: real() + 7200\n"


def test_an_operator_with_a_wrong_clock_ends_no_run(api: Api, start: Start) -> None:
    """Two hours ahead every deadline would have passed."""
    first = start(api, "--no-leader-election").ready()
    api.submit()
    api.run("teachers")
    api.until("Trained", "False", "Starting")
    first.stop()
    start(api, "--no-leader-election", prelude=AHEAD).ready()
    api.run("trainer")
    api.until("Trained", "False", "Running")
    assert api.condition("Failed") == ("False", "NotFailed")
    times = api.status()["stageTimes"]["TrainerReady"]
    assert times["completionTime"] < time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 60))


# ---------------------------------------------------------------------------------------------------- other clients


def test_another_manager_of_the_same_field_does_not_make_it_hot(api: Api, operator: Operator) -> None:
    api.submit()
    wait_for(lambda: api.ours("deployments", "teachers"))
    end = time.monotonic() + 12
    fought = 0
    while time.monotonic() < end or fought <= 100:
        body = {"spec": {"replicas": 3}}
        path = api.path("deployments", "tiny-teachers-0") + "?fieldManager=somebody"
        api.call("PATCH", path, body, "application/merge-patch+json")
        fought += 1
        time.sleep(0.05)
    applied = [name for verb, resource, name in api.writes() if (verb, resource) == ("patch", "deployments")]
    assert fought > 100
    assert len(applied) < 15
    wait_for(lambda: api.ours("deployments", "teachers")[0]["spec"]["replicas"] == 1, "the last word", 70)


STRANGERS = {
    "services": ("tiny-teachers-0", {"spec": {"ports": [{"port": 80}], "selector": {"app": "theirs"}}}),
    "configmaps": (
        next(name for kind, name in World().settle().children if kind == "ConfigMap"), {"data": {"theirs": "yes"}},
    ),
    "serviceaccounts": ("tiny-workload", {"metadata": {"annotations": {"eks.amazonaws.com/role-arn": "arn:theirs"}}}),
}  # fmt: skip


@pytest.mark.parametrize("plural", STRANGERS)
def test_an_object_of_another_team_is_left_alone_and_told(plural: str, api: Api, operator: Operator) -> None:
    """Neither overwritten nor taken away with the distillation; and no pod runs with another team's account."""
    name, content = STRANGERS[plural]
    metadata = {**content.get("metadata", {}), "name": name}
    theirs = api.call("POST", api.path(plural), {**content, "metadata": metadata})
    api.submit()
    api.until("TeachersReady", "False", "Rejected")
    quiet(api)
    (condition,) = [c for c in api.status()["conditions"] if c["type"] == "TeachersReady"]
    assert f"{name}: an object of this name is there already" in condition["message"]
    assert api.call("GET", api.path(plural, name)) == theirs
    assert not api.ours("deployments", "teachers"), "its pods would use it"
    api.delete(plural, name)
    wait_for(lambda: api.ours("deployments", "teachers"), "the retry", 40)
    (owner,) = api.call("GET", api.path(plural, name))["metadata"]["ownerReferences"]
    assert owner["name"] == "tiny"


def test_what_a_spec_leaves_out_later_goes(api: Api, operator: Operator) -> None:
    """Also what was there when the child was made."""
    api.submit(teacherServing__pod={"env": [{"name": "EXTRA", "value": "1"}]})

    def extra() -> list[str]:
        (deployment,) = api.ours("deployments", "teachers")
        (container,) = deployment["spec"]["template"]["spec"]["containers"]
        return [each["value"] for each in container["env"] if each["name"] == "EXTRA"]

    wait_for(lambda: api.ours("deployments", "teachers"))
    assert extra() == ["1"]
    api.edit(teacherServing={"pod": {"env": [{"name": "EXTRA", "value": "2"}]}})
    wait_for(lambda: extra() == ["2"])
    api.edit(teacherServing={"pod": {"env": None}})
    wait_for(lambda: extra() == [])
    quiet(api)


def test_a_status_that_somebody_has_restored_is_the_operators_again(api: Api, operator: Operator) -> None:
    """Under server-side apply whatever another manager has set, too, would stay for ever."""
    api.submit()
    api.run("teachers")
    api.until("Trained", "False", "Starting")
    restored = {"apiVersion": "opd.dev/v1alpha1", "kind": "OPDDistillation", "metadata": {"name": "tiny"},
                "status": api.status()}  # fmt: skip
    path = api.path("opddistillations", "tiny", "status") + "?fieldManager=velero&force=true"
    api.call("PATCH", path, restored, "application/apply-patch+yaml")
    to_student(api)
    assert not {"teachers", "teachersReady", "workers", "workersReady"} & api.status().keys()
    quiet(api)


def test_a_policy_that_changes_children_is_lived_with(api: Api, operator: Operator) -> None:
    """A mirror of images, a sidecar and a variable for every Deployment, as platform teams have them. What an apply makes
    is what can be had; it was applied for ever."""
    mutate = """Object{spec: Object.spec{template: Object.spec.template{spec: Object.spec.template.spec{
        containers: object.spec.template.spec.containers.filter(c, c.name != "proxy").map(c,
            Object.spec.template.spec.containers{
                name: c.name, image: c.image.startsWith("mirror/") ? c.image : "mirror/" + c.image,
                env: [Object.spec.template.spec.containers.env{name: "COMPANY", value: "yes"}]})
            + [Object.spec.template.spec.containers{name: "proxy", image: "proxy:1"}]}}}}"""
    rule = {
        "apiGroups": ["apps"],
        "apiVersions": ["v1"],
        "operations": ["CREATE", "UPDATE"],
        "resources": ["deployments"],
    }
    here = {"matchLabels": {"kubernetes.io/metadata.name": api.namespace}}
    admission, name = "/apis/admissionregistration.k8s.io/v1", f"company-{api.namespace}"
    policy = {
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": "Fail", "reinvocationPolicy": "Never",
            "matchConstraints": {"resourceRules": [rule], "namespaceSelector": here},
            "mutations": [{"patchType": "ApplyConfiguration", "applyConfiguration": {"expression": mutate}}],
        },
    }  # fmt: skip
    api.call("POST", f"{admission}/mutatingadmissionpolicies", policy)
    binding = {"metadata": {"name": name}, "spec": {"policyName": name}}
    api.call("POST", f"{admission}/mutatingadmissionpolicybindings", binding)

    def at_work() -> bool:
        probe = {"metadata": {"name": "probe"}, "spec": {"replicas": 0, "selector": {"matchLabels": {"a": "b"}}, "template": {
            "metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}}}  # fmt: skip
        made = api.call("POST", api.path("deployments") + "?dryRun=All", probe)
        return len(made["spec"]["template"]["spec"]["containers"]) == 2

    try:
        wait_for(at_work, "the policy")
        api.submit()
        (deployment,) = wait_for(lambda: api.ours("deployments", "teachers"))
        images = {c["name"]: c["image"] for c in deployment["spec"]["template"]["spec"]["containers"]}
        assert images.pop("proxy") == "proxy:1"
        assert all(image.startswith("mirror/") for image in images.values())
        for number in range(5):  # each is a look
            api.patch("deployments", deployment["metadata"]["name"], {"metadata": {"annotations": {"n": str(number)}}})
            time.sleep(0.5)
        quiet(api)
        assert not [w for w in api.writes() if w[:2] == ("patch", "deployments")], "nothing else was wanted"
        api.patch("deployments", deployment["metadata"]["name"], {"spec": {"replicas": 5}})
        wait_for(lambda: api.ours("deployments", "teachers")[0]["spec"]["replicas"] == 1, "what somebody has changed")
        quiet(api)
    finally:
        api.call("DELETE", f"{admission}/mutatingadmissionpolicybindings/{name}")
        api.call("DELETE", f"{admission}/mutatingadmissionpolicies/{name}")


# ---------------------------------------------------------------------------------------------------- hostile neighbours


def test_nothing_that_a_pod_or_an_object_says_ends_the_operator(api: Api, second_api: Api, start: Start) -> None:
    """Once a message of 4096 brackets in one namespace ended it for all, and again after each restart."""
    second_api.submit("hostile")
    operator = start(
        api, f"--watch-namespace={second_api.namespace}", "--no-leader-election", "--resync-seconds=5"
    ).ready()
    second_api.run("teachers")
    second_api.run("trainer")
    second_api.until("Trained", "False", "Running", name="hostile")
    (trainer,) = second_api.pods("trainer")[:1]
    name = trainer["metadata"]["name"]
    labels = {"app.kubernetes.io/managed-by": "opd-operator"}
    index = {"batch.kubernetes.io/job-completion-index": "9" * 5000}
    second_api.patch("pods", name, {"metadata": {"annotations": index}})
    fields = {
        "manager": "m",
        "operation": "Update",
        "apiVersion": "v1",
        "fieldsType": "FieldsV1",
        "fieldsV1": {"f:x": "?"},
    }
    body = {"metadata": {"name": "deep", "labels": labels, "managedFields": [fields]}, "data": {"x": "y"}}
    nested = json.dumps(body).replace('"?"', '{"f:x":' * 9900 + "{}" + "}" * 9900)
    made = second_api.http.post(
        second_api.path("configmaps"), content=nested, headers={"Content-Type": "application/json"}
    )
    assert made.status_code == 201, made.text
    for message in ("[" * 4096, '{"a":' * 800, "\ud800\x1b[2J", "9" * 4096):
        container = {"name": trainer["spec"]["containers"][0]["name"], "image": "i", "imageID": "", "ready": True,
                     "restartCount": 1, "state": {"running": {}},
                     "lastState": {"terminated": {"exitCode": 1, "message": message}}}  # fmt: skip
        status = {"status": {"containerStatuses": [container], "message": "\x1b]52;c;x\x07"}}
        second_api.patch("pods", name, status, "status")
    api.submit()
    to_student(api)
    time.sleep(6)  # a full listing
    assert operator.process
    assert operator.process.poll() is None, operator.log.read_text()
    assert "listing failed" not in operator.log.read_text()
    operator.stop(signal.SIGKILL)
    operator.start().ready()
    api.run("endpoint")
    api.until("Ready", "True")


def test_an_admission_webhook_that_is_not_there_is_told_and_waited_for(api: Api, operator: Operator) -> None:
    hook = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingWebhookConfiguration",
        "metadata": {"name": f"absent-{api.namespace}"},
        "webhooks": [
            {
                "name": "absent.example.com",
                "clientConfig": {"service": {"namespace": "nowhere", "name": "absent", "path": "/"}},
                "rules": [
                    {
                        "apiGroups": ["apps"],
                        "apiVersions": ["v1"],
                        "operations": ["CREATE"],
                        "resources": ["deployments"],
                    }
                ],
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": api.namespace}},
                "failurePolicy": "Fail",
                "sideEffects": "None",
                "admissionReviewVersions": ["v1"],
                "timeoutSeconds": 1,
            }
        ],
    }
    path = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    api.call("POST", path, hook)
    try:
        time.sleep(1)
        api.submit()
        api.until("TeachersReady", "False", "Rejected")
        conditions = {c["type"]: c["message"] for c in api.status()["conditions"]}
        assert "absent.example.com" in conditions["TeachersReady"]
    finally:
        api.call("DELETE", f"{path}/absent-{api.namespace}")
    wait_for(lambda: api.ours("deployments", "teachers"), "the teachers", 60)
    api.until("TeachersReady", "False", "Starting")


def test_a_deletion_that_hangs_is_not_called_failed(api: Api, operator: Operator) -> None:
    """kubeflow/trainer#3994: what is called failed holds no GPU."""
    api.submit(runPolicy={"stageDeadlines": {"teachersReady": 3}})
    wait_for(lambda: api.ours("deployments", "teachers"))
    api.patch("deployments", "tiny-teachers-0", {"metadata": {"finalizers": ["example.com/hold"]}})
    wait_for(lambda: "deletionTimestamp" in api.ours("deployments", "teachers")[0]["metadata"], "the deletion")
    time.sleep(2)
    assert api.condition("Failed") == ("False", "Stopping")
    api.patch("deployments", "tiny-teachers-0", {"metadata": {"finalizers": None}})

    def failed() -> bool:
        api.sweep()
        return api.condition("Failed") == ("True", "DeadlineExceeded")

    wait_for(failed)


# ---------------------------------------------------------------------------------------------------- many, and later


def test_many_objects_at_once(api: Api, operator: Operator) -> None:
    many = 60
    for number in range(many):
        api.submit(f"many-{number}")
    began = time.monotonic()
    wait_for(lambda: len(api.ours("deployments", "teachers")) == many, f"{many} Deployments", 60)

    def starting() -> bool:
        items = api.call("GET", api.path("opddistillations"))["items"]
        return all(item.get("status", {}).get("phase") == "Starting" for item in items)

    wait_for(starting, "their status", 60)
    print(f"{many} objects in {time.monotonic() - began:.1f} s")
    quiet(api)


def test_an_upgraded_operator_rewrites_nothing(api: Api, start: Start) -> None:
    """A new release brings new default images; what runs keeps what it began with."""
    first = start(api, "--no-leader-election").ready()
    api.submit("served")
    api.submit("training", training__seed=7)
    for name in ("served", "training"):
        wait_for(lambda name=name: api.status(name))
    api.run("teachers", 2)
    api.run("trainer", 2)
    api.end("trainer", digest=STUDENT)
    wait_for(lambda: len(api.pods("evaluator")) == 2, "two evaluators")
    api.end("evaluator", digest=STUDENT, gatePassed=True, scores=[])
    for name in ("served", "training"):
        api.until("Evaluated", "True", name=name)
    api.run("endpoint", 2)
    for name in ("served", "training"):
        api.until("Ready", "True", name=name)
    api.edit("training", training={"seed": 8})
    api.run("teachers")
    quiet(api)
    first.stop()
    before = api.writes()
    images = [f"--{role}-image=diffusion-opd/{role}:99" for role in ("trainer", "teacher", "endpoint")]
    start(api, "--no-leader-election", *images).ready()
    time.sleep(4)
    assert api.writes() == before


def test_the_lease_is_given_back_and_the_next_one_takes_over_at_once(api: Api, start: Start) -> None:
    lease = f"--lease-namespace={api.namespace}"
    first = start(api, lease).ready()
    wait_for(lambda: "opd_leader 1.0" in first.metrics())
    second = start(api, lease).ready()
    began = time.monotonic()
    assert first.stop(signal.SIGTERM) == 0
    wait_for(lambda: "opd_leader 1.0" in second.metrics(), "the second one", 15)
    assert time.monotonic() - began < 13  # a page of metrics is up to 5 s old
