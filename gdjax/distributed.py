"""One run by many processes, on one machine or many, started by srun, mpirun or by hand.

JAX's distributed runtime finds out where the others are (it knows SLURM and Open MPI), gives each process its devices
and waits until all have come. Then it is left again, before any device is touched: as long as it runs, JAX ends every
process when one of them dies, and with its recovery switched on still when the first one does. Problems are
independent, so nothing is needed of it later: the processes watch each other through the folder that they write into
(`gdjax.team`), and what each has done is known from the parts that are there.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gdjax.team import DONE, LEFT, SIGHT, Team, TeamError, taking_part

if TYPE_CHECKING:
    from gdjax.jobs import Job
    from gdjax.stream import StreamSolution

PATIENCE = 300
"""Seconds to wait for all processes to come."""

LAUNCHERS = (  # rank, number of processes, of these on this machine, a name of the run
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "PMIX_NAMESPACE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", "PMI_FD"),
    ("SLURM_PROCID", "SLURM_NTASKS", "", "SLURM_JOB_ID"),
)
JAX_KNOWS = (
    ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE"),
    ("SLURM_STEP_NODELIST", "SLURM_NTASKS"),
)
"""What tells that JAX can find the other processes by itself: Open MPI up to 4, a step of SLURM."""

PORTS = range(49152, 61440)
"""Where a coordinator listens that nobody named; JAX takes those above for what it finds itself."""


@dataclass(frozen=True)
class Launch:
    """Which process this is, of how many, and where the first one is; None where JAX can find that out."""

    process_id: int
    processes: int
    coordinator: str | None


def launched(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Launch | None:
    """How this process was launched beside others; None where it is alone.

    Args:
        coordinator: `host:port` of process 0, the port one that is free there.
        processes: how many there are.
        process_id: which of them this one is, from 0.
        environment: where a launcher has left its word.

    Raises:
        ValueError: some of the three are missing where no launcher tells them, or they contradict each other.

    >>> launched("node1:5000", 4, 0)
    Launch(process_id=0, processes=4, coordinator='node1:5000')
    >>> launched(environment={"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    True
    """
    names = launcher(environment)
    if names is not None:
        processes = int(environment[names[1]]) if processes is None else processes
        process_id = int(environment[names[0]]) if process_id is None else process_id
    elif (coordinator, processes, process_id) == (None, None, None):
        return None
    if processes == 1 and process_id in (0, None):
        return None
    known = any(all(name in environment for name in pair) for pair in JAX_KNOWS)
    if names is not None and coordinator is None and not known:
        coordinator = on_this_machine(names, environment)
    if processes is None or process_id is None or (coordinator is None and not known):
        raise ValueError(
            f"coordinator={coordinator!r}, processes={processes}, process_id={process_id}, and no srun or mpirun tells "
            "the rest; pass all three: host:port of process 0, how many there are, and 0, 1, ... for each"
        )
    host, _, port = (coordinator or "known:0").rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"coordinator={coordinator!r}; pass host:port of process 0, such as node1:5000")
    if not 0 <= process_id < processes:
        raise ValueError(f"process_id={process_id} of processes={processes}; number the processes from 0")
    return Launch(process_id, processes, coordinator)


def launcher(environment: Mapping[str, str]) -> tuple[str, ...] | None:
    """The names under which a launcher of several processes has left its word."""
    for names in LAUNCHERS:
        if names[0] in environment and int(environment.get(names[1], 1)) > 1:
            # A batch script outside of srun is one process, whatever was allotted to it.
            if names[0] != "SLURM_PROCID" or "SLURM_STEP_NODELIST" in environment:
                return names
    return None


def on_this_machine(names: tuple[str, ...], environment: Mapping[str, str]) -> str:
    """An address for processes that a launcher has started here; ValueError where some are elsewhere."""
    _, size, local, run = names
    if environment.get(local) != environment[size]:
        raise ValueError(
            f"{environment[size]} processes were started, not all on this machine, by a launcher that does not say "
            "where the first one is; pass coordinator, host:port of process 0"
        )
    number = int.from_bytes(hashlib.sha256(f"{environment.get(run, os.getppid())}".encode()).digest()[:4], "big")
    return f"127.0.0.1:{PORTS[number % len(PORTS)]}"


@contextmanager
def gathered(
    launch: Launch, patience: float = PATIENCE, say: Callable[[str], Any] = lambda text: None
) -> Iterator[None]:
    """Wait until all processes have come, and at the end until all are through with what is within.

    Nothing within may touch a device of JAX's. A process that waits in vain ends with a message and status 2, before
    JAX would abort it.

    Raises:
        RuntimeError: a device was touched before, or JAX cannot start here.
    """
    import jax

    where = launch.coordinator or "the address that the launcher tells"
    who = f"process {launch.process_id} of {launch.processes}"

    def give_up() -> None:
        say(
            f"{who} has waited {patience:.0f} s at {where} and not all have come; start all of them, each with a "
            "process id of its own and the same coordinator, which must be reachable and its port free"
        )
        os._exit(2)

    timers = [
        threading.Timer(patience / 10, say, [f"{who} is waiting for the others at {where}"]),
        threading.Timer(patience, give_up),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    limit = int(patience) + 30
    try:
        jax.distributed.initialize(
            launch.coordinator,
            launch.processes,
            launch.process_id,
            initialization_timeout=limit,
            shutdown_timeout_seconds=limit,
        )
        try:
            yield
        finally:
            jax.distributed.shutdown()
    finally:
        for timer in timers:
            timer.cancel()


@dataclass(frozen=True)
class Ending:
    """How a run of several processes ended, as one of them sees it.

    Attributes:
        job: the job, this process's parts of which are done.
        leads: whether this is the first of the processes that ended well: the one to finish the job.
        missing: the parts that are not there.
        lost: a line for each process that died or failed.
    """

    job: Job
    leads: bool
    missing: list[int]
    lost: list[str]

    @property
    def told(self) -> str:
        """What the user should know of processes that were lost."""
        lines = "; ".join(self.lost) or f"{len(self.missing)} parts are missing although all processes ended well"
        return lines + ("; run the same again, which does what is missing" if self.missing else "")


def together(
    launch: Launch,
    folder: Path,
    open_job: Callable[[], Job],
    *,
    progress: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> Ending:
    """Do a job's missing parts together with the other processes; each calls this.

    Process 0 opens the job first, and deals its missing parts out; the others open it then. When one dies, the others
    do theirs; what it leaves is done by the next run, of however many processes.

    Args:
        launch: which process this is, as `launched` tells.
        folder: the job's folder, on a file system that all processes share.
        open_job: opens it; nothing may have touched a device of JAX's before.
        progress: show a progress bar, of process 0's parts.
        say: is told what the user should know.

    Raises:
        TeamError: the processes do not see each other, or process 0 failed or died before the work began.
    """
    team = Team(launch.process_id, launch.processes, folder)
    with gathered(launch, say=say):
        team.come()
    with taking_part(team):
        team.meet()
        if team.index == 0:
            job = open_job()
            if job.count is None:
                raise TeamError(
                    "the source is an iterator, whose parts are known only at its end; write it into a Parquet file or "
                    "folder first, or run one process"
                )
            parts = job.missing()
            team.deal(parts)
        else:
            parts = team.dealt()
            job = open_job()
        job.run(parts=parts[team.index :: team.count], progress=progress and team.index == 0)
        team.say(DONE)
        lost = team.lost()
        missing = awaited(job, patient=not lost)
        lines = [f"{m} {m.fate}; {among(parts[m.index :: team.count], missing)}" for m in lost]
        leads = team.index == min(set(range(team.count)) - {member.index for member in lost})
        if leads:
            team.disband(lost)
        else:
            team.say(LEFT)
        return Ending(job, leads, missing, lines)


def awaited(job: Job, patient: bool) -> list[int]:
    """The parts that are missing when all processes have ended; a shared folder may show the others' a little late."""
    limit = time.monotonic() + SIGHT
    while (missing := job.missing()) and patient and time.monotonic() < limit:
        time.sleep(1)
    return missing


def among(parts: list[int], missing: list[int]) -> str:
    """How many of a process's parts are missing, in words."""
    left = sorted(set(parts) & set(missing))
    if not left:
        return "all its parts are there"
    few = ", ".join(str(number) for number in left[:5]) + (", ..." if len(left) > 5 else "")
    return f"{len(left)} of its {len(parts)} parts missing: {few}"


class PartsMissing(RuntimeError):
    """Other processes died or failed before their parts were done; the message says which, and how to go on."""


def solve_stream(
    source: Any,
    sink: Any,
    loss: Callable[..., Any],
    weights: Any,
    data: tuple[Any, ...] = (),
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    progress: bool = False,
    **options: Any,
) -> StreamSolution | None:
    """`gdjax.solve_stream` by many processes: each calls this and does its parts, into one folder under one manifest.

    Under `srun` or `mpirun` the processes find each other; elsewhere each is told `coordinator`, `processes` and its
    `process_id`. Call it before anything touches a device of JAX's. Each process uses its own devices. Alone, it is
    `gdjax.solve_stream`. The results are the same in every bit, whoever does which part.

    Args:
        source: as in `gdjax.solve_stream`, but no iterator; every process must be able to read it.
        sink: a folder, or a file that is joined at the end; on a file system that all processes share.
        loss, weights, data: as in `gdjax.solve_stream`.
        coordinator: `host:port` of process 0, the port one that is free there.
        processes: how many processes there are.
        process_id: which of them this is, from 0.
        progress: show a progress bar, of process 0's parts.
        options: as in `gdjax.solve_stream`.

    Returns:
        A `StreamSolution` to the first of the processes that ended well, None to the others.

    Raises:
        ValueError: as `gdjax.solve_stream`; processes that cannot find or see each other.
        PartsMissing: another process died, and parts of its are missing. This one's are done; the same again, with as
            many processes as you like, does the rest.

    >>> import gdjax, numpy as np, pathlib, tempfile
    >>> problems = {"x": np.full(3, 2.0), "t": np.array([4.0, 5.0, 6.0])}
    >>> out = pathlib.Path(tempfile.mkdtemp()) / "answers.csv"
    >>> s = solve_stream(problems, out, gdjax.kernel.squared_loss, 1.0, ("x", "t"), learning_rate=0.1, steps=50)
    >>> s.problems, s.counts
    (3, {'RAN_ALL_STEPS': 3})
    """
    from gdjax import stream

    launch = launched(coordinator, processes, process_id)
    if launch is None:
        return stream.solve_stream(source, sink, loss, weights, data, progress=progress, **options)
    folder, _ = stream.places(sink)
    ending = together(
        launch,
        folder,
        lambda: stream.open_job(source, sink, loss, weights, data, **options),
        progress=progress,
        say=tell,
    )
    if ending.missing:
        raise PartsMissing(ending.told)
    if ending.lost:
        tell(ending.told)
    return stream.told(ending.job, ending.job.finish(), options.get("device", "auto")) if ending.leads else None


def tell(text: str) -> None:
    print(f"gdjax: {text}", file=sys.stderr, flush=True)
