"""Closed-loop evaluation in the simulator: `pi05 sim-eval`."""
