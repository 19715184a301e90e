"""Settings of the whole suite."""

from hypothesis import settings

# Times vary on shared machines; nothing here tests speed.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")
