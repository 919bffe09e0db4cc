"""What the official client gets: images, seeds, formats, and the same bytes for the same seed."""

import base64
import hashlib
import io
import json
import re
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image


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


def test_the_same_seed_gives_the_same_bytes_alone_and_among_eight_concurrent_requests(endpoint):
    def ask(number: int) -> str:
        mine = number == 3
        extension = {"seed": 7} if mine else {"seed": number, "steps": 1 + number % 7, "guidance": 1.0 + number % 3}
        prompt = "a red 3" if mine else f"two blue {number}"
        size = "32x32" if mine or number % 2 else "24x40"
        return endpoint.client().images.generate(prompt=prompt, size=size, extra_body=extension).data[0].b64_json

    alone = ask(3)
    for _ in range(3):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(ask, range(8)))[3] == alone
    assert endpoint.metric('opd_endpoint_batch_size_bucket{le="1.0"}') < endpoint.metric(
        "opd_endpoint_batch_size_count"
    )


def test_n_images_come_from_consecutive_seeds_each_reproducible(endpoint):
    client = endpoint.client()
    several = client.images.generate(prompt="a red 3", n=3, extra_body={"seed": 7}).data
    assert [item.seed for item in several] == [7, 8, 9]
    assert len({item.b64_json for item in several}) == 3
    assert client.images.generate(prompt="a red 3", extra_body={"seed": 8}).data[0].b64_json == several[1].b64_json


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


def test_curl_without_a_content_type_is_understood(endpoint):
    """curl -d says it sends a form."""
    request = urllib.request.Request(f"{endpoint.url}/v1/images/generations", b'{"prompt": "a red 3"}')
    with urllib.request.urlopen(request) as response:
        assert request.get_header("Content-type") == "application/x-www-form-urlencoded"
        assert response.headers["X-Request-Id"].startswith("req_")
        assert json.load(response)["data"][0]["revised_prompt"] is None


def test_models_are_listed_and_shown(endpoint):
    client = endpoint.client()
    (model,) = client.models.list().data
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").version == endpoint.service.served.digest


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/v2/models/tiny/ready"])
def test_health_of_kubernetes_and_of_the_open_inference_protocol(endpoint, path):
    with urllib.request.urlopen(endpoint.url + path) as response:
        assert response.status == 200


def test_openapi_describes_the_parameters(endpoint):
    with urllib.request.urlopen(f"{endpoint.url}/openapi.json") as response:
        document = json.load(response)
    post = document["paths"]["/v1/images/generations"]["post"]
    properties = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"prompt", "n", "size", "seed", "steps", "guidance", "negative_prompt", "output_format"} <= properties.keys()


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
