"""The parts that the benchmarks share, and the worker processes that they start."""
