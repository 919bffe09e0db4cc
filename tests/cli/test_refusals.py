"""What goes wrong between `opd` and a cluster is one message that says what to do."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import kubernetes
import pytest
import yaml
from devcluster.control_plane import ControlPlane
from devcluster.control_plane import control_plane as run_control_plane
from opd_cli.cluster.connection import Connection
from opd_cli.cluster.refusals import refusal
from opd_core.errors import UnavailableError
from opd_core.exit_codes import ExitCode

from tests.cli.conftest import Done
from tests.operator.live import Api

Opd = Callable[..., Done]


@pytest.fixture
def kubeconfig(api: Api, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the administrator's with other settings."""

    def write(server: str = "", token: str = "", namespace: str = "") -> Path:
        content = yaml.safe_load(api.cluster.kubeconfig.read_text())
        if server:
            content["clusters"][0]["cluster"]["server"] = server
        if token:
            content["users"][0]["user"] = {"token": token}
        if namespace:
            content["contexts"][0]["context"]["namespace"] = namespace
        file = tmp_path / "kubeconfig"
        file.write_text(yaml.safe_dump(content))
        return file

    return write


def test_no_cluster_answers(opd: Opd, kubeconfig: Callable[..., Path], free_port: Callable[[], int]) -> None:
    address = f"https://127.0.0.1:{free_port()}"
    done = opd("status", "--kubeconfig", kubeconfig(server=address))
    assert done.code == ExitCode.UNAVAILABLE
    assert done.err.startswith(f"error: {address} does not answer as an API server does: ")
    assert done.err.endswith("check the address in the kubeconfig, and whether the cluster runs\n")
    assert done.err.count("\n") == 1, "the client's own warnings are not for users"


def test_something_else_answers(opd: Opd, api: Api, kubeconfig: Callable[..., Path]) -> None:
    done = opd("status", "--kubeconfig", kubeconfig(server=api.http.base_url.copy_with(scheme="http").__str__()))
    assert done.code in (ExitCode.INVALID, ExitCode.UNAVAILABLE)
    assert "Traceback" not in done.err


def test_no_kubeconfig(opd: Opd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    done = opd("status")
    assert done.code == ExitCode.INVALID
    assert f"error: {tmp_path / 'none'}: no such file, and this is no pod of a cluster" in done.err
    assert "--kubeconfig FILE" in done.err
    assert "no such file" in opd("status", "--kubeconfig", tmp_path / "none").err


@pytest.mark.parametrize("text", ["", "a: [", "just text", "[1]", "{contexts: []}", "{contexts: [{name: a}]}"])
def test_a_file_that_is_no_kubeconfig(opd: Opd, tmp_path: Path, text: str) -> None:
    (tmp_path / "config").write_text(text)
    done = opd("status", "--kubeconfig", tmp_path / "config")
    assert done.code == ExitCode.INVALID
    assert done.err.startswith("error: ")


def test_an_unknown_context_is_told_with_those_that_are_there(opd: Opd) -> None:
    done = opd("status", "--context", "production")
    assert (done.code, done.err) == (2, "error: --context production: the kubeconfig has devcluster\n")


def test_a_kubeconfig_may_leave_the_context_to_the_command(opd: Opd, api: Api, tmp_path: Path) -> None:
    content = yaml.safe_load(api.cluster.kubeconfig.read_text())
    del content["current-context"]
    (tmp_path / "config").write_text(yaml.safe_dump(content))
    where = ("--kubeconfig", tmp_path / "config")
    assert opd("status", *where).code == ExitCode.INVALID
    assert opd("status", *where, "--context", "devcluster").code == ExitCode.OK


def test_the_context_has_a_namespace_of_its_own(opd: Opd, api: Api, kubeconfig: Callable[..., Path]) -> None:
    api.submit()
    file = kubeconfig(namespace=api.namespace)
    done = opd("status", "tiny", "--kubeconfig", file, namespace="")
    assert done.code == 0
    assert f"opd status tiny -w --kubeconfig={file}" in done.out, "commands to copy lead to the same place"


def test_a_name_that_is_not_there_is_told_with_what_is_near(opd: Opd, api: Api) -> None:
    api.submit("tiny-three-tasks")
    for command in (["status"], ["wait", "--for=Ready"], ["suspend"], ["delete"], ["events"], ["logs"]):
        done = opd(*command, "tiny-tree-task")
        assert done.code == ExitCode.INVALID
        assert "no distillation tiny-tree-task in namespace" in done.err
        assert "did you mean tiny-three-tasks?" in done.err
    assert "`opd status -A` lists" in opd("status", "tiny", namespace="elsewhere").err


def test_what_is_not_allowed_is_told_with_who_may_allow_it(opd: Opd, api: Api, kubeconfig: Callable[..., Path]) -> None:
    def kubectl(*arguments: str) -> str:
        return api.cluster.kubectl("-n", api.namespace, *arguments)

    kubectl("create", "serviceaccount", "weak")
    file = kubeconfig(token=kubectl("create", "token", "weak").strip())
    done = opd("suspend", "tiny", "--kubeconfig", file)
    user = f"system:serviceaccount:{api.namespace}:weak"
    assert done.code == ExitCode.INVALID
    assert done.err == (
        f"error: {user} may not patch opddistillations.opd.dev in namespace {api.namespace}; an administrator allows it "
        f"with: kubectl create rolebinding opd-edit --namespace={api.namespace} --clusterrole=edit --user={user}\n"
    )
    done = opd("status", "-A", "--kubeconfig", file, namespace="")
    assert f"kubectl create clusterrolebinding opd-view --clusterrole=view --user={user}" in done.err
    done = opd("status", "--kubeconfig", kubeconfig(token="expired"))
    assert "does not accept these credentials; log in again" in done.err


@pytest.fixture(scope="module")
def bare() -> Iterator[ControlPlane]:
    """A cluster in which nothing was installed."""
    with run_control_plane() as running:
        yield running


def test_a_cluster_without_the_type_is_told_how_to_get_it(opd: Opd, bare: ControlPlane, example: Path) -> None:
    for command in (["status"], ["submit", example], ["wait", "tiny", "--for=Ready"]):
        done = opd(*command, "--kubeconfig", bare.kubeconfig, namespace="default")
        assert done.code == ExitCode.INVALID
        assert "has no type OPDDistillation (opd.dev/v1alpha1); install the operator: helm install" in done.err


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_in_trouble_may_be_asked_again(status: int) -> None:
    body = json.dumps({"kind": "Status", "message": "etcdserver: request timed out", "code": status})
    error = refusal(status, body, "https://host")
    assert isinstance(error, UnavailableError)
    assert str(error) == "https://host: etcdserver: request timed out; try again"


@pytest.mark.parametrize(("busy", "asked"), [(2, 3), (99, 5)])
def test_a_server_that_says_when_to_ask_again_is_asked_again_with_an_end(busy: int, asked: int) -> None:
    seen = []

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_response(429 if len(seen) <= busy else 200)
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(b'{"message": "storage is (re)initializing"}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        settings = kubernetes.client.Configuration(host=f"http://127.0.0.1:{server.server_port}")
        settings.retries = 0
        connection = Connection(kubernetes.client.ApiClient(settings), "default")
        if busy < asked:
            assert connection.request("GET", "/api")["message"]
        else:
            with pytest.raises(UnavailableError, match=r"storage is \(re\)initializing; try again"):
                connection.request("GET", "/api")
        server.shutdown()
    assert len(seen) == asked


def test_what_no_rule_knows_is_passed_on() -> None:
    assert str(refusal(403, json.dumps({"message": "exceeded quota: gpus"}), "h")) == "exceeded quota: gpus"
    assert str(refusal(418, "", "h")) == "HTTP status 418"


def test_a_missing_client_is_named_with_its_extra() -> None:
    source = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'kubernetes': raise ModuleNotFoundError(name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from opd_cli.main import main\nsys.argv = ['opd', 'status']\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.INVALID
    assert done.stderr == "error: kubernetes is missing; in the checkout: pip install '.[cluster]'\n"
