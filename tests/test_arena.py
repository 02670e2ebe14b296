"""Memory is given out again only when nobody can see it any more."""

import gc

import jax
import numpy as np
import pytest

from gdjax import arena
from gdjax.arena import ALIGNED, LEAST, aligned, aligned_empty, aligned_together
from gdjax.placed import give


@pytest.fixture
def kept(monkeypatch):
    fresh = arena.Arena()
    monkeypatch.setattr("gdjax.arena.ARENA", fresh)
    return fresh.free


def test_a_block_comes_back_when_its_last_view_is_gone(kept):
    whole = aligned_empty((1 << 20,), np.float32)
    place, part = whole.ctypes.data, whole.reshape(2, -1)[1, 10:20]
    del whole
    assert not kept
    part[...] = 7
    del part
    assert len(kept) == 1
    again = aligned_empty((1 << 20,), np.float32)
    assert again.ctypes.data == place
    assert not kept


def test_a_jax_array_and_what_was_made_of_it_hold_their_block(kept):
    mine = aligned_empty((1 << 20,), np.float32)
    mine[...] = 3
    theirs = give(mine, jax.devices("cpu")[0])
    del mine
    gc.collect()
    assert not kept
    seen = np.asarray(theirs)
    del theirs
    gc.collect()
    assert not kept
    other = aligned_empty((1 << 20,), np.float32)
    other[...] = 5
    assert np.all(seen == 3)
    del seen, other
    gc.collect()
    assert len(kept) == 2


def test_no_more_than_the_limit_is_kept(kept, monkeypatch):
    monkeypatch.setattr(arena, "LIMIT", 5 << 20)
    blocks = [aligned_empty((2 << 20,), np.uint8) for _ in range(4)]
    del blocks
    assert 0 < sum(block.size for block in kept) <= 5 << 20


def test_small_arrays_are_left_to_the_system(kept):
    small = aligned_empty((1000,), np.float32)
    del small
    assert not kept


@pytest.mark.parametrize("count", [0, 1, 37, LEAST])
def test_arrays_that_are_made_together_do_not_touch(kept, count):
    wanted = [((count,), np.float32), ((count, 3), np.float32), ((), np.int32), ((count,), np.int8)]
    arrays = aligned_together(wanted)
    assert [(array.shape, array.dtype) for array in arrays] == [(shape, np.dtype(dtype)) for shape, dtype in wanted]
    assert all(map(aligned, arrays))
    for number, array in enumerate(arrays):
        array[...] = number
    assert all(np.all(array == number) for number, array in enumerate(arrays))
    del array, arrays
    assert len(kept) == (3 if count == LEAST else 0), "large ones lie in blocks of their own, to come back one by one"


def test_nothing_is_made_together_of_nothing(kept):
    assert aligned_together([]) == []
    assert ALIGNED <= LEAST
