# SPDX-License-Identifier: BSD-3-Clause
"""The memory that was really in use, as the GPU or the operating system measures it."""

from __future__ import annotations

import contextlib
import resource
from pathlib import Path

import torch

__all__ = ["begin_peak", "peak_memory"]


def begin_peak() -> None:
    """Forget what was in use before; where the system does not let us, peaks go back to the start of the process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """The most bytes that were in use since then: on the GPU if one was used, else by this process.

    Examples
    --------
    >>> peak_memory() > 10_000_000
    True
    """
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
