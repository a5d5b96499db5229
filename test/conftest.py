"""Settings of all tests."""

import os

from hypothesis import settings

# A shared machine may let any example wait longer than hypothesis's 200 ms. The same examples every
# time: a change is judged by what it changes. EXPLORE=1 looks for further ones.
settings.register_profile("shared machine", deadline=None, derandomize="EXPLORE" not in os.environ)
settings.load_profile("shared machine")
