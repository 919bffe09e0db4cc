"""The engine in trouble: no memory, a thread that has ended, a device that hangs or fails; and what is said about it."""

import dataclasses
import logging
import random
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from opd_core.device import is_out_of_memory
from opd_core.exit_codes import ExitCode
from opd_serving.endpoint import images, memory, scheduler, server
from opd_serving.endpoint.engine import Limits
from opd_serving.endpoint.server import make_service

from tests.endpoint.conftest import running, wait_until


class Memory:
    """Stands in for the device's memory: the transformer fails as a GPU does, in any batch of more than `rows` rows of
    32x32 pixels, and now and then for no reason, as on a GPU that is shared."""

    def __init__(self, transformer, rows: float, share: float = 0.0) -> None:
        self.rows, self.share, self.failed, self.original = rows, share, 0, transformer.forward
        self.dice = random.Random(7)
        transformer.forward = self.forward

    def forward(self, *arguments, **options):
        latents = options["hidden_states"]
        if latents[:, 0].numel() > self.rows * 16 * 16 or self.dice.random() < self.share:
            self.failed += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return self.original(*arguments, **options)


def pixels_of_latents(endpoint) -> tuple[int, int]:
    outline = endpoint.service.outline
    return outline.latent_shape(32, 32)[1:]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("CUDA error: out of memory"),  # of the driver: somebody else has the rest of the card
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)  # fmt: skip
def test_memory_that_runs_out_is_known_by_its_errors(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


def test_the_limit_of_a_batch_is_halved_and_comes_back():
    limit = memory.BatchLimit(16)
    limit.too_much(16)
    limit.too_much(8)
    assert limit.pixels == 4
    for _ in range(300):
        limit.fitted()
    assert limit.pixels == 8
    for _ in range(3000):
        limit.fitted()
    assert limit.pixels == 16


def test_a_batch_that_does_not_fit_is_made_in_smaller_ones(settings):
    """Eight requests that each fit alone; it was 500 for all of them."""
    with running(make_service(settings)) as endpoint, ThreadPoolExecutor(8) as pool:
        side = pixels_of_latents(endpoint)[0]
        Memory(endpoint.service.engine.model.transformer, rows=4 * side * side / 256)
        ask = endpoint.client().images.generate
        answers = [pool.submit(ask, prompt="a", extra_body={"seed": seed, "steps": 8}) for seed in range(8)]
        assert [answer.result().data[0].seed for answer in answers] == list(range(8))
        assert (
            endpoint.metric("opd_endpoint_out_of_memory_total") <= 6
        )  # and not at every tick: the limit is remembered
        assert endpoint.metric("opd_endpoint_batch_pixels") < 16 * 32 * 32
        assert endpoint.metric('opd_endpoint_failures_total{stage="step"}') == 0
        assert (endpoint.status("/livez"), endpoint.status("/readyz")) == (200, 200)


def test_one_image_that_does_not_fit_is_the_requests_fault_and_not_repeated(settings):
    """It was a 500, which the client repeats: three failed ticks, and the replica was taken for broken."""
    with running(make_service(settings)) as endpoint:
        side = pixels_of_latents(endpoint)[0]
        small = Memory(endpoint.service.engine.model.transformer, rows=4 * side * side / 256)
        for _ in range(4):
            with pytest.raises(openai.BadRequestError) as refused:
                endpoint.client(max_retries=2).images.generate(prompt="a", size="64x64")
            assert (refused.value.code, refused.value.param) == ("too_large", "size")
            assert "64x64" in refused.value.message
        assert small.failed == 4
        assert (endpoint.status("/livez"), endpoint.status("/readyz")) == (200, 200)
        assert endpoint.client().images.generate(prompt="a").data
        assert endpoint.service.engine.idle


@pytest.mark.parametrize(("component", "method"), [("vae", "decode"), ("text_encoder_3", "forward")])
def test_what_cannot_be_made_smaller_is_done_again_once(settings, component, method):
    with running(make_service(settings)) as endpoint:
        module = getattr(endpoint.service.engine.model.pipeline, component)
        original, left = getattr(module, method), [1]

        def fail(*arguments, **options):
            if left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError("CUDA out of memory")
            return original(*arguments, **options)

        setattr(module, method, fail)
        assert endpoint.client().images.generate(prompt="a new prompt", extra_body={"steps": 1}).data
        left[0] = 2
        with pytest.raises(openai.BadRequestError) as refused:
            endpoint.client().images.generate(prompt="another prompt", extra_body={"steps": 1})
        assert refused.value.code == "too_large"
        assert endpoint.status("/readyz") == 200


def test_memory_that_runs_out_at_random_ticks_costs_nobody_an_image(settings):
    """Batches of several are halved; of one alone it is said, and that it was not this server's last word."""
    service = make_service(dataclasses.replace(settings, limits=Limits(fixed_rows=8)))
    with running(service) as endpoint, ThreadPoolExecutor(6) as pool:
        ask = endpoint.client().images.generate
        plain = [ask(prompt="a", extra_body={"seed": seed, "steps": 4}).data[0].b64_json for seed in range(12)]
        Memory(endpoint.service.engine.model.transformer, rows=1e9, share=0.1)

        def until_done(seed: int) -> str:
            for _ in range(20):
                try:
                    return ask(prompt="a", extra_body={"seed": seed, "steps": 4}).data[0].b64_json
                except openai.BadRequestError as error:
                    assert error.code == "too_large"
            raise AssertionError("never")

        assert list(pool.map(until_done, range(12))) == plain, "a step that failed half way was not made twice"
        assert endpoint.status("/livez") == 200
        assert endpoint.service.engine.idle


def test_a_device_that_fails_on_every_tick_is_not_live(settings):
    with running(make_service(settings)) as endpoint:

        def broken(*arguments, **options):
            raise RuntimeError("CUDA error: device-side assert triggered")

        endpoint.service.engine.model.transformer.forward = broken
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                endpoint.client().images.generate(prompt="a")
        assert endpoint.status("/livez") == 503
        with pytest.raises(openai.InternalServerError) as refused:
            endpoint.client().images.generate(prompt="a")
        assert (refused.value.status_code, refused.value.code) == (503, "failed")


def test_a_defect_that_ends_the_thread_answers_everybody_and_takes_no_more(settings, monkeypatch):
    with running(make_service(settings)) as endpoint, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(endpoint.client().images.generate, prompt="a", extra_body={"steps": 100})
        wait_until(lambda: endpoint.metric("opd_endpoint_active_samples") == 1)
        monkeypatch.setattr(scheduler, "charge", lambda *arguments: 1 / 0)
        with pytest.raises(openai.InternalServerError) as stopped:
            answer.result(30)
        assert (stopped.value.status_code, stopped.value.code) == (503, "stopped")
        wait_until(lambda: endpoint.status("/livez") == 503)
        assert endpoint.status("/readyz") == 503
        with pytest.raises(openai.InternalServerError) as refused:
            endpoint.client().images.generate(prompt="a")
        assert (refused.value.status_code, refused.value.code) == (503, "failed")


def test_a_tick_that_hangs_is_not_live_and_takes_no_more(settings):
    with running(make_service(settings)) as endpoint, ThreadPoolExecutor(1) as pool:
        module, go_on = endpoint.service.engine.model.transformer, threading.Event()
        original = module.forward
        module.forward = lambda *arguments, **options: go_on.wait(60) and original(*arguments, **options)
        endpoint.service.engine.hang_seconds = 0.3
        answer = pool.submit(endpoint.client().images.generate, prompt="a")
        wait_until(lambda: endpoint.status("/livez") == 503)
        assert endpoint.status("/readyz") == 503
        with pytest.raises(openai.InternalServerError) as refused:
            endpoint.client().images.generate(prompt="a")
        assert refused.value.code == "failed"
        go_on.set()
        endpoint.service.engine.hang_seconds = 60
        assert answer.result().data
        assert endpoint.status("/livez") == 200


@pytest.mark.parametrize("how", ["hangs", "ends"])
def test_the_program_ends_with_its_engine(settings, free_port, monkeypatch, how):
    """`opd serve` has no kubelet that restarts it; it stayed up for ever, and its callers hung."""
    service, hold = make_service(settings), threading.Event()
    monkeypatch.setattr(server, "make_service", lambda settings: service)
    codes, failures = [], []

    def play() -> None:
        service.engine.wait_loaded()
        service.engine.hang_seconds = 0.3
        transformer = service.engine.model.transformer
        if how == "hangs":
            transformer.forward = lambda *arguments, **options: hold.wait(60)
        else:
            monkeypatch.setattr(scheduler, "charge", lambda *arguments: 1 / 0)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        try:
            client.images.generate(prompt="a", timeout=60)
        except openai.APIError as error:
            failures.append(error)

    port = free_port()
    other = threading.Thread(target=play)
    other.start()
    try:
        codes.append(server.run(dataclasses.replace(settings, port=port)))
    finally:
        hold.set()
        other.join()
    assert codes == [ExitCode.INTERNAL]
    assert failures


def test_the_request_id_of_a_failure_is_in_the_answer_and_in_the_log_and_no_prompt_is(settings, monkeypatch, caplog):
    """Prompts are private: neither a truncated one's end nor one that fails is logged."""
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with running(make_service(settings)) as endpoint, caplog.at_level(logging.INFO):
        client = endpoint.client()
        secret = "a secret 3 " * 20
        done = client.images.with_raw_response.generate(prompt=secret)
        with monkeypatch.context() as broken:
            broken.setattr(images, "xmp", lambda provenance: 1 / 0)
            with pytest.raises(openai.InternalServerError) as internal:
                client.images.generate(prompt=secret)
        endpoint.service.engine.model.transformer.forward = lambda *arguments, **options: 1 / 0
        with pytest.raises(openai.InternalServerError) as step:
            client.images.generate(prompt=secret)
    assert (internal.value.code, step.value.code) == ("internal_error", "step_failed")
    for answer in (done, internal.value.response, step.value.response):
        request_id = answer.headers["X-Request-Id"]
        (line,) = [r.getMessage() for r in caplog.records if request_id in r.getMessage() and "/v1/" in r.getMessage()]
        assert re.search(
            rf"{request_id} /v1/images/generations (200|500) [0-9.]+ s 127.0.0.1 1 of 32x32, 4 steps", line
        )
    assert any(step.value.response.headers["X-Request-Id"] in r.getMessage() for r in caplog.records if r.exc_info)
    assert "secret" not in caplog.text


def test_failures_and_the_process_are_measured(settings):
    with running(make_service(settings)) as endpoint:
        with pytest.raises(openai.BadRequestError):
            endpoint.client().images.generate(prompt="a", size="33x32")
        endpoint.client().images.generate(prompt="a", extra_body={"steps": 1})
        for code in (200, 400):
            assert endpoint.metric(f'opd_endpoint_request_duration_seconds_count{{code="{code}"}}') == 1
        assert endpoint.metric("process_resident_memory_bytes") > 1e6
        assert endpoint.metric("process_open_fds") > 3
