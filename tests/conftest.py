"""Settings of the whole test suite."""

from hypothesis import settings

# derandomize: the same examples in every run, so that a failure is a change of the code and never of the draw.
# deadline: the first call of a compiled function takes seconds.
settings.register_profile("bcd", deadline=None, derandomize=True, max_examples=100, print_blob=True)
settings.load_profile("bcd")
