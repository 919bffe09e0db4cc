"""`opd generate`: an image from a running endpoint, or from a student directory."""

import base64
import ipaddress
import json
import os
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from opd_core.errors import InvalidError, OPDError, RefusedError, StorageError, UnavailableError

from opd_cli.serve import claims_around
from opd_cli.terminal import echo

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@dataclass(frozen=True)
class Image:
    """An image file, and the seed that gives it again."""

    data: bytes
    seed: int


def generate(
    prompt: Annotated[str, typer.Argument(help="What the image shows.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="File: .png, .jpg or .webp.")] = Path("image.png"),
    student: Annotated[str | None, typer.Option(help="Student directory: compute here, without a server.")] = None,
    url: Annotated[str, typer.Option(help="Endpoint to ask when there is no --student.")] = "http://127.0.0.1:8080",
    seed: Annotated[int | None, typer.Option(help="Image i is drawn from seed + i; default: random.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Images; several are numbered: x-0.png, x-1.png.")] = 1,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; default: the model's.")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the image does not show.")] = None,
    claims: Annotated[
        Path | None, typer.Option(help="Folder with one entry per claim; default: the one of the run around --student.")
    ] = None,
    device: Annotated[str, typer.Option(help="With --student: auto, cpu or cuda.")] = "auto",
    api_key: Annotated[str | None, typer.Option(envvar="OPD_API_KEY", help="API key of the endpoint.")] = None,
) -> None:
    """Make images and print their files and seeds.

    Example: opd generate 'the number " 4 2 "' -o x.png --seed 7 --student runs/quickstart/student
    """
    if output.suffix.lower() not in _FORMATS:
        raise InvalidError(f"--output {output} ends in {output.suffix!r}; write one of {', '.join(_FORMATS)}")
    parameters: dict[str, Any] = {"seed": seed, "n": n, "size": size, "steps": steps, "guidance": guidance}
    parameters |= {"negative_prompt": negative_prompt, "output_format": _FORMATS[output.suffix.lower()]}
    if student is None:
        images = request_images(url, prompt, api_key=api_key, **parameters)
    else:
        images = compute_images(student, claims or claims_around(student), device, prompt, **parameters)
    for file, image in zip(write_images(images, output), images, strict=True):
        echo(f"{file}  seed {image.seed}")


def request_images(
    url: str, prompt: str, *, api_key: str | None = None, timeout: float = 600, **parameters: Any
) -> list[Image]:
    """Images of the endpoint at `url` (with or without `/v1`).

    Args:
        parameters: of POST /v1/images/generations; None is left to the server. timeout: seconds.

    Raises:
        InvalidError: the endpoint refused a parameter or the key. UnavailableError: not there, full or not ready.
        RefusedError: something else answers at `url`.
    """
    address = url.rstrip("/").removesuffix("/v1") + "/v1/images/generations"
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
        raise InvalidError(f"--url {url} is not an address; write http://HOST:PORT")
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    body = json.dumps({"prompt": prompt, **parameters}).encode()
    request = urllib.request.Request(address, body, headers)  # noqa: S310  (scheme is checked above)
    # An environment's HTTP proxy does not know this machine's loopback.
    proxies = [urllib.request.ProxyHandler({})] if _is_loopback(urlsplit(address).hostname or "") else []
    try:
        with urllib.request.build_opener(*proxies).open(request, timeout=timeout) as response:
            answer = json.load(response)
        return [Image(base64.b64decode(item["b64_json"]), int(item["seed"])) for item in answer["data"]]
    except urllib.error.HTTPError as error:
        raise _refusal(address, error) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UnavailableError(f"{address} cannot be reached: {reason}; is `opd serve` running there?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{address} answered, but not as an image endpoint does: {error!r}") from error


def compute_images(student: str, claims: Path, device: str, prompt: str, **parameters: Any) -> list[Image]:
    """The same images as an endpoint on `student` gives, from its engine in this process."""
    from opd_serving.endpoint.server import Settings, make_service
    from opd_serving.endpoint.service import generate_here

    service = make_service(Settings(student=student, claims=claims, device=device))
    return [Image(data, seed) for data, seed in generate_here(service, {"prompt": prompt, **parameters})]


def write_images(images: Sequence[Image], path: Path) -> list[Path]:
    """Write each image as a whole; several become name-0.png, name-1.png and so on."""
    if len(images) == 1:
        files = [path]
    else:
        files = [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(len(images))]
    for file, image in zip(files, images, strict=True):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            descriptor, scratch = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
            try:
                with os.fdopen(descriptor, "wb") as opened:
                    opened.write(image.data)
                Path(scratch).chmod(0o644)
                Path(scratch).replace(file)
            finally:
                Path(scratch).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {file}: {error}; choose another --output") from error
    return files


def _refusal(address: str, error: urllib.error.HTTPError) -> OPDError:
    try:
        message = json.load(error)["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError):
        return RefusedError(f"{address} answered {error.code}, but not as an image endpoint does; check --url")
    if error.code in (429, 503, 504):
        again = f"; try again in {error.headers['Retry-After']} s" if error.headers["Retry-After"] else ""
        return UnavailableError(f"{address}: {message}{again}")
    if error.code == 401:
        return InvalidError(f"{address}: {message}; give --api-key or OPD_API_KEY")
    return InvalidError(f"{address}: {message}") if error.code < 500 else OPDError(f"{address}: {message}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
