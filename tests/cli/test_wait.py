"""`opd wait`: as long as it can still come true, and no longer."""

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from opd_cli.cluster import Distillations, NotFoundError
from opd_core.errors import GateError, UnavailableError
from opd_core.exit_codes import ExitCode

from tests.cli.conftest import Done, say
from tests.cli.test_status import READY, TRAINING, failed, watchers
from tests.operator.live import Api

Opd = Callable[..., Done]


def during(work: Callable[[], Any], then: Callable[[], Any]) -> Any:
    """The result of `work`, or what it raised, with `then` done while it is at it."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    then()
    thread.join(30)
    assert result, "it still waits"
    return result[0]


def test_a_condition_is_told_with_its_reason(opd: Opd, api: Api) -> None:
    api.submit()
    say(api, **READY)
    done = opd("wait", "tiny", "--for=evaluated")
    assert (done.code, done.out) == (0, "opd/tiny is Evaluated (Completed: ocr 0.95)\n")


def test_it_waits_for_the_newest_spec(cluster: Distillations, api: Api) -> None:
    api.submit()
    say(api, **READY)
    api.edit(training={"rounds": 900})

    def judge() -> None:
        watchers(api)
        say(api, **READY)

    began = api.get()["metadata"]["generation"]
    found = during(lambda: cluster.wait("tiny", "Ready", timeout=30), judge)
    assert found.status.observed_generation == began


def test_a_failure_ends_it_at_once_with_its_reason(cluster: Distillations, opd: Opd, api: Api) -> None:
    api.submit()

    def fail() -> None:
        watchers(api)
        say(api, **failed("GateMissed", "Evaluated"))

    error = during(lambda: cluster.wait("tiny", "Deployed", timeout=None), fail)
    assert isinstance(error, GateError)
    assert str(error) == "tiny failed: GateMissed: what went wrong"
    assert opd("wait", "tiny", "--for=Failed").code == ExitCode.OK
    assert opd("wait", "tiny", "--for=Accepted").code == ExitCode.OK, "what is True is True, failed or not"


def test_what_the_spec_turns_off_never_comes(opd: Opd, api: Api) -> None:
    api.submit(endpoint__enabled=False)
    say(api, conditions={"Deployed": ("False", "Disabled", "spec.endpoint.enabled is false")})
    done = opd("wait", "tiny", "--for=Deployed")
    assert (done.code, done.err) == (2, "error: tiny will never be Deployed: spec.endpoint.enabled is false\n")


def test_time_is_up(opd: Opd, api: Api) -> None:
    api.submit()
    say(api, **TRAINING)
    began = time.monotonic()
    done = opd("wait", "tiny", "--for=Trained", "--timeout=1s")
    assert time.monotonic() - began < 10
    assert done.code == ExitCode.UNAVAILABLE
    assert done.err == "error: tiny is not Trained after 1 s (Running: 500 rounds)\n"


@pytest.mark.parametrize("duration", ["5x", "soon", "1h 30m", "-1s", ""])
def test_a_duration_has_a_unit(opd: Opd, duration: str) -> None:
    done = opd("wait", "tiny", "--for=Ready", f"--timeout={duration}")
    assert done.code == ExitCode.INVALID
    assert "write e.g. 90s, 10m, 24h or 1h30m" in done.err.replace("\n", " ").replace("│", "").replace("  ", " ")


def test_a_deleted_object_is_not_waited_for(cluster: Distillations, api: Api) -> None:
    api.submit()

    def remove() -> None:
        watchers(api)
        api.delete("opddistillations", "tiny")

    error = during(lambda: cluster.wait("tiny", "Ready", timeout=30), remove)
    assert isinstance(error, NotFoundError)
    assert "was deleted" in str(error)


def test_submit_and_wait_in_one(opd: Opd, api: Api, example: Any) -> None:
    def judge() -> None:
        watchers(api)
        say(api, "tiny-three-tasks", **READY)

    done = during(lambda: opd("submit", example, "--wait=Deployed", "--timeout=30s"), judge)
    assert done.code == 0
    assert "created" in done.out

    # The same again, as a pipeline does that is run twice, is answered at once.
    done = opd("submit", example, "--wait=Deployed", "--timeout=5s")
    assert (done.code, done.out.split(" in ")[0]) == (0, "opd/tiny-three-tasks unchanged")
    say(api, "tiny-three-tasks", **failed("GateMissed", "Evaluated"))
    for again in (("submit", example), ("submit", example, "--wait=Deployed", "--timeout=5s")):
        done = opd(*again)
        assert done.code == (ExitCode.GATE if "--wait=Deployed" in again else 0)
        assert "--wait=Deployed" in again or "it has failed (GateMissed: what went wrong)" in done.out
    assert "tiny-three-tasks failed: GateMissed" in done.err


def test_an_api_server_that_restarts_interrupts_nothing(cluster: Distillations, api: Api) -> None:
    api.submit()

    def restart() -> None:
        watchers(api)
        api.cluster.daemons.stop("apiserver")
        time.sleep(1.5)
        api.cluster.daemons.start("apiserver")
        again(lambda: say(api, **READY))

    assert during(lambda: cluster.wait("tiny", "Ready", timeout=60), restart).name == "tiny"


def again(write: Callable[[], None]) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            return write()
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def test_an_api_server_that_does_not_answer_counts_as_time(
    cluster: Distillations, free_port: Callable[[], int]
) -> None:
    cluster.connection.api.configuration.host = f"https://127.0.0.1:{free_port()}"
    with pytest.raises(UnavailableError, match="does not answer as an API server does"):
        cluster.wait("tiny", "Ready", timeout=2)
