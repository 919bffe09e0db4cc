"""Every refusal names its parameter, has OpenAI's shape and becomes the right error class of the client."""

import json
import urllib.error
import urllib.request

import openai
import pytest

REFUSALS = {
    "prompt missing": ({"prompt": None}, "prompt", "missing"),
    "prompt empty": ({"prompt": ""}, "prompt", "at least 1 character"),
    "prompt blank": ({"prompt": " \n "}, "prompt", "blank"),
    "prompt no unicode": ({"prompt": "\ud800"}, "prompt", "unicode"),
    "prompt no text": ({"prompt": ["a"]}, "prompt", "valid string"),
    "prompt too long": ({"prompt": "a" * 32_001}, "prompt", "at most 32000"),
    "n 0": ({"n": 0}, "n", "greater than or equal to 1"),
    "n 11": ({"n": 11}, "n", "less than or equal to 10"),
    "n text": ({"n": "2"}, "n", "valid integer"),
    "size text": ({"size": "large"}, "size", "match pattern"),
    "size not a multiple": ({"size": "33x32"}, "size", "multiple of 8"),
    "size beyond the model": ({"size": "1024x32"}, "size", "up to 64"),
    "size 0": ({"size": "0x32"}, "size", "match pattern"),
    "size with zeros before it": ({"size": "00032x00032"}, "size", "match pattern"),
    "size enormous (vllm-project/vllm-omni#3381)": ({"size": "99999x99999"}, "size", "up to 64"),
    "frames of a model of images": ({"frames": 9}, "frames", "makes images only"),
    "seed negative": ({"seed": -1}, "seed", "greater than or equal to 0"),
    "seed beyond JSON": ({"seed": 2**53}, "seed", "less than or equal to"),
    "steps 0": ({"steps": 0}, "steps", "greater than or equal to 1"),
    "steps 101": ({"num_inference_steps": 101}, "num_inference_steps", "less than or equal to 100"),
    "steps twice": ({"steps": 4, "num_inference_steps": 5}, "num_inference_steps", "same parameter"),
    "guidance negative": ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
    "negative prompt without guidance": (
        {"guidance": 1, "negative_prompt": "a"},
        "negative_prompt",
        "guidance above 1",
    ),
    "url (sgl-project/sglang#19346)": ({"response_format": "url"}, "response_format", "b64_json"),
    "format": ({"output_format": "gif"}, "output_format", "png"),
    "compression of png": ({"output_compression": 50}, "output_compression", "another output_format"),
    "compression 101": ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "100"),
    "quality": ({"quality": "hd"}, "quality", "auto"),
    "transparent": ({"background": "transparent"}, "background", "opaque"),
    "stream (Wei-Shaw/claude-relay-service#1240)": ({"stream": True}, "stream", "False"),
    "partial images": ({"partial_images": 2}, "partial_images", "0"),
    "quality of another kind": ({"quality": "high"}, "quality", "auto"),
    "unknown": ({"sampler": "ddim"}, "sampler", "not a parameter"),
    "unknown, nested": ({"extra_body": {"sampler": "ddim"}}, "sampler", "not a parameter"),
    "nested, no object": ({"extra_body": 1}, "extra_body", "not an object"),
    "nested, contradicting": ({"seed": 1, "extra_body": {"seed": 2}}, "seed", "different values"),
}


def post(url: str, content: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict, dict]:
    headers = {"Content-Type": "application/json"} | (headers or {})
    request = urllib.request.Request(f"{url}/v1/images/generations", content, headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value as response:
        return response.status, json.load(response)["error"], dict(response.headers)


@pytest.mark.parametrize(("change", "param", "words"), REFUSALS.values(), ids=REFUSALS)
def test_a_bad_parameter_is_named_with_its_value_or_remedy(endpoint, change, param, words):
    body = {"prompt": "a red 3", **change}
    status, error, _ = post(endpoint.url, json.dumps(body).encode())
    assert status == 400
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert words in error["message"]
    assert len(error["message"]) < 500


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b'"a"', b'{"prompt": "a", "guidance": NaN}', b"\xff", b"[" * 100_000,
        b'{"prompt": "a", "\\ud800": 1}', b'{"prompt": "a", "extra_body": {"\\ud800": 1}}',
        b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a", "n": ' + b"1" * 5000 + b"}",
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(endpoint, content):
    status, error, _ = post(endpoint.url, content)
    assert (status, error["code"]) == (400, "invalid_json")


@pytest.mark.parametrize(
    ("content", "headers"),
    [
        (b'\xef\xbb\xbf{"prompt": "a", "steps": 1}', {}),
        ('{"prompt": "ü", "steps": 1}'.encode("utf-16"), {}),
        (b'{"prompt": "a", "steps": 1}', {"Expect": "100-continue"}),
        (b'{"prompt": "a", "steps": 1}', {"Content-Type": "application/json; charset=utf-8"}),
        (iter([b'{"prompt": ', b'"a", "steps": 1}']), {}),
    ],
    ids=["BOM", "UTF-16", "expect", "charset", "chunked"],
)
def test_unusual_and_right_bodies_are_understood(endpoint, content, headers):
    """AUTOMATIC1111/stable-diffusion-webui#11889."""
    headers = {"Content-Type": "application/json"} | headers
    request = urllib.request.Request(f"{endpoint.url}/v1/images/generations", content, headers)
    with urllib.request.urlopen(request) as response:
        assert len(json.load(response)["data"]) == 1


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data; boundary=x", ""]
)
def test_what_a_form_of_any_web_page_can_send_is_not_executed(endpoint, kind):
    """A browser sends these types to other hosts without asking them first."""
    status, error, _ = post(endpoint.url, b'{"prompt": "a"}', {"Content-Type": kind, "Origin": "https://evil.example"})
    assert (status, error["code"]) == (415, "unsupported_media_type")
    assert "application/json" in error["message"]


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "10.0.0.1", ""])
def test_a_server_of_this_machine_does_not_answer_under_another_name(endpoint, host):
    """DNS rebinding: a page's own host name comes to point here, and its scripts may then read what is answered."""
    request = urllib.request.Request(f"{endpoint.url}/v1/models", headers={"Host": host})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request)
    with caught.value as response:
        assert (response.status, json.load(response)["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost", "localhost:1", "127.0.0.1:1", "[::1]:1", "[::1]", "opd.localhost"])
def test_its_own_names_are_answered(endpoint, host):
    request = urllib.request.Request(f"{endpoint.url}/v1/models", headers={"Host": host})
    with urllib.request.urlopen(request) as response:
        assert response.status == 200


def test_a_huge_body_is_refused(endpoint):
    status, error, _ = post(endpoint.url, b'{"prompt": "' + b"a" * 2**20 + b'"}')
    assert (status, error["code"]) == (413, "body_too_large")


def test_an_image_larger_than_the_servers_limit_is_refused(endpoint):
    """The model could make 64x64; this server's limit is four times the default size, so it is within it."""
    assert endpoint.service.max_pixels == 64 * 64
    assert endpoint.client().images.generate(prompt="a", size="64x64", extra_body={"steps": 1}).size == "64x64"


@pytest.mark.parametrize("wish", ["soon", "0.000001", "-1", "nan"])
def test_a_timeout_that_no_image_could_keep_is_refused(endpoint, wish):
    status, error, _ = post(endpoint.url, b'{"prompt": "a"}', {"X-Request-Timeout": wish})
    assert (status, error["param"]) == (400, "X-Request-Timeout")
    assert "at least 1" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/images", 404, "not_found"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("POST", "/v1/images/edits", 404, "not_supported"),
        ("POST", "/v1/images/variations", 404, "not_supported"),
        ("GET", "/v1/" + "x" * 30_000, 404, "not_found"),
        ("GET", "/v1/models/other", 404, "model_not_found"),
        ("DELETE", "/readyz", 405, "method_not_allowed"),
    ],
)
def test_unknown_paths_and_methods_have_the_same_shape(endpoint, method, path, status, code):
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(urllib.request.Request(endpoint.url + path, method=method))
    with caught.value as response:
        error = json.load(response)["error"]
        assert response.headers["X-Request-Id"].startswith("req_")
    assert (response.status, error["code"]) == (status, code)
    assert error.keys() == {"message", "type", "param", "code"}
    assert len(error["message"]) < 300


def test_the_clients_error_classes_fit(endpoint):
    with pytest.raises(openai.BadRequestError) as bad:
        endpoint.client().images.generate(prompt="a", size="33x32")
    assert bad.value.param == "size"
    with pytest.raises(openai.NotFoundError) as missing:
        endpoint.client().images.generate(prompt="a", model="gpt-image-2")
    assert missing.value.code == "model_not_found"
    assert "'tiny'" in missing.value.message
