"""Memory that calls work in is used again and again: no call may see what another has left in it."""

import itertools
import threading
import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from problems import same_bits

import gdjax
from gdjax.arena import aligned_empty
from gdjax.engine import host, spares
from gdjax.engine.block import Pace
from gdjax.engine.cuts import pieces
from gdjax.kernel import squared_loss
from gdjax.placed import filled

RNG = np.random.default_rng(5)
RULES = [None, gdjax.stop.gradient_below(1e-3)]


def batch(count, dtype=np.float32):
    return [RNG.uniform(0.5, 1.5, count).astype(dtype) for _ in range(4)]


def solve(w, x, t, r, rule=None, steps=30):
    return gdjax.minimize(squared_loss, w, (x, t), learning_rate=r, steps=steps, stop=rule)


def answers(solution):
    return [np.asarray(leaf) for leaf in (solution.weights, solution.loss, solution.gradient_norm, solution.status)]


@pytest.mark.parametrize("rule", RULES, ids=["fixed", "stop"])
@pytest.mark.parametrize("count", [1, 100, 300, 2048, 5000])
def test_a_solution_stays_what_it_is_when_others_follow(count, rule):
    given = batch(count)
    first = solve(*given, rule)
    noted = [leaf.copy() for leaf in answers(first)]
    for other in (count, max(1, count // 2), count):
        solve(*batch(other), rule)
    assert same_bits(answers(first), noted)
    assert same_bits(answers(solve(*given, rule)), noted)


def test_arrays_are_read_where_they_lie(monkeypatch):
    """Most of a batch of several blocks, whatever multiples of 64 bytes its arrays begin behind."""
    size, plan = 1 << 19, gdjax.Plan("lanes", 2048, 44)  # a smaller block is copied to where it works
    places = [16, 48, 16]
    w, x, t = (aligned_empty((size + 16,), np.float32)[place // 4 : place // 4 + size] for place in places)
    w[:], x[:], t[:] = batch(size)[:3]
    expected = answers(gdjax.minimize(squared_loss, w.copy(), (x.copy(), t.copy()), learning_rate=0.1, steps=5))
    windows = []
    original = host.window

    def noted(array, *place):
        given = original(array, *place)
        windows.append((array, given))  # in one step: the workers do this side by side
        return given

    monkeypatch.setattr(host, "window", noted)
    got = gdjax.minimize(squared_loss, w, (x, t), learning_rate=0.1, steps=5, plan=plan)
    assert same_bits(answers(got), expected)
    views = [(array, given) for array, given in windows if np.shares_memory(array, given)]
    read = [sum(given.nbytes for array, given in views if array is leaf) for leaf in (w, x, t)]
    assert min(read[0], read[2]) > 0.7 * w.nbytes
    assert read[1] == 0


@pytest.mark.parametrize("shift", [0, 12])
@pytest.mark.parametrize("begin", [0, 100])
def test_whatever_is_left_of_a_batch_is_cut_into_pieces_that_fit(begin, shift):
    """After a device was full, too: then a few problems are left, or what one piece was."""
    block = SimpleNamespace(plan=gdjax.Plan("lanes", 32, 64), devices=[None], size=2048)
    for count in range(1, 6000):
        cuts = pieces(block, [(begin, begin + count)], 2, shift)
        assert cuts[0][0] == begin
        assert cuts[-1][1] == begin + count
        assert all(last == following for (_, last), (following, _) in itertools.pairwise(cuts))
        assert all(0 < last - first <= block.size for first, last in cuts)


def test_one_slow_call_does_not_decide_how_many_workers_share_a_job():
    """The first call of a program is slow; so is one that is held up."""
    pace, updates = Pace(), 1000
    assert pace.crew(updates, 2) == 2
    pace.note(3e-3, updates, 2)
    assert pace.crew(updates, 2) == 1
    pace.note(2e-3, updates, 1)
    taken = []
    for _ in range(200):
        taken.append(pace.crew(updates, 2))
        pace.note(2e-3 if taken[-1] == 1 else 1e-3, updates, taken[-1])
    assert taken[8:].count(2) > 180
    pace.note(1.0, updates, 2)
    assert pace.crew(updates, 2) == 2


def test_what_is_left_of_a_larger_batch_is_not_seen():
    broken = batch(200)
    broken[0][:] = np.nan
    small = batch(3)
    alone = answers(solve(*small))
    assert np.all(np.asarray(solve(*broken).status) == gdjax.Status.DIVERGED)
    assert same_bits(answers(solve(*small)), alone)


def test_memory_is_taken_again():
    given = batch(100)
    solve(*given)
    before = spares.STAGES.bytes
    made = []
    original = spares.Stage.__init__

    def counted(self, *arguments):
        made.append(self)
        original(self, *arguments)

    spares.Stage.__init__ = counted
    try:
        for _ in range(3):
            solve(*given)
    finally:
        spares.Stage.__init__ = original
    assert not made
    assert spares.STAGES.bytes == before


def test_memory_that_jax_would_copy_is_not_used(monkeypatch):
    given = batch(100)
    wanted = answers(solve(*given))
    monkeypatch.setattr(spares, "STAGES", spares.Kept())
    monkeypatch.setattr(spares, "adopted", lambda array, device: jax.device_put(array.copy(), device, may_alias=False))
    assert same_bits(answers(solve(*given)), wanted)
    assert spares.STAGES.bytes == 0


def test_no_more_is_kept_than_said(monkeypatch):
    kept = spares.Kept()
    monkeypatch.setattr(spares, "KEPT_BYTES", 100)
    for number in range(3):
        kept.give("a", number, 40)
    assert kept.bytes == 80
    assert {kept.take("a"), kept.take("a")} == {0, 1}
    assert kept.take("a") is None
    assert kept.bytes == 0


def test_threads_do_not_share_memory():
    given = [batch(150) for _ in range(4)]
    wanted = [answers(solve(*one)) for one in given]
    wrong = []

    def often(one, right):
        for _ in range(30):
            if not same_bits(answers(solve(*one)), right):
                wrong.append(one)

    threads = [threading.Thread(target=often, args=pair) for pair in zip(given, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_steps_of_equal_runs_lie_in_memory_that_nobody_can_change():
    given = batch(50)
    first, second = solve(*given), solve(*given)
    assert first.steps.unsafe_buffer_pointer() == second.steps.unsafe_buffer_pointer()
    assert not np.asarray(first.steps).flags.writeable
    doubled = jax.jit(lambda steps: 2 * steps, donate_argnums=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX says that this memory cannot be given away
        doubled(first.steps)
    assert np.array_equal(np.asarray(second.steps), np.full(50, 30))
    assert np.array_equal(np.asarray(solve(*given).steps), np.full(50, 30))
    assert np.array_equal(np.asarray(solve(*given, steps=7).steps), np.full(50, 7))


def test_steps_handed_to_torch_are_its_own():
    pytest.importorskip("torch")
    given = batch(50)
    first = solve(*given)
    first.to("torch").steps.add_(1)
    for solution in (first, solve(*given)):
        assert np.array_equal(np.asarray(solution.steps), np.full(50, 30))


def test_large_arrays_of_steps_are_not_kept(monkeypatch):
    monkeypatch.setattr("gdjax.placed.FILLED_BYTES", 100)
    device = jax.devices("cpu")[0]
    assert filled(26, 3, device) is not filled(26, 3, device)
    assert filled(25, 3, device) is filled(25, 3, device)


def test_steps_on_an_accelerator_are_kept_until_someone_gives_them_away(monkeypatch):
    monkeypatch.setattr("gdjax.device.is_host", lambda device: False)
    device = jax.devices("cpu")[-1]
    first = filled(25, 3, device)
    assert filled(25, 3, device) is first
    assert filled(25, 4, device)[0] == 4
    again = filled(25, 3, device)
    again.delete()  # as donating it does
    assert np.array_equal(filled(25, 3, device), np.full(25, 3))


def test_float64_answers_are_the_callers_to_write_to():
    solution = solve(*batch(10, np.float64))
    assert solution.weights.dtype == np.float64
    solution.weights[:] = 0
