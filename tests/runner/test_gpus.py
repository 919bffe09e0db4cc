"""Who sees which GPU of a machine with several: a decision, so no GPU is needed."""

import pytest
from opd_cli.runner.gpus import Placement, place, visible

EIGHT = tuple("01234567")


@pytest.mark.parametrize(
    ("gpus", "ranks", "servers", "trainer", "teachers"),
    [
        (EIGHT, 5, 3, "01234", "567"),  # Dedicated: three bases on three GPUs of their own
        (EIGHT, 6, 3, "012345", "676"),  # one of the free ones has two
        (EIGHT, 1, 1, "0", "1"),
        (EIGHT, 8, 2, EIGHT, "76"),  # none is free: rank 0 shares last
        (("0",), 1, 3, "0", "000"),
        (("4", "GPU-b"), 1, 1, ("4",), ("GPU-b",)),
        (EIGHT, 2, 0, "01", ""),  # teachers inside the trainer
        ((), 1, 2, "", ""),  # a CPU
        (("0", "1"), 4, 1, "01", "1"),  # the trainer refuses four ranks itself
    ],
)  # fmt: skip
def test_ranks_first_then_teachers(
    gpus: tuple[str, ...], ranks: int, servers: int, trainer: tuple[str, ...], teachers: tuple[str, ...]
) -> None:
    assert place(gpus, ranks, servers) == Placement(tuple(trainer), tuple(teachers))


def test_roles_are_placed_by_their_environment() -> None:
    placement = place(EIGHT, 6, 2)
    assert placement.env_of_trainer == {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5"}
    assert [placement.env_of_server(i)["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["6", "7"]
    assert str(placement) == "trainer on GPU 0, 1, 2, 3, 4, 5; teachers-0 on GPU 6; teachers-1 on GPU 7"
    without = place((), 1, 2)
    assert (without.env_of_trainer, without.env_of_server(1)) == ({}, {})


def test_a_shared_gpu_is_told() -> None:
    assert str(place(("0",), 1, 1)) == "trainer on GPU 0; teachers-0 on GPU 0; GPU 0 is shared"


def test_what_the_user_has_left_visible_keeps_its_names() -> None:
    assert visible(3, None) == ("0", "1", "2")
    assert visible(2, "4, 7") == ("4", "7")
    assert visible(1, "4,-1,7") == ("4",)  # PyTorch stops at the first that is none
    assert visible(0, "") == ()
