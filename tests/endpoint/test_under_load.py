"""A full queue, clients that leave, requests that take too long, and a model that fails on one request."""

import dataclasses
import http.client
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import openai
import pytest
from opd_serving.endpoint import images
from opd_serving.endpoint.engine import Limits
from opd_serving.endpoint.server import make_service

from tests.endpoint.conftest import running, wait_until

LONG = {"steps": 100, "guidance": 4.5}
HEAD = (
    "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n"
    "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n"
)


@pytest.fixture
def small(settings):
    """An endpoint that takes three images at once, and the work of as many long ones."""
    with running(make_service(dataclasses.replace(settings, steps=100, limits=Limits(2, 1)))) as started:
        yield started


def raw_request(url: str, body: dict) -> socket.socket:
    """A request whose answer is not read."""
    content = json.dumps(body).encode()
    connection = socket.create_connection((urlsplit(url).hostname, urlsplit(url).port))
    connection.sendall(HEAD.format(len(content)).encode() + content)
    return connection


def test_while_the_model_loads_the_server_is_live_not_ready_and_says_when_to_come_back(settings):
    ready = make_service(settings)
    load, may_load = ready.engine._load, threading.Event()
    ready.engine._load = lambda: may_load.wait() and load()
    with running(ready, loaded=False) as endpoint:
        assert (endpoint.status("/livez"), endpoint.status("/readyz"), endpoint.status("/v2/health/ready")) == (
            200,
            503,
            503,
        )
        with pytest.raises(openai.InternalServerError) as early:
            endpoint.client().images.generate(prompt="a")
        assert (early.value.status_code, early.value.code) == (503, "loading")
        assert int(early.value.response.headers["Retry-After"]) > 0
        may_load.set()
        ready.engine.wait_loaded()
        assert endpoint.status("/readyz") == 200
        assert endpoint.client().images.generate(prompt="a").data


def test_a_full_queue_answers_429_with_retry_after_and_takes_requests_again(small):
    client = small.client()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(client.images.generate, prompt="a", n=3, extra_body={"steps": 50})
        wait_until(lambda: not small.service.engine.idle)
        with pytest.raises(openai.RateLimitError) as full:
            client.images.generate(prompt="b")
        assert 1 <= int(full.value.response.headers["Retry-After"]) <= 60
        assert (full.value.code, full.value.type) == ("queue_full", "rate_limit_error")
        assert small.metric('opd_endpoint_rejected_total{reason="queue_full"}') == 1
        # The client's own retries, which follow Retry-After, get through.
        assert client.with_options(max_retries=8).images.generate(prompt="b", extra_body={"steps": 4}).data
        assert len(accepted.result().data) == 3
    assert small.service.engine.idle
    assert small.metric("opd_endpoint_backlog_pixel_steps") == 0


def test_more_images_than_the_server_ever_takes_are_refused_for_good(small):
    with pytest.raises(openai.BadRequestError) as refused:
        small.client().images.generate(prompt="a", n=4)
    assert (refused.value.param, refused.value.code) == ("n", "too_large")


def test_a_client_that_leaves_frees_its_place(small):
    connection = raw_request(small.url, {"prompt": "a", "n": 3, **LONG})
    wait_until(lambda: small.metric("opd_endpoint_active_samples") > 0)
    connection.close()
    wait_until(lambda: small.service.engine.idle)
    assert small.metric('opd_endpoint_cancelled_total{reason="disconnect"}') == 1
    assert small.metric("opd_endpoint_images_total") == 0
    assert small.metric('opd_endpoint_requests_total{code="499",model="tiny"}') == 1
    assert small.client().images.generate(prompt="a", extra_body={"steps": 4}).data


def test_a_client_that_leaves_the_queue_costs_no_step(small):
    first = raw_request(small.url, {"prompt": "a", "n": 2, **LONG})
    wait_until(lambda: small.metric("opd_endpoint_active_samples") == 2)
    second = raw_request(small.url, {"prompt": "b", **LONG})
    wait_until(lambda: small.metric("opd_endpoint_queue_depth") == 1)
    second.close()
    wait_until(lambda: small.metric('opd_endpoint_cancelled_total{reason="disconnect"}') == 1)
    wait_until(lambda: small.metric("opd_endpoint_queue_depth") == 0)
    assert small.metric("opd_endpoint_active_samples") == 2
    first.close()


@pytest.mark.parametrize(("most", "status"), [(600.0, 408), (1.0, 504)], ids=["the client's limit", "the server's"])
def test_a_request_that_takes_too_long_is_given_up_and_is_no_failure_of_the_student(settings, most, status):
    """Else any client rolls back every canary: the operator reads failures and images."""
    service = make_service(dataclasses.replace(settings, steps=100, limits=Limits(2, 18), max_request_seconds=most))
    with running(service) as endpoint, ThreadPoolExecutor(1) as pool:
        others = pool.submit(endpoint.client().images.generate, prompt="b", n=2, extra_body=LONG)
        wait_until(lambda: not endpoint.service.engine.idle)
        connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc)
        body = json.dumps({"prompt": "a", "n": 10, **LONG})
        headers = {"X-Request-Timeout": "1", "Content-Type": "application/json"}
        connection.request("POST", "/v1/images/generations", body, headers)
        with connection.getresponse() as response:
            assert (response.status, response.headers["x-should-retry"]) == (status, "false")
            assert json.load(response)["error"]["code"] == "timeout"
        connection.close()
        others.cancel() or others.exception()
        wait_until(lambda: endpoint.service.engine.idle)
        assert endpoint.metric('opd_endpoint_cancelled_total{reason="timeout"}') >= 1
        for stage in ("encode", "step", "decode", "internal"):
            assert endpoint.metric(f'opd_endpoint_failures_total{{stage="{stage}"}}') == 0


def test_a_small_image_does_not_wait_for_a_large_one(settings):
    """Groups take turns: four steps of 32x32 are done long before a hundred of 64x64."""
    with running(make_service(dataclasses.replace(settings, steps=100, limits=Limits(2, 30)))) as endpoint:
        large = raw_request(endpoint.url, {"prompt": "a", "n": 2, "size": "64x64", **LONG})
        wait_until(lambda: endpoint.metric("opd_endpoint_active_samples") > 0)
        assert endpoint.client().images.generate(prompt="b", size="32x32", extra_body={"steps": 4}).data
        assert endpoint.metric("opd_endpoint_images_total") == 1
        large.close()


@pytest.mark.parametrize(
    ("stage", "component", "method"),
    [("decode", "vae", "decode"), ("step", "transformer", "forward"), ("encode", "text_encoder_3", "forward")],
)
def test_a_failing_part_fails_its_request_and_nothing_else(settings, stage, component, method):
    """The fault is injected into the model itself, for one request; another one is in flight meanwhile."""
    with running(make_service(settings)) as endpoint:
        client, module = endpoint.client(), getattr(endpoint.service.engine.model.pipeline, component)
        original = getattr(module, method)
        survivor_size, victim_size = "64x64", "16x16"

        def fail_once(*arguments, **options):
            tensor = options.get("hidden_states", arguments[0] if arguments else None)
            if stage == "encode" or tensor.shape[-1] == 4:  # the victim's latents
                setattr(module, method, original)
                raise RuntimeError("internal detail: an illegal memory access at 0xdeadbeef")
            return original(*arguments, **options)

        with ThreadPoolExecutor(1) as pool:
            survivor = pool.submit(client.images.generate, prompt="a", size=survivor_size, extra_body={"steps": 25})
            wait_until(lambda: endpoint.metric("opd_endpoint_active_samples") == 1)
            setattr(module, method, fail_once)
            with pytest.raises(openai.InternalServerError) as failed:
                client.images.generate(prompt="a victim", size=victim_size)
            assert failed.value.code == f"{stage}_failed"
            assert "0xdeadbeef" not in failed.value.response.text
            assert survivor.result().data
        assert endpoint.metric(f'opd_endpoint_failures_total{{stage="{stage}"}}') == 1
        assert endpoint.service.engine.alive
        assert client.images.generate(prompt="a victim", size=victim_size).data
        assert endpoint.service.engine.idle


def test_a_model_that_answers_nan_is_an_error_and_no_black_image(settings):
    with running(make_service(settings)) as endpoint:
        parameter = endpoint.service.engine.model.transformer.proj_out.weight
        kept = parameter.clone()
        parameter.fill_(float("nan"))
        with pytest.raises(openai.InternalServerError) as failed:
            endpoint.client().images.generate(prompt="a")
        assert failed.value.code == "decode_failed"
        parameter.copy_(kept)
        assert endpoint.client().images.generate(prompt="a").data


def test_a_defect_of_the_server_shows_the_client_no_stack_trace(settings, monkeypatch):
    with running(make_service(settings)) as endpoint:
        monkeypatch.setattr(images, "xmp", lambda provenance: 1 / 0)
        with pytest.raises(openai.InternalServerError) as failed:
            endpoint.client().images.generate(prompt="a")
        assert failed.value.code == "internal_error"
        assert endpoint.metric('opd_endpoint_failures_total{stage="internal"}') == 1
        assert "ZeroDivisionError" not in failed.value.response.text
        monkeypatch.undo()
        assert endpoint.client().images.generate(prompt="a").data
