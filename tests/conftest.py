"""What all tests share."""

from hypothesis import settings

# The same examples in every run: a failure is a finding, never a coincidence.
settings.register_profile("mehdb", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("mehdb")
