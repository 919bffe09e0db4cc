"""The DeepSpeed engine: what is trained, its optimiser, and nothing else.

The engine is given the adapter's parameters alone, in float32. The frozen base stays outside: DeepSpeed neither casts
nor broadcasts nor saves it, and the parameters are their own masters whatever the arithmetic of the forward pass
(`precision`). Gradients therefore accumulate in float32 under every ZeRO stage; DeepSpeed's own bf16 mode sums them in
bf16, which is too coarse for the small differences that are trained here.
"""

import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from opd_core.api.training import LearningRateSchedule, Optimizer
from opd_core.imports import without_collection
from torch import Tensor, nn

# A collective waits for the slowest rank, and a rank may wait ten minutes for its teachers.
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among all training processes. `device`: of the tensors that it exchanges with the others."""

    rank: int
    size: int
    local_rank: int
    device: str = "cpu"


ALONE = World(0, 1, 0)


def join(device: str) -> World:
    """Join the process group of the environment without DeepSpeed; without one, this process is all there is."""
    kind = torch.device(device).type
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return World(0, 1, 0, kind)
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]), kind)
    if kind == "cuda":
        torch.cuda.set_device(world.local_rank)
    torch.distributed.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_COLLECTIVE_TIMEOUT)
    return world


def init_distributed(device: str) -> World:
    """Join the process group of the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT)."""
    kind = torch.device(device).type
    os.environ["DS_ACCELERATOR"] = kind  # guessing it prints warnings and may guess wrong
    with without_collection():
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On a CPU DeepSpeed compiles a shared-memory collective that only inference uses: without a compiler it cannot
    # start, with one the first start takes a minute, and its buffers stay behind in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Whatever the optimiser, DeepSpeed imports its Muon, which asks for torch.compile on import: two seconds of
    # inductor for functions that nobody calls.
    deepspeed.runtime.compiler.compile = lambda: lambda function: function
    world = World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]), kind)
    if kind == "cuda":
        torch.cuda.set_device(world.local_rank)
    if world.size > 1 and world.local_rank == 0:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"rank {world.rank} of {world.size} meets the others at {place}", flush=True)
    deepspeed.init_distributed(timeout=_COLLECTIVE_TIMEOUT, verbose=False)
    return world


class Engine:
    """One optimiser step from many backward passes."""

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Optimizer, zero_stage: int) -> None:
        import deepspeed

        if any(parameter.dtype != torch.float32 for parameter in parameters):
            raise TypeError("trained parameters must be float32: they are their own master copies")
        self.parameters = list(parameters)
        numel = sum(parameter.numel() for parameter in self.parameters)
        # torch's AdamW: DeepSpeed's own would be compiled on first use.
        adamw = torch.optim.AdamW(
            self.parameters,
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
        )
        self._engine, *_ = deepspeed.initialize(
            model=nn.ParameterList(self.parameters),
            model_parameters=self.parameters,
            optimizer=adamw,
            config={
                # The loss is already a mean over this rank's images, and backward passes of a round add up.
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": optimizer.max_grad_norm,
                # DeepSpeed allocates the whole bucket: 2 GB by default, for 75 MB of a LoRA's gradient.
                "zero_optimization": {"stage": zero_stage, "reduce_bucket_size": numel},
            },
        )
        self._zero_stage = zero_stage

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of a scalar loss. `last`: the optimiser step comes next; ranks are averaged then."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> float:
        """Clip, update and clear. Returns the gradient's norm before clipping; NaN, and no update, where that is not
        finite."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        # Without ZeRO the engine clips but does not say from which norm.
        norm = self._total_norm() if self._zero_stage == 0 else None
        if norm is not None and not math.isfinite(norm):  # ZeRO looks for itself
            for parameter in self.parameters:
                parameter.grad = None
            return math.nan
        self._engine.step()
        norm = self._engine.get_global_grad_norm() if norm is None else norm
        return float(norm) if norm is not None and math.isfinite(norm) else math.nan

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """torch's own: of all parameters, or under ZeRO of this rank's flat part of them."""
        outer = self._engine.optimizer
        base: torch.optim.Optimizer = getattr(outer, "optimizer", outer)
        return base

    def optimizer_state(self) -> dict[str, Tensor]:
        """This rank's moments and step counts, by parameter and name."""
        state = self.optimizer.state_dict()["state"]
        return {f"{i}.{name}": tensor for i, of_one in state.items() for name, tensor in of_one.items()}

    @torch.no_grad()
    def restore(self, parameters: Sequence[Tensor], optimizer_state: Mapping[str, Tensor]) -> None:
        """Continue with what `parameters` and `optimizer_state` were when they were saved. All ranks must call it.

        Raises:
            ValueError: they are of other parameters.
        """
        copy_all(parameters, self.parameters)
        if self._zero_stage > 0:  # its masters are copies
            self._engine.optimizer.refresh_fp32_params()
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in optimizer_state.items():
            i, _, name = key.partition(".")
            state.setdefault(int(i), {})[name] = tensor
        owned = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        shapes = {i: parameter.shape for i, parameter in enumerate(owned)}
        found = {(i, tensor.shape) for i, of_one in state.items() for tensor in of_one.values() if tensor.ndim > 0}
        if state and found != set(shapes.items()):  # none at all before the first step: torch makes it then
            raise ValueError("the optimizer's state is of other parameters")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _total_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def close(self) -> None:
        self._engine.destroy()


@torch.no_grad()
def copy_all(values: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Every number of `values` to `targets`.

    Raises:
        ValueError: their shapes differ.
    """
    found, wanted = ([tuple(tensor.shape) for tensor in tensors] for tensors in (values, targets))
    if found != wanted:
        raise ValueError(f"{len(found)} tensors do not have the shapes of the {len(wanted)} parameters")
    for value, target in zip(values, targets, strict=True):
        target.copy_(value)


def learning_rate(optimizer: Optimizer, rounds: int, round_: int) -> float:
    """Of the round with index `round_`: linear warm-up, then constant or a cosine that ends at zero."""
    if round_ < optimizer.warmup_rounds:
        return optimizer.learning_rate * (round_ + 1) / optimizer.warmup_rounds
    if optimizer.schedule == LearningRateSchedule.CONSTANT:
        return optimizer.learning_rate
    progress = (round_ - optimizer.warmup_rounds) / (rounds - optimizer.warmup_rounds)
    return optimizer.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def all_reduce(values: Tensor, world: World) -> Tensor:
    """Sum over ranks."""
    if world.size > 1:
        torch.distributed.all_reduce(values)
    return values


def total(value: float, world: World) -> float:
    """Sum over ranks of one number."""
    return float(all_reduce(torch.tensor([value], dtype=torch.float64, device=world.device), world))


def maximum(value: float, world: World) -> float:
    """Largest over ranks of one number."""
    largest = torch.tensor([value], dtype=torch.float64, device=world.device)
    if world.size > 1:
        torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return float(largest)


def broadcast(value: int, world: World) -> int:
    """The number that rank 0 has."""
    shared = torch.tensor([value], device=world.device)
    if world.size > 1:
        torch.distributed.broadcast(shared, 0)
    return int(shared)


def barrier(world: World) -> None:
    if world.size > 1:
        torch.distributed.barrier()


def is_peer_loss(error: BaseException) -> bool:
    """Whether a collective or the rendezvous failed because another rank is gone or silent.

    Gloo has no exception of its own: its RuntimeErrors begin with the source file that raised them.
    """
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error).partition("]")[0]
    )


def shutdown() -> None:
    """End the process group of this process, if there is one; another may be joined after it."""
    if not torch.distributed.is_initialized():
        return
    deepspeed = sys.modules.get("deepspeed")
    if deepspeed is not None and deepspeed.comm.is_initialized():  # it keeps groups that would outlive torch's
        deepspeed.comm.destroy_process_group()
    else:
        torch.distributed.destroy_process_group()
