"""The interface through which the trainer asks its teachers, whoever answers."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from opd_core.conditioning import Conditioning
from opd_core.teachers.contract import ServiceInfo


@dataclass
class ClientStats:
    """Counted since the client was made."""

    requests: int = 0
    retries: int = 0
    registrations: int = 0


class TeacherClient(Protocol):
    stats: ClientStats

    def describe(self) -> ServiceInfo:
        """Who answers. Several servers must agree in all but the teachers they hold.

        Raises:
            UnavailableError: nobody answers. RefusedError: the servers disagree.
        """
        ...

    def submit(
        self,
        teacher: str,
        latents: Tensor,
        sigmas: Tensor,
        scales: Tensor,
        conditioning: Sequence[Conditioning],
        negative: Conditioning,
        base: bool = False,
        branches: bool = False,
    ) -> "Future[Tensor]":
        """Ask `teacher` for velocities at B states; returns at once.

        Args:
            latents: [B, *latent], any float dtype and device; sigmas: [B]; scales: [B, 2], as `Scales`.
            conditioning: B encoded prompts; negative: of the unconditional branch.
            base: the base of this teacher answers in its place.
            branches: the conditional and the unconditional velocity are answered, [B, 2, *latent], and not what
                guidance makes of them; every row must be guided.

        Returns:
            A future of velocities [B, *latent], or of both branches, float32 on the CPU, all finite. A missing,
            misshapen or non-finite answer makes it raise, never count as zero.
        """
        ...

    def stop_waiting(self) -> None:
        """From now on what fails is not asked again, and what is being asked again is given up: whoever asks has been
        told to stop. Safe in a signal handler."""
        ...

    def close(self) -> None: ...
