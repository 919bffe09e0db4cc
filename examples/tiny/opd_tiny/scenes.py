"""What a picture shows: coloured digits and how they are arranged, and the prompt that says so."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

Kind = Literal["single", "count", "relation", "number", "picture"]

TASKS = ("geneval", "ocr", "aesthetic")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 0.85, 0.2),
    "blue": (0.2, 0.35, 1.0),
    "yellow": (1.0, 0.9, 0.1),
}
RELATIONS = ("above", "below", "left of", "right of")
_COUNT_WORDS = {2: "two", 3: "three"}


@dataclass(frozen=True)
class Digit:
    """One digit; ``colour`` is None where the prompt names no colour."""

    digit: int
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """A set of digits; ``relation`` says where the first lies as seen from the second."""

    kind: Kind
    objects: tuple[Digit, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """The caption, at most ten CLIP tokens with its begin and end marks."""
        first = self.objects[0]
        match self.kind:
            case "single":
                return f"a {first.colour} {first.digit}"
            case "count":
                return f"{_COUNT_WORDS[len(self.objects)]} {first.colour} {first.digit}"
            case "relation":
                second = self.objects[1]
                return f"a {first.colour} {first.digit} {self.relation} a {second.colour} {second.digit}"
            case "number":
                return f'the number " {first.digit} {self.objects[1].digit} "'
            case "picture":
                return "a lovely picture of " + (f"{first.colour} " if first.colour else "") + str(first.digit)

    def to_json(self) -> dict[str, Any]:
        """The form kept in prompt files."""
        return {
            "kind": self.kind,
            "objects": [{"digit": o.digit, "colour": o.colour} for o in self.objects],
            "relation": self.relation,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_json`. Raises KeyError where a field is missing."""
        objects = tuple(Digit(o["digit"], o["colour"]) for o in data["objects"])
        return cls(data["kind"], objects, data["relation"])


def scenes_of(task: str) -> list[list[Scene]]:
    """Every scene of ``task``, one list per group; groups are drawn with :data:`GROUP_WEIGHTS`."""
    digits, colours = range(10), list(COLOURS)
    coloured = [Digit(d, c) for c in colours for d in digits]
    if task == "geneval":
        return [
            [Scene("single", (o,)) for o in coloured],
            [Scene("count", (o,) * n) for n in (2, 3) for o in coloured],
            [Scene("relation", (a, b), r) for r in RELATIONS for a in coloured for b in coloured],
        ]
    if task == "ocr":
        return [[Scene("number", (Digit(a), Digit(b))) for a in digits for b in digits]]
    if task == "aesthetic":
        return [[Scene("picture", (Digit(d),)) for d in digits], [Scene("picture", (o,)) for o in coloured]]
    raise ValueError(f"task {task!r} is not one of {', '.join(TASKS)}")


GROUP_WEIGHTS = {"geneval": (0.2, 0.2, 0.6), "ocr": (1.0,), "aesthetic": (0.5, 0.5)}


def sample_scene(task: str, rng: random.Random) -> Scene:
    """Draw a scene of ``task``: first its group, then uniformly within it."""
    return rng.choice(rng.choices(_GROUPS[task], GROUP_WEIGHTS[task])[0])


_GROUPS = {task: scenes_of(task) for task in TASKS}


def corrupt(scene: Scene, rng: random.Random) -> Scene:
    """A scene that differs from ``scene`` in at most one attribute, like a web image beside its careless caption."""
    draw = rng.random()
    if scene.kind == "relation" and draw < 0.35:
        return replace(scene, relation=rng.choice(RELATIONS))
    if scene.kind == "count" and draw < 0.5:
        return replace(scene, objects=scene.objects[:1] * rng.choice([1, 2, 3]))
    i = rng.randrange(len(scene.objects))
    old = scene.objects[i]
    if old.colour and draw < 0.75:
        new = replace(old, colour=rng.choice(list(COLOURS)))
    else:
        new = replace(old, digit=rng.randrange(10))
    return replace(scene, objects=(*scene.objects[:i], new, *scene.objects[i + 1 :]))
