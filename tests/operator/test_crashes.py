"""The operator killed after every single write of a whole life: the same end as undisturbed."""

import pytest
from opd_operator import names

from tests.operator.world import STUDENT, World, adapter, teachers

NEXT = "sha256:" + "b" * 64


def life(world: World) -> World:
    """A failure, a disruption, a student in service, suspension, and a successor by canary."""
    world.settle().up(names.TEACHERS).run().fail(names.TRAINER, 1).wait(60)
    world.run().fail(names.TRAINER, 143).wait(60)
    world.run().finish(names.TRAINER, digest=STUDENT)
    world.finish(names.EVALUATOR, digest=STUDENT, gatePassed=True, scores=[]).up(names.ENDPOINT)
    world.edit(endpoint__replicas=2, suspend=True, endpoint__suspend=True).edit(endpoint__replicas=2).up(names.ENDPOINT)
    world.edit(endpoint__replicas=2, training__seed=7).up(names.TEACHERS).run().finish(names.TRAINER, digest=NEXT)
    world.finish(names.EVALUATOR, digest=NEXT, gatePassed=True, scores=[])
    for _ in range(8):
        world.up(names.ENDPOINT).wait(61)
    return world


def teaching(world: World) -> World:
    """Two teachers side by side: one fails, one is disrupted, a suspension; then they teach, and one is trained anew."""
    policy = {"parallelTeachers": 2}
    world.settle().run(names.TEACH, "geneval").fail(names.TEACH, 1, teacher="geneval")
    world.run(names.TEACH, "ocr").fail(names.TEACH, 143, teacher="ocr").wait(60)
    world.taught("ocr")
    world.edit(teachers=teachers("geneval", "ocr"), runPolicy=policy, suspend=True)
    world.edit(teachers=teachers("geneval", "ocr"), runPolicy=policy)
    world.taught("geneval").up(names.TEACHERS).run()
    world.edit(teachers=teachers("aesthetic", "ocr"), runPolicy=policy).taught("aesthetic")
    return world.up(names.TEACHERS).run().finish(names.TRAINER, digest=STUDENT)


def end(world: World) -> tuple[object, ...]:
    children = {key: child.get("spec") for key, child in world.children.items() if child["kind"] != "Pod"}
    return world.status, children


UNDISTURBED = life(World(endpoint__replicas=2))


def test_the_undisturbed_life_ends_well():
    world = UNDISTURBED
    assert world.condition("Ready")[0] == "True"
    assert world.status["endpoint"]["stable"]["digest"] == NEXT
    assert (world.status["restarts"], world.status["run"]["attempt"]) == (0, 2)
    assert world.writes > 60


TEACHING = {"teachers": teachers("geneval", "ocr"), "runPolicy": {"parallelTeachers": 2}}
TAUGHT = teaching(World(**TEACHING))


def test_the_undisturbed_teachers_teach():
    assert TAUGHT.condition("Trained")[0] == "True"
    assert {row["name"]: row["digest"] for row in TAUGHT.status["teaching"]} == {
        name: adapter(name) for name in ("aesthetic", "ocr")
    }


@pytest.mark.parametrize("k", range(1, TAUGHT.writes + 1))
def test_killed_after_write_while_teachers_are_trained(k):
    world = World(**TEACHING)
    world.crash_at = k
    assert end(teaching(world)) == end(TAUGHT)


@pytest.mark.parametrize("k", range(1, UNDISTURBED.writes + 1))
def test_killed_after_write(k):
    world = World(endpoint__replicas=2)
    world.crash_at = k
    assert end(life(world)) == end(UNDISTURBED)
