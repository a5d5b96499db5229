"""`pi05 demo`."""
