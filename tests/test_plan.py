"""Plans: sound without measuring, measured once, remembered safely, and without any say in the results."""

import json
import multiprocessing
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdjax
from gdjax import plan as plans
from gdjax import tuning
from gdjax.kernel import squared_loss
from gdjax.plan import Kind, Plan

CPU = jax.devices("cpu")[0]
SCALAR = Kind(bytes=16, elementwise=True, shared=False)
VECTOR = Kind(bytes=1188, elementwise=False, shared=False)


def vector_loss(w, x, t):
    return 0.5 * jnp.mean((t - x @ w) ** 2)


def scalars(count, seed=0):
    rng = np.random.default_rng(seed)
    w, x, t = (rng.normal(size=count).astype(np.float32) for _ in range(3))
    return w, (x, t), rng.uniform(0, 0.1, count).astype(np.float32)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GDJAX_CACHE_DIR", str(tmp_path / "plans"))
    return tmp_path / "plans"


@pytest.mark.parametrize("kind", [SCALAR, VECTOR])
def test_every_candidate_gives_the_same_bits(kind):
    count = 3000
    rng = np.random.default_rng(1)
    if kind.elementwise:
        loss, (w, data, rate) = squared_loss, scalars(count)
    else:
        loss, rate = vector_loss, 0.1
        w = rng.normal(size=(count, 8)).astype(np.float32)
        data = rng.normal(size=(count, 32, 8)).astype(np.float32), rng.normal(size=(count, 32)).astype(np.float32)
    results = []
    for n in (100, 3000, 1 << 20):
        for candidate in tuning.candidates(kind, plans.default(kind, CPU, n)):
            small = Plan(candidate.kernel, candidate.tile, min(candidate.tiles, 2), candidate.chunk)
            results.append(gdjax.minimize(loss, w, data, learning_rate=rate, steps=23, plan=small, device="cpu"))
    assert len(results) > 8
    for result in results[1:]:
        np.testing.assert_array_equal(result.weights, results[0].weights)
        np.testing.assert_array_equal(result.loss, results[0].loss)


def test_default_plan_depends_on_the_batch_size_by_class_only():
    for kind in (SCALAR, VECTOR):
        found = {plans.default(kind, CPU, n) for n in range(1, 1 << 20, 997)}
        assert len(found) <= 5


def test_an_accelerator_has_few_idle_lanes_and_few_sizes(monkeypatch):
    monkeypatch.setattr(plans.dev, "is_host", lambda device: False)
    counts = [*range(257, 5000, 37), 20_000, 50_000, 1_000_003, 4_000_000]
    tiles = [plans.default.__wrapped__(SCALAR, CPU, n).tile for n in counts]
    assert all(n <= tile <= 1.25 * n + 64 for n, tile in zip(counts, tiles, strict=True))
    assert len(set(tiles)) <= 4 * 5 + 4  # four sizes between a power of two and the next
    assert plans.default.__wrapped__(SCALAR, CPU, 10).tile == plans.SMALL
    assert plans.default.__wrapped__(SCALAR, CPU, 10**9).tile == 1 << 24


def test_under_vmap_an_accelerator_has_no_more_lanes_than_work(monkeypatch):
    """A hundred networks must not run with thousands of copies of the last one."""
    monkeypatch.setattr(plans.dev, "is_host", lambda device: False)
    light, heavy = (plans.fallback(VECTOR, CPU, 100, "", operations).tile for operations in (1e3, 1e6))
    assert (light, heavy) == (1 << 14, 256)
    sizes = {plans.fallback(VECTOR, CPU, count, "", 1e6).tile for count in (1, 100, 10**6)}
    assert sizes == {heavy}  # it follows from the problem alone


def test_measured_plan_is_remembered_and_used(cache):
    w, data, rate = scalars(20_000)
    first = gdjax.minimize(squared_loss, w, data, learning_rate=rate, steps=5, plan="measure", device="cpu")
    (kept,) = cache.glob("*.json")
    held = json.loads(kept.read_text())
    assert (first.plan.tile, first.plan.chunk) == (held["tile"], held["chunk"])
    assert first.plan.tiles < held["tiles"]  # a block holds no more than so small a batch needs


def test_a_remembered_plan_has_blocks_for_the_size_of_the_batch(cache):
    """A few problems are not handled in arrays for some hundred thousand."""
    sizes = {}
    for count in (300_000, 20_000, 1000, 100):
        w, data, rate = scalars(count)
        plan = gdjax.minimize(squared_loss, w, data, learning_rate=rate, steps=5, plan="measure", device="cpu").plan
        sizes[count] = plan.tile * plan.tiles
    assert sizes[300_000] >= 1 << 18
    assert sizes[20_000] <= 1 << 15
    assert sizes[100] <= sizes[1000] <= 1 << 14  # the largest tile that is measured


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"kernel": "lanes"}', b"\xff\xfe", b'{"tile": "x"}'])
def test_a_torn_or_foreign_file_is_as_good_as_none(cache, content):
    cache.mkdir()
    (cache / "name.json").write_bytes(content)
    assert tuning.recall("name") is None
    tuning.remember("name", Plan(tile=64))
    assert tuning.recall("name") == Plan(tile=64)


def test_the_cache_can_be_switched_off(cache, monkeypatch):
    monkeypatch.setenv("GDJAX_CACHE", "off")
    tuning.remember("name", Plan())
    assert tuning.recall("name") is None
    assert not cache.exists()


def test_a_folder_that_cannot_be_written_is_no_failure(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GDJAX_CACHE_DIR", str(tmp_path / "file"))
    tuning.remember("name", Plan())
    assert tuning.recall("name") is None


def remember_many(seed):
    for n in range(200):
        tuning.remember("shared", Plan(tile=64 * (1 + (seed + n) % 4)))


def test_several_processes_write_the_same_plan(cache):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=remember_many, args=(seed,)) for seed in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [w.exitcode for w in workers] == [0, 0, 0]
    assert tuning.recall("shared") is not None
    assert sorted(os.listdir(cache)) == ["shared.json"]


def test_the_fastest_plan_wins():
    import time

    slow, fast = Plan(tile=64), Plan(tile=128)
    assert tuning.fastest([slow, fast], lambda plan: time.sleep(0.05 if plan == slow else 0.0)) == fast


def test_short_jobs_are_not_measured():
    assert not tuning.worth_measuring(SCALAR, CPU, 1000, 10**9 // 1000)
    assert not tuning.worth_measuring(SCALAR, CPU, 4_000_000, 240)
    assert tuning.worth_measuring(SCALAR, CPU, 100_000_000, 100_000)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [({"kernel": "pallas"}, "kernel"), ({"tile": 17}, "tile"), ({"tiles": 0}, "tiles"), ({"chunk": 0}, "chunk")],
)
def test_impossible_plans_are_refused(arguments, word):
    with pytest.raises(ValueError, match=word):
        Plan(**arguments)
