"""Problems with a stop rule change places in the lanes of one tile, on the CPU."""

import collections
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import answers, pick, same_bits

import gdjax
from gdjax import Plan, kernel, stop
from gdjax.engine import flow, refill
from gdjax.engine.kernels import KERNELS
from gdjax.engine.program import RUNNING, Program
from gdjax.engine.tile import by_problem
from gdjax.rules import Descent
from gdjax.session import SESSIONS, TILES

RNG = np.random.default_rng(17)
N = 1003
X, T, W = (RNG.normal(size=(N, *shape)).astype(np.float32) for shape in ((5, 3), (5,), (3,)))
SMALL = Plan("lanes", 32, 4)
"""Blocks of 128 problems that run through 32 lanes."""


def uneven(count=N):
    """Problems that need 1 to some thousand updates, in no order; some never end and one diverges."""
    x = np.exp(RNG.uniform(np.log(0.02), 0, count)).astype(np.float32)
    x[3], x[700] = 1e-6, 1e15
    return np.ones(count, np.float32), (x, np.zeros(count, np.float32))


@pytest.fixture
def leaving(monkeypatch):
    """However few problems a block has, it leaves those that run in the end when most of its lanes are idle."""
    monkeypatch.setattr(flow, "ALONE", 0)
    monkeypatch.setattr(SESSIONS, "kept", collections.OrderedDict())


@pytest.mark.parametrize("plan", ["auto", Plan("lanes", 32, 4, 4), Plan("lanes", 32, 64, 1), Plan("lanes", 64, 1, 4)])
def test_problems_that_change_places_keep_their_bits(plan):
    changes_places(plan)


@pytest.mark.parametrize("steps", [1, 31, 32, 33, 47, 64, 65, 300, 1000])
@pytest.mark.parametrize("chunk", [1, 4, 48])
def test_no_update_more_than_asked_for(steps, chunk):
    """Also for those seated late, which have more left than their neighbours; the fixed steps are the judge."""
    x, t, rates = (RNG.uniform(0.5, 1, 300).astype(np.float32) for _ in range(3))
    w = np.zeros(300, np.float32)
    early = np.arange(300) % 3 == 0  # these are at their ends to begin with, and make room
    t[early] = 0
    given = {"learning_rate": rates / 1000, "steps": steps}
    plan = Plan("lanes", 32, 16, chunk)
    out = gdjax.minimize(kernel.squared_loss, w, (x, t), stop=stop.gradient_below(0.0), plan=plan, **given)
    fixed = gdjax.minimize(kernel.squared_loss, w, (x, t), **given)
    np.testing.assert_array_equal(out.steps, np.where(early, 0, steps))
    assert same_bits(out.weights, fixed.weights)
    assert same_bits(out.gradient_norm, fixed.gradient_norm)


def test_those_left_are_put_together(leaving, monkeypatch):
    came = collections.Counter()
    monkeypatch.setitem(TILES, "through", counted(TILES["through"], came))
    changes_places(Plan("lanes", 32, 4, 4))
    assert came["engine"] > 0


def counted(engine, came):
    """The same engine, which counts how often it is asked for."""

    @by_problem
    def asked(*arguments):
        came["engine"] += 1
        return engine(*arguments)

    return asked


def changes_places(plan):
    w, data = uneven()
    options = {"learning_rate": 0.5, "steps": 5000, "stop": stop.gradient_below(1e-4) | stop.loss_below(1e-9)}
    out = gdjax.minimize(kernel.squared_loss, w, data, plan=plan, **options)
    steps, status = np.asarray(out.steps), np.asarray(out.status)
    assert len(np.unique(steps)) > 100
    assert steps.max() == 5000
    assert status[700] == gdjax.Status.DIVERGED
    for one in (0, 3, 700, *np.argsort(steps)[[0, 1, N // 2, -3, -2]]):
        alone = gdjax.minimize(kernel.squared_loss, w[[one]], pick(data, [one]), **options)
        assert same_bits(answers(alone), pick(answers(out), [one]))
    order = RNG.permutation(N)
    shuffled = gdjax.minimize(kernel.squared_loss, w[order], pick(data, order), plan=plan, **options)
    assert same_bits(answers(shuffled), pick(answers(out), order))
    assert out.state.steps.sum() == steps.sum()


@pytest.mark.parametrize("steps", [32, 33])
def test_so_few_updates_that_all_are_looked_at_are_taken_in_one_loop(steps, caplog):
    w, x, t = (RNG.uniform(0.5, 1, 300).astype(np.float32) for _ in range(3))
    options = {"learning_rate": 0.1, "stop": stop.gradient_below(0.05), "plan": Plan("lanes", 32, 16, 4)}
    with caplog.at_level(logging.INFO, "gdjax"):
        out = gdjax.minimize(kernel.squared_loss, w, (x, t), steps=steps, **options)
    flowed = any("lanes went" in record.msg for record in caplog.records)
    assert flowed == (steps > flow.LAST)
    assert len(np.unique(out.status)) == 2
    longer = gdjax.minimize(kernel.squared_loss, w, (x, t), steps=200, **options)
    ended = np.asarray(out.status) == gdjax.Status.CONVERGED
    assert same_bits(np.asarray(out.weights)[ended], np.asarray(longer.weights)[ended])


@pytest.mark.parametrize("count", [32, 64, 320, 333])
def test_whole_tiles_of_neighbours_change_places(count):
    """All begin with a gradient of 1, of which an update leaves 95%: all lanes wait at the same time."""
    x, answer = RNG.uniform(0.5, 1, count), RNG.uniform(-0.5, 0.5, count)
    w, t, rate, x = (a.astype(np.float32) for a in (answer + 1 / x**2, x * answer, 0.05 / x**2, x))
    options = {"steps": 1000, "stop": stop.gradient_below(1e-3)}
    together = gdjax.minimize(
        kernel.squared_loss, w, (x, t), learning_rate=rate, plan=Plan("lanes", 32, 16, 4), **options
    )
    assert np.ptp(np.asarray(together.steps)) <= 2
    for one in range(0, count, 7):
        some = slice(one, one + 1)
        alone = gdjax.minimize(kernel.squared_loss, w[some], (x[some], t[some]), learning_rate=rate[some], **options)
        assert same_bits(answers(alone), pick(answers(together), [one]))


def alike(count):
    """The same vector problem over and over, apart from the rates: in every fifth tile a few diverge, in one all."""
    rates = np.full(count, 0.1, np.float32)
    rates[7::160], rates[64:96] = 1e3, 1e4
    w, x, t = (np.repeat(leaf[:1], count, axis=0) for leaf in (W, X, T))
    return w, (x, t), rates


@pytest.mark.parametrize("soon", [True, False])
@pytest.mark.parametrize("count", [32, 64, 320, 333])
def test_vectors_that_are_all_alike_end_in_their_lanes(count, soon, caplog):
    """The masked loop that one problem runs through is the judge; a run that goes on finds some at their ends."""
    w, data, rates = alike(count)
    rule = stop.gradient_below(0.02 if soon else 0.002)
    options = {"learning_rate": rates, "stop": rule}

    def squared(w, x, t):
        return 0.5 * jnp.mean((x @ w - t) ** 2)

    with caplog.at_level(logging.INFO, "gdjax"):
        out = gdjax.minimize(squared, w, data, steps=400, plan=Plan("lanes", 32, 16), **options)
    status, steps = np.asarray(out.status), np.asarray(out.steps)
    told = [record.args for record in caplog.records if "lanes went" in record.msg]
    assert [taken for _, taken in told] == ([steps.sum()] if count > 32 else [])  # one tile runs in a masked loop
    assert (steps.max() <= flow.LAST) == soon
    longest = np.pad(steps, (0, -count % 32)).reshape(-1, 32).max(axis=1)
    for spent, _ in told:
        if soon:  # all updates are looked at, two at a time, and the weights after the last one
            assert spent == 32 * np.sum(2 * (longest // 2 + 1))
        else:  # each takes those of the stride in which it ends once more
            assert steps.sum() + 2 * count <= spent < (count + 32) * (steps.max() + 16)
    assert np.all((status == gdjax.Status.CONVERGED) == (rates == np.float32(0.1)))
    for rate in np.unique(rates):
        some = np.flatnonzero(rates == rate)
        options = {"learning_rate": rate, "stop": rule}
        alone = gdjax.minimize(squared, w[:1], pick(data, [0]), steps=400, **options)
        assert steps[some[0]] > 5
        assert same_bits(pick(answers(out), some), pick(answers(alone), np.zeros(len(some), int)))
    for first in (3, 60):
        options = {"learning_rate": rates, "stop": rule, "plan": Plan("lanes", 32, 16)}
        begun = gdjax.minimize(squared, w, data, steps=first, **options)
        again = gdjax.minimize(squared, begun.weights, data, steps=400 - first, resume=begun.state, **options)
        assert same_bits(answers(again), answers(out))


def test_problems_just_seated_are_not_left(leaving, monkeypatch):
    """Four of them have the last tile for themselves, and need no more updates than the others."""
    came = collections.Counter()
    monkeypatch.setitem(TILES, "through", counted(TILES["through"], came))
    w, (x, t), _ = alike(100)
    options = {"learning_rate": 0.1, "steps": 400, "stop": stop.gradient_below(0.1), "plan": SMALL}
    out = gdjax.minimize(lambda w, x, t: 0.5 * jnp.mean((x @ w - t) ** 2), w, (x, t), **options)
    assert 0 < out.steps.max() < 32
    assert not came


def block(x, rate, count, held=0):
    """One block of problems through 32 lanes, written over memory in which everything is `held`."""
    program = Program(kernel.squared_loss, Descent(), stop.gradient_below(1e-3))
    x, rate = (leaf.astype(np.float32) for leaf in (x, rate))
    inputs = refill.Start(1 / x**2, None, (x, np.zeros_like(x)), {"learning_rate": rate})
    flags = refill.Start(True, None, (True, True), {"learning_rate": True})
    lanes = KERNELS["lanes"](32)
    lanes.on_host = True
    room = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, held, leaf.dtype), flow.room(lanes, program, flags, inputs)
    )

    @jax.jit
    def run(room):
        return flow.flow(lanes, program, 4, flags, np.int32(0), np.int32(10_000))(inputs, np.int32(count), room)[0]

    ended, tally = run(room)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], ended), np.asarray(tally)


@pytest.mark.parametrize("needed", [[150] * 100, [300] * 4 + [700] * 28 + [250] * 4], ids=["a tile", "lanes"])
def test_those_that_came_late_are_not_left(needed, monkeypatch):
    """Few run in the end, and have not had their lanes for long."""
    monkeypatch.setattr(flow, "ALONE", 0)
    count, x = len(needed), RNG.uniform(0.5, 1, 128)
    needed = np.array(needed + [1000] * (128 - count))
    ended, (away, _) = block(x, (1 - 1e-3 ** (1 / needed)) / x**2, count)
    assert np.abs(ended.lane["index"] - needed[:count]).max() <= 2
    assert away == 0


def test_one_that_is_left_while_its_loss_is_infinite_goes_on(leaving, monkeypatch):
    """Its gradient is a number, and an update later its loss may be one."""
    came = collections.Counter()
    monkeypatch.setitem(TILES, "through", counted(TILES["through"], came))
    w, x = np.full(128, 1e-3, np.float32), np.full(128, 0.1, np.float32)
    w[5::64] = 1e25
    given = {"learning_rate": 0.5, "steps": 20_000, "stop": stop.gradient_below(1e-4)}
    out = gdjax.minimize(kernel.squared_loss, w, (x, np.zeros_like(x)), plan=Plan("lanes", 32, 4, 4), **given)
    assert came["engine"] > 0
    assert set(np.asarray(out.status)) == {gdjax.Status.CONVERGED}
    alone = gdjax.minimize(kernel.squared_loss, w[5:6], (x[5:6], np.zeros(1, np.float32)), **given)
    assert alone.steps[0] > 10_000
    assert same_bits(answers(alone), pick(answers(out), [5]))


@pytest.mark.parametrize("chunk", [1, 4])
def test_tiles_that_end_soon_between_others(chunk, caplog):
    """After a tile of few updates the next is begun as if it were one as well, and goes on where it is none."""
    needed = np.repeat([10, 10, 200, 20, 33, 32, 31, 500, 9, 9], 32)
    needed[40], needed[7 * 32 :: 9] = 300, 12
    count = len(needed)
    x, answer = RNG.uniform(0.5, 1, count), RNG.uniform(-0.5, 0.5, count)
    rate = (1 - 1e-3 ** (1 / needed)) / x**2
    w, t, rate, x = (a.astype(np.float32) for a in (answer + 1 / x**2, x * answer, rate, x))
    options = {"steps": 1000, "stop": stop.gradient_below(1e-3)}
    with caplog.at_level(logging.INFO, "gdjax"):
        together = gdjax.minimize(
            kernel.squared_loss, w, (x, t), learning_rate=rate, plan=Plan("lanes", 32, 16, chunk), **options
        )
    spent, taken = next(record.args for record in caplog.records if "lanes went" in record.msg)
    assert np.abs(np.asarray(together.steps) - needed).max() <= 2
    assert taken < spent < 3 * taken
    for one in range(0, count, 5):
        some = slice(one, one + 1)
        alone = gdjax.minimize(kernel.squared_loss, w[some], (x[some], t[some]), learning_rate=rate[some], **options)
        assert same_bits(answers(alone), pick(answers(together), [one]))


def test_a_long_tile_after_one_that_ends_soon_is_not_looked_at_to_its_end(caplog):
    """Those that stride take the last updates once more; what is looked at is taken once."""
    needed = np.repeat([10, 500, 10, 500], 32)  # one half for each of two workers
    x = RNG.uniform(0.5, 1, len(needed))
    rate = (1 - 1e-3 ** (1 / needed)) / x**2
    w, t, rate, x = (a.astype(np.float32) for a in (1 / x**2, 0 * x, rate, x))
    options = {"steps": 1000, "stop": stop.gradient_below(1e-3), "plan": Plan("lanes", 32, 4, 4)}
    with caplog.at_level(logging.INFO, "gdjax"):
        out = gdjax.minimize(kernel.squared_loss, w, (x, t), learning_rate=rate, **options)
    spent, taken = next(record.args for record in caplog.records if "lanes went" in record.msg)
    assert taken == np.asarray(out.steps).sum()
    assert taken + 2 * 64 <= spent


@pytest.mark.parametrize("count", [20, 96, 101, 128])
def test_what_was_in_the_memory_for_results_means_nothing(count):
    """Of a tile that is not full, problems have ended where the padding, were it to run, had long to go."""
    x = np.geomspace(0.3, 1, 128)
    x[count:] = 0.05
    (clean, tally), (used, again) = (block(x, np.full_like(x, 0.5), count, held) for held in (0, RUNNING))
    assert same_bits(jax.tree.leaves(clean), jax.tree.leaves(used))
    assert list(tally) == list(again)
    assert tally[0] == 0
    assert clean.lane["index"].sum() < tally[1] < 128 * 1000  # the padding would take some thousands each
    assert len(np.unique(clean.lane["index"])) > count // 2


HALVES = {
    "every other lane": [240, 100] * 16 + [100] * 16 + [240] * 80,
    "the first lanes": [100] * 4 + [600] * 28 + [100] * 4 + [358] * 4 + [200] * 28 + [100] * 60,
    "the first lanes, then whole tiles": [100] * 4 + [600] * 28 + [466] * 4 + [200] * 92,
}


@pytest.mark.parametrize("chunk", [1, 4])
@pytest.mark.parametrize("half", HALVES)
def test_all_that_leave_at_once_need_not_be_neighbours(half, chunk, monkeypatch):
    """Some lanes are left early and taken by problems that end together with those that stayed. In the last case whole
    tiles come then, each of problems of two, and in the end fewer are left than a tile has. (Where updates
    are taken singly, they leave when they have waited for 32, which is why some need 34 less.)"""
    came = collections.Counter()
    monkeypatch.setitem(TILES, "through", counted(TILES["through"], came))
    needed = np.array(2 * HALVES[half])  # one half for each of two workers
    count = len(needed)
    x, answer = RNG.uniform(0.5, 1, count), RNG.uniform(-0.5, 0.5, count)
    rate = (1 - 1e-3 ** (1 / needed)) / x**2
    w, t, rate, x = (a.astype(np.float32) for a in (answer + 1 / x**2, x * answer, rate, x))
    options = {"steps": 1000, "stop": stop.gradient_below(1e-3)}
    together = gdjax.minimize(
        kernel.squared_loss, w, (x, t), learning_rate=rate, plan=Plan("lanes", 32, 4, chunk), **options
    )
    assert np.abs(np.asarray(together.steps) - needed).max() <= 2
    assert not came
    for one in range(0, count, 5):
        some = slice(one, one + 1)
        alone = gdjax.minimize(kernel.squared_loss, w[some], (x[some], t[some]), learning_rate=rate[some], **options)
        assert same_bits(answers(alone), pick(answers(together), [one]))


def test_vectors_and_their_optimizer_change_places(caplog):
    optax = pytest.importorskip("optax")
    rates = np.geomspace(1e-3, 0.3, N).astype(np.float32)
    options = {"optimizer": optax.adam, "steps": 400, "stop": stop.loss_change_below(1e-4)}

    def squared(w, x, t):
        return 0.5 * jnp.mean((x @ w - t) ** 2)

    with jax.numpy_dtype_promotion("standard"), caplog.at_level(logging.INFO, "gdjax"):
        out = gdjax.minimize(squared, W, (X, T), hyperparams={"learning_rate": rates}, plan=SMALL, **options)
        spent, taken = next(record.args for record in caplog.records if "lanes went" in record.msg)
        steps = np.asarray(out.steps)
        assert len(np.unique(steps)) > 50
        assert taken == steps.sum()
        assert taken <= spent < N * steps.max()
        for one in (0, 400, N - 1):
            alone = gdjax.minimize(
                squared, W[[one]], (X[[one]], T[[one]]), hyperparams={"learning_rate": rates[[one]]}, **options
            )
            assert same_bits(answers(alone), pick(answers(out), [one]))


def test_a_resumed_run_goes_on_where_each_problem_stood():
    w, data = uneven()
    options = {"learning_rate": 0.5, "stop": stop.gradient_below(1e-4), "plan": SMALL}
    whole = gdjax.minimize(kernel.squared_loss, w, data, steps=900, **options)
    first = gdjax.minimize(kernel.squared_loss, w, data, steps=300, **options)
    again = gdjax.minimize(kernel.squared_loss, first.weights, data, steps=600, resume=first.state, **options)
    assert same_bits(answers(again), answers(whole))
