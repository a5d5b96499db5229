"""Open-loop evaluation on bags and data sets: `pi05 evaluate`."""
