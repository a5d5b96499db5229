"""Everything but the robot's runtime: simulate, record, train, evaluate, benchmark, show."""
