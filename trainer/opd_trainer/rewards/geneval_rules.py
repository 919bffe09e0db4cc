"""GenEval's verdict on the objects that a detector found (Ghosh et al. 2023, arXiv 2310.11513): no network in here.

A prompt's record holds GenEval's own metadata: `include`, a list of {class, count, color, position: [relation, index of
an earlier clause]}, and optionally `exclude`, a list of {class, count}. Objects are those of one image, of any class.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot
from typing import Any, NamedTuple

from opd_core.errors import InvalidError
from torch import Tensor

# COCO's classes by index, under the names that GenEval's prompts use: "computer mouse" is COCO's "mouse".
_NAMES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop
    sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack,
    umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove,
    skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple,
    sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining
    table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone, microwave, oven,
    toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
OBJECT_NAMES = tuple(" ".join(_NAMES.split()).split(", "))
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9  # of records with the tag "counting", against doubles
MOST = 16  # objects of a class
MARGIN = 0.1  # of both objects' sizes together, by which centres must differ
MOSTLY = 0.5  # share of the distance between the centres that must lie in a relation's direction


@dataclass(frozen=True, eq=False)
class Found:
    """One object: class name, confidence, box (left, top, right, bottom) in pixels, mask [H, W] if known."""

    name: str
    confidence: float
    box: tuple[float, float, float, float]
    mask: Tensor | None = None


ColoursOf = Callable[[Sequence[Found]], list[str]]


class Verdict(NamedTuple):
    """Of one clause: the objects that meet it, None where something fails; `terms` of Flow-GRPO's reward."""

    objects: Sequence[Found] | None
    terms: list[float]


def check_record(record: Mapping[str, Any], prompt: str) -> None:
    """Raises InvalidError for a record that no image can ever meet."""
    if not record.get("include"):
        raise InvalidError(f'reward geneval: the record of prompt {prompt!r} has no GenEval metadata ("include")')
    for number, clause in enumerate(record["include"]):
        where = f"reward geneval: the record of prompt {prompt!r}, include[{number}]"
        if clause.get("class") not in OBJECT_NAMES:
            raise InvalidError(f"{where}: class {clause.get('class')!r} is none of GenEval's 80 object names")
        if "color" in clause and clause["color"] not in COLOURS:
            raise InvalidError(f"{where}: color {clause['color']!r}; GenEval knows {', '.join(COLOURS)}")
        if "position" in clause and clause["position"][1] not in range(number):
            raise InvalidError(f"{where}: position refers to include[{clause['position'][1]}], which is no earlier one")


def correct(record: Mapping[str, Any], found: Sequence[Found], colours_of: ColoursOf) -> bool:
    """GenEval's official verdict: at least as many objects as wanted, the most confident of them in the wanted colour
    and place, and nothing excluded. Colour and place of a clause are judged on its `count` most confident objects."""
    objects = by_class(record, found)
    groups: list[Sequence[Found] | None] = []
    for clause in record["include"]:
        best: Sequence[Found] | None = objects.get(clause["class"], [])[: clause["count"]]
        if best is not None and len(best) < clause["count"]:
            best = None
        if best is not None and "color" in clause and colours_of(best).count(clause["color"]) < clause["count"]:
            best = None
        if best is not None and "position" in clause and not _placed(best, clause["position"], groups):
            best = None
        groups.append(best)
    excluded = any(len(objects.get(c["class"], [])) >= c["count"] for c in record.get("exclude", []))
    return None not in groups and not excluded


def flow_grpo_score(
    record: Mapping[str, Any], found: Sequence[Found], colours_of: ColoursOf, *, as_published: bool = False
) -> float:
    """Flow-GRPO's shaped reward (yifan123/reward-server, `score`): the mean over what the clauses ask for, with counts
    exact; at most 1, and negative where there are far too many objects. `exclude` does not matter.

    Args:
        as_published: with its defect: a wrong place counts 0 and then 1, so that it still earns half of that term.
    """
    objects = by_class(record, found)
    groups: list[Sequence[Found] | None] = []
    terms: list[float] = []
    for clause in record["include"]:
        verdict = _clause_score(clause, objects.get(clause["class"], []), groups, colours_of, as_published)
        groups.append(verdict.objects)
        terms += verdict.terms
    return sum(terms) / len(terms)


def _clause_score(
    clause: Mapping[str, Any],
    of_class: Sequence[Found],
    groups: Sequence[Sequence[Found] | None],
    colours_of: ColoursOf,
    as_published: bool,
) -> Verdict:
    count = clause["count"]
    terms = [1 - abs(count - len(of_class)) / count]
    if len(of_class) != count:
        return Verdict(None, [*terms, 0.0] if "color" in clause or "position" in clause else terms)
    if "color" in clause:
        right = colours_of(of_class).count(clause["color"])
        terms.append(1 - abs(count - right) / count)
        if right != count:
            return Verdict(None, terms)
    if "position" in clause:
        placed = _placed(of_class, clause["position"], groups)
        no_target = groups[clause["position"][1]] is None
        terms += [1.0] if placed else [0.0, 1.0] if as_published and not no_target else [0.0]
        if not placed:
            return Verdict(None, terms)
    return Verdict(of_class, terms)


def by_class(record: Mapping[str, Any], found: Sequence[Found]) -> dict[str, list[Found]]:
    """Objects that are sure enough, the surest first."""
    threshold = COUNTING_THRESHOLD if record.get("tag") == "counting" else THRESHOLD
    objects: dict[str, list[Found]] = {}
    for each in sorted(found, key=lambda f: -f.confidence):
        if each.confidence > threshold:
            objects.setdefault(each.name, []).append(each)
    return {name: of_class[:MOST] for name, of_class in objects.items()}


def relations(of: Found, to: Found) -> set[str]:
    """Where `of` lies as seen from `to`: among "left of", "right of", "above", "below".

    Of the offset between the centres, `MARGIN` of the two sizes does not count; what is left must be more than `MOSTLY`
    of the whole distance. So "mostly below, a little to the right" is not "right of".
    """
    offset = [(of.box[i] + of.box[i + 2] - to.box[i] - to.box[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(of.box[i + 2] - of.box[i]) + abs(to.box[i + 2] - to.box[i]) for i in (0, 1)]
    beyond = [max(abs(d) - MARGIN * size, 0.0) for d, size in zip(offset, sizes, strict=True)]
    if max(beyond) < 1e-3:
        return set()
    distance = hypot(*offset)
    names = (("left of", "right of"), ("above", "below"))
    return {
        after if d > 0 else before
        for d, b, (before, after) in zip(offset, beyond, names, strict=True)
        if b / distance > MOSTLY
    }


def _placed(objects: Sequence[Found], position: Sequence[Any], groups: Sequence[Sequence[Found] | None]) -> bool:
    relation, target = position
    others = groups[target]
    return others is not None and all(relation in relations(each, other) for each in objects for other in others)
