"""trainer.data.order: every window exactly once per epoch, in an order that is a pure function."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import DataError
from trainer.data.loader import batch_numbers
from trainer.data.order import WindowOrder, derive_key, micro_batch_numbers, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_a_permutation(size: int, key: int):
    image = permute(np.arange(size, dtype=np.int64), size, key)
    assert sorted(image) == list(range(size))
    one = np.array([size // 2], dtype=np.int64)
    assert permute(one, size, key)[0] == image[size // 2]


@given(
    shards=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    length=st.integers(1, 40),
    group=st.integers(1, 5),
    seed=st.integers(0, 99),
)
@settings(max_examples=80, deadline=None)
def test_each_epoch_visits_every_window_once(shards: list[int], length: int, group: int, seed: int):
    if sum(shards) <= length:
        with pytest.raises(DataError, match="fewer than one window"):
            WindowOrder(shards, length, seed, group, "set")
        return
    order = WindowOrder(shards, length, seed, group, "set")
    assert order.windows == (sum(shards) - 1) // length
    found = order.locate(np.arange(3 * order.windows, dtype=np.int64))
    windows = order.first_window[found.shard] + found.window
    for epoch in range(3):
        assert sorted(windows[epoch * order.windows : (epoch + 1) * order.windows]) == list(range(order.windows))
    # A window belongs to the shard that holds its first token.
    starts = np.concatenate([[0], np.cumsum(shards)])
    assert np.all(starts[found.shard] <= windows * length)
    assert np.all(windows * length < starts[found.shard + 1])


def test_epochs_and_seeds_differ_and_seeking_does_not():
    order = WindowOrder([5000, 5000, 700], 10, 1, 2, "set")
    numbers = np.arange(2 * order.windows, dtype=np.int64)
    whole = order.locate(numbers)
    piecewise = [order.locate(numbers[i : i + 7]) for i in range(0, len(numbers), 7)]
    assert np.array_equal(whole.window, np.concatenate([piece.window for piece in piecewise]))
    assert np.array_equal(whole.shard, np.concatenate([piece.shard for piece in piecewise]))
    assert not np.array_equal(whole.window[: order.windows], whole.window[order.windows :])
    other = WindowOrder([5000, 5000, 700], 10, 2, 2, "set").locate(numbers)
    assert not np.array_equal(whole.window, other.window)


def test_few_shards_are_in_use_at_a_time_and_announced():
    order = WindowOrder([1000] * 50, 10, 3, 4, "set")
    found = order.locate(np.arange(order.windows, dtype=np.int64))
    for first in range(0, order.windows, 100):
        in_use = set(found.shard[first : first + 100].tolist())
        assert len(in_use) <= 8
        assert in_use <= set(order.shards_from(first, 8))
    assert len(order.shards_from(0, 1000)) == 50


def test_ten_trillion_tokens_take_a_few_numbers_per_shard():
    shards = 10**13 // (1 << 27)
    order = WindowOrder([1 << 27] * shards, 1024, 5, 4, "set")
    found = order.locate(np.array([0, 10**9, order.windows - 1, order.windows + 5], dtype=np.int64))
    assert np.all((found.shard >= 0) & (found.shard < shards))
    plan = order._plan(0)
    held = order.starts.nbytes + order.first_window.nbytes + order.shard_windows.nbytes + plan.shard_order.nbytes
    assert held + plan.group_starts.nbytes < 40 * shards


def test_the_order_is_pinned():
    """Resuming a run under a newer release must visit the same windows: these numbers may never change."""
    order = WindowOrder([1000, 640, 333], 16, 1337, 2, "set")
    found = order.locate(np.arange(8, dtype=np.int64))
    assert (found.shard * 1000 + found.window).tolist() == PINNED
    assert derive_key(1337, 0, 1) == PINNED_KEY


PINNED = [2010, 1032, 2006, 1031, 2012, 1006, 2002, 1022]
PINNED_KEY = 15270377480210099868


def test_a_step_whose_batch_is_left_out_takes_the_next_one():
    steps = np.arange(6)
    assert batch_numbers(steps, []).tolist() == [0, 1, 2, 3, 4, 5]
    assert batch_numbers(steps, [3]).tolist() == [0, 1, 3, 4, 5, 6]
    # The one that moved up is left out too: batches 2 and 3 belong to steps 3 and 4.
    assert batch_numbers(steps, [3, 4]).tolist() == [0, 1, 4, 5, 6, 7]
    assert batch_numbers(np.array([10]), [1, 2, 12]).tolist() == [13]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
@pytest.mark.parametrize("dealt", [False, True])
def test_every_micro_batch_is_somebodys(world: int, dealt: bool):
    numbers = [micro_batch_numbers(rank, world, 24 // world, dealt) for rank in range(world)]
    assert sorted(number for each in numbers for number in each) == list(range(24))
    assert all(each == sorted(each) for each in numbers)
    if dealt and world == 2:  # four turns of three
        assert numbers[1] == [3, 4, 5, 9, 10, 11, 15, 16, 17, 21, 22, 23]
