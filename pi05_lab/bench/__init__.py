"""Benchmarks: latency of a chunk, chunk schedulers."""
