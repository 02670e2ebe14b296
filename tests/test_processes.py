"""Several processes on one machine: the bits of one process, whoever dies; and how they find each other."""

import csv
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gdjax
from gdjax import kernel, stop, team
from gdjax.distributed import Launch, launched

TESTS = pathlib.Path(__file__).parent


def start(*arguments, command=(TESTS / "process.py",), **environment):
    """A process of its own, warnings being errors."""
    command = [sys.executable, "-W", "error", *map(str, (*command, *arguments))]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def ended(*processes):
    """Their exit codes and what they printed."""
    said = [process.communicate(timeout=240) for process in processes]
    for process, (_, errors) in zip(processes, said, strict=True):
        assert process.returncode in (0, 2, 3, -9), errors
    return [(process.returncode, output) for process, (output, _) in zip(processes, said, strict=True)]


def free_port(low=0):
    """A port that is free now, from `low` on."""
    for port in [0] if not low else range(low, low + 4096):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return probe.getsockname()[1]
    raise OSError("no port is free")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """2,050 problems, and the folder of their results by one process."""
    folder = tmp_path_factory.mktemp("source")
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(size=2050).astype(np.float32) for name in "wxt"}
    pq.write_table(pa.table(columns), folder / "problems.parquet")
    (code, said), *_ = ended(start("stream", folder / "problems.parquet", folder / "alone"))
    assert code == 0
    assert "parts=21" in said
    return folder


def files(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def test_two_processes_under_slurm_write_what_one_does(source, tmp_path):
    """Their environment is that of `srun -n 2`; JAX's own detection finds the coordinator in it."""
    port = free_port(61440)
    slurm = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_STEP_NUM_NODES": "1"}
    ranks = [{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)} for n in range(2)]
    both = [start("stream", source / "problems.parquet", tmp_path / "both", **slurm, **rank) for rank in ranks]
    (first, said), (second, nothing) = ended(*both)
    assert (first, second) == (0, 0)
    assert "problems=2050" in said
    assert nothing.strip() == "None"
    assert files(tmp_path / "both") == files(source / "alone")  # the manifest too, and nothing else


@pytest.mark.parametrize("dies", [0, 1])
def test_one_is_killed_the_other_finishes_and_is_told_a_rerun_completes(source, tmp_path, dies):
    arguments = "stream", source / "problems.parquet", tmp_path / "both", free_port(), 2
    both = [start(*arguments, number, "dies" if number == dies else "") for number in range(2)]
    codes = ended(*both)
    assert codes[dies][0] == -9
    assert codes[1 - dies][0] == 3
    told = codes[1 - dies][1]
    assert f"missing: process {dies} (" in told
    assert f"pid {both[dies].pid}) died" in told
    assert f"of its {11 - dies} parts missing" in told
    assert "run the same again" in told
    before = {name: held for name, held in files(tmp_path / "both").items() if not name.startswith(".")}
    expected = files(source / "alone")
    assert set(before) < set(expected)
    others = [f"part-{number:08d}.parquet" for number in range(1 - dies, 21, 2)]
    assert set(others) <= set(before)
    assert all(expected[name] == content for name, content in before.items())
    port = free_port()
    again = [start(*arguments[:3], port, 2, number) for number in range(2)] if dies else [start(*arguments[:3])]
    assert [code for code, _ in ended(*again)] == [0] * len(again)
    assert files(tmp_path / "both") == expected


def test_gdjax_solve_under_mpirun(tmp_path):
    """In the environment of Open MPI 5, of which JAX knows nothing: one table, one answer, told once."""
    table = pathlib.Path(gdjax.__file__).parent / "data" / "gapminder.csv"
    columns = "--group", "country", "--inputs", "year", "--target", "lifeExp"

    def solve(out, *more, **environment):
        return start(table, *columns, *more, "--out", tmp_path / out, command=("-m", "gdjax", "solve"), **environment)

    run = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "PMIX_NAMESPACE": f"test-{os.getpid()}"}
    both = [solve("both.csv", **run, OMPI_COMM_WORLD_RANK=str(rank)) for rank in range(2)]
    (first, told), (second, untold) = ended(*both)
    assert (first, second) == (0, 0)
    assert "142 models: 142 converged" in told
    assert "of each of 2 processes" in " ".join(told.split())
    assert untold == ""
    assert [path.name for path in tmp_path.iterdir()] == ["both.csv"]
    rows, found = (list(csv.DictReader(p.read_text("utf-8").splitlines())) for p in (table, tmp_path / "both.csv"))
    for model in found:
        own = [(float(row["year"]), float(row["lifeExp"])) for row in rows if row["country"] == model["country"]]
        assert float(model["year"]) == pytest.approx(np.polyfit(*np.transpose(own), 1)[0], rel=1e-8)


def test_arrays_over_two_processes(tmp_path):
    rng = np.random.default_rng(1)
    batch = {name: rng.normal(size=1000).astype(np.float32) for name in "wxt"}
    batch["rates"] = np.linspace(0.01, 0.1, 1000)
    np.savez(tmp_path / "batch.npz", **batch)
    port = free_port()
    both = [start("arrays", tmp_path / "batch.npz", tmp_path / f"{number}.npz", port, number) for number in range(2)]
    assert [code for code, _ in ended(*both)] == [0, 0]
    found = {k: v for number in range(2) for k, v in np.load(tmp_path / f"{number}.npz").items()}
    for name, rule in (("fixed", None), ("stop", stop.gradient_below(1e-2))):
        data = batch["x"], batch["t"]
        options = {"learning_rate": batch["rates"], "steps": 40, "stop": rule}
        expected = gdjax.minimize(kernel.squared_loss, batch["w"], data, **options)
        for field in ("weights", "loss", "gradient_norm", "steps", "status"):
            shards = [found[f"{name} {field} {first}"] for first in range(0, 1000, 125)]
            assert np.concatenate(shards).tobytes() == np.asarray(getattr(expected, field)).tobytes()


def test_a_process_that_waits_in_vain_says_so():
    ((code, said),) = ended(start("waits", free_port()))
    assert code == 2
    assert "process 0 of 2 has waited 2 s" in said
    assert "not all have come" in said


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


def test_launchers_are_noticed():
    assert launched(environment={}) is None
    assert launched(environment=SLURM) is None  # a batch script outside of srun
    assert launched(environment={**SLURM, "SLURM_STEP_NODELIST": "a[1-4]"}) == Launch(3, 4, None)
    assert launched(environment={**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1"}) == Launch(1, 2, None)
    five = launched(environment={**OPEN_MPI, "PMIX_NAMESPACE": "prterun-a-1@1"})
    assert (five.process_id, five.processes) == (1, 2)
    assert five.coordinator.startswith("127.0.0.1:")
    assert five == launched(environment={**OPEN_MPI, "PMIX_NAMESPACE": "prterun-a-1@1"})
    assert five != launched(environment={**OPEN_MPI, "PMIX_NAMESPACE": "prterun-a-2@1"})
    assert launched("b:1", environment=OPEN_MPI) == Launch(1, 2, "b:1")
    assert launched("b:1", 3, 0, {}) == Launch(0, 3, "b:1")
    assert launched("b:1", 1, 0, {}) is None


@pytest.mark.parametrize(
    ("arguments", "environment", "fragment"),
    [
        ((None, 2, 0), {}, "coordinator=None, processes=2, process_id=0, and no srun or mpirun tells the rest"),
        (("a:1", None, None), {}, "pass all three"),
        (("a", 2, 0), {}, "coordinator='a'; pass host:port"),
        (("a:1", 2, 2), {}, "process_id=2 of processes=2; number the processes from 0"),
        ((), {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "not all on this machine"),
    ],
)
def test_launches_that_do_not_fit(arguments, environment, fragment):
    with pytest.raises(ValueError) as error:
        launched(*arguments, environment=environment)
    assert fragment in str(error.value)


def member(**word):
    found = team.Member(1)
    found.hear({"stage": team.READY, **team.me(), **word})
    return found


def test_the_dead_are_told_from_the_living(monkeypatch):
    assert not member().dead
    gone = subprocess.Popen([sys.executable, "-c", ""])
    word = {"pid": gone.pid, "born": team.born(gone.pid)}
    while pathlib.Path(f"/proc/{gone.pid}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    assert member(**word).dead  # although nobody has waited for it yet
    gone.wait()
    assert member(**word).dead
    assert not member(**word, stage=team.DONE).dead
    assert member(born="1").dead  # another process has the number now
    elsewhere = member(machine="another")
    assert not elsewhere.dead
    monkeypatch.setattr(team, "SILENCE", 0.05)
    time.sleep(0.1)
    assert elsewhere.dead
    elsewhere.hear({**elsewhere.word, "number": 2})
    assert not elsewhere.dead


def test_processes_that_do_not_share_a_folder_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(team, "SIGHT", 0.2)
    alone = team.Team(0, 2, tmp_path / "mine")
    alone.come()
    with pytest.raises(team.TeamError, match=r"sees nothing of process 1 in .*mine; name a folder on a file system"):
        alone.meet()
    alone.leave()


def test_what_ends_one_process_is_told_to_the_others(tmp_path):
    first, second = (team.Team(number, 2, tmp_path) for number in range(2))
    first.come()
    second.come()
    with pytest.raises(ValueError, match="no such column"), team.taking_part(first):
        raise ValueError("no such column")
    with pytest.raises(team.TeamError, match=r"process 0 \(.*\) failed: no such column"):
        second.dealt()
    (lost,) = second.lost()
    assert (lost.index, lost.fate) == (0, "failed (no such column)")
    second.leave()
