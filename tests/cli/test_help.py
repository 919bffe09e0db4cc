"""What every command in a cluster has in common."""

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from opd_cli.cluster import Distillations
from opd_cli.main import app
from typer.main import get_command

from tests.cli.conftest import Done, say
from tests.cli.test_edit import FIRST, students
from tests.operator.live import Api

COMMANDS = [
    "submit", "status", "logs", "events", "wait", "suspend", "resume", "promote", "rollback", "delete", "get-student",
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_and_says_which_cluster(command: str) -> None:
    found = get_command(app).commands[command]  # type: ignore[attr-defined]
    assert re.search(rf"Example: opd {command} ", found.help or "")
    options = {option for parameter in found.params for option in parameter.opts}
    assert {"--namespace", "-n", "--kubeconfig", "--context"} <= options
    assert all(parameter.help for parameter in found.params)


def test_the_client_is_loaded_only_where_it_is_needed() -> None:
    source = "import sys, opd_cli.main, opd_cli.cluster; assert not {'kubernetes', 'torch'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", source], check=False).returncode == 0


def test_the_client_needs_its_own_extra_alone() -> None:
    source = (
        "import sys\n"
        "others = 'aiohttp fastapi fsspec huggingface_hub httpx jinja2 kopf numpy PIL prometheus_client safetensors torch'\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in others.split(): raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import opd_cli.main, opd_cli.cluster.commands, kubernetes.client, kubernetes.config, kubernetes.stream.ws_client"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def complete(api: Api, line: str, **environment: str) -> list[str]:
    """What bash is given after `line`."""
    words = line.split(" ")
    env = {
        **os.environ, "KUBECONFIG": str(api.cluster.kubeconfig), "_OPD_COMPLETE": "complete_bash",
        "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1), **environment,
    }  # fmt: skip
    program = "from opd_cli.main import app; app(prog_name='opd')"
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert not done.stderr, done.stderr
    return done.stdout.split()


def test_names_and_digests_are_completed_from_the_cluster(api: Api) -> None:
    api.submit("tiny-three-tasks")
    api.submit("tiny-one-task")
    api.submit("sd35")
    say(api, "sd35", students=students(FIRST))
    where = f"-n {api.namespace}"
    assert complete(api, f"opd status {where} tiny") == ["tiny-one-task", "tiny-three-tasks"]
    assert complete(api, f"opd logs {where} sd") == ["sd35"]
    assert complete(api, f"opd logs {where} sd35 tra") == ["trainer"]
    assert complete(api, f"opd promote {where} sd35 ") == ["latest", FIRST]


def test_completion_is_silent_where_no_cluster_answers(api: Api) -> None:
    assert complete(api, "opd status ti", KUBECONFIG="/nowhere") == []


def test_a_later_operator_may_say_more_than_this_client_knows(cluster: Distillations, opd: Callable[..., Done]) -> None:
    """An API server prunes what its type does not know, so a later one is played here."""
    from opd_cli.cluster import Distillation

    newer = Distillation({
        "metadata": {"name": "tiny", "namespace": "n", "generation": 1},
        "status": {"phase": "Ready", "new": 1, "student": {"digest": "d", "new": {}}, "conditions": [
            {"type": "New", "status": "True", "reason": "Newer", "lastTransitionTime": "t", "observedGeneration": 1}]},
    })  # fmt: skip
    assert newer.status.student
    assert newer.status.student.digest == "d"
