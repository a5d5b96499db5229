"""Settings of all tests."""

from hypothesis import settings

# A shared machine may let any example wait longer than hypothesis's 200 ms.
settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
