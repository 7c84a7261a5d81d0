# SPDX-License-Identifier: BSD-3-Clause
"""What a result file says besides its numbers: when, at which commit, on which machine, with which versions.

A full run writes results/NAME.json and results/NAME*.png. A quick run writes the same under
``blockdescent-experiments`` in the system's temporary folder, so that it never replaces a full result.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import llvmlite.binding
import numpy as np

from experiments import FOLDER, RESULTS

LIBRARIES = ("numpy", "scipy", "numba", "scikit-learn", "llvmlite")


def record(name: str, module: ModuleType, quick: bool) -> list[Path]:
    """Run an experiment and save what it returns.

    Parameters
    ----------
    name : str
    module : module
        With ``TITLE``, ``SEED`` and ``run``.
    quick : bool
        Run the small version, and save it in the temporary folder.

    Returns
    -------
    list of Path
        The files written: the numbers first, then the pictures.
    """
    folder = Path(tempfile.gettempdir()) / "blockdescent-experiments" if quick else RESULTS
    folder.mkdir(exist_ok=True)
    stem = f"{name}.quick" if quick else name
    entry: dict[str, Any] = {"name": name, "title": module.TITLE, "quick": quick, "seed": module.SEED}
    entry |= environment()
    started = time.perf_counter()
    results = module.run(quick)
    entry["seconds"] = round(time.perf_counter() - started, 1)
    entry["load_average_after"] = load_average()
    pictures = {f"{stem}{'-' * bool(s)}{s}.png": picture for s, picture in results.pop("pictures", {}).items()}
    entry["pictures"] = sorted(pictures)
    entry["results"] = results
    for file, picture in pictures.items():
        if isinstance(picture, bytes):  # a PNG as it is
            (folder / file).write_bytes(picture)
        else:
            picture.savefig(folder / file, dpi=144)
    (folder / f"{stem}.json").write_text(to_json(entry), encoding="utf-8")
    return [folder / f"{stem}.json", *(folder / file for file in pictures)]


def environment() -> dict[str, Any]:
    """Date, commit, machine and versions; no host name and no path."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git_commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
        "blas": blas(),
        "load_average_before": load_average(),
    }


def load_average() -> float | None:
    """Processes running in the last minute: others on the machine disturb the timings."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def git_commit() -> str | None:
    """The commit of the working tree, with "+" where files differ from it; None outside git."""
    folders = ("../bcd", "../llm", ".")
    try:
        commit, changed = (
            subprocess.run(["git", *command], cwd=FOLDER, capture_output=True, text=True, check=True).stdout.strip()
            for command in (
                ["rev-parse", "--short=12", "HEAD"],
                ["status", "--porcelain", "--", *folders, ":(exclude)results"],
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)


def machine() -> dict[str, Any]:
    """CPU model, LLVM's name for its instruction set, and the cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu_model(), "architecture": llvmlite.binding.get_host_cpu_name(), "cores": cores}


def cpu_model() -> str:
    """Model name as the kernel gives it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def blas() -> list[dict[str, Any]] | None:
    """Which kernels the BLAS libraries chose; None without threadpoolctl."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return None
    kept = ("internal_api", "version", "architecture", "num_threads")
    return [{k: pool[k] for k in kept if k in pool} for pool in threadpool_info()]


def to_json(entry: dict[str, Any]) -> str:
    """Indented JSON with every list of plain numbers or words on one line."""
    text = json.dumps(entry, indent=1, default=_plain, allow_nan=True)
    return re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: "[" + re.sub(r"\s*\n\s*", " ", m[1]) + "]", text) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot go into a result file")
