"""Which role sees which GPU, where a machine has several: a teacher server beside a rank takes memory and time from it.

A program that is given no device by its own number takes the first one that it sees, so a role is placed by
CUDA_VISIBLE_DEVICES alone. The evaluator and the endpoint have the machine to themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Placement:
    """GPUs of the trainer and of each teacher server, as CUDA_VISIBLE_DEVICES names them; none where there are none."""

    trainer: tuple[str, ...]
    servers: tuple[str, ...]

    def env_of_server(self, number: int) -> Mapping[str, str]:
        return {VISIBLE: self.servers[number]} if self.servers else {}

    @property
    def env_of_trainer(self) -> Mapping[str, str]:
        return {VISIBLE: ",".join(self.trainer)} if self.trainer else {}

    def __str__(self) -> str:
        shared = sorted({*self.trainer} & {*self.servers})
        where = [f"trainer on GPU {', '.join(self.trainer)}"]
        where += [f"teachers-{i} on GPU {gpu}" for i, gpu in enumerate(self.servers)]
        return "; ".join(where) + (f"; GPU {', '.join(shared)} is shared" if shared else "")


def place(gpus: Sequence[str], ranks: int, servers: int) -> Placement:
    """The first GPUs are the ranks', one each; the teacher servers take turns on the others.

    Where none is left they take turns on all, from the last to the first: rank 0 encodes and writes for the others.
    """
    trainer = tuple(gpus[:ranks])
    free = list(gpus[ranks:]) or list(reversed(gpus))
    return Placement(trainer, tuple(free[i % len(free)] for i in range(servers)) if free else ())


def visible(count: int, variable: str | None) -> tuple[str, ...]:
    """Names of the `count` GPUs that PyTorch sees. `variable`: CUDA_VISIBLE_DEVICES of this process, if it is set."""
    names = [name.strip() for name in variable.split(",")] if variable else [str(i) for i in range(count)]
    return tuple(names[:count])
