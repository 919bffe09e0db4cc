"""What to do next with a distillation: commands, each with its purpose. Pure."""

from datetime import datetime, timedelta

from opd_core.stages import Condition, Reason, Stage

from opd_cli.cluster import students
from opd_cli.cluster.distillation import Distillation
from opd_cli.cluster.logs import ROLES, Role

Advice = list[tuple[str, str]]

_SOON = timedelta(seconds=30)  # an operator that is there has looked at an object by then
# No container has run, so there is no log to read.
_BEFORE_LOGS = (
    Reason.UNSCHEDULABLE,
    Reason.IMAGE_PULL_FAILED,
    Reason.REJECTED,
    Reason.WAITING,
    Reason.STARTING,
    Reason.QUEUED,
)


def next_steps(distillation: Distillation, flags: str, now: datetime) -> Advice:
    """Args: flags: what leads `opd` and kubectl to this object's cluster and namespace."""
    name = distillation.name
    accepted = distillation.condition(Condition.ACCEPTED)
    if accepted is None:
        if now - distillation.created < _SOON or distillation.status.conditions:
            return [(f"opd status {name} -w{flags}", "follow it")]
        return [("kubectl get pods -A -l app.kubernetes.io/name=diffusion-opd", "does the operator run?")]
    if distillation.holds(Condition.SUSPENDED):
        return [(f"opd resume {name}{flags}", "go on at the last checkpoint")]
    if distillation.spec["endpoint"].get("suspend") and distillation.stage == Stage.DEPLOYED:
        return [(f"opd resume {name} --endpoint{flags}", "serve its student again")]
    if distillation.failure:
        return _after_failure(distillation, flags)
    if distillation.holds(Condition.READY):
        return _when_ready(distillation, flags)
    stage = distillation.stage
    found = distillation.condition(Condition(stage.value))
    steps = [(f"opd status {name} -w{flags}", "follow it"), (f"opd events {name}{flags}", "what has happened")]
    if found and found.reason not in _BEFORE_LOGS:
        steps.insert(1, (f"opd logs {name} {ROLES[stage].value} -f{flags}", "what it prints"))
    return steps


def _after_failure(distillation: Distillation, flags: str) -> Advice:
    name, failed = distillation.name, distillation.condition(Condition.FAILED)
    events = (f"opd events {name}{flags}", "what has happened")
    if failed is None or failed.status != "True":
        return [(f"opd submit FILE{flags}", "with a spec that can be run")]
    if failed.reason == Reason.GATE_MISSED:
        student = distillation.status.student
        digest = students.short(student.digest if student else None)
        return [
            (f"opd promote {name} {digest}{flags}", "serve it all the same"),
            (f"opd submit FILE{flags}", "with more rounds, or another gate"),
        ]
    last = distillation.status.last_failure
    stage = Stage(last.stage) if last and last.stage in list(Stage) else distillation.stage
    return [(f"opd logs {name} {ROLES[stage].value}{flags}", "if its pod is still there"), events]


def _when_ready(distillation: Distillation, flags: str) -> Advice:
    name, endpoint = distillation.name, distillation.status.endpoint
    steps = [(f"opd get-student {name} --out students/{name}{flags}", "copy the student here")]
    if endpoint and endpoint.url:
        service = f"service/{name}-{Role.ENDPOINT.value}"
        port = endpoint.url.rpartition(":")[2]
        steps += [
            (f"kubectl port-forward {service} {port}{flags}", "reach its image API from here"),
            (f"opd generate 'a prompt' --url http://127.0.0.1:{port}", "then ask for an image"),
        ]
    return steps
