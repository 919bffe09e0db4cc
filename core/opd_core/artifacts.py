"""What the directory of a student or a trained teacher contains: LoRA weights that diffusers loads, a manifest of their
origin, and of a student the same as a model card."""

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from opd_core.errors import InvalidError, RefusedError, StorageError
from opd_core.model_card import model_card
from opd_core.models.adapter_keys import Format
from opd_core.scales import Scales
from opd_core.uris import claim_path

WEIGHTS = "pytorch_lora_weights.safetensors"
MANIFEST = "manifest.json"
TEACHER_MANIFEST = "teacher.json"
CARD = "README.md"
TrueCfg = Annotated[float, Field(exclude_if=lambda scale: scale == 1)]  # manifests without it are as they were
_PACKAGES = ("diffusion-opd", "torch", "diffusers", "transformers", "peft", "deepspeed", "tritonclient")


class _Part(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True)


class Source(_Part):
    """Something the student was made from."""

    uri: str
    fingerprint: str


class TeacherSource(Source):
    name: str
    guidance_scale: float
    true_cfg_scale: TrueCfg = 1.0
    prompts_uri: str
    prompts_digest: str

    @property
    def scales(self) -> Scales:
        return Scales(self.guidance_scale, self.true_cfg_scale)


class SamplingDefaults(_Part):
    """What the endpoint uses where a request does not say otherwise."""

    width: int
    height: int
    steps: int
    guidance_scale: float
    true_cfg_scale: TrueCfg = 1.0
    max_sequence_length: int
    frames: int = Field(1, exclude_if=lambda frames: frames == 1)  # manifests of images are as they were

    @property
    def scales(self) -> Scales:
        return Scales(self.guidance_scale, self.true_cfg_scale)


class Score(_Part):
    """Mean reward over held-out prompts with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int


class KeptShare(_Part):
    """Share of a teacher's gain over the base that the student keeps, with its 95 % bootstrap interval."""

    share: float
    low: float
    high: float


class Recipe(_Part):
    """How a student was trained, as far as a reader asks first; the spec's digest covers all of it.

    Args:
        objective: of reinforcement learning its algorithm.
        init_from: URI of the LoRA that it started from, or in words whose mean that was; "": none.
    """

    method: str
    objective: str
    sampler: str
    steps: int
    rank: int
    alpha: int
    init_from: str
    learning_rate: float
    seed: int
    evaluation_seed: int


class StudentManifest(_Part):
    """`manifest.json`; `digest` names the student: the SHA-256 of its weights file."""

    api_version: str = "opd.dev/student/v1"
    name: str
    digest: str
    base: Source
    teachers: list[TeacherSource]
    spec_digest: str
    round: int
    recipe: Recipe | None = Field(None, description="None: a student from before it was noted.")
    sampling: SamplingDefaults
    scores: dict[str, Score] = Field(default_factory=dict)
    kept: dict[str, KeptShare] = Field(default_factory=dict, description="By task.")
    license: str = Field(description="The licence of the base model applies to the student.")
    versions: dict[str, str] = Field(default_factory=dict)


class TeacherManifest(_Part):
    """`teacher.json`, beside the weights of a teacher that was trained.

    Args:
        digest: SHA-256 of the weights file. scores: of base and teacher on the held-out prompts, by reward.
        gain: of the teacher over the base in the weighted sum of its rewards, image by image.
    """

    api_version: str = "opd.dev/teacher/v1"
    name: str
    digest: str
    algorithm: str
    round: int
    guidance_scale: float
    true_cfg_scale: TrueCfg = 1.0
    base: Source
    prompts_uri: str
    prompts_digest: str
    scores: dict[str, dict[str, Score]]
    gain: Score
    license: str = Field(description="The licence of the base model applies to the teacher.")
    versions: dict[str, str] = Field(default_factory=dict)


def installed_versions() -> dict[str, str]:
    """Versions of the packages that take part in a result, as far as they are installed."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def write_student(
    directory: Path, save_weights: Callable[[Path], Path], describe: Callable[[str], StudentManifest]
) -> StudentManifest:
    """Write a student directory as a whole: after a failure `directory` is what it was before.

    Args:
        save_weights: writes the weights into the folder it is given and returns their file, named `WEIGHTS`.
        describe: the manifest, given the digest of the weights.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    with _replacing(directory, "student") as scratch:
        manifest = describe(file_digest(save_weights(scratch)))
        (scratch / MANIFEST).write_text(_dump(manifest))
        write_card(scratch, manifest)
    return manifest


def write_card(directory: Path, manifest: StudentManifest, to: Format = Format.DIFFUSERS) -> None:
    """The model card of a student whose files in the format `to` are in `directory`."""
    (directory / CARD).write_text(model_card(manifest, to), encoding="utf-8")


def write_teacher(
    directory: Path, save_weights: Callable[[Path], Path], describe: Callable[[str], TeacherManifest]
) -> TeacherManifest:
    """Write the directory of a trained teacher as `write_student` does."""
    with _replacing(directory, "teacher") as scratch:
        manifest = describe(file_digest(save_weights(scratch)))
        (scratch / TEACHER_MANIFEST).write_text(_dump(manifest))
    return manifest


def read_trained_teacher(directory: Path) -> TeacherManifest | None:
    """The manifest of a trained teacher; None where there is none yet.

    Raises:
        InvalidError: it cannot be read. RefusedError: the weights are not those that it describes.
    """
    file = directory / TEACHER_MANIFEST
    if not file.exists():
        return None
    try:
        manifest = TeacherManifest.model_validate_json(file.read_text())
    except ValidationError as error:
        raise InvalidError(f"{file} is not a teacher's manifest: {error}; delete {directory} to train it") from error
    if (digest := file_digest(directory / WEIGHTS)) != manifest.digest:
        raise RefusedError(
            f"{directory / WEIGHTS} has digest {digest}, its manifest says {manifest.digest}; delete {directory} to "
            "train it again"
        )
    return manifest


def publish_student(directory: Path, uri: str, claims: Path) -> Path:
    """Copy a student directory to `uri`, a folder in a claim, as a whole. Returns where it went.

    Raises:
        StorageError: it cannot be written there.
    """
    target = claim_path(uri, claims)
    assert target is not None, "types.Output allows claims only"
    with _replacing(target, "student") as scratch:
        shutil.copytree(directory, scratch, dirs_exist_ok=True)
    return target


@contextmanager
def _replacing(directory: Path, what: str) -> Iterator[Path]:
    """A folder that takes the place of `directory` when its writer is done, and vanishes when it fails."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    except OSError as error:
        raise StorageError(f"cannot write the {what} to {directory}: {error}") from error
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp's 0700 would lock out the endpoint's user
        _replace(scratch, directory)
    except OSError as error:
        raise StorageError(f"cannot write the {what} to {directory}: {error}; the old one is untouched") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def update_scores(directory: Path, scores: dict[str, Score], kept: dict[str, KeptShare]) -> StudentManifest:
    """Put evaluation scores, by reward, and kept shares, by task, into the manifest of a student directory."""
    manifest, _ = read_student(directory)
    scored = manifest.model_copy(update={"scores": scores, "kept": kept})
    scratch = directory / f".{MANIFEST}"
    try:
        scratch.write_text(_dump(scored))
        scratch.replace(directory / MANIFEST)
        write_card(directory, scored)
    except OSError as error:
        raise StorageError(f"cannot write the scores to {directory}: {error}") from error
    return scored


def read_student(directory: Path) -> tuple[StudentManifest, Path]:
    """Manifest and weights file of a student directory.

    Raises:
        InvalidError: not a student directory. RefusedError: the weights are not those that the manifest describes.
    """
    try:
        manifest = StudentManifest.model_validate_json((directory / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise InvalidError(f"{directory} is not a student directory: it has no {MANIFEST}") from error
    except ValidationError as error:
        raise InvalidError(f"{directory / MANIFEST} is not a student's manifest: {error}") from error
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise InvalidError(f"{directory} has no {WEIGHTS}; copy the student again")
    digest = file_digest(weights)
    if digest != manifest.digest:
        raise RefusedError(
            f"{weights} has digest {digest}, its manifest says {manifest.digest}; copy the student again"
        )
    return manifest, weights


def _dump(manifest: StudentManifest | TeacherManifest) -> str:
    return manifest.model_dump_json(by_alias=True, indent=2) + "\n"


def _replace(scratch: Path, directory: Path) -> None:
    """Put `scratch` at `directory`. rename(2) replaces no folder that holds files, so the old one steps aside."""
    if not directory.exists():
        scratch.rename(directory)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    directory.rename(aside / "old")
    scratch.rename(directory)
    shutil.rmtree(aside, ignore_errors=True)
