"""Settings of the whole test suite."""

import signal

from hypothesis import settings

# a shell that starts the tests in the background makes them ignore Ctrl-C, and so would the solvers under test
signal.signal(signal.SIGINT, signal.default_int_handler)

# derandomize: the same examples in every run, so that a failure is a change of the code and never of the draw.
# deadline: the first call of a compiled function takes seconds.
settings.register_profile("bcd", deadline=None, derandomize=True, max_examples=100, print_blob=True)
settings.load_profile("bcd")
