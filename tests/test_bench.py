"""The benchmarks themselves: every program solves the same problem, results can be read and compared."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import gdjax
from bench import compare, environment, exact, plots, report
from bench.__main__ import main
from bench.cases import CASES, choose
from bench.peers import Answer, Skip, own, programs, torch_peers
from bench.rounds import LIMITS, Result, Row, part_for, run_case
from gdjax import limits, measure, reference
from gdjax.engine.targets import TARGETS

# One case per family, the smallest that still means something; the others differ in size only.
TINY = {
    name: dataclasses.replace(CASES[name], problems=24, steps=min(CASES[name].steps, 3000), needed=(10, 500))
    for name in ("scalar", "vector-16x4", "shared", "logistic-32x8", "adam", "stop-scalar", "stop-logistic")
}
TINY["shared"] = dataclasses.replace(TINY["shared"], points=40, weights=5)
# torch takes seconds to import and longer to compile: its eager form shows that the gradients agree.
COMPILED = ("torch compiled", "torch compiled, 12 steps")
SLOW = ("numba", "jaxopt", "optimistix")
PAIRS = [
    (name, program)
    for name, case in TINY.items()
    for program in case.programs
    if program not in (*COMPILED, "multiply-adds") and (program not in SLOW or "scalar" in name)
]


def solved(name, program):
    """The answer of this program on this tiny case, and the part of the inputs that it ran."""
    case = TINY[name]
    part = part_for(programs()[program], case, case.inputs())
    # optax's Adam raises a float to an integer power, which strict promotion refuses.
    promotion = "standard" if case.family == "adam" else "strict"
    try:
        with jax.numpy_dtype_promotion(promotion):
            return case, part, programs()[program].build(case, part, "cpu")()
    except Skip as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("name", "program"), PAIRS)
@pytest.mark.filterwarnings("ignore")  # the peers' own
def test_every_program_finds_the_answer(name, program):
    """Float32 programs come as near to the float64 answer as float32 can; stopped ones to the tolerance."""
    case, part, answer = solved(name, program)
    if case.tolerance is None:
        assert exact.error(case, part, answer) < 1e-4
    elif program in LIMITS:
        assert answer.weights.shape == part.weights.shape
    else:
        assert answer.converged.all()
        assert exact.error(case, part, answer) < 1.01


@pytest.mark.parametrize("name", ["scalar", "adam"])
@pytest.mark.filterwarnings("ignore")
def test_steps_unrolled_in_torch_are_all_taken(name):
    """What `torch compiled, 12 steps` compiles, here uncompiled; 30 steps leave some for the single step."""
    pytest.importorskip("torch")
    case = dataclasses.replace(TINY[name], steps=30)
    inputs = case.inputs()
    answer = torch_peers.program(case, inputs, "cpu", torch_peers.UNROLLED, compiled=False)()
    assert exact.error(case, inputs, answer) < 1e-4


@pytest.mark.parametrize("name", ["scalar", "vector-16x4", "shared"])
def test_closed_form_is_the_recurrence(name):
    """The closed form of a squared loss against the same descent step by step."""
    case = TINY[name]
    inputs = case.inputs()
    np.testing.assert_allclose(
        exact.fixed_point(case, inputs), exact.recurrence(case, inputs), rtol=0, atol=1e-12
    )


def test_closed_form_is_the_reference():
    """And against the scalar reference in plain Python."""
    case = TINY["scalar"]
    inputs = case.inputs()
    x, t = inputs.data
    numbers = zip(*(array.tolist() for array in (inputs.weights, x, t, inputs.rates)), strict=True)
    found = [reference.descend(*one, case.steps).weights[-1] for one in numbers]
    np.testing.assert_allclose(exact.expected(case, inputs), found, rtol=0, atol=1e-12)


def test_stop_case_needs_the_steps_it_says():
    """The rates of the stop cases come from the step counts; gdjax counts the same but for rounding."""
    case = TINY["stop-scalar"]
    inputs = case.inputs()
    answer = own.gdjax(case, inputs, "cpu")()
    np.testing.assert_allclose(answer.steps, inputs.useful_steps, rtol=0.02, atol=1)


def test_bit_equality_is_noticed():
    """One bit, or one step, of difference to a problem run alone is found."""
    case = TINY["scalar"]
    inputs = case.inputs()
    answer = own.gdjax(case, inputs, "cpu")()
    singles = own.alone(case, inputs, "cpu", problems=2)
    assert own.bit_equal(answer, singles)
    for problem, _ in singles:
        changed = answer.weights.copy()
        changed[problem] = np.nextafter(changed[problem], np.float32(9))
        assert not own.bit_equal(dataclasses.replace(answer, weights=changed), singles)
        steps = answer.steps.copy()
        steps[problem] += 1
        assert not own.bit_equal(dataclasses.replace(answer, steps=steps), singles)


def test_run_of_a_stop_rule_and_round_trip(tmp_path):
    """With the share of lanes' steps that were needed, by gdjax's own count."""
    case = dataclasses.replace(TINY["stop-scalar"], problems=5000)
    found = run_case(case, rounds=1, only=("gdjax", "vmap"))
    assert found.row("vmap").lane_share < found.row("gdjax").lane_share < 1
    report.save(tmp_path / "a.json", about(), [found])
    assert report.load(tmp_path / "a.json")[1] == [found]


def result(seconds, program="gdjax", case="scalar"):
    """A made-up result of two programs; the other one always takes 2 s."""
    rows = [
        Row(case, program, 10, 10, list(seconds), 1.0, 5, 100, error=1e-7),
        Row(case, "vmap", 10, 10, [2.0] * len(seconds)),
        Row(case, "scipy", 10, 10, missing="skipped: scipy is not installed"),
    ]
    targets = [{"program": "vmap", "least": 3.0, "aim": 100.0}]
    return Result(case, "a case", 10, 10, "c loop", [0.5] * len(seconds), rows, targets)


def about():
    """A made-up environment."""
    versions = {"jax": "0.10.2"}
    fields = {"device": "cpu: x", "cores": 2, "driver": "d", "commit": "c", "flags": {}, "versions": versions}
    return fields | {"date": "2026-01-01", "system": "Linux"}


def test_run_case_and_round_trip(tmp_path):
    """A real run through JSON and back, with bits compared, limits and skipped programs named."""
    found = run_case(TINY["scalar"], rounds=2, only=("gdjax", "numpy", "gdjax, fixed steps"))
    row = found.row("gdjax")
    assert row.bit_equal is True
    assert len(row.seconds) == 2
    assert {row.program for row in found.rows} == {"gdjax", "numpy", "c loop"}
    report.save(tmp_path / "a.json", about(), [found])
    loaded_about, loaded = report.load(tmp_path / "a.json")
    assert loaded == [found]
    assert loaded_about == about()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    text = report.readable(loaded_about, loaded)
    assert "bits as alone" in text
    assert "| gdjax " in text


def test_promises_are_judged_by_the_median_of_ratios():
    """2 s against 0.5 s is 4 times: the promise of 3 holds, the aim of 100 does not."""
    assert report.promises([result([0.5, 0.5, 4.0])])[0][2:] == ["4 (0.5 to 4)", "3", "100", "yes"]
    assert report.promises([result([1.0, 1.0, 0.1])])[0][-1] == "NO"
    assert result([0.5, 1.0, 1.0]).share("gdjax") == (0.5, 0.5, 1.0)


def test_compare_tells_movement_from_noise(tmp_path):
    """Twice as slow is news where the rounds agree, and none where they differ by as much."""
    paths = [tmp_path / f"{i}.json" for i in range(4)]
    runs = [[1.0, 1.01, 0.99, 1.0], [2.0, 2.01, 1.99, 2.0], [0.6, 3.0, 0.9, 1.4], [1.005, 1.0, 1.01, 1.0]]
    for path, seconds in zip(paths, runs, strict=True):
        report.save(path, about(), [result(seconds)])
    assert "2.00x slower" in compare.compare(paths[0], paths[1])
    assert "2.00x faster" in compare.compare(paths[1], paths[0])
    assert "0 of 2 moved" in compare.compare(paths[0], paths[2])
    assert "0 of 2 moved" in compare.compare(paths[0], paths[3])
    report.save(paths[1], about() | {"versions": {"jax": "0.11.0"}}, [result(runs[0])])
    assert "jax: 0.10.2 -> 0.11.0" in compare.compare(paths[0], paths[1])


def test_command_line(tmp_path, capsys):
    """A whole quick run: files written, exit code; and bad input with exit code 2."""
    arguments = ["--cases", "size-1e4", "--programs", "gdjax", "--quick", "--out", str(tmp_path)]
    assert main(arguments) == 0
    files = sorted(path.suffix for path in tmp_path.iterdir())
    assert files == [".json", ".md"]
    document = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert document["versions"]["jax"]
    assert document["results"][0]["rows"][0]["bit_equal"] is True
    capsys.readouterr()
    (tmp_path / "torn.json").write_text('{"format": 1, "results": [')
    for wrong, words in [
        (["--cases", "nonsense"], "no such case"),
        (["--cases", "scalar", "--programs", "nobody"], "no such program"),
        (["--cases", "scalar", "--rounds", "0"], "--rounds"),
        (["--compare", str(tmp_path / "torn.json"), str(tmp_path / "torn.json")], "not a result"),
    ]:
        assert main(wrong) == 2
        assert words in capsys.readouterr().err


def test_a_failing_program_costs_only_its_own_row(monkeypatch):
    """Its reason is in the table, the others have their figures."""

    def broken(case, inputs, device):
        def run():
            raise RuntimeError("out of luck")

        return run

    table = programs() | {"numpy": dataclasses.replace(programs()["numpy"], build=broken)}
    monkeypatch.setattr("bench.rounds.programs", lambda: table)
    found = run_case(TINY["scalar"], rounds=1, only=("gdjax", "numpy"))
    assert (
        next(row.missing for row in found.rows if row.program == "numpy")
        == "failed: RuntimeError: out of luck"
    )
    assert found.row("gdjax").times


def test_pictures_need_something_to_show(tmp_path):
    """A sweep of one size is no line."""
    sweep = [
        dataclasses.replace(result([1.0]), case=f"size-{n}", problems=n, sweep="size") for n in (10, 100)
    ]
    assert plots.sizes(sweep[:1]) is None
    written = plots.draw(tmp_path / "run", [*sweep, result([1.0])])
    assert [path.name for path in written] == ["run-sizes.png", "run-limit.png", "run-precision.png"]


def test_environment_names_no_folders(monkeypatch):
    """Flags are kept, paths in them are not."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/somebody/dump --xla_cpu_ftz=true")
    found = environment.describe(gdjax.select_device("cpu").device)
    assert found["flags"]["XLA_FLAGS"] == "--xla_dump_to=... --xla_cpu_ftz=true"
    assert found["versions"]["jax"]


def test_sweeps_are_chosen_by_name():
    """A sweep's word stands for its cases."""
    assert [case.name for case in choose(["spread"])] == [name for name in CASES if name.startswith("spread")]
    assert len(choose(None)) == len(CASES)


TOY = measure.Kind("scalar", 0, 1, 8, (4, 64, 256), (4, 64))


def test_measure(tmp_path):
    """The engine of `gdjax bench` on toy sizes: table, sentences, files."""
    toy_vector = measure.Kind("vector", 3, 2, 8, (4, 64), (4, 64))
    found = measure.measure("cpu", quick=True, kinds=(TOY, toy_vector))
    assert [(point.kind, point.problems) for point in found.points] == [
        ("scalar", 4), ("scalar", 64), ("vector", 4), ("vector", 64),
    ]  # fmt: skip
    assert all(point.limit_share > 0 for point in found.points)
    assert (measure.short(9.72e9), measure.short(5e-4, "s")) == ("9.72 G", "500 us")
    header, lines = measure.rows(found)
    assert {len(line) for line in lines} == {len(header)}
    assert len(measure.verdicts(found)) == 2
    measure.save(found, tmp_path / "a.json")
    assert len(json.loads((tmp_path / "a.json").read_text())["points"]) == 4
    measure.plot(found, tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes().startswith(b"<?xml")
    with pytest.raises(ValueError, match=r"\.json"):
        measure.save(found, tmp_path / "a.txt")


def test_verdicts_say_who_wins_from_where():
    """A device that is slow on small batches and fast on large ones wins from the first size it keeps."""

    def line(device, speeds):
        return [
            measure.Point(device, "scalar", n, 1, n / speed, 0, 0, 0, 0.1, "memory")
            for n, speed in zip((10, 100, 1000, 10_000), speeds, strict=True)
        ]

    ceilings = tuple(limits.Limits(name, name, 1.0, 1.0, None) for name in ("cpu:0", "gpu:0"))
    points = (*line("cpu:0", (5, 50, 50, 50)), *line("gpu:0", (1, 60, 40, 4000)))
    found = measure.Measurement(ceilings, points, {"scalar": 6.0}, {}, True)
    assert measure.verdicts(found) == [
        "scalar, cpu:0: from 100 problems on faster than the scalar reference",
        "scalar, cpu:0: at no measured size the fastest device",
        "scalar, gpu:0: from 100 problems on faster than the scalar reference",
        "scalar, gpu:0: from 10,000 problems on the fastest device",
    ]


def test_limits_are_the_slowest_of_what_is_needed():
    """Compute, memory or transfer, whichever takes longest."""
    ceiling = limits.Limits("gpu:0", "x", multiply_adds=100.0, copy_bytes=10.0, transfer_bytes=1.0)
    assert ceiling.seconds(1000, 1, 1) == (10.0, "compute")
    assert ceiling.seconds(1, 1000, 200) == (200.0, "transfer")
    assert ceiling.seconds(1, 1000, 20) == (100.0, "memory")
    assert dataclasses.replace(ceiling, transfer_bytes=None).seconds(1, 1000, 1000) == (100.0, "memory")


def test_multiply_adds_in_registers_are_done():
    """What is timed is computed: every chain of every number, interpreted."""
    x = np.linspace(0, 1, 256, dtype=np.float32)[None]
    got = limits.chains(TARGETS["cpu"], jax.numpy.asarray(x), 3)
    chains = [x * np.float32(0.5 + 0.01 * i) for i in range(limits.CHAINS)]
    for _ in range(3 * limits.DEPTH):
        chains = [chain * x + np.float32(0.25) for chain in chains]
    np.testing.assert_allclose(got, sum(chains), rtol=1e-5)


def test_answers_without_steps_are_judged():
    """A program that does not count its steps is compared by its weights alone."""
    answer = Answer(np.ones(3, np.float32))
    assert own.bit_equal(answer, [(1, Answer(np.ones(1, np.float32), np.zeros(1, np.int32)))])


def test_claims_are_measured_and_said_to_be_kept_or_not(monkeypatch, capsys):
    from bench import device_claims

    claims = (device_claims.Claim("scalar", ratio=0.0), device_claims.Claim("stop-equal", ratio=1e9))
    monkeypatch.setattr(device_claims, "CLAIMS", claims)
    assert device_claims.main(["--quick", "--device", "cpu"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(one["case"], one["problems"], one["kept"]) for one in found] == [
        ("scalar", 512, True),
        ("stop-equal", 512, False),
    ]
    assert found[0]["largest difference"] < 1e-6
