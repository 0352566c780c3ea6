"""Which weights are read ahead: those that follow, in order, none twice, and no more than there is room for."""

from __future__ import annotations

import torch

from trl_turbo.engine.decode_ahead import Ahead

SIZES = (40, 16, 100, 60)  # bytes of a layer's weights


def weights(layers=2):
    return [torch.empty(size // 2, dtype=torch.bfloat16) for _ in range(layers) for size in SIZES]


def place(made, taken):
    """The weight that a piece is of, and its bytes."""
    for i, weight in enumerate(made):
        start = taken.data_ptr() - weight.data_ptr()
        if 0 <= start < weight.nbytes:
            return i, start, start + taken.nbytes
    raise AssertionError("a piece of no weight")


def test_pieces_follow_each_other_and_end_with_their_weight():
    made = weights()
    ahead = Ahead(made, 1000)
    ahead.reads(made[0])
    found = [place(made, ahead.take(most)) for most in (10, 10, 30, 80)]
    assert found == [(1, 0, 10), (1, 10, 16), (2, 0, 30), (2, 30, 100)]
    # What was read meanwhile is not asked for, and what was asked for is not asked for again
    ahead.reads(made[1])
    assert place(made, ahead.take(8)) == (3, 0, 8)
    ahead.reads(made[3])
    assert place(made, ahead.take(8)) == (4, 0, 8)


def test_no_more_than_there_is_room_for():
    made = weights()
    ahead = Ahead(made, 30)
    ahead.reads(made[0])
    assert [place(made, ahead.take(20)), place(made, ahead.take(20))] == [(1, 0, 16), (2, 0, 14)]
    assert ahead.take(20) is None
    ahead.reads(made[1])
    assert place(made, ahead.take(100)) == (2, 14, 30)


def test_the_end_of_a_step_and_the_next_one():
    made = weights(1)
    ahead = Ahead(made, 1000)
    for _ in range(2):
        ahead.reads(made[0])
        assert place(made, ahead.take(100)) == (1, 0, 16)
        ahead.reads(made[-1])
        assert ahead.take(100) is None


def test_unknown_and_scattered_weights_and_no_room_at_all():
    made = weights(1)
    scattered = torch.empty(8, 8, dtype=torch.bfloat16).t()[:, :4]
    ahead = Ahead([made[0], scattered, made[1]], 1000)
    ahead.reads(made[0])
    ahead.reads(scattered)
    assert place(made, ahead.take(100)) == (1, 0, 16)
    nothing = Ahead.of(made)  # a CPU has no such memory
    nothing.reads(made[0])
    assert nothing.take(100) is None
    assert Ahead((), 0).take(100) is None
