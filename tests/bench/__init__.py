"""Benchmarks: modules run as `python -m tests.bench.NAME --json`, no part of `make test`.

Both sides run interleaved in one process start, A B A B ..., because absolute times on shared machines drift; the last
line of standard output is one compact JSON object with at least `ratio`, both sides' medians, the repeats and the
machine. `make bench-setup` installs peers, each in an environment of its own under .bench/.
"""
