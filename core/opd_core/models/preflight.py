"""What is wrong with a spec's models, as far as their files tell without being loaded: seconds before hours.

Whoever sees the files asks: `opd run` before it starts anything, and a teacher server before it becomes one.
A problem is a line: the field's path, its value, what is wrong and what to do.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from opd_core.api.teachers import adapter_of, teacher_uri
from opd_core.api.training import LoRA
from opd_core.api.types import Spec
from opd_core.errors import InvalidError
from opd_core.families.family import Outline
from opd_core.models.adapter_file import (
    AdapterFile,
    matches,
    mean_alpha,
    missed_blocks,
    read_adapter_file,
    read_teacher,
    unknown_targets,
)
from opd_core.models.adapter_layers import fit
from opd_core.models.outline import linear_layers, read_outline
from opd_core.models.teacher_files import check_teacher_model

_T = TypeVar("_T")
# The local path of a URI, or None for one that shall not be fetched now. Raises InvalidError: nothing is there.
Find = Callable[[str], Path | None]
Linear = Mapping[str, tuple[int, int]]


def teacher_problems(spec: Spec, find: Find, names: Collection[str]) -> list[str]:
    """Of the base, the images that it shall make, and the adapters or models of the teachers `names`."""
    found: list[str] = []
    outline, linear = _base(spec, find, found)
    if outline is not None:
        found += _resolution(spec, outline)
    for i, teacher in enumerate(spec.teachers):
        if teacher.name not in names or not teacher.teaches:
            continue
        check: Callable[[Path], object]
        if teacher.model:
            base = None if outline is None else find(spec.model.uri)
            check = partial(check_teacher_model, base=base, resolution=spec.training.resolution)
            field = "model.uri"
        else:
            check = partial(_teacher, alpha=adapter_of(spec, teacher).alpha, linear=linear)
            field = "adapter.uri" if teacher.adapter else "training"
        attempt(f"spec.teachers[{i}].{field}", teacher_uri(spec, teacher), find, check, found)
    return found


def adapter_problems(spec: Spec, find: Find) -> list[str]:
    """Of the adapters that are trained, the student's and those of teachers: what they start from, or the layers that a
    fresh one is put on."""
    found: list[str] = []
    outline, linear = _base(spec, find, [])  # a base that cannot be read is told with the teachers
    trained = [("spec.student", spec.student.adapter, spec.student.init_from)]
    for i, teacher in enumerate(spec.teachers):
        if teacher.training:
            trained.append((f"spec.teachers[{i}].training", teacher.training.adapter, teacher.training.init_from))
    for path, adapter, init_from in trained:
        found += _fresh(f"{path}.adapter", adapter, linear)
        if init_from:
            check = partial(_start, linear=linear)
            start = attempt(f"{path}.initFrom", init_from, find, check, found)
            if start and outline and linear:
                found += start_problems(adapter, start, outline.family.targets, f"{path}.adapter")
    if spec.student.init_from_teachers:
        found += _mean_problems(spec, find, linear)
    return found


def _mean_problems(spec: Spec, find: Find, linear: Linear | None) -> Iterator[str]:
    """Why the student cannot start from the mean of its teachers: told before any of them is trained."""
    ranks, scale = 0, 0.0  # of all, and of the first, which the mean has (`merge`)
    for teacher in spec.teachers:
        if teacher.training:
            rank = teacher.training.adapter.rank
            own = teacher.training.adapter.alpha / rank
        else:
            try:
                given = adapter_of(spec, teacher)
                place = find(given.uri)
                file = _teacher(place, given.alpha, linear) if place else None
            except InvalidError:
                return  # told with the teachers
            if file is None:
                return
            rank, own = file.rank(file.layers[0]), file.scale(file.layers[0])
        ranks, scale = ranks + rank, scale or own
    for name, ours, theirs in (
        ("rank", spec.student.adapter.rank, ranks),
        ("alpha", spec.student.adapter.alpha, mean_alpha(scale, ranks)),
    ):
        if ours != theirs:
            yield f"spec.student.adapter.{name} is {ours}: the mean of the teachers has {theirs}; write {theirs}"


def _fresh(path: str, adapter: LoRA, linear: Linear | None) -> Iterator[str]:
    """Why `adapter` cannot be put on the layers that it names."""
    if not linear or not adapter.target_modules:
        return
    unknown = unknown_targets(adapter.target_modules, linear)
    for target in unknown:
        yield (
            f"{path}.targetModules names {target}: no linear layer of the model ends so; leave it out, or write e.g. "
            "attn.to_q"
        )
    for kind, layer in ({} if unknown else missed_blocks(adapter.target_modules, linear)).items():
        yield (
            f"{path}.targetModules names no layer of {kind}, which would stay as they are; add one such as {layer}, or "
            "leave the field out"
        )


def teacher_notes(spec: Spec, find: Find, names: Collection[str]) -> Iterator[str]:
    """What is no fault but should be known of the LoRAs that are given to the teachers `names`. For a spec without
    problems."""
    for i, teacher in enumerate(spec.teachers):
        if teacher.adapter and teacher.name in names and (place := find(teacher.adapter.uri)):
            notes = read_teacher(place, teacher.adapter.alpha).notes
            yield from (f"spec.teachers[{i}].adapter.uri is {teacher.adapter.uri}: {note}" for note in notes)


def start_notes(spec: Spec, find: Find) -> Iterator[str]:
    """The same of the LoRA that the student starts from."""
    if spec.student.init_from and (place := find(spec.student.init_from)):
        notes = read_adapter_file(place).notes
        yield from (f"spec.student.initFrom is {spec.student.init_from}: {note}" for note in notes)


def model_notes(spec: Spec, outline: Outline) -> Iterator[str]:
    """What is no fault but should be known: where the model makes of the spec something else than one might expect."""
    for path, sampler in (("training", spec.training.sampler), ("evaluation", spec.evaluation.sampler)):
        steps = outline.distilled_steps
        if steps is not None and sampler.steps != steps:
            yield (
                f"spec.{path}.sampler.steps is {sampler.steps}: this model was distilled to {steps} steps, and was not "
                "made for the noise levels of others"
            )
    guidance = outline.guidance
    of_teachers = {
        f"spec.teachers[{i}]": teacher.scales
        for i, teacher in enumerate(spec.teachers)
        if teacher.teaches and teacher.model is None
    }
    for path, (scale, true_cfg) in {"spec.training": spec.training.scales, **of_teachers}.items():
        if not guidance.effective and scale != 1:
            yield f"{path}.guidanceScale is {scale:g} and has no effect: this model was distilled with its guidance"
        elif guidance.effective and scale == 1 and (guidance.embedded or guidance.off != 1):
            off = "no number does" if guidance.embedded else f"{guidance.off:g} does"
            yield f"{path}.guidanceScale is 1, which does not turn guidance off in this model's family; {off}"
        if not guidance.true_cfg and true_cfg != 1:
            yield f"{path}.trueCfgScale is {true_cfg:g} and has no effect: this model's family has guidanceScale alone"


def start_problems(
    adapter: LoRA, start: AdapterFile, usual: Sequence[str], path: str = "spec.student.adapter"
) -> Iterator[str]:
    """Why `adapter`, at `path` of a spec, cannot start from `start`. `usual`: its targets where the spec names none."""
    ranks, alphas = {start.rank(layer) for layer in start.layers}, set(start.alphas.values())
    for name, ours, theirs in (("rank", adapter.rank, ranks), ("alpha", adapter.alpha, alphas)):
        if theirs != {ours}:
            told = " and ".join(f"{value:g}" for value in sorted(theirs))
            possible = len(theirs) == 1 and theirs <= set(range(1, 2049))  # a spec's are whole numbers
            remedy = "make them equal" if possible else "start from one that has a single whole one"
            yield f"{path}.{name} is {ours}: the adapter of initFrom has {told}; {remedy}"
    outside = [layer for layer in start.layers if not matches(layer, adapter.target_modules or usual)]
    if outside:
        yield (
            f"{path}.targetModules leaves out {outside[0]}, which the adapter of initFrom changes; "
            f"add it ({len(outside)} such layers)"
        )


def attempt(path: str, uri: str, find: Find, check: Callable[[Path], _T], found: list[str]) -> _T | None:
    """What `check` makes of the file behind `uri`, the value at `path`. A refusal goes to `found`; None then, and where
    the file shall not be fetched."""
    try:
        place = find(uri)
        return None if place is None else check(place)
    except InvalidError as error:
        found.append(f"{path} is {uri}: {error}")
        return None


def refuse(problems: Collection[str], source: object) -> None:
    """Raises InvalidError with all of them, if there are any."""
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise InvalidError("\n  ".join([f"{source}: {count}", *problems]))


def _base(spec: Spec, find: Find, found: list[str]) -> tuple[Outline | None, Linear | None]:
    path, uri = "spec.model.uri", spec.model.uri
    outline = attempt(path, uri, find, read_outline, found)
    return outline, attempt(path, uri, find, linear_layers, found) if outline else None


def _resolution(spec: Spec, outline: Outline) -> Iterator[str]:
    resolution = spec.training.resolution
    for name, side in (("width", resolution.width), ("height", resolution.height)):
        if not outline.takes(side):
            yield f"spec.training.resolution.{name} is {side}: this model needs {outline.sides}"
    if not outline.takes_frames(resolution.frames):
        yield f"spec.training.resolution.frames is {resolution.frames}: this model needs {outline.frame_counts}"


def _teacher(place: Path, alpha: float | None, linear: Linear | None) -> AdapterFile:
    return _fit(read_teacher(place, alpha), linear)


def _start(place: Path, linear: Linear | None) -> AdapterFile:
    return _fit(read_adapter_file(place), linear)


def _fit(adapter: AdapterFile, linear: Linear | None) -> AdapterFile:
    return adapter if linear is None else fit(adapter, linear)
