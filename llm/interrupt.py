# SPDX-License-Identifier: BSD-3-Clause
"""Ctrl-C and SIGTERM during a run: never in the middle of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["Interrupts"]


class Interrupts:
    """Signals that ask a run to end.

    While ``whole`` is entered the first one is noted only. At other times, and from the second one on, they raise
    KeyboardInterrupt where the program is.

    Attributes
    ----------
    number : int or None
        The first signal that came.
    torn : bool
        Whether what must be whole was left before its end.

    Examples
    --------
    >>> with Interrupts() as interrupts:
    ...     with interrupts.whole():
    ...         signal.raise_signal(signal.SIGTERM)
    ...     interrupts.number == signal.SIGTERM, interrupts.torn
    (True, False)
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.torn = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        """Listen, if this is the main thread; a signal that is ignored stays so."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._came)
        return self

    def __exit__(self, *error: Any) -> None:
        """Put back what was there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _came(self, number: int, frame: Any) -> None:
        again, self.number = self.number is not None, self.number or number
        if again or not self.torn:
            raise KeyboardInterrupt

    @contextmanager
    def whole(self) -> Iterator[None]:
        """What happens inside is not to be left before its end."""
        self.torn = True
        yield
        self.torn = False

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells count."""
        return 128 + (self.number or signal.SIGINT)
