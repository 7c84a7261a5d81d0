# SPDX-License-Identifier: BSD-3-Clause
"""Files of the data, and what is made of them once.

The data lie below llm/ in the folder that BCD_DATA names. Tokens and models are kept in the cache folder
(``$XDG_CACHE_HOME`` or ~/.cache, then blockdescent/llm).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def data_file(path: str) -> Path:
    """A file below llm/ in the folder of the data.

    Raises
    ------
    FileNotFoundError
        If it is not there.
    """
    found = Path(os.environ.get("BCD_DATA", "")) / "llm" / path
    if not os.environ.get("BCD_DATA") or not found.is_file():
        raise FileNotFoundError(
            f"there is no llm/{path} in the folder of the data; set BCD_DATA to a folder that has it (found "
            f"{os.environ.get('BCD_DATA')!r})"
        )
    return found


def read(path: str) -> str:
    """The text of a gzipped file."""
    with gzip.open(data_file(path), "rt", encoding="utf-8") as file:
        return file.read()


def lines(path: str) -> list[str]:
    """The lines of a gzipped file; only a line feed ends one."""
    return [line for line in read(path).split("\n") if line]


def cache() -> Path:
    """The folder for tokens and models."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockdescent" / "llm"


def cached(name: str, key: Any, write: Callable[[Path], None]) -> Path:
    """A file or folder of the cache, made once.

    Parameters
    ----------
    name : str
    key
        Plain values that its content depends on.
    write : callable
        Makes it at the path that it is given.
    """
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    path = cache() / f"{name}-{digest}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            write(Path(folder) / "new")
            try:
                (Path(folder) / "new").rename(path)
            except OSError:  # someone else has made the folder meanwhile
                if not path.exists():
                    raise
    return path


def cached_arrays(name: str, key: Any, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of the cache by name."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **compute())

    with np.load(cached(name, key, write), allow_pickle=False) as arrays:
        return dict(arrays)
