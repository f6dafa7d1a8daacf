"""Ctrl-C and SIGTERM, held back while something must not be broken off."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

KINDS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_back() -> Iterator[list[int]]:
    """What comes while the block runs is in the list that it gives, and has its effect, once, when the block has ended.

    Only the main thread is ever interrupted: in another one there is nothing to hold back.
    """
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    # None is a handler that is not Python's, and could not be put back.
    before = {kind: handler for kind in KINDS if (handler := signal.getsignal(kind)) not in (signal.SIG_IGN, None)}
    for kind in before:
        signal.signal(kind, lambda number, _: came.append(number))
    try:
        yield came
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
        if came:
            signal.raise_signal(came[0])
