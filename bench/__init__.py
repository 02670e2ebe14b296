"""Benchmarks: every case run by gdjax and by the programs that a user would pick instead, in interleaved
rounds.

`python -m bench` runs them and writes `bench/results/<device>-<date>.json`, a table and plots; `pytest
bench/` runs the same cases under pytest-benchmark. cases.py says what is solved, peers/ by whom, rounds.py
how it is timed."""
