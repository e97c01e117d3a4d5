"""What a signal raises, told from what a function raises."""

from __future__ import annotations

import signal


class Interrupted(KeyboardInterrupt):
    """A signal's own exception, so that it is told from a KeyboardInterrupt that some function raised."""


def is_signal(error: BaseException) -> bool:
    """Whether a signal raised this here: through `Signals`, or through Python's own handler of SIGINT."""
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return isinstance(error, Interrupted) or (own and isinstance(error, KeyboardInterrupt))
