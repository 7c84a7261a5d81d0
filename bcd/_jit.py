# SPDX-License-Identifier: BSD-3-Clause
"""Numba's compiler as this package uses it: without a place for its cache, and with Ctrl-C while it works."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numba
from numba.core import event


def njit(cache: bool = True, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit, which also works where no folder can be written for the cache (then every process compiles)."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=cache, **options)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            warnings.warn(_NO_CACHE, RuntimeWarning, stacklevel=2)
            return numba.njit(**options)(function)

    return decorate


_NO_CACHE = (
    "compiled code cannot be kept, so that every process compiles anew: neither the folder of the package nor a "
    "cache of the user can be written; name a folder in the environment variable NUMBA_CACHE_DIR"
)


class _AfterCompilation(event.Listener):
    """Delays Ctrl-C until the compiler has finished: raised inside a callback of LLVM's, it would be lost."""

    def __init__(self) -> None:
        self.depth, self.pressed = 0, False
        self.before: Any = None

    def on_start(self, event: Any) -> None:
        """Note what comes from now on."""
        if threading.current_thread() is not threading.main_thread():
            return
        self.depth += 1
        if self.depth == 1:
            self.pressed, self.before = False, signal.getsignal(signal.SIGINT)
            if callable(self.before):
                signal.signal(signal.SIGINT, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.pressed = True

    def on_end(self, event: Any) -> None:
        """Hand over what came to whoever listened before."""
        if threading.current_thread() is not threading.main_thread() or not self.depth:
            return
        self.depth -= 1
        if self.depth == 0 and callable(self.before):
            signal.signal(signal.SIGINT, self.before)
            if self.pressed:
                signal.raise_signal(signal.SIGINT)


event.register("numba:compiler_lock", _AfterCompilation())
