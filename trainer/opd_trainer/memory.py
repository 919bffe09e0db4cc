"""How much of a round fits on the device at once: measured, decided before the first round, and logged.

The largest part by far is what the student's forward passes keep for their backward passes: at Stable Diffusion 3.5
Medium's size 4 GiB an image and solver step, of which one pass holds several at a time. What a spec leaves open is
chosen so that this fits: first the number of images computed at once, then how many steps may wait for their teachers,
and recomputation only where nothing else helps, for it costs a third more arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from opd_core.api.training import Passes
from opd_core.device import is_out_of_memory
from opd_core.models.pipeline import Model
from torch import Tensor, nn

# Steps whose graphs wait for their teachers. Two hide a teacher as slow as student forward and backward together.
IN_FLIGHT = 2
# Of the room, for the allocator's fragments and for what forward and backward need for moments.
_SPARE = 0.1
_TOO_MUCH = 1 << 50  # bytes of a graph that did not fit while it was measured


@dataclass(frozen=True)
class Footprint:
    """Bytes that one image needs at one solver step.

    Args:
        graph: kept for backward. checkpointed: the same with gradient checkpointing.
        block: of the graph, the part of one block of the network: what is recomputed at a time then.
    """

    graph: int
    checkpointed: int
    block: int


@dataclass(frozen=True)
class Plan:
    """How one rank's images are computed.

    Args:
        micro_batch_size: images at once. in_flight: solver steps that may wait for their teachers.
        needed: estimated bytes of activations at the peak. room: bytes there are for them; None where nobody knows.
    """

    micro_batch_size: int
    gradient_checkpointing: bool
    in_flight: int
    needed: int
    room: int | None

    @property
    def fits(self) -> bool:
        return self.room is None or self.needed <= self.room

    def __str__(self) -> str:
        room = "" if self.room is None else f" of {self.room / 2**30:.1f} GiB"
        switch = "on" if self.gradient_checkpointing else "off"
        return (
            f"{self.micro_batch_size} at once, gradient checkpointing {switch}, "
            f"{self.in_flight + 1} graphs at most, {self.needed / 2**30:.2f} GiB{room} for activations"
            f"{'' if self.fits else '; this may be too much'}"
        )


def plan(
    footprint: Footprint,
    images: int,
    room: int | None,
    passes: Passes,
    micro_batch_size: int | None = None,
    gradient_checkpointing: bool | None = None,
) -> Plan:
    """The fastest way that fits; where none does, the smallest. What is given is not changed.

    Args:
        images: of one rank in a round. room: free bytes on its device; None: take all images at once.
    """
    sizes = [micro_batch_size] if micro_batch_size else [n for n in range(images, 0, -1) if images % n == 0]
    recompute = [gradient_checkpointing] if gradient_checkpointing is not None else [False, True]
    windows = range(IN_FLIGHT, -1, -1) if passes == Passes.ONE else [0]
    usable = None if room is None else int(room * (1 - _SPARE))
    plans = [
        Plan(size, recomputed, window, _needed(footprint, size, recomputed, window), usable)
        for recomputed in recompute
        for window in windows
        for size in sizes
    ]
    return next(
        (candidate for candidate in plans if candidate.fits), min(plans, key=lambda candidate: candidate.needed)
    )


def _needed(footprint: Footprint, images: int, recomputed: bool, window: int) -> int:
    kept = footprint.checkpointed if recomputed else footprint.graph
    return images * ((window + 1) * kept + footprint.block)


def measure(model: Model, forward: Callable[[int], Tensor]) -> Footprint:
    """What `forward` of one image keeps, with and without gradient checkpointing, which is off afterwards.

    Args:
        forward: the student's answer to so many images at one solver step, with its graph.
    """
    transformer, network = model.transformer, model.pipeline.transformer
    blocks = max((len(part) for part in network.children() if isinstance(part, nn.ModuleList)), default=1)
    transformer.enable_gradient_checkpointing()
    checkpointed = saved_bytes(transformer, lambda: forward(1))
    transformer.disable_gradient_checkpointing()
    try:
        graph = saved_bytes(transformer, lambda: forward(1))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Footprint(graph=_TOO_MUCH, checkpointed=checkpointed, block=checkpointed)
    return Footprint(graph=graph, checkpointed=checkpointed, block=-(-graph // blocks))


def saved_bytes(network: nn.Module, forward: Callable[[], Tensor]) -> int:
    """Bytes that the graph of `forward` keeps beside the parameters; a storage that is saved twice counts once."""
    own = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del result
    return found


def free_bytes(device: torch.device) -> int | None:
    """What PyTorch can still get on a GPU, its own cache included; None on a CPU, whose memory others share."""
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
