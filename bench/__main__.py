"""`python -m bench`: run cases, write what came out, or compare two runs."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    """The options."""
    from bench.cases import CASES, SWEEPS

    options = argparse.ArgumentParser("python -m bench", description=__doc__)
    options.add_argument(
        "--cases", nargs="+", metavar="NAME", help=f"some of: {', '.join(CASES)}; or a sweep: {', '.join(SWEEPS)}"
    )
    options.add_argument("--programs", nargs="+", metavar="NAME", help="only these programs, e.g. gdjax vmap")
    options.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default 5)")
    options.add_argument("--quick", action="store_true", help="a fiftieth of the problems, two rounds: a smoke test")
    options.add_argument("--device", default="cpu", help="as gdjax names it: cpu, gpu, tpu, gpu:1 (default cpu)")
    options.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default bench/results)")
    options.add_argument("--compare", nargs=2, type=Path, metavar=("OLD", "NEW"), help="tell what moved between two")
    options.add_argument("--list", action="store_true", help="list the cases and the programs")
    return options


def show_cases() -> None:
    """What there is to run."""
    from bench.cases import CASES

    for case in CASES.values():
        print(f"{case.name:20} {case.title}\n{'':20} {', '.join(case.programs)}")


def run(options: argparse.Namespace) -> int:
    """Run the chosen cases and write JSON, table and plots."""
    from bench import environment, plots, report
    from bench.cases import choose
    from bench.peers import programs
    from bench.peers.jax_peers import pick
    from bench.rounds import quick, run_case

    cases = choose(options.cases)
    unknown = set(options.programs or ()) - set(programs())
    if unknown:
        raise ValueError(f"no such program: {', '.join(sorted(unknown))}; there are {', '.join(programs())}")
    if options.rounds < 1:
        raise ValueError(f"--rounds must be 1 or more, got {options.rounds}")
    device = pick(options.device)
    now = datetime.datetime.now(datetime.UTC)
    about = environment.describe(device) | {"date": now.isoformat(timespec="seconds"), "quick": options.quick}
    options.out.mkdir(parents=True, exist_ok=True)
    kind = about["device"] + (" quick" if options.quick else "")
    stem = options.out / f"{environment.slug(kind)}-{now:%Y-%m-%d-%H%M}"
    results = []
    for case in cases:
        result = run_case(
            quick(case) if options.quick else case,
            rounds=min(options.rounds, 2) if options.quick else options.rounds,
            device=options.device,
            only=options.programs,
            say=lambda text: print(f"  {text}", file=sys.stderr, flush=True),
        )
        results.append(result)
        print(report.case_table(result), flush=True)
        # After each case, so that a run that is stopped keeps what it has.
        report.save(stem.with_name(stem.name + ".json"), about, results)
    with report.replacing(stem.with_name(stem.name + ".md")) as file:
        file.write(report.readable(about, results).encode())
    pictures = plots.draw(stem, results)
    print(f"written: {stem}.json, .md, {', '.join(path.name for path in pictures)}")
    failed = [row for result in results for row in result.rows if row.missing.startswith("failed")]
    differ = [row for result in results for row in result.rows if row.bit_equal is False]
    return 1 if failed or differ else 0


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 where a program failed or bits differ, 2 for bad input."""
    options = parser().parse_args(arguments)
    try:
        if options.list:
            show_cases()
        elif options.compare:
            from bench.compare import compare

            print(compare(*options.compare))
        else:
            return run(options)
    except (ValueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
