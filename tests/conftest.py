"""Settings for the whole suite."""

from hypothesis import settings

# The machines that run the suite are shared: how long an example takes says nothing about it.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
