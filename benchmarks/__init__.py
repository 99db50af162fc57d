"""What the platform costs in time, memory and evaluation: one program each, listed by `python -m benchmarks`."""
