"""Positive-direction matching: the positive prediction and the direction of guidance, each matched with the teacher's
(PDM; "Rethinking Classifier-Free Guidance in On-Policy Diffusion Distillation", arXiv 2607.24731).

With the branches v+ (told the prompt) and v- (told the negative one), d = v+ - v-, and e = v_S - v_T of each,

    l = |e+|^2 + lambda |d_S - d_T|^2 = |e+|^2 + lambda |e+ - e-|^2

is zero only where both branches are matched, so at every guidance. The distance of guided velocities, which is
|g e+ + (1 - g) e-|^2 for classifier-free guidance g, is also zero where the errors of the two branches cancel. They are
equal at lambda = g^2 - 1 where the negative branches agree.

The paper's are the formula and lambda = 1, the best of its ablation. Ours: means over elements in the place of sums, as
in all other objectives; a teacher's own guidance scale does not enter, since the branches do not know it.
"""

from torch import Tensor

from opd_trainer.objectives.match import Loss, Match, Objective


def pdm(direction_weight: float) -> Loss:
    """`direction_weight`: lambda."""

    def loss(match: Match) -> Tensor:
        assert match.branches is not None
        positive, negative = (match.branches.student - match.branches.target).unbind(1)
        return _mean_square(positive) + direction_weight * _mean_square(positive - negative)

    return loss


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


PDM = Objective(pdm(1.0), of_branches=pdm)
