"""The control loop without ROS and without the network.

The node drives `PolicyRunner` with ROS time and real messages; an evaluation drives the same class
with a simulator's clock.
"""

from pi05_ros.runner.policy_runner import PolicyRunner
from pi05_ros.runner.tick import Braking, Tick

__all__ = ["Braking", "PolicyRunner", "Tick"]
