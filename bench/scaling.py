"""`python -m bench.scaling`: the same batch on more devices (strong), a batch that grows with them (weak).

Real devices are used where `--device gpu` or `tpu` has several. `--virtual` makes so many CPU devices out of one
processor: they share its cores, one core to a device as long as there are cores, so that the best there can be is
min(devices, cores) times one device. What is looked at then is the shape, nothing lost to dealing and to devices, and
the processor time that the same work takes, which says so on a busy machine too.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.__main__ import RESULTS

CASES = ("scalar", "vector-32x8", "stop-scalar")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser("python -m bench.scaling", description=__doc__.partition(":")[2])
    options.add_argument("--cases", nargs="+", default=CASES, metavar="NAME", help=f"default: {' '.join(CASES)}")
    options.add_argument("--device", default="cpu", help="the kind of devices: cpu, gpu, tpu (default cpu)")
    options.add_argument("--virtual", type=int, default=8, help="virtual CPU devices (default 8)")
    options.add_argument("--problems", type=int, help="problems on all devices (default: the case's own)")
    options.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default bench/results)")
    return options


def counts(most: int) -> list[int]:
    """One device, twice as many and so on, and all of them."""
    return sorted({most, *(1 << k for k in range(most.bit_length()) if 1 << k <= most)})


def runs(case: Any, devices: list[Any], problems: int) -> dict[tuple[str, int], tuple[int, Callable[[], Any]]]:
    """What is timed, by `(kind, number of devices)`: so many problems, and the call."""
    import numpy as np
    from jax import device_put
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    import gdjax

    stop = None if case.tolerance is None else gdjax.stop.gradient_below(case.tolerance)
    every = len(devices)
    inputs = case.inputs(problems // every * every)

    def solve(part: Any, **options: Any) -> Any:
        settings = {"learning_rate": part.rates, "in_axes": case.in_axes, "steps": case.steps, "stop": stop}
        out = gdjax.minimize(case.loss, part.weights, part.data, **settings, **options)
        out.loss.block_until_ready()
        return out

    def sharded(part: Any, count: int) -> Callable[[], Any]:
        mesh = Mesh(np.array(devices[:count]), ("problems",))
        lay = lambda leaf: device_put(leaf, NamedSharding(mesh, PartitionSpec("problems")))  # noqa: E731
        laid = type(part)(lay(part.weights), tuple(map(lay, part.data)), lay(part.rates))
        return lambda: solve(laid)

    made: dict[tuple[str, int], tuple[int, Callable[[], Any]]] = {}
    for count in counts(every):
        share = inputs.take(slice(len(inputs) // every * count), case.shared)
        few = devices[:count]
        made["strong", count] = len(inputs), lambda few=few: solve(inputs, device=few)
        made["weak", count] = len(share), lambda share=share, few=few: solve(share, device=few)
        if count > 1 and len(inputs) % count == 0:
            made["sharded arrays", count] = len(inputs), sharded(inputs, count)
    return made


def same(one: Any, other: Any) -> bool:
    """Whether two solutions have the same bits."""
    import numpy as np

    names = ("weights", "loss", "gradient_norm", "steps", "status")
    return all(np.asarray(getattr(one, n)).tobytes() == np.asarray(getattr(other, n)).tobytes() for n in names)


def measure(case: Any, devices: list[Any], problems: int, rounds: int) -> list[dict[str, Any]]:
    """Each run once to compile, then all of them in interleaved rounds."""
    made = runs(case, devices, problems)
    first = {name: run() for name, (_, run) in made.items()}
    alone = first["strong", 1]
    seconds: dict[tuple[str, int], list[float]] = {name: [] for name in made}
    work: dict[tuple[str, int], list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, (_, run) in made.items():
            began, busy = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - began)
            work[name].append(time.process_time() - busy)
    rows = []
    for (kind, count), (size, _) in made.items():
        base = seconds["weak" if kind == "weak" else "strong", 1]
        gain = statistics.median(a / b for a, b in zip(base, seconds[kind, count], strict=True))
        each = statistics.median(work["strong", 1]) / made["strong", 1][0]
        rows.append(
            {
                "case": case.name,
                "kind": kind,
                "devices": count,
                "problems": size,
                "seconds": seconds[kind, count],
                # Work done per second against one device: with as many problems, or with as many per device.
                "times_one": gain * (count if kind == "weak" else 1),
                # Processor time per problem against that of all problems on one device: 1 where nothing is lost.
                "work": statistics.median(work[kind, count]) / size / each,
                "bit_equal": None if kind == "weak" and count < len(devices) else same(first[kind, count], alone),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], best: Callable[[int], int]) -> str:
    lines = [
        "| case | scaling | devices | problems | seconds | times one device | of the best | bits |",
        "|" + "---|" * 8,
    ]
    for row in rows:
        equal = {None: "", True: "equal", False: "DIFFER"}[row["bit_equal"]]
        lines.append(
            f"| {row['case']} | {row['kind']} | {row['devices']} | {row['problems']:,} | "
            f"{statistics.median(row['seconds']):.3g} | {row['times_one']:.2f} | "
            f"{row['times_one'] / best(row['devices']):.0%} | {row['work']:.2f} | {equal} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 where bits differ, 2 for bad input."""
    options = parser().parse_args(arguments)
    virtual = options.device == "cpu"
    if virtual:
        flag = f" --xla_force_host_platform_device_count={options.virtual}"
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + flag
    import jax

    from bench import environment
    from bench.cases import choose
    from bench.report import replacing
    from gdjax import device as dev

    try:
        cases, devices = choose(options.cases), jax.local_devices(backend=options.device)
    except (ValueError, RuntimeError) as error:
        print(f"bench.scaling: {error}", file=sys.stderr)
        return 2
    cores = dev.workers(devices[0])
    if virtual:
        dev.workers = lambda device: 1  # one core to a device: alone, a CPU device would use them all
    note = f"{len(devices)} virtual CPU devices on {cores} cores" if virtual else f"{len(devices)} devices"
    print(f"{note}; medians of {options.rounds} interleaved rounds\n", flush=True)
    rows: list[dict[str, Any]] = []
    for case in cases:
        rows += measure(case, devices, options.problems or case.problems, options.rounds)
    print(table(rows, lambda count: min(count, cores) if virtual else count))
    now = datetime.datetime.now(datetime.UTC)
    about = environment.describe(devices[0]) | {"date": now.isoformat(timespec="seconds"), "devices": note}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"scaling-{environment.slug(about['device'])}-{now:%Y-%m-%d-%H%M}.json"
    with replacing(path) as file:
        file.write((json.dumps({**about, "scaling": rows}, indent=1) + "\n").encode())
    print(f"\nwritten: {path}")
    return 1 if any(row["bit_equal"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
