"""Stops `make` with one line when this Python cannot run the package."""

import sys

if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    found = ".".join(map(str, sys.version_info[:3]))
    sys.exit(
        "pi05_ros needs Python 3.10 to 3.13 (ROS 2 has no wheels for others), and %s is %s. "
        "Name another: make PYTHON=python3.11" % (sys.executable, found)
    )
try:
    import ensurepip  # noqa: F401
    import venv  # noqa: F401
except ImportError:
    sys.exit("pi05_ros: this Python has no venv. Install it: apt-get install python3-venv")
