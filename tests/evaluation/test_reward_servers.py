"""Rewards behind HTTP: real servers as processes, replicas that die, hang or lie, and questions that are none."""

import base64
import io
import json
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from opd_core.api.load import check_spec, dump_spec, load_spec
from opd_core.api.types import RewardServers
from opd_core.errors import OPDError, RefusedError, UnavailableError
from opd_core.ports import free_ports
from opd_core.uris import resolve
from opd_trainer.preflight import data_notes, data_problems
from opd_trainer.rewards import replicas, serve, wire
from opd_trainer.rewards.registry import load_reward, load_rewards
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from PIL import Image
from pydantic import TypeAdapter

from tests.forks import Program

CPU = torch.device("cpu")
STRANGE = "tests.evaluation.strange_rewards"


@contextmanager
def server(tmp_path, *rewards, **env):
    """A server's process and its URL; it is there when its /healthz is."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    options = [*rewards, f"--port={port}", "--device=cpu"]
    program = Program("opd_trainer.rewards.serve", options, tmp_path / f"{port}.log", {"OMP_NUM_THREADS": "1", **env})
    try:
        while program.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/healthz", timeout=5).read()
                break
            except OSError:
                time.sleep(0.05)
        assert program.poll() is None, program.log.read_text()
        yield program, url
    finally:
        program.kill()
        program.wait(10)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    names = [f"{STRANGE}:{name}" for name in ("brightness", "alone", "also_alone", "nan", "broken", "picky", "stuck")]
    with server(tmp_path_factory.mktemp("good"), *names) as (_, url):
        yield url


@contextmanager
def answering(status, content, *, seconds_a_byte=0.0, port=0):
    """A server of somebody else that says this to whatever it is asked; and the list of what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            for i in range(0, len(content), 1 if seconds_a_byte else len(content)):
                time.sleep(seconds_a_byte)
                self.wfile.write(content[i:] if not seconds_a_byte else content[i : i + 1])

        def log_message(self, *_):
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_):
            pass  # who asks has hung up

    http = Quiet(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", asked
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def reward_of(name, *urls, seconds=30):
    return load_reward(name, CPU, RewardServers(reward=name, urls=list(urls), timeout_seconds=seconds))


def images_of(count, size=8):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def score(name, *urls, count=40, seconds=30):
    """What servers say to `count` images; and what is right, of 8 bits a colour."""
    images = images_of(count)
    metadata = [{"more": i} for i in range(count)]
    scores = reward_of(name, *urls, seconds=seconds)(images, [f"prompt {i}" for i in range(count)], metadata)
    return scores, ((images * 255).round() / 255).mean((1, 2, 3)) + torch.arange(count)


# ---------------------------------------------------------------- scores


def test_servers_say_what_the_reward_says_here(good):
    """In the order of the images, however many questions they are asked in; from several threads at once."""
    scores, right = score(f"{STRANGE}:brightness", good)
    torch.testing.assert_close(scores, right)
    found = []
    threads = [threading.Thread(target=lambda: found.append(score(f"{STRANGE}:brightness", good))) for _ in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 3
    assert all(torch.equal(scores, again) for again, _ in found)
    assert len(reward_of(f"{STRANGE}:brightness", good)(images_of(0), [], [])) == 0


def test_a_spec_says_which_rewards_are_served(good, repository):
    content = dump_spec(load_spec(repository / "examples" / "tiny" / "distill.yaml"))
    content["spec"]["teachers"][2]["rewards"] = ["tiny-aesthetic", f"{STRANGE}:brightness"]
    content["spec"]["rewardServers"] = [{"reward": f"{STRANGE}:brightness", "urls": [good]}]
    rewards = load_rewards(check_spec(content).spec, "cpu")["aesthetic"]
    images = images_of(2, size=32)
    assert rewards[f"{STRANGE}:brightness"](images, ["a", "b"], [{}, {"more": 3}])[1] > 3
    assert torch.equal(
        rewards["tiny-aesthetic"](images, ["a"] * 2, [{}] * 2),
        load_reward("tiny-aesthetic", CPU)(images, ["a"] * 2, [{}] * 2),
    )


def test_a_process_computes_one_batch_at_a_time_whatever_is_asked(good):
    found = []
    names = ("alone", "also_alone")
    threads = [
        threading.Thread(target=lambda name=name: found.append(score(f"{STRANGE}:{name}", good))) for name in names
    ]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(found) == 2
    for scores, right in found:
        torch.testing.assert_close(scores, right)


# ---------------------------------------------------------------- replicas that fail


def test_a_replica_that_is_killed_in_the_middle_loses_nothing(good, tmp_path):
    inside = tmp_path / "inside"
    with server(tmp_path, f"{STRANGE}:stuck", STUCK=str(inside)) as (program, url):

        def kill():
            while not inside.exists():
                time.sleep(0.01)
            program.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        scores, right = score(f"{STRANGE}:stuck", url, good, count=100)
        killer.join()
    torch.testing.assert_close(scores, right)


def test_a_replica_that_hangs_is_left_for_another(good, tmp_path):
    """Also one that is never silent for long: its deadline is of the whole answer."""
    with server(tmp_path, f"{STRANGE}:stuck", STUCK=str(tmp_path / "inside")) as (_, url):
        scores, right = score(f"{STRANGE}:stuck", url, good, seconds=1)
    torch.testing.assert_close(scores, right)
    with answering(200, b" " * 1000, seconds_a_byte=0.05) as (url, asked):
        scores, right = score(f"{STRANGE}:brightness", url, good, seconds=1)
    torch.testing.assert_close(scores, right)
    assert asked


def test_a_replica_with_an_error_of_its_own_is_left_for_another(good):
    with answering(500, b'{"error": "out of memory"}') as (url, asked):
        scores, right = score(f"{STRANGE}:brightness", url, good)
    torch.testing.assert_close(scores, right)
    assert 1 <= len(asked) <= 4, "one that fails is not asked over and over"


def test_where_nobody_answers_the_error_names_reward_images_and_server(monkeypatch):
    """It is an error to try again later, never a score."""
    monkeypatch.setattr(replicas, "_FIRST_PAUSE", 0.001)
    ports = free_ports(2)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with pytest.raises(UnavailableError) as error:
        score("geneval", *urls, count=16)
    said = str(error.value)
    assert said.startswith("reward geneval, 16 images, the first of 'prompt 0': ")
    assert "no answer, asked 10 times; the last time http://127.0.0.1:" in said
    assert said.endswith("could not be asked: [Errno 111] Connection refused")


def test_a_server_that_came_back_is_asked_again(monkeypatch):
    """After a rest which grows with every failure."""
    monkeypatch.setattr(replicas, "_FIRST_PAUSE", 0.05)
    with answering(200, b'{"scores": [7]}') as (url, _):
        pass
    port = int(url.rpartition(":")[2])
    ours = replicas.Replicas([url], 5, threading.Event())
    began = time.monotonic()
    with pytest.raises(UnavailableError):
        ours.ask("/score", b"{}", lambda content: 1, "it", stop=threading.Event(), tries=4)
    assert time.monotonic() - began >= 0.05 + 0.1 + 0.2
    with answering(200, b'{"scores": [7]}', port=port):
        assert ours.ask("/score", b"{}", json.loads, "it", stop=threading.Event(), tries=10) == {"scores": [7]}


@pytest.mark.parametrize("before", [True, False], ids=["told before", "told while it waits"])
def test_told_to_hurry_nobody_waits_for_a_server_that_failed(monkeypatch, before):
    monkeypatch.setattr(replicas, "_FIRST_PAUSE", 60.0)
    with answering(200, b"") as (url, _):
        pass
    hurry = threading.Event()
    ours = replicas.Replicas([url], 5, hurry)
    timer = threading.Timer(0.0 if before else 0.5, hurry.set)
    timer.start()
    if before:
        timer.join()
    began = time.monotonic()
    with pytest.raises(UnavailableError, match="asked once" if before else "all servers have failed and rest"):
        ours.ask("/score", b"{}", json.loads, "it", stop=threading.Event(), tries=10)
    assert time.monotonic() - began < 30
    timer.join()


# ---------------------------------------------------------------- answers that are wrong


@pytest.mark.parametrize(
    ("status", "content", "words"),
    [
        (200, b"<html>welcome</html>", "is wrong: no JSON"),
        (200, b"[" * 100_000, "is wrong: no JSON"),
        (200, b'{"score": [1]}', 'is wrong: no "scores" in it'),
        (200, b'{"scores": [1]}', "is wrong: 1 scores for 2 images"),
        (200, b'{"scores": [1, NaN]}', "is wrong: score 1 is nan, which is no finite number"),
        (200, b'{"scores": [1, 1e999]}', "is wrong: score 1 is inf"),
        (200, b'{"scores": [true, 1]}', "is wrong: score 0 is True"),
        (200, b'{"scores": ["1", 1]}', "is wrong: score 0 is '1'"),
        (302, b"", "answered 302"),
        (401, b"who are you?\x1b]0;title\x07", "answered 401: who are you?\ufffd]0;title\ufffd"),
    ],
)
def test_a_wrong_answer_ends_it_with_server_reward_and_images(status, content, words):
    with answering(status, content) as (url, _), pytest.raises(RefusedError) as error:
        reward_of("taste", url)(images_of(2), ["a cat", "a dog"], [{}, {}])
    assert str(error.value).startswith("reward taste, 2 images, the first of 'a cat': ")
    assert url in str(error.value)
    assert words in str(error.value)
    assert str(error.value).isprintable()


def test_an_answer_is_bounded(monkeypatch):
    monkeypatch.setattr(replicas, "_FIRST_PAUSE", 0.001)
    too_long = pytest.raises(UnavailableError, match="its answer has more than 1048576 bytes")
    with answering(200, b" " * (replicas._LARGEST_ANSWER + 1)) as (url, _), too_long:
        reward_of("taste", url)(images_of(1), ["a cat"], [{}])


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("nan", RefusedError, r"answered 422: reward .*:nan answered nan for prompt 'a cat'"),
        ("picky", RefusedError, r"answered 400: reward picky: prompt 'a cat' has no text in quotes"),
        ("absent", RefusedError, r"answered 404: reward .*:absent is not served here; there are .*:brightness"),
        ("broken", UnavailableError, r"asked 10 times; .* answered 500: RuntimeError: CUDA error: .*\ufffd\[31m was"),
    ],
)
def test_what_a_reward_says_reaches_who_asks(name, kind, words, good, monkeypatch):
    monkeypatch.setattr(replicas, "_FIRST_PAUSE", 0.001)
    with pytest.raises(kind, match=words) as error:
        reward_of(f"{STRANGE}:{name}", good)(images_of(1), ["a cat"], [{}])
    assert f"reward {STRANGE}:{name}, the image of 'a cat'" in str(error.value)


def test_the_first_question_that_fails_ends_the_others():
    """And does not wait for the servers that rest."""
    with answering(200, b'{"scores": []}') as (url, asked), pytest.raises(OPDError, match="0 scores for 16 images"):
        score("taste", url, count=16 * 50)
    assert len(asked) < 10


# ---------------------------------------------------------------- UnifiedReward behind OpenAI's API


def completion(said):
    """What a server of OpenAI's API answers, by the types of its own client."""
    choice = Choice(
        index=0, finish_reason="stop", message=ChatCompletionMessage(role="assistant", content=said)
    )  # fmt: skip
    whole = ChatCompletion(id="1", choices=[choice], created=0, model="m", object="chat.completion")
    return whole.model_dump_json().encode()


def test_unified_reward_is_the_final_score_of_a_chat(monkeypatch):
    """Each image by itself, at temperature 0, at most 512 pixels wide; the question is one of OpenAI's."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with answering(200, completion("The cat is there.\nFinal Score: 3.5\n")) as (url, asked):
        scores = reward_of("unified-reward", f"{url}/v1")(images_of(3, size=1024), ["a cat"] * 3, [{}] * 3)
    assert scores.tolist() == [3.5] * 3
    assert len(asked) == 3
    for question in asked:
        TypeAdapter(CompletionCreateParamsNonStreaming).validate_python(question)
        assert question["temperature"] == 0
        picture, text = question["messages"][0]["content"]
        assert "a cat" in text["text"]
        file = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        assert Image.open(io.BytesIO(file)).size == (512, 512)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("It is lovely.", "no \"Final Score:\" of 1 to 5 in it, but 'It is lovely.'"),
        ("Final Score: 5.7", "of 1 to 5 in it"),
        ("Final Score: 0", "of 1 to 5 in it"),
        (None, "of 1 to 5 in it, but None"),
    ],
)
def test_an_answer_without_a_score_is_no_zero(said, words):
    with answering(200, completion(said)) as (url, _), pytest.raises(RefusedError) as error:
        reward_of("unified-reward", url)(images_of(1), ["a cat"], [{}])
    assert f"reward unified-reward, the image of 'a cat': the answer of {url} is wrong: " in str(error.value)
    assert words in str(error.value)
    with answering(200, b'{"choices": []}') as (url, _), pytest.raises(RefusedError, match="no chat completion"):
        reward_of("unified-reward", url)(images_of(1), ["a cat"], [{}])


def test_its_words_and_its_model_can_be_the_authors(monkeypatch):
    monkeypatch.setenv("OPD_UNIFIED_REWARD_PROMPT", "Rate {prompt}!")
    monkeypatch.setenv("OPD_UNIFIED_REWARD_MODEL", "ours")
    with answering(200, completion("Final Score: 4")) as (url, asked):
        assert reward_of("unified-reward", url)(images_of(1), ["{a} cat"], [{}]).tolist() == [4.0]
    assert asked[0]["model"] == "ours"
    assert asked[0]["messages"][0]["content"][1]["text"] == "Rate {a} cat!"


def test_without_servers_it_is_a_problem_of_the_spec(repository, tiny_claims):
    content = dump_spec(load_spec(repository / "examples" / "tiny" / "distill.yaml"))
    content["spec"]["teachers"][0]["rewards"].append("unified-reward")
    (problem,) = data_problems(check_spec(content).spec, tiny_claims, lambda uri: resolve(uri, tiny_claims))
    assert problem.startswith("spec.teachers[0].rewards[1] is unified-reward: reward unified-reward is a model behind")
    assert "spec.rewardServers" in problem


# ---------------------------------------------------------------- before the first round


def told(repository, claims, *servers):
    """Problems and notes of the tiny spec with these reward servers, whose rewards are the second task's."""
    content = dump_spec(load_spec(repository / "examples" / "tiny" / "distill.yaml"))
    content["spec"]["teachers"][1]["rewards"] += [each["reward"] for each in servers]
    content["spec"]["rewardServers"] = list(servers)
    spec = check_spec(content).spec
    problems, notes = (tell(spec, claims, lambda uri: resolve(uri, claims)) for tell in (data_problems, data_notes))
    return problems, [note for note in notes if "rewardServers" in note]


def test_servers_are_asked_before_the_first_round(good, repository, tiny_claims):
    """Who answers wrongly is a problem; who does not answer yet is told, and may come while the student trains."""
    (port,) = free_ports(1)
    there, absent = {"urls": [good]}, {"urls": [good, f"http://127.0.0.1:{port}"]}
    assert told(repository, tiny_claims, {"reward": f"{STRANGE}:brightness", **there}) == ([], [])
    problems, (note,) = told(repository, tiny_claims, {"reward": f"{STRANGE}:brightness", **absent})
    assert problems == []
    assert note.startswith(
        f"spec.rewardServers[0].urls[1] is http://127.0.0.1:{port}: reward {STRANGE}:brightness, the"
    )
    assert "asked once; the last time" in note
    (problem,), _ = told(repository, tiny_claims, {"reward": f"{STRANGE}:nan", **there})
    assert problem.startswith(f"spec.rewardServers[0].urls[0] is {good}: reward {STRANGE}:nan, the image of ")
    assert "answered 422" in problem


# ---------------------------------------------------------------- the server


def ask(url, body, headers=None):
    """Status and words of what is posted to /score."""
    request = urllib.request.Request(f"{url}/score", body, headers or {})
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def picture(width, height, value=0):
    return base64.b64encode(wire.png(torch.full((3, height, width), value / 255))).decode()


def question(*pngs, **changes):
    rows = [{"png": png, "prompt": "a", "metadata": {}, **changes} for png in pngs]
    return json.dumps({"reward": f"{STRANGE}:brightness", "images": rows}).encode()


def test_one_line_of_any_language_asks_it(good):
    assert ask(good, question(picture(4, 4, 255), picture(4, 4, 51))) == (200, {"scores": [1.0, pytest.approx(0.2)]})


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "no JSON"),
        (b"[]", 'it needs "reward"'),
        (b"\x80\x04\x95", "no JSON"),  # a pickle
        (question(), 'and "images", a list of at least one'),
        (question(picture(4, 4), prompt=1), 'images[0] needs "png" and "prompt"'),
        (question(picture(4, 4), metadata=[]), "images[0] needs"),
        (question("????"), "images[0].png: no PNG file in base64"),
        (question(base64.b64encode(b"GIF89a").decode()), "images[0].png: no PNG file"),
        (question(picture(4, 4), picture(4, 8)), "images[1].png has another size than the first"),
        (question(picture(8192, 4097)), "the images have more than 33554432 pixels"),
        (question(*[picture(4096, 4096)] * 3), "images[2].png: the images have more than"),
    ],
)
def test_what_is_no_question_is_refused_with_the_reason(body, words, good):
    status, said = ask(good, body)
    assert status == 400
    assert said.startswith("the question cannot be read: ")
    assert words in said


def test_a_question_is_bounded_in_bytes(good):
    for length in (str(serve.LARGEST + 1), "9" * 1000):
        with socket.create_connection(good.removeprefix("http://").split(":")) as connection:
            connection.sendall(f"POST /score HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
            assert connection.recv(1000).startswith(b"HTTP/1.0 413")
    with socket.create_connection(good.removeprefix("http://").split(":")) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nContent-Length: -1\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.0 411")
    assert ask(good, question(picture(4, 4)))[0] == 200


def test_the_last_answer_is_given_before_it_ends(tmp_path):
    inside = tmp_path / "inside"
    with server(tmp_path, f"{STRANGE}:held", STUCK=str(inside)) as (program, url):
        found = []
        asks = threading.Thread(target=lambda: found.append(score(f"{STRANGE}:held", url, count=2)))
        asks.start()
        while not inside.exists():
            time.sleep(0.01)
        program.send_signal(signal.SIGTERM)
        inside.unlink()
        asks.join()
        assert program.wait(30) == 0
    ((scores, right),) = found
    torch.testing.assert_close(scores, right)


def test_who_has_left_is_not_computed_for(tmp_path):
    """A question whose asker went to another replica would only delay the next one."""
    inside = tmp_path / "inside"
    with server(tmp_path, f"{STRANGE}:held", STUCK=str(inside)) as (program, url):
        body = question(picture(4, 4)).replace(b":brightness", b":held")
        head = f"POST /score HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        first, second = (socket.create_connection(url.removeprefix("http://").split(":")) for _ in range(2))
        first.sendall(head + body)
        while not inside.exists():
            time.sleep(0.01)
        second.sendall(head + body)
        second.close()
        inside.unlink()
        assert first.recv(1000).startswith(b"HTTP/1.0 200")
        first.close()
        while "408" not in program.log.read_text():
            time.sleep(0.01)
        assert not inside.exists()


def test_what_cannot_be_served_is_said_at_the_start(capsys):
    assert serve.main(["no-such-reward", "--device=cpu"]) == 2
    assert "error: there is no reward no-such-reward" in capsys.readouterr().err
