"""Action chunks become stamped trajectories within the robot's limits. numpy and defusedxml only.

Values are in the controller's units (rad, or m for a prismatic gripper) and seconds on the clock of
the observation stamps.
"""
