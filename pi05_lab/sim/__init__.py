"""A simulated ALOHA: two ViperX 300s arms, a table, cubes and cameras (mujoco and numpy alone).

Import from the modules: `arms`, `cameras`, `controller`, `scene`. Nothing is loaded from here.
"""
