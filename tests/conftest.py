"""For all tests."""

import signal

# A shell that starts the tests in the background has interrupts ignored, and that is inherited: without this, neither
# the tests nor the processes that they start would see Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
