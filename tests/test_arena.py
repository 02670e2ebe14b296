"""Memory is given out again only when nobody can see it any more."""

import gc

import jax
import numpy as np
import pytest

from gdjax import arena
from gdjax.arena import aligned_empty
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
