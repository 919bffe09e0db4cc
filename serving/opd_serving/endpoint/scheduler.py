"""Which samples the next forward pass advances: step-level continuous batching as pure functions.

One *sample* is one image on its way from noise. A tick advances one group: samples whose tensors can share a batch,
whatever their prompt, step, step count, guidance or seed. Groups take turns, so a large image delays a small one by one
tick and not by its whole trajectory; within a group the oldest samples go first, so everyone finishes.
"""

from collections.abc import Container, Hashable, Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Sample:
    """`group`: what must match to share a batch (latent shape and text length). `step` of `steps` is the next one."""

    id: int
    group: Hashable
    steps: int
    step: int = 0


@dataclass(frozen=True)
class State:
    """`samples` in order of arrival; `turns`: groups with samples, the next one first."""

    samples: tuple[Sample, ...] = ()
    turns: tuple[Hashable, ...] = ()


def admit(state: State, samples: Iterable[Sample]) -> State:
    """New samples join; they may be in the next tick."""
    return _with(state, (*state.samples, *samples), state.turns)


def plan(state: State, max_batch_size: int) -> tuple[Sample, ...]:
    """The samples to advance by one step now; empty when there is nothing to do."""
    if not state.turns:
        return ()
    return tuple(sample for sample in state.samples if sample.group == state.turns[0])[:max_batch_size]


def advance(state: State, batch: tuple[Sample, ...]) -> tuple[State, tuple[Sample, ...]]:
    """The state after `batch` made its step, and the samples that are finished; the batch's group goes last."""
    moved = {sample.id: replace(sample, step=sample.step + 1) for sample in batch}
    samples = [moved.get(sample.id, sample) for sample in state.samples]
    finished = tuple(sample for sample in samples if sample.step == sample.steps)
    group = batch[0].group
    turns = (*(turn for turn in state.turns if turn != group), group)
    return _with(state, (sample for sample in samples if sample.step < sample.steps), turns), finished


def drop(state: State, ids: Container[int]) -> State:
    """Samples leave unfinished: cancelled, or their batch failed."""
    return _with(state, (sample for sample in state.samples if sample.id not in ids), state.turns)


def _with(state: State, samples: Iterable[Sample], turns: tuple[Hashable, ...]) -> State:
    kept = tuple(samples)
    alive = dict.fromkeys(sample.group for sample in kept)
    known = [turn for turn in turns if turn in alive]
    return replace(state, samples=kept, turns=(*known, *(group for group in alive if group not in known)))
