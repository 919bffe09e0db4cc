"""Valid specs: round trips, digests, defaults, and a schema that bounds everything."""

import json
import random
from pathlib import Path
from typing import get_args

import pytest
import yaml
from annotated_types import MaxLen
from hypothesis import given, settings
from hypothesis import strategies as st
from opd_core.api import rules
from opd_core.api.load import SpecError, check_spec, dump_spec, load_spec, parse_spec, spec_digest
from opd_core.api.teachers import completed, trained_teachers
from opd_core.api.training import Algorithm, Sampler, TeacherTraining
from opd_core.api.types import OPDDistillation, Spec
from pydantic import BaseModel

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*/*.yaml"))
EXAMPLES = [file for file in EXAMPLES if file.stem in ("distill", "from-base")]


@pytest.mark.parametrize("example", EXAMPLES, ids=[f"{file.parent.name}/{file.stem}" for file in EXAMPLES])
def test_examples_are_valid_and_survive_a_round_trip(example):
    distillation = load_spec(example)
    again = parse_spec(yaml.safe_dump(dump_spec(distillation)))
    assert again == distillation
    assert spec_digest(again) == spec_digest(distillation)
    assert parse_spec(json.dumps(dump_spec(distillation))) == distillation


def test_the_sd35_example_is_the_papers_run(repository):
    spec = load_spec(repository / "examples" / "sd35" / "distill.yaml").spec
    training = spec.training
    assert (spec.student.adapter.rank, spec.student.adapter.alpha) == (32, 64)
    assert [teacher.guidance_scale for teacher in spec.teachers] == [1.0, 4.5, 4.5]
    assert (training.images_per_task, training.sampler.steps, training.guidance_scale) == (24, 10, 4.5)
    assert (training.optimizer.learning_rate, training.optimizer.weight_decay, training.ema.decay) == (
        3e-4,
        1e-4,
        0.961,
    )
    assert (training.resolution.width, training.world_size, spec.evaluation.sampler.steps) == (512, 8, 40)


def test_the_sd35_example_from_the_base_trains_the_papers_teachers(repository):
    spec = load_spec(repository / "examples" / "sd35" / "from-base.yaml").spec
    second_half = load_spec(repository / "examples" / "sd35" / "distill.yaml").spec
    assert (spec.training, spec.evaluation) == (second_half.training, second_half.evaluation)
    made = {teacher.name: teacher.training for teacher in trained_teachers(spec)}
    assert {name: training.algorithm for name, training in made.items()} == {
        "geneval": "DiffusionNFT",
        "ocr": "GRPOGuard",
        "aesthetic": "GRPOGuard",
    }
    assert {(each.group_size, each.prompts_per_round) for each in made.values()} == {(24, 48)}


def test_what_an_algorithm_uses_by_itself_is_its_authors():
    nft, flow, guard = (
        completed(TeacherTraining(algorithm=algorithm, rounds=1))
        for algorithm in (Algorithm.DIFFUSION_NFT, Algorithm.FLOW_GRPO, Algorithm.GRPO_GUARD)
    )
    assert (nft.sampler.solver, nft.sampler.noise_level, nft.steps_per_image) == ("DPM2", 0.0, 9)
    assert (nft.kl_weight, nft.clip_range) == (1e-4, None)
    assert (flow.sampler.type, flow.sampler.noise_level, flow.steps_per_image) == ("SDE", 0.7, 9)
    assert (flow.kl_weight, flow.clip_range) == (0.04, 1e-4)
    assert (guard.kl_weight, guard.clip_range) == (0.0, 2e-6)
    own = completed(
        TeacherTraining(algorithm=Algorithm.DIFFUSION_NFT, rounds=1, sampler=Sampler(steps=1), kl_weight=0.5)
    )
    assert (own.steps_per_image, own.kl_weight) == (1, 0.5)


MINIMAL = {
    "apiVersion": "opd.dev/v1alpha1",
    "kind": "OPDDistillation",
    "metadata": {"name": "minimal"},
    "spec": {
        "model": {"uri": "pvc://m/base"},
        "student": {"output": {"uri": "pvc://m/student"}},
        "teachers": [
            {"name": "a", "adapter": {"uri": "pvc://m/a"}, "prompts": {"uri": "pvc://m/a.txt"}, "rewards": ["ocr"]}
        ],
        "training": {"rounds": 10},
    },
}


def test_defaults_are_the_papers():
    training = check_spec(MINIMAL).spec.training
    assert (training.images_per_task, training.sampler.steps, training.sampler.noise_level) == (24, 10, 0.0)
    assert (training.optimizer.learning_rate, training.optimizer.max_grad_norm) == (3e-4, 1.0)
    assert training.objective.type == "MeanMatching"
    assert training.objective.trained_steps is None


def test_what_an_api_server_holds_is_a_spec():
    held = {**MINIMAL, "metadata": {"name": "minimal", "uid": "u", "generation": 3}, "status": {"phase": "Ready"}}
    assert check_spec(held).spec == check_spec(MINIMAL).spec


@pytest.mark.parametrize(("text", "number"), [("1e-3", 1e-3), ("3E-4", 3e-4), ("1.e-2", 1e-2), ("1.0e-3", 1e-3)])
def test_numbers_are_read_as_kubectl_reads_them(text, number):
    content = yaml.safe_dump(MINIMAL).replace("rounds: 10", f"rounds: 10\n    optimizer: {{learningRate: {text}}}")
    assert parse_spec(content).spec.training.optimizer.learning_rate == number


def test_the_api_servers_way_with_null_and_whole_numbers():
    content = json.loads(json.dumps(MINIMAL))
    content["spec"]["training"] = {"rounds": 10.0, "nodes": None, "microBatchSize": None}
    content["spec"]["endpoint"] = {"pod": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}
    spec = check_spec(content).spec
    assert (spec.training.rounds, spec.training.nodes, spec.training.micro_batch_size) == (10, 1, None)
    assert spec.endpoint.pod.resources.limits == {"nvidia.com/gpu": "1"}


def test_the_digest_ignores_order_and_written_out_defaults():
    shuffled = json.loads(json.dumps(MINIMAL))
    shuffled["spec"] = dict(reversed(shuffled["spec"].items()))
    written = dump_spec(check_spec(MINIMAL))
    other = json.loads(json.dumps(MINIMAL))
    other["spec"]["training"]["rounds"] = 11
    digests = [spec_digest(check_spec(content)) for content in (MINIMAL, shuffled, written, other)]
    assert digests[0] == digests[1] == digests[2] != digests[3]


def models_in(model: type[BaseModel]):
    yield model
    for field in model.model_fields.values():
        yield from (found for item in parts_of(field.annotation) for found in models_in(item))


def parts_of(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for item in get_args(annotation):
        yield from parts_of(item)


def test_every_field_is_described():
    for model in models_in(Spec):
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_every_text_list_and_map_is_bounded():
    """Kubernetes needs bounds to estimate the cost of its rules, and a server needs them anyway."""
    for model in models_in(Spec):
        for name, field in model.model_fields.items():
            for part in schema_parts(model.model_json_schema(by_alias=False)["properties"][name], model):
                if part.get("type") == "string" and "enum" not in part and "const" not in part:
                    assert "maxLength" in part or "pattern" in part, f"{model.__name__}.{name}"
                if part.get("type") == "array":
                    assert "maxItems" in part, f"{model.__name__}.{name}"
                if part.get("type") == "object" and "additionalProperties" in part and "properties" not in part:
                    assert "maxProperties" in part or any(isinstance(m, MaxLen) for m in field.metadata)


def schema_parts(schema, model):
    yield schema
    for key in ("anyOf", "items"):
        for part in schema.get(key, []) if key == "anyOf" else [schema.get(key, {})]:
            if part:
                yield from schema_parts(part, model)


# ---------------------------------------------------------------- properties


@st.composite
def contents(draw):
    """Specs with random training and evaluation parts; many are valid, many are not."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    content = json.loads(json.dumps(MINIMAL))
    steps = rng.randint(1, 12)
    content["spec"]["training"] = {
        "rounds": rng.randint(1, 50),
        "imagesPerTask": rng.choice([1, 2, 3, 4, 24]),
        "processesPerNode": rng.choice([1, 1, 2, 3]),
        "resolution": {"width": rng.choice([16, 20, 32, 512]), "height": rng.choice([16, 24, 512])},
        "sampler": {
            "type": rng.choice(["ODE", "SDE"]), "solver": rng.choice(["Flow", "Dance", "DDIM", "CPS", "DPM2"]),
            "steps": steps, "noiseLevel": rng.choice([0, 0, 0.4, 0.7, 1.5]),
        },
        "objective": {"type": rng.choice(["KL", "MeanMatching", "Velocity", "X0", "PPO", "PolicyGradient", "PDM"])},
        "optimizer": {"schedule": rng.choice(["Constant", "Cosine"]), "warmupRounds": rng.choice([0, 5, 60])},
    }  # fmt: skip
    if rng.random() < 0.5:
        content["spec"]["training"]["objective"]["trainedSteps"] = sorted({rng.randint(0, 12) for _ in range(3)})
    if rng.random() < 0.3:
        count = rng.choice([steps, steps, steps + 1])
        content["spec"]["training"]["objective"]["stepWeights"] = [rng.choice([0, 1, 2.5]) for _ in range(count)]
    if rng.random() < 0.3:
        content["spec"]["training"]["objective"]["stepsPerRound"] = rng.randint(1, 3)
    content["spec"]["training"]["objective"]["selfNormalized"] = rng.random() < 0.3
    method = content["spec"]["training"]["method"] = rng.choice(["OPD", "SFT", "DMD2", "TDM", "RL"])
    if method == "RL" or rng.random() < 0.1:
        content["spec"]["training"]["reinforcement"] = {"algorithm": rng.choice(["DiffusionNFT", "GRPOGuard"])}
    if rng.random() < 0.5:
        content["spec"]["training"]["microBatchSize"] = rng.choice([1, 2, 5])
    return content


@settings(max_examples=200, deadline=None)
@given(contents())
def test_what_is_accepted_can_be_trained(content):
    """No spec that validation takes is refused by the step weights that the trainer builds from it."""
    from opd_core.diffusion.schedule import schedule_from_config
    from opd_core.diffusion.transitions import transitions
    from opd_trainer.objectives.registry import load_loss, round_weights, step_weights

    try:
        distillation = check_spec(content)
    except SpecError as refusal:
        assert refusal.problems
        assert all(problem.path.startswith("spec.") and problem.remedy for problem in refusal.problems)
        return
    training = distillation.spec.training
    path = transitions(
        schedule_from_config({"shift": 3.0}, training.sampler.steps),
        training.sampler.solver,
        training.sampler.noise_level,
    )
    assert load_loss(training.objective, path)
    weights, drawn = step_weights(training.objective, len(path)), training.objective.steps_per_round
    assert any(weight > 0 for weight in round_weights(weights, drawn, training.seed, 0))
    assert check_spec(dump_spec(distillation)) == distillation
    assert rules.problems(distillation.spec) == []


def test_the_spec_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, opd_core.api.load, opd_core.roles, opd_core.stages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert isinstance(check_spec(MINIMAL), OPDDistillation)
