"""Time and memory of randattn, against what bounds it: `python -m benchmarks --help`."""
