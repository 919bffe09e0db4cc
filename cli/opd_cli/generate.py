"""`opd generate`: an image from a running endpoint, or from a student directory."""

import base64
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import typer
from opd_core.errors import InvalidError, OPDError, RefusedError, StorageError, UnavailableError

from opd_cli.serve import claims_around
from opd_cli.terminal import echo
from opd_cli.web import is_loopback, open_url

_FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".mp4": "mp4"}


@dataclass(frozen=True)
class Image:
    """An image file, and the seed that gives it again."""

    data: bytes
    seed: int


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What the image shows; - is standard input.")],
    out: Annotated[Path, typer.Option("--out", help="File: .png, .jpg or .webp; of a video .webp or .mp4.")] = Path(
        "image.png"
    ),
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    student: Annotated[str | None, typer.Option(help="Student directory: compute here, without a server.")] = None,
    url: Annotated[str, typer.Option(help="Endpoint to ask when there is no --student.")] = "http://127.0.0.1:8000",
    seed: Annotated[int | None, typer.Option(help="Image i is drawn from seed + i; default: random.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", help="Images; several are numbered: x-0.png, x-1.png.")] = 1,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels; default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a video; default: the model's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps; default: the model's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance; default: the model's.")] = None,
    true_cfg: Annotated[
        float | None, typer.Option(help="The same beside a guidance that the network takes; default: the model's.")
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the image does not show.")] = None,
    claims: Annotated[
        Path | None, typer.Option(help="Folder with one entry per claim; default: the one of the run around --student.")
    ] = None,
    device: Annotated[str, typer.Option(help="With --student: auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="With --student: auto, BF16, FP16 or FP32.")] = "auto",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="OPD_API_KEY", help="API key of the endpoint; on a command line others see it."),
    ] = None,
    output: Annotated[
        Literal["text", "json"], typer.Option("--output", "-o", help="How files and seeds are printed.")
    ] = "text",
) -> None:
    """Make images and print their files and seeds.

    Example: opd generate 'the number " 4 2 "' --out x.png --seed 7 --student runs/quickstart/student
    """
    if prompt == "-":
        prompt = sys.stdin.read().strip()
    if out.suffix.lower() not in _FORMATS:
        raise InvalidError(f"--out {out} ends in {out.suffix!r}; write one of {', '.join(_FORMATS)}")
    if not force and (there := [file for file in files_of(out, n) if file.exists()]):
        raise InvalidError(f"{there[0]} is there already; choose another --out, or replace it with --force")
    parameters: dict[str, Any] = {"seed": seed, "n": n, "size": size, "frames": frames, "steps": steps}
    parameters |= {
        "guidance": guidance,
        "true_cfg": true_cfg,
        "negative_prompt": negative_prompt,
        "output_format": _FORMATS[out.suffix.lower()],
    }
    if student is None:
        images = request_images(url, prompt, api_key=api_key, **parameters)
    else:
        images = compute_images(student, claims or claims_around(student), device, precision, prompt, **parameters)
    written = list(zip(write_images(images, out), images, strict=True))
    if output == "json":
        echo(json.dumps([{"file": str(file), "seed": image.seed} for file, image in written], indent=2))
        return
    for file, image in written:
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
    host = urlsplit(address).hostname or ""
    if api_key and urlsplit(address).scheme == "http" and not is_loopback(host):
        echo(f"warning: the API key travels to {host} in clear; use https where the network is not yours", err=True)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    body = json.dumps({"prompt": prompt, **parameters}).encode()
    request = urllib.request.Request(address, body, headers)  # noqa: S310  (scheme is checked above)
    try:
        with open_url(request, timeout) as response:
            answer = json.load(response)
        return [Image(base64.b64decode(item["b64_json"]), int(item["seed"])) for item in answer["data"]]
    except urllib.error.HTTPError as error:
        raise _refusal(address, error) from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UnavailableError(f"{address} cannot be reached: {reason}; is `opd serve` running there?") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{address} answered, but not as an image endpoint does: {error!r}") from error


def compute_images(
    student: str, claims: Path, device: str, precision: str, prompt: str, **parameters: Any
) -> list[Image]:
    """The same images as an endpoint on `student` gives, from its engine in this process."""
    from opd_serving.endpoint.server import Settings, make_service
    from opd_serving.endpoint.service import generate_here

    service = make_service(Settings(student=student, claims=claims, device=device, precision=precision))
    echo(f"loading {student}", err=True)
    return [Image(data, seed) for data, seed in generate_here(service, {"prompt": prompt, **parameters})]


def files_of(path: Path, count: int) -> list[Path]:
    """Where `count` images go: several become name-0.png, name-1.png and so on."""
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def write_images(images: Sequence[Image], path: Path) -> list[Path]:
    """Write each image as a whole, to `files_of(path, ...)`."""
    files = files_of(path, len(images))
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
            raise StorageError(f"cannot write {file}: {error}; choose another --out") from error
    return files


def _refusal(address: str, error: urllib.error.HTTPError) -> OPDError:
    if error.code < 400:
        elsewhere = error.headers["Location"] or "nowhere"
        return RefusedError(f"{address} redirects to {elsewhere}; if that is where it shall go, give it as --url")
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
