"""What the official client gets: images, seeds, formats, and the same bytes for the same seed."""

import base64
import dataclasses
import hashlib
import io
import json
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import numpy as np
import pytest
from opd_serving.endpoint.engine import Limits
from opd_serving.endpoint.server import make_service
from PIL import Image

from tests.endpoint.conftest import running


def decode(item) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def test_the_client_gets_a_png_of_the_requested_size(endpoint):
    answer = endpoint.client().images.generate(prompt="a red 3", model="tiny", size="48x24")
    image = decode(answer.data[0])
    assert (image.format, image.size, image.mode) == ("PNG", (48, 24), "RGB")
    assert answer.size == "48x24"
    assert answer.output_format == "png"
    assert answer.created > 1_700_000_000


def test_absent_and_null_parameters_take_the_students_defaults(endpoint):
    nulls: dict = dict.fromkeys(("seed", "steps", "guidance", "negative_prompt", "output_compression", "user"))
    nulls["extra_body"] = {"steps": None}
    answer = endpoint.client().images.generate(prompt="a red 3", n=None, size=None, extra_body=nulls)
    assert (answer.size, answer.steps, answer.guidance) == ("32x32", 4, 4.5)
    assert len(answer.data) == 1


@pytest.mark.parametrize("fixed_rows", [0, 8])
def test_the_same_seed_gives_the_promised_image_alone_and_among_eight_concurrent_requests(settings, fixed_rows):
    """With fixed rows the same bytes; else, in company, no channel of a pixel differs by more than one level."""
    service = make_service(dataclasses.replace(settings, limits=Limits(fixed_rows=fixed_rows)))
    with running(service) as endpoint:

        def ask(number: int):
            mine = number == 3
            extension = {"seed": 7} if mine else {"seed": number, "steps": 1 + number % 7, "guidance": 1.0 + number % 3}
            prompt = "a red 3" if mine else f"two blue {number}"
            size = "32x32" if mine or number % 2 else "24x40"
            return endpoint.client().images.generate(prompt=prompt, size=size, extra_body=extension).data[0]

        alone = ask(3)
        assert ask(3).b64_json == alone.b64_json
        for _ in range(3):
            with ThreadPoolExecutor(8) as pool:
                among = list(pool.map(ask, range(8)))[3]
            difference = np.abs(np.asarray(decode(among), int) - np.asarray(decode(alone), int)).max()
            assert difference <= (0 if fixed_rows else 1)
        assert endpoint.metric('opd_endpoint_batch_size_bucket{le="1.0"}') < endpoint.metric(
            "opd_endpoint_batch_size_count"
        )


def test_n_images_come_from_consecutive_seeds_each_reproducible(settings):
    service = make_service(dataclasses.replace(settings, limits=Limits(fixed_rows=8)))
    with running(service) as endpoint:
        client = endpoint.client()
        several = client.images.generate(prompt="a red 3", n=3, extra_body={"seed": 7}).data
        assert [item.seed for item in several] == [7, 8, 9]
        assert len({item.b64_json for item in several}) == 3
        again = client.images.generate(prompt="a red 3", extra_body={"seed": 8}).data[0]
        assert again.b64_json == several[1].b64_json


def test_a_random_seed_is_told_and_gives_the_image_again(endpoint):
    client = endpoint.client()
    first, second = (client.images.generate(prompt="a red 3").data[0] for _ in range(2))
    assert first.seed != second.seed
    again = client.images.generate(prompt="a red 3", extra_body={"seed": first.seed}).data[0]
    assert again.b64_json == first.b64_json


@pytest.mark.parametrize(
    "extension",
    [
        {"steps": 5},
        {"guidance": 2.0},
        {"negative_prompt": "a blue 5"},
        {"extra_body": {"steps": 5}},
        {"num_inference_steps": 5},
        {"guidance_scale": 2.0},
    ],
    ids=lambda extension: json.dumps(extension),
)
def test_each_extension_changes_the_image(endpoint, extension):
    client = endpoint.client()
    plain = client.images.generate(prompt="a red 3", extra_body={"seed": 7}).data[0]
    changed = client.images.generate(prompt="a red 3", extra_body={"seed": 7, **extension}).data[0]
    assert changed.b64_json != plain.b64_json


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_files_say_that_a_model_made_them_and_which(endpoint, form):
    answer = endpoint.client().images.generate(prompt="a secret 3", output_format=form, extra_body={"seed": 7})
    image = decode(answer.data[0])
    assert image.format == form.upper()
    packet = image.info["XML:com.adobe.xmp"] if form == "png" else image.info["xmp"].decode()
    assert "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia" in packet
    assert 'opd:seed="7"' in packet
    assert f'opd:modelDigest="{endpoint.service.served.digest}"' in packet
    assert "secret" not in packet


def test_compression_makes_a_smaller_file(endpoint):
    def size(**options) -> int:
        answer = endpoint.client().images.generate(prompt="a red 3", extra_body={"seed": 7}, **options)
        return len(answer.data[0].b64_json)

    assert size(output_format="jpeg", output_compression=20) < size(output_format="jpeg")
    assert size(output_format="webp", output_compression=20) < size(output_format="webp")


@pytest.mark.parametrize(
    ("parameter", "ignored"),
    [
        ({"moderation": "auto"}, ["moderation"]),
        ({"moderation": "low"}, ["moderation"]),
        ({"style": "vivid"}, ["style"]),
        ({"partial_images": 0}, []),
        ({"quality": "standard"}, []),
        ({"output_compression": 100, "output_format": "png"}, []),
        ({"background": "opaque"}, []),
        ({"stream": False}, []),
        ({"user": "me"}, ["user"]),
        ({"extra_body": {"safety_identifier": "me"}}, ["safety_identifier"]),
        ({"model": ""}, []),
        ({"model": "tiny", "n": 1, "size": "32x32", "response_format": "b64_json"}, []),
    ],
    ids=json.dumps,
)
def test_what_clients_always_send_and_would_change_nothing_is_taken_and_told(endpoint, parameter, ignored):
    """BerriAI/litellm#10760, #12408; open-webui/open-webui#14822, #16571, #23611; danny-avila/LibreChat#7291; LangChain's
    DallEAPIWrapper; an empty model: lordmathis/llamactl#125, vllm-project/vllm#58025."""
    client = endpoint.client()
    plain = client.images.generate(prompt="a red 3", extra_body={"seed": 7, "steps": 2})
    given = {**parameter, "extra_body": {"seed": 7, "steps": 2, **parameter.get("extra_body", {})}}
    answer = client.images.generate(prompt="a red 3", **given)
    assert (answer.data[0].b64_json, answer.ignored) == (plain.data[0].b64_json, ignored)


@pytest.mark.parametrize("guidance", [0, 0.5, 1])
def test_guidance_of_1_and_less_is_off_as_in_diffusers(endpoint, guidance):
    """0 is what many clients send for "off"; it is not an image of no prompt at all."""
    client = endpoint.client()

    def ask(prompt: str, value: float):
        return client.images.generate(prompt=prompt, extra_body={"seed": 7, "guidance_scale": value})

    answer = ask("a red 3", guidance)
    assert answer.guidance == 1
    assert answer.data[0].b64_json == ask("a red 3", 1.0).data[0].b64_json
    assert answer.data[0].b64_json != ask("two blue 5", guidance).data[0].b64_json


def test_a_prompt_that_is_longer_than_the_model_reads_is_told(endpoint):
    """huggingface/diffusers#8786: the end of long prompts goes without a word."""
    client = endpoint.client()
    assert client.images.generate(prompt="a red 3").truncated is False
    assert client.images.generate(prompt="a red 3 " * 20).truncated is True
    assert client.images.generate(prompt="a red 3", extra_body={"negative_prompt": "b " * 50}).truncated is True


def test_the_answer_says_what_was_made(endpoint):
    """vllm-project/vllm-omni#3092, #2082; a size is honoured: mudler/LocalAI#2430, open-webui/open-webui#16726."""
    answer = endpoint.client().images.generate(prompt="a", n=2, size="48x24", output_format="jpeg")
    assert (answer.size, answer.output_format, answer.background, answer.quality) == ("48x24", "jpeg", "opaque", "auto")
    assert [decode(item).size for item in answer.data] == [(48, 24)] * 2
    assert answer.data[0].revised_prompt is None


def test_models_are_listed_and_shown(endpoint):
    client = endpoint.client()
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").version == endpoint.service.served.digest


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/v1/models", "/", "/openapi.json", "/metrics"])
def test_get_and_head_of_what_uptime_monitors_ask(endpoint, path):
    """mozilla-it/ctms-api#165, patroni/patroni#2021: HEAD was 405."""
    for method in ("GET", "HEAD"):
        with urllib.request.urlopen(urllib.request.Request(endpoint.url + path, method=method)) as response:
            body = response.read()
            assert response.status == 200
        assert bool(body) == (method == "GET")


def test_the_open_inference_protocol(endpoint):
    """Its client takes an error for a string: tritonclient raised a TypeError over OpenAI's object."""
    assert endpoint.json("/v2")["name"] == "diffusion-opd"
    assert endpoint.json("/v2/models/tiny") | {"platform": ""} == {
        "name": "tiny", "versions": ["1"], "platform": "", "inputs": [], "outputs": [],
    }  # fmt: skip
    for path in ("health/live", "health/ready", "models/tiny/ready", "models/tiny/versions/1/ready"):
        assert endpoint.status(f"/v2/{path}") == 200
    for path in ("models/other", "models/other/ready", "models/tiny/versions/2/ready", "nothing"):
        with pytest.raises(urllib.error.HTTPError) as caught:
            endpoint.json(f"/v2/{path}")
        with caught.value as response:
            assert response.status == 404
            assert isinstance(json.load(response)["error"], str)


@pytest.mark.parametrize(
    ("method", "path", "asked", "body"),
    [
        ("GET", "/v1/models", "/v1/models", None),
        ("GET", "/v1/models/{name}", "/v1/models/tiny", None),
        ("GET", "/v1/models/{name}", "/v1/models/other", None),
        ("GET", "/readyz", "/readyz", None),
        ("GET", "/livez", "/livez", None),
        ("GET", "/v2/models/{name}", "/v2/models/other", None),
        ("GET", "/v2/models/{name}/ready", "/v2/models/other/ready", None),
        ("GET", "/v2", "/v2", None),
        *(
            ("POST", "/v1/images/generations", "/v1/images/generations", body)
            for body in (
                {"prompt": "a", "steps": 1, "seed": 2},
                {"prompt": "a", "num_inference_steps": 1, "guidance_scale": 2, "extra_body": {"seed": 1}},
                {"prompt": "a", "user": "x", "n": 2, "steps": 1, "output_format": "webp", "output_compression": 3},
                {"prompt": "a", "size": "33x32"},
                {"prompt": "a", "model": "other"},
                {"prompt": "a" * 2**20},
                {},
            )
        ),
    ],
)
def test_openapi_describes_every_answer(endpoint, method, path, asked, body):
    """Status and body of each are in the document, and so is a body that is taken."""
    document = endpoint.json("/openapi.json")
    operation = document["paths"][path][method.lower()]
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(endpoint.url + asked, content, {"Content-Type": "application/json"}, method=method)
    try:
        response = urllib.request.urlopen(request)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        described = operation["responses"][str(response.status)]["content"]["application/json"]["schema"]
        jsonschema.validate(json.load(response), {**described, "components": document["components"]})
    if body is not None and response.status == 200:
        jsonschema.validate(body, operation["requestBody"]["content"]["application/json"]["schema"])


def test_openapi_tells_of_no_error_that_never_comes(endpoint):
    document = endpoint.json("/openapi.json")
    responses = document["paths"]["/v1/images/generations"]["post"]["responses"]
    expected = {200, 400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504}
    assert {int(status) for status in responses} == expected
    for path in document["paths"].values():
        assert not any("422" in operation["responses"] for operation in path.values())
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert set(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == {"text/plain"}


def test_the_playground_loads_nothing_and_runs_nothing_but_its_own(endpoint):
    """Keys are typed there: no other host, no script but the one in the file, in no other page's frame."""
    with urllib.request.urlopen(endpoint.url) as response:
        page, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert "v1/images/generations" in page
    assert "http" not in page.replace("http-equiv", "")
    script = re.search(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert {"default-src 'none'", "frame-ancestors 'none'", "connect-src 'self'"} <= set(policy.split("; "))
    assert "unsafe" not in policy


def test_there_is_no_page_that_loads_scripts_from_elsewhere(endpoint):
    assert (endpoint.status("/docs"), endpoint.status("/redoc")) == (404, 404)
