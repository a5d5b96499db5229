"""Recordings in and out: LeRobot v3.0 datasets, rosbag2 MCAP, and the simulated experts' own.

Import from the modules: `reader`, `writer`, `mcap`, `simulated`. Nothing is loaded from here.
"""
