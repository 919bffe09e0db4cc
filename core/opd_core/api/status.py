"""What the operator reports in `status`. Only the operator writes it; all of it can be absent."""

from typing import Annotated, Literal

from pydantic import Field

from opd_core.api.base import Model, ShortText

Text = Annotated[str, Field(max_length=1024)]
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Time = Annotated[str, Field(max_length=64, json_schema_extra={"format": "date-time"})]


class ConditionStatus(Model):
    type: Annotated[str, Field(min_length=1, max_length=63)] = Field(description="One of the documented conditions.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it is so.")
    reason: Annotated[str, Field(max_length=63)] = Field(default="", description="One of the documented reasons.")
    message: Text = Field(default="", description="The same for people.")
    last_transition_time: Time = Field(description="When the status of this condition changed last.")
    observed_generation: int | None = Field(default=None, ge=0, description="The spec that this is about.")


class Verdict(Model):
    """Why a run ended without what was asked for."""

    reason: ShortText | None = Field(default=None, description="One of the documented reasons.")
    message: Text | None = Field(default=None, description="The same for people.")
    stage: ShortText | None = Field(default=None, description="The stage in which it happened.")
    evaluation: ShortText | None = Field(default=None, description="The evaluation that missed the gate.")


class Starts(Model):
    """The Jobs of one role, or of one teacher that is trained, in this run."""

    number: Count | None = Field(default=None, description="Number of the Job; each start has its own.")
    failures: Count | None = Field(default=None, description="Failed starts, disruptions left out.")
    since: Time | None = Field(default=None, description="Since when all of its pods are waited for.")
    ran: bool | None = Field(default=None, description="Whether all of its pods have run.")
    next_start: Time | None = Field(default=None, description="When it is started again.")
    pod: ShortText | None = Field(default=None, description="Names the settings that its pods were made with.")
    disrupted: ShortText | None = Field(default=None, description="A pod of this start that was evicted or lost.")
    checkpoint: Count | None = Field(default=None, description="Round of the newest checkpoint at the last failure.")


class Run(Model):
    """The training that this spec asks for."""

    key: ShortText | None = Field(default=None, description="Names what the weights depend on; a new key is a new run.")
    attempt: Count | None = Field(default=None, description="Runs of this object so far.")
    trainer: Starts | None = Field(default=None, description="Its trainer.")
    teach: dict[ShortText, Starts] | None = Field(
        default=None, max_length=64, description="By name, the teachers that it trains."
    )
    evaluator: Starts | None = Field(default=None, description="Its evaluator.")
    images: dict[ShortText, ShortText] | None = Field(
        default=None, max_length=8, description="Images of the roles since this run began."
    )
    suspended: bool | None = Field(default=None, description="Whether this run was suspended and has not resumed.")
    queued: Time | None = Field(default=None, description="Since when it has been waiting in a queue.")
    evicted: bool | None = Field(default=None, description="Whether it waits because its queue took it out of work.")
    failed: Verdict | None = Field(default=None, description="Why this run is over.")


class Metric(Model):
    name: ShortText = Field(description="Name, and the task it is of.")
    value: ShortText = Field(description="Its value, as text.")


class Progress(Model):
    round: Count | None = Field(default=None, description="Rounds done.")
    total_rounds: Count | None = Field(default=None, description="Rounds of this run.")
    percentage: int | None = Field(default=None, ge=0, le=100, description="Rounds done, in percent.")
    remaining_seconds: Count | None = Field(default=None, description="Seconds until training is done.")
    metrics: list[Metric] | None = Field(default=None, max_length=256, description="Figures of the last round.")
    last_update_time: Time | None = Field(default=None, description="When the trainer said so.")


class CheckpointStatus(Model):
    round: Count | None = Field(default=None, description="Round of the newest checkpoint.")


class TeacherServer(Model):
    name: ShortText = Field(description="Name of the server.")
    ready: bool = Field(description="Whether it answers.")


class TrainedTeacher(Model):
    """A teacher that this spec trains."""

    name: ShortText = Field(description="Name of the teacher.")
    uri: Annotated[str, Field(max_length=720)] = Field(
        description="Where it is, or will be; it names all that the teacher depends on."
    )
    digest: ShortText | None = Field(default=None, description="Digest of its adapter; absent: not trained yet.")
    verdict: Text | None = Field(default=None, description="How it compares with the base.")
    beats_base: bool | None = Field(
        default=None, description="False: it teaches although it is no better than the base."
    )
    round: Count | None = Field(default=None, description="Rounds done.")
    total_rounds: Count | None = Field(default=None, description="Rounds of its training.")
    checkpoint: Count | None = Field(default=None, description="Round of its newest checkpoint.")


class Workers(Model):
    desired: Count | None = Field(default=None, description="Training pods asked for.")
    ready: Count | None = Field(default=None, description="Training pods that run.")
    succeeded: Count | None = Field(default=None, description="Training pods that are done.")
    failed: Count | None = Field(default=None, description="Training pods that failed.")


class Score(Model):
    task: ShortText = Field(description="The task.")
    reward: ShortText = Field(description="One of its rewards.")
    base: float | None = Field(default=None, description="Mean reward of the base.")
    teacher: float | None = Field(default=None, description="Mean reward of the task's teacher.")
    student: float | None = Field(default=None, description="Mean reward of the student.")
    kept: float | None = Field(default=None, description="Share of the teacher's gain over the base.")


class PublishedStudent(Model):
    digest: ShortText = Field(description="Digest of the student's files; spec.endpoint.studentDigest takes it.")
    key: ShortText | None = Field(default=None, description="The run that trained it.")
    uri: Annotated[str, Field(max_length=640)] | None = Field(default=None, description="Where it is.")
    gate_passed: bool | None = Field(default=None, description="Whether it reached spec.evaluation.gate.")
    time: Time | None = Field(default=None, description="When it was evaluated.")
    image: ShortText | None = Field(default=None, description="The image that serves it.")
    served: bool | None = Field(default=None, description="Whether it has had all the traffic.")


class StudentStatus(Model):
    digest: ShortText | None = Field(default=None, description="Digest of the student's files.")
    uri: Annotated[str, Field(max_length=640)] | None = Field(default=None, description="Where it is.")
    key: ShortText | None = Field(default=None, description="The run that trained it.")
    evaluation: ShortText | None = Field(default=None, description="Names what the scores depend on.")
    scores: list[Score] | None = Field(default=None, max_length=256, description="Mean rewards on held-out prompts.")
    gate_passed: bool | None = Field(default=None, description="Whether it reached spec.evaluation.gate.")
    verdict: Text | None = Field(default=None, description="Which rules of the gate it missed.")
    summary: Text | None = Field(default=None, description="The share of each teacher's gain that it kept.")


class Revision(Model):
    """One student behind the endpoint."""

    revision: ShortText | None = Field(default=None, description="Names student and pod template.")
    digest: ShortText | None = Field(default=None, description="Digest of the student.")
    key: ShortText | None = Field(default=None, description="The run that trained it.")
    image: ShortText | None = Field(default=None, description="The image that serves it.")
    settings: Annotated[str, Field(max_length=2**20)] | None = Field(
        default=None, description="What its pods are made of, in spec.endpoint as it was: JSON."
    )
    started: Time | None = Field(default=None, description="When its rollout began.")
    deployed: bool | None = Field(default=None, description="Whether it has had all the traffic.")


class Canary(Revision):
    step: Count | None = Field(default=None, description="Index in spec.endpoint.rollout.steps.")
    step_started: Time | None = Field(default=None, description="When this step began, or its pods were lost.")
    traffic_percent: int | None = Field(default=None, ge=0, le=100, description="Its share of the traffic.")
    since: Time | None = Field(default=None, description="When it reached this step.")
    ready_replicas: Count | None = Field(default=None, description="With a route: its pods that answer.")
    followed_percent: int | None = Field(
        default=None, ge=0, le=100, description="With a route: the share that every gateway gives it by now."
    )
    changed: Time | None = Field(default=None, description="With a route: when its pods or its share changed.")


class Rejected(Model):
    revision: ShortText | None = Field(default=None, description="The revision that was taken back.")
    reason: ShortText | None = Field(default=None, description="One of the documented reasons.")
    message: Text | None = Field(default=None, description="The same for people.")


class EndpointStatus(Model):
    url: ShortText | None = Field(default=None, description="Where the image API answers, inside the cluster.")
    replicas: Count | None = Field(default=None, description="Endpoint pods.")
    ready_replicas: Count | None = Field(default=None, description="Endpoint pods that answer.")
    selector: Text | None = Field(default=None, description="Labels of the endpoint pods, for an autoscaler.")
    stable: Revision | None = Field(default=None, description="What takes the traffic.")
    canary: Canary | None = Field(default=None, description="What is taking it over.")
    rejected: Rejected | None = Field(default=None, description="What failed in service.")
    leaving: dict[ShortText, Time] | None = Field(
        default=None, max_length=16, description="Revisions that have left the route, and when."
    )


class StageTime(Model):
    start_time: Time | None = Field(default=None, description="When the stage began.")
    completion_time: Time | None = Field(default=None, description="When it was done.")


class LastFailure(Model):
    stage: ShortText | None = Field(default=None, description="The stage in which it happened.")
    reason: ShortText | None = Field(default=None, description="One of the documented reasons.")
    message: Text | None = Field(default=None, description="The container's last words.")
    pod: ShortText | None = Field(default=None, description="The pod that failed first.")
    container: ShortText | None = Field(default=None, description="Its container.")
    exit_code: int | None = Field(default=None, ge=-(2**31), le=2**31 - 1, description="How it ended.")
    time: Time | None = Field(default=None, description="When it was seen.")


class Status(Model):
    observed_generation: int | None = Field(default=None, ge=-1, description="The spec this is about; -1: none yet.")
    phase: ShortText | None = Field(default=None, description="One word for people; programs read the conditions.")
    conditions: list[ConditionStatus] | None = Field(
        default=None, max_length=16, description="What is so; every condition is always there."
    )
    start_time: Time | None = Field(default=None, description="When this run began.")
    completion_time: Time | None = Field(default=None, description="When it was ready or had failed.")
    run: Run | None = Field(default=None, description="The training that this spec asks for.")
    begun: bool | None = Field(
        default=None,
        description="Whether a trainer of this object has run: model.uri and student.output.uri stay from then on.",
    )
    restarts: Count | None = Field(default=None, description="Restarts after failures; runPolicy.backoffLimit ends it.")
    disruptions: Count | None = Field(default=None, description="Restarts after evictions, preemptions, lost nodes.")
    progress: Progress | None = Field(
        default=None, description="How far the training is: of all teachers that are trained, then of the student."
    )
    checkpoint: CheckpointStatus | None = Field(default=None, description="Where it would resume.")
    teaching: list[TrainedTeacher] | None = Field(
        default=None, max_length=64, description="The teachers that are trained, in the spec's order."
    )
    teachers: list[TeacherServer] | None = Field(default=None, max_length=1024, description="The teacher servers.")
    teachers_ready: ShortText | None = Field(default=None, description="Teacher servers that answer, of all.")
    workers: Workers | None = Field(default=None, description="The training pods.")
    workers_ready: ShortText | None = Field(default=None, description="Training pods that run, of all.")
    student: StudentStatus | None = Field(default=None, description="The student of this run.")
    students: list[PublishedStudent] | None = Field(
        default=None, max_length=10, description="Students of this object, oldest first."
    )
    endpoint: EndpointStatus | None = Field(default=None, description="What is served.")
    stage_times: dict[ShortText, StageTime] | None = Field(
        default=None, max_length=16, description="When each stage of this run began and was done."
    )
    stopping: Verdict | None = Field(default=None, description="Why pods are being removed before the run fails.")
    last_failure: LastFailure | None = Field(default=None, description="The last failed pod, with its last words.")
