"""LeRobot v3.0 data sets, rosbag2 bags, and the simulated experts' recordings."""
