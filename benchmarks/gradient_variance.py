"""How much the gradients of the KL and of its policy gradients vary from round to round, at one student.

    python benchmarks/gradient_variance.py [--rounds 64] [--after 30] [--write]

All three have one expectation (tests/trainer/test_objectives.py). The student of the quickstart's example, on the paper's
SDE (noise level 0.7), first learns `--after` rounds by the KL; then its weights stand still, and every round gives the
gradient of each objective at the same prompts, states and noise. Noise over signal is E |g - E g|^2 / |E g|^2, with E g
the KL's mean: what the optimiser has to average away. The ratio to the KL's is how many rounds a policy gradient needs
for one round of the KL, as far as variance decides.
"""

import argparse
import os
from pathlib import Path

import torch
import yaml
from figures import write
from opd_core.api.load import check_spec
from opd_core.ports import free_ports
from opd_trainer.engine import init_distributed, shutdown
from opd_trainer.loop import play_round
from opd_trainer.methods.distillation import Distillation
from opd_trainer.objectives.policy import POLICY_GRADIENT, PPO
from opd_trainer.objectives.squared import KL
from opd_trainer.run import Run
from opd_trainer.setup import build_run
from torch import Tensor

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny" / "distill.yaml"
OBJECTIVES = {"KL": KL, "PPO": PPO, "PolicyGradient": POLICY_GRADIENT}
RATE = 1e-3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=64)
    options.add_argument("--after", type=int, default=30)
    options.add_argument("--write", action="store_true", help="keep the figures in docs/figures")
    arguments = options.parse_args()
    run = student()
    for round_ in range(arguments.after):
        play_round(run, round_)
        run.engine.step(RATE)
    found: dict[str, list[Tensor]] = {name: [] for name in OBJECTIVES}
    for round_ in range(arguments.after, arguments.after + arguments.rounds):
        for name, objective in OBJECTIVES.items():
            found[name].append(gradient(run, objective.loss, round_))
    run.method.close()
    run.engine.close()
    shutdown()

    variance = {name: torch.stack(each).double().var(0).sum() for name, each in found.items()}
    mean = torch.stack(found["KL"]).double().mean(0)
    signal = mean.square().sum() - variance["KL"] / arguments.rounds  # without what is left of the noise in the mean
    noise = {name: float(each / signal) for name, each in variance.items()}
    lines = ["| objective | noise over signal | x KL |", "|---|---:|---:|"]
    lines += [f"| `{name}` | {value:.3g} | {value / noise['KL']:.3g} |" for name, value in noise.items()]
    print("\n".join(lines))
    if arguments.write:
        ratios = {f"{name}_ratio": f"{value / noise['KL']:.3g}" for name, value in noise.items() if name != "KL"}
        write("gradient_variance", {**ratios, "rounds": str(arguments.rounds)}, lines)


def student() -> Run:
    """The example's run in this process, under the paper's SDE and KL."""
    content = yaml.safe_load(EXAMPLE.read_text())
    content["spec"]["teacherServing"]["placement"] = "InProcess"
    sampler = {"type": "SDE", "steps": 4, "noiseLevel": 0.7}
    content["spec"]["training"].update(sampler=sampler, objective={"type": "KL"})
    (port,) = free_ports(1)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    return build_run(check_spec(content).spec, EXAMPLE.parent, [], "cpu", init_distributed("cpu"))


def gradient(run: Run, loss: object, round_: int) -> Tensor:
    """[P] of one round; the weights stay."""
    assert isinstance(run.method, Distillation)
    run.method.loss = loss  # type: ignore[assignment]
    play_round(run, round_)
    parts = [parameter.grad.flatten().clone() for parameter in run.engine.parameters if parameter.grad is not None]
    for parameter in run.engine.parameters:
        parameter.grad = None
    return torch.cat(parts)


if __name__ == "__main__":
    main()
