"""Several devices: lists, meshes and sharded arrays give the bits of one device, every device gets its share."""

import collections
import dataclasses
import threading

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from problems import CASES, answers, compilations, same_bits

import gdjax
from gdjax import blocks, device, stop
from gdjax.engine import copies

CPUS = jax.devices("cpu")
ALONG = P("problems")
MESH = Mesh(np.array(CPUS), ("problems",))
GRID = Mesh(np.array(CPUS).reshape(4, 2), ("problems", "copies"))
RULES = {"all steps": None, "stop rule": stop.gradient_below(0.05)}
WAYS = {
    "scalar": ("squared", "all steps"),
    "scalar, stop rule": ("squared", "stop rule"),
    "shared data": ("shared data", "all steps"),
    "shared data, stop rule": ("shared data", "stop rule"),
}


def plan_for(case, count):
    """The usual plan for a thousand scalar problems; else one for all sizes, so that they share what is compiled."""
    return "auto" if (case, count) == ("squared", 1000) else gdjax.Plan(tile=64, tiles=32, chunk=2)


def shard(tree, spec=ALONG, mesh=MESH):
    return jax.device_put(tree, NamedSharding(mesh, spec))


@dataclasses.dataclass
class Way:
    """A case with a rule, solved wherever the arrays or the device say."""

    case: str
    rule: str = "all steps"
    count: int = 1000

    def __post_init__(self):
        self.plan = plan_for(self.case, self.count)
        self.weights, self.data = CASES[self.case].batch(self.count, np.float32)
        self.rates = np.linspace(0.01, 0.1, self.count, dtype=np.float32)

    def solve(self, place=lambda tree: tree, weights=None, **options):
        case = CASES[self.case]
        data = tuple(d if axis is None else place(d) for d, axis in zip(self.data, case.axes, strict=True))
        settings = {"learning_rate": self.rates, "steps": 9, "stop": RULES[self.rule], "plan": self.plan, **options}
        start = self.weights if weights is None else weights
        return gdjax.minimize(case.loss, place(start), data, in_axes=case.axes, **settings)


@pytest.mark.parametrize("count", [1, 7, 1000, 100_003])
@pytest.mark.parametrize("name", WAYS)
def test_eight_devices_give_the_bits_of_one(name, count):
    way = Way(*WAYS[name], count)
    expected = way.solve(device="cpu:3")
    for several in (CPUS, MESH):
        out = way.solve(device=several)
        assert same_bits(answers(out), answers(expected))
        assert out.device == "cpu:0 and 7 more"
        assert out.loss.devices() == {CPUS[0]}
    on = way.solve(device=CPUS, weights=out.weights, resume=out.state)
    assert same_bits(answers(on), answers(way.solve(device="cpu", steps=18)))


@pytest.mark.parametrize("count", [8, 100_000])
@pytest.mark.parametrize("name", WAYS)
def test_sharded_arrays_come_back_sharded_with_the_bits_of_one_device(name, count):
    way = Way(*WAYS[name], count)
    out = way.solve(shard)
    assert same_bits(answers(out), answers(way.solve(device="cpu")))
    assert out.device == "cpu:0 and 7 more"
    for leaf in jax.tree.leaves((answers(out), out.state.status, out.state.steps)):
        assert leaf.sharding.is_equivalent_to(NamedSharding(MESH, P("problems")), leaf.ndim)
    on = way.solve(shard, out.weights, resume=out.state)
    assert same_bits(answers(on), answers(way.solve(device="cpu", steps=18)))


def test_a_run_in_shards_goes_on_elsewhere():
    way = Way("linear", "stop rule")
    out = way.solve(shard)
    on = way.solve(weights=np.asarray(out.weights), resume=out.state, device="cpu")
    assert same_bits(answers(on), answers(way.solve(device="cpu", steps=18)))


@pytest.fixture
def many(monkeypatch):
    """Programs run on the virtual devices themselves, as on accelerators, and not on the one that stands for them."""
    monkeypatch.setattr(device, "host_in_place", lambda: None)


def test_every_device_gets_its_share(monkeypatch, many):
    """As many tiles on each device as on any other, and none idle while there is a problem for it."""
    tiles, one_by_one = collections.Counter(), threading.Lock()
    compile_block = blocks.compile_block

    def counting(*arguments):
        def counted(executable, where):
            def run(inputs, start, steps, used, *others):
                with one_by_one:
                    tiles[where] += int(used)
                return executable(inputs, start, steps, used, *others)

            return run

        block = compile_block(*arguments)
        pairs = zip(block.executables, block.devices, strict=True)
        return dataclasses.replace(block, executables=tuple(counted(e, d) for e, d in pairs))

    monkeypatch.setattr(blocks, "compile_block", counting)
    loss = lambda w, x: (w - x) ** 2  # noqa: E731
    plan = gdjax.Plan(tile=32, tiles=64)
    for count in (7, 8, 1000, 100_003):
        tiles.clear()
        w = np.arange(count, dtype=np.float32)
        gdjax.minimize(loss, w, (w,), learning_rate=0.1, steps=3, device=CPUS, plan=plan)
        assert len(tiles) == min(count, 8)
        assert max(tiles.values()) - min(tiles.values()) <= 1 + count // (64 * 32 * 8)
    tiles.clear()
    w = shard(np.arange(1000, dtype=np.float32))
    gdjax.minimize(loss, w, (w,), learning_rate=0.1, steps=3, plan=plan)
    assert list(tiles.values()) == [4] * 8


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("place", ["one for all", "many"])
def test_eight_devices_compile_what_one_does(rule, place, request):
    if place == "many":
        request.getfixturevalue("many")

    def programs(**options):
        loss = lambda w, x: (w - x) ** 2 + 0.1 * w  # noqa: E731
        w = np.ones(1000, np.float32)
        with compilations() as compiled:
            gdjax.minimize(loss, w, (w,), learning_rate=0.1, steps=50, stop=RULES[rule], **options)
        return compiled.count("jit(block)")

    one = programs(device="cpu:0")
    assert 1 <= one <= 4
    assert programs(device=CPUS) == one
    way = Way("squared", rule)
    way.solve(shard)
    with compilations() as compiled:
        way.solve(shard)
    assert compiled == []


def test_devices_that_cannot_load_compile_for_themselves(monkeypatch, many):
    def refuse(*_):
        raise RuntimeError("cannot be written down")

    monkeypatch.setattr(copies, "loaded", refuse)
    w = np.ones(1000, np.float32)
    loss = lambda w, x: (w - x) ** 2  # noqa: E731
    with compilations() as compiled:
        out = gdjax.minimize(loss, w, (2 * w,), learning_rate=0.1, steps=5, device=CPUS[:3])
    assert compiled.count("jit(block)") == 3
    assert same_bits(answers(out), answers(gdjax.minimize(loss, w, (2 * w,), learning_rate=0.1, steps=5)))


@pytest.mark.parametrize(
    ("spec", "mesh"),
    [
        (P("problems"), GRID),
        (P(("problems", "copies")), GRID),
        (P("problems"), Mesh(np.array(CPUS)[[5, 1, 7, 2]], ("problems",))),
        (P("problems", None), MESH),
    ],
    ids=["repeated on two devices each", "two axes", "four devices, unordered", "spec in full"],
)
def test_shardings_of_the_problem_axis(spec, mesh):
    way = Way("linear")
    out = way.solve(lambda leaf: shard(leaf, spec if leaf.ndim > 1 else P(*spec[:1]), mesh))
    assert same_bits(answers(out), answers(way.solve(device="cpu")))
    assert out.weights.sharding.is_equivalent_to(NamedSharding(mesh, spec), 2)


def test_arrays_that_lie_otherwise_are_brought_to_the_shards():
    """Weights in eight shards, data in four, targets on the host, a rate in shards: the first array leads."""
    way = Way("linear")
    few = Mesh(np.array(CPUS[4:]), ("problems",))
    x, t = way.data
    rates = shard(way.rates)
    out = gdjax.minimize(
        CASES["linear"].loss, shard(way.weights), (shard(x, mesh=few), t), learning_rate=rates, steps=9
    )
    assert same_bits(answers(out), answers(way.solve(device="cpu")))
    assert len(out.loss.sharding.device_set) == 8
    leading = gdjax.minimize(CASES["linear"].loss, way.weights, (shard(x, mesh=few), t), learning_rate=rates, steps=9)
    assert same_bits(answers(leading), answers(out))
    assert len(leading.loss.sharding.device_set) == 4


@pytest.mark.parametrize("spec", [P(None, "problems"), P()], ids=["split problems", "everywhere the same"])
def test_arrays_without_shards_of_problems_run_as_one(spec):
    way = Way("squared vector")
    weights = np.repeat(way.weights, 2, axis=1)
    loss = lambda w, x, t: CASES["squared vector"].loss(w[:4], x, t) + w[7] ** 2  # noqa: E731
    expected = gdjax.minimize(loss, weights, way.data, learning_rate=0.1, steps=5)
    out = gdjax.minimize(loss, shard(weights, spec), way.data, learning_rate=0.1, steps=5)
    assert same_bits(answers(out), answers(expected))
    assert len(out.loss.devices()) == 1


def test_another_device_asked_for_takes_the_shards_there():
    way = Way("linear")
    out = way.solve(shard, device="cpu:6")
    assert same_bits(answers(out), answers(way.solve(device="cpu")))
    assert out.loss.devices() == {CPUS[6]}
    same = way.solve(shard, device=MESH)
    assert len(same.loss.sharding.device_set) == 8


def test_optax_state_records_and_divergence_in_shards():
    way = Way("squared")
    way.weights[17] = np.inf
    way.plan = plan_for("squared", 1)
    adam = {"learning_rate": None, "optimizer": optax.adam, "hyperparams": {"learning_rate": way.rates}, "record": 3}
    with jax.numpy_dtype_promotion("standard"):  # optax relies on it
        expected = way.solve(device="cpu", **adam)
        out = way.solve(shard, **adam)
        assert same_bits((answers(out), out.record), (answers(expected), expected.record))
        assert out.status[17] == gdjax.Status.DIVERGED
        assert out.record.sharding.is_equivalent_to(NamedSharding(MESH, P("problems")), 2)
        on = way.solve(shard, out.weights, resume=out.state, **adam)
        assert same_bits(answers(on), answers(way.solve(device="cpu", **{**adam, "steps": 18})))


@pytest.mark.parametrize("rule", RULES)
def test_a_callback_hears_of_all_shards_and_ends_them_alike(rule):
    way = Way("linear", rule)
    heard = []
    out = way.solve(shard, steps=20_000, callback=heard.append)
    assert heard[-1].done == heard[-1].problems == 1000
    assert same_bits(answers(out), answers(way.solve(device="cpu", steps=20_000)))
    early = way.solve(shard, steps=20_000, callback=lambda report: True, stop=None)
    taken = early.state.total
    assert 0 < taken < 20_000
    assert set(np.asarray(early.steps)) == {taken}
    assert early.summary()["STOPPED"] == 1000
    on = way.solve(shard, early.weights, steps=20_000 - taken, resume=early.state, stop=None)
    assert same_bits(answers(on), answers(way.solve(device="cpu", steps=20_000, stop=None)))


def test_dtypes_of_shards():
    way = Way("linear")
    narrow = way.solve(device="cpu", dtype="float16")
    out = way.solve(shard, dtype="float16")
    assert same_bits(answers(out), answers(narrow))
    assert len(out.weights.sharding.device_set) == 8
    way.weights, way.data = CASES["linear"].batch(1000, np.float64)
    with jax.enable_x64(True):
        wide = way.solve(shard)
        assert wide.weights.dtype == np.float64
        assert len(wide.weights.sharding.device_set) == 8
        weights, x, t = shard(way.weights), shard(way.data[0]), shard(way.data[1])
    host = gdjax.minimize(CASES["linear"].loss, weights, (x, t), learning_rate=way.rates, steps=9)
    assert isinstance(host.weights, np.ndarray)  # x64 is off: JAX would narrow it at the next operation
    assert same_bits(answers(host), answers(wide))


def test_data_with_problems_on_another_axis():
    w = np.linspace(-1, 1, 1000, dtype=np.float32)
    x = np.random.default_rng(0).normal(size=(8, 1000)).astype(np.float32)
    loss = lambda w, x: ((w - x) ** 2).mean()  # noqa: E731
    expected = gdjax.minimize(loss, w, (x,), in_axes=1, learning_rate=0.1, steps=5)
    out = gdjax.minimize(loss, shard(w), (shard(x, P(None, "problems")),), in_axes=1, learning_rate=0.1, steps=5)
    assert same_bits(answers(out), answers(expected))
    assert len(out.loss.sharding.device_set) == 8


def test_under_a_mesh_that_jax_has_set():
    w = np.linspace(-1, 1, 1000, dtype=np.float32)
    loss = lambda w, x: (w - x) ** 2  # noqa: E731
    mesh = jax.make_mesh((8,), ("problems",))
    placed = shard(w, mesh=mesh)
    with jax.set_mesh(mesh):
        alone = gdjax.minimize(loss, w, (2 * w,), learning_rate=0.1, steps=5)
        out = gdjax.minimize(loss, placed, (2 * w,), learning_rate=0.1, steps=5)
    assert same_bits(answers(out), answers(alone))
    assert out.weights.sharding == placed.sharding
    assert alone.device == "cpu:0"


def test_a_mesh_of_one_device_is_a_mesh():
    """What is written for eight devices means the same on one."""
    way = Way("squared")
    mesh = Mesh(np.array(CPUS[3:4]), ("problems",))
    out = way.solve(lambda leaf: shard(leaf, mesh=mesh))
    assert same_bits(answers(out), answers(way.solve(device="cpu")))
    assert out.weights.sharding == NamedSharding(mesh, P("problems"))
    assert out.device == "cpu:3"
