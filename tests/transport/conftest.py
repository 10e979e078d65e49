"""Settings of this room's property tests."""

from hypothesis import settings

settings.register_profile("shoal", deadline=None)  # no test asserts on time
settings.load_profile("shoal")
