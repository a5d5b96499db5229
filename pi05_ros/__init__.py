"""Runs the π0.5 vision-language-action policy on a ROS 2 robot."""

__version__ = "0.1.0"
