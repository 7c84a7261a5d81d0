# SPDX-License-Identifier: BSD-3-Clause
"""Sparse deltas: keep what fine-tuning changed, put it on the base model, take it off again, exactly.

:mod:`llm.delta_file` has the file and its mathematics. A model is a module, a state dict, or the path of a folder or of
a safetensors file; it is gone through tensor by tensor, and nothing of it is touched before everything is checked.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.delta_file import FORMAT, Change, Delta, Record, add_tensor, delta_info, finish, said
from llm.tensor_files import DTYPES, Live, Stored, Writer, read_header, replace_files, replacing, sha256, tensors_of

__all__ = [
    "Delta",
    "Record",
    "apply_delta",
    "delta_info",
    "list_deltas",
    "merge_deltas",
    "remove_delta",
    "save_delta",
    "swap_deltas",
]

CONFLICTS = ("error", "last", "sum")
Slot = Live | Stored
Members = list[tuple[Delta, Record]]  # of one tensor


# -- saving ----------------------------------------------------------------------------------------


def save_delta(base: Any, tuned: Any, path: str | os.PathLike[str]) -> Delta:
    """Write what differs between two models, bit by bit.

    Parameters
    ----------
    base, tuned : Module, mapping of str to Tensor, or path of a model folder or a safetensors file
        With the same tensors, types and shapes. Tied tensors may bear any of their names.
    path : str or Path
        Replaced at once when all is written. Beyond the models, memory holds a few copies of one tensor.

    Returns
    -------
    Delta

    Raises
    ------
    ValueError
        If a tensor is missing on one side, or has another type or shape there.

    Examples
    --------
    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> base, tuned = {"w": torch.zeros(3, 2)}, {"w": torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]])}
    >>> delta = save_delta(base, tuned, folder.name + "/a.safetensors")
    >>> delta.entries, delta.tensors[0].slices, delta.tensors[0].unit
    (2, 1, 2)
    >>> _ = apply_delta(base, delta.path)
    >>> base["w"][1]
    tensor([1., 2.])
    >>> _ = remove_delta(base, delta.path)
    >>> base["w"].any()
    tensor(False)
    >>> folder.cleanup()
    """
    records: dict[Any, list[Record]] = {}
    contents = set()
    with Writer(Path(path)) as writer:
        for names, old, new in _pairs(tensors_of(base, "base"), tensors_of(tuned, "tuned")):
            words = old.read().cpu()
            content = sha256(words)
            contents.add(f"{said(old.dtype, old.shape)} {content}")
            twin = (tuple(slot.key for slot in new), content)
            if twin in records:  # tied in tuned, and copies of each other in base
                records[twin] = [replace(record, names=record.names + names) for record in records[twin]]
                continue
            records[twin] = add_tensor(writer, names, old.dtype, old.shape, content, words ^ _only(names, new))
        whole = hashlib.sha256("\n".join(sorted(contents)).encode()).hexdigest()
        return finish(writer, whole, [record for added in records.values() for record in added])


def _pairs(base: Mapping[str, Slot], tuned: Mapping[str, Slot]) -> list[tuple[tuple[str, ...], Slot, list[Slot]]]:
    """Every tensor of the base once, with its names and those of ``tuned`` that bear one of these."""
    tied: dict[Any, list[str]] = {}
    for name, slot in base.items():
        tied.setdefault(slot.key, []).append(name)
    found: list[tuple[tuple[str, ...], Slot, list[Slot]]] = []
    partners: set[Any] = set()
    for names in tied.values():
        old, new = base[names[0]], {tuned[n].key: tuned[n] for n in names if n in tuned}
        if not new:
            raise ValueError(f"tuned must have the tensors of base; it lacks {names[0]!r}")
        for slot in new.values():
            if (slot.dtype, slot.shape) != (old.dtype, old.shape):
                raise ValueError(
                    f"tensor {names[0]!r} must have one type and shape; found {said(old.dtype, old.shape)} in base and "
                    f"{said(slot.dtype, slot.shape)} in tuned"
                )
        partners |= new.keys()
        found.append((tuple(names), old, list(new.values())))
    extra = [name for name, slot in tuned.items() if slot.key not in partners]
    if extra:
        raise ValueError(f"base must have the tensors of tuned; it lacks {extra[0]!r}")
    return sorted(found, key=lambda pair: pair[0])


def _only(names: Sequence[str], slots: Sequence[Slot]) -> Tensor:
    """The bits of a tensor that is tied in the base: all that bear its names must have them."""
    first, *others = (slot.read().cpu() for slot in slots)
    if not all(torch.equal(first, other) for other in others):
        raise ValueError(f"{' and '.join(names)} are one tensor in base but differ in tuned; untie them in base")
    return first


# -- putting on and taking off ---------------------------------------------------------------------


def apply_delta(model: Any, path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Delta:
    """Put a delta on its base model. Everything is checked first; then all of it happens, or nothing.

    Parameters
    ----------
    model : Module, mapping of str to Tensor, or path of a model folder or a safetensors file
        The base. Changed in place: tensors keep their identity and memory; of a folder only files with changed
        tensors are replaced. Optimizers that hold copies of weights must be made anew.
    path : str or Path
        Of the delta.
    out : str or Path, optional
        Instead of changing ``model``, a path: write the result there. Of a folder all files are copied.

    Returns
    -------
    Delta

    Raises
    ------
    ValueError
        If the delta is damaged, or ``model`` is not its base bit for bit. The model is as before then, and so it is
        after any other error and after Ctrl-C.
    """
    return _toggle(model, path, out, on=True)


def remove_delta(model: Any, path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Delta:
    """Take a delta off: the model is its base again, bit for bit. As :func:`apply_delta` otherwise."""
    return _toggle(model, path, out, on=False)


def swap_deltas(model: Any, old: str | os.PathLike[str], new: str | os.PathLike[str]) -> Delta:
    """Take ``old`` off and put ``new`` on, in place; ``old`` is back if that fails."""
    remove_delta(model, old)
    try:
        return apply_delta(model, new)
    except BaseException:
        with _deaf():
            apply_delta(model, old)
        raise


def _toggle(model: Any, path: Any, out: Any, on: bool) -> Delta:
    files = isinstance(model, str | os.PathLike)
    if out is not None and not files:
        raise ValueError(f"out={str(out)!r} needs a model that is a folder or a file; found {type(model).__name__}")
    if out is not None and (Path(out).exists() or not Path(out).absolute().parent.is_dir()):
        raise ValueError(f"{out}: must be a new name in a folder that exists")
    delta, what = delta_info(path), f"{model}" if files else "the model"
    pairs = _targets(tensors_of(model, "model"), delta, what)
    for record, slot in pairs:
        _check_content(slot, delta, record, what, on)
    if files:
        _toggle_files(Path(model), None if out is None else Path(out), pairs, delta)
    else:
        _toggle_live(pairs, delta)
    return delta


def _targets(tensors: Mapping[str, Slot], delta: Delta, what: str) -> list[tuple[Record, Any]]:
    """Every tensor of a model that a delta changes, once."""
    found: dict[Any, tuple[Record, Slot]] = {}
    for record in delta.tensors:
        name = record.names[0]
        slots = {tensors[n].key: tensors[n] for n in record.names if n in tensors}
        if not slots:
            raise ValueError(f"{delta.path}: changes tensor {name!r}, which {what} lacks")
        for key, slot in slots.items():
            if (slot.dtype, slot.shape) != (record.dtype, record.shape):
                raise ValueError(
                    f"{delta.path}: tensor {name!r} must be {said(record.dtype, record.shape)} in {what}; found "
                    f"{said(slot.dtype, slot.shape)}"
                )
            other, _ = found.setdefault(key, (record, slot))
            if (other.base, other.data) != (record.base, record.data):
                raise ValueError(
                    f"{delta.path}: changes {other.names[0]!r} and {name!r} in different ways, which are one tensor in "
                    f"{what}"
                )
    return list(found.values())


def _check_content(slot: Slot, delta: Delta, record: Record, what: str, on: bool) -> None:
    """The tensor is that of the base (on), or will be (off)."""
    words, change = slot.read(), delta.change(record)
    if sha256(words if on else _other_side(words, change)) == record.base:
        return
    if sha256(_other_side(words, change) if on else words) == record.base:
        raise ValueError(f"{delta.path}: is {'already' if on else 'not'} applied to {what}")
    raise ValueError(
        f"{delta.path}: tensor {record.names[0]!r} of {what} is not that of the base"
        f"{'' if on else ' with this delta on it'}; take off what was put on since, or make one delta of several with "
        "merge_deltas"
    )


def _other_side(words: Tensor, change: Change) -> Tensor:
    other = words.clone()
    change.put(other, change.toggled(words))
    return other


def _toggle_live(pairs: Sequence[tuple[Record, Live]], delta: Delta) -> None:
    """Change tensors in memory; put back what was changed if something comes between."""
    journal: dict[int, Tensor | None] = {}  # the old slices while they are being written, None after
    try:
        for k, (record, slot) in enumerate(pairs):
            change, words = delta.change(record), slot.read()
            new = change.toggled(words)
            journal[k] = change.take(words)
            _write(slot, words, change, new)
            journal[k] = None
    except BaseException:
        with _deaf():
            for k, old in journal.items():
                record, slot = pairs[k]
                change, words = delta.change(record), slot.read()
                _write(slot, words, change, change.toggled(words) if old is None else old)
        raise


def _write(slot: Live, words: Tensor, change: Change, values: Tensor) -> None:
    change.put(words, values)
    slot.write(words)


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C does nothing in here."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _toggle_files(model: Path, out: Path | None, pairs: Sequence[tuple[Record, Stored]], delta: Delta) -> None:
    by_file: dict[Path, list[tuple[Record, Stored]]] = {}
    for record, slot in pairs:
        by_file.setdefault(slot.path, []).append((record, slot))
    if model.is_file():
        with replacing(out or model) as file:
            _copy_toggled(model, by_file.get(model, []), delta, file)
        return
    fresh = out.with_name(f".{uuid.uuid4().hex}.part") if out else model / f".delta-{uuid.uuid4().hex}"
    try:
        if out:
            _copy_others(model, fresh, {path.name for path in by_file})
        else:
            fresh.mkdir()
        for path, changes in by_file.items():
            with replacing(fresh / path.name) as file:
                _copy_toggled(path, changes, delta, file)
        if out:
            os.rename(fresh, out)
        else:
            replace_files(model, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _copy_others(model: Path, fresh: Path, changed: set[str]) -> None:
    """A copy of a folder without the files that change."""

    def _ignore(folder: str, names: list[str]) -> set[str]:
        return changed if Path(folder) == model else set()

    shutil.copytree(model, fresh, ignore=_ignore, copy_function=shutil.copyfile)


def _copy_toggled(source: Path, changes: Sequence[tuple[Record, Stored]], delta: Delta, file: Any) -> None:
    """A copy of a safetensors file in which some tensors change."""
    with source.open("rb") as original:
        shutil.copyfileobj(original, file, 1 << 20)
    for record, slot in changes:
        change, words = delta.change(record), slot.read()
        change.put(words, change.toggled(words))
        file.seek(slot.start)
        file.write(words.numpy())


# -- many deltas -----------------------------------------------------------------------------------


def list_deltas(folder: str | os.PathLike[str]) -> list[Delta]:
    """The deltas among the files ``*.safetensors`` of a folder, by name.

    Raises
    ------
    ValueError
        If there is no such folder, or one of these files is damaged.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = sorted(Path(folder).glob("*.safetensors"))
    return [delta_info(file) for file in files if read_header(file)[0].get("format") == FORMAT]


def merge_deltas(
    paths: Iterable[str | os.PathLike[str]], out: str | os.PathLike[str], *, conflict: str = "error", base: Any = None
) -> Delta:
    """One delta that does what several deltas of one base do.

    Parameters
    ----------
    paths : iterable of str or Path
        What one of them changes alone comes out as there, bit for bit.
    out : str or Path
        Replaced at once when all is written.
    conflict : {"error", "last", "sum"}
        What several change: ValueError unless they agree; as in the last that changes it; or the base value plus the
        sum of all differences, computed in float64 and rounded once (whole numbers: as "error").
    base : Module, mapping of str to Tensor, or path, optional
        Needed for "sum".

    Returns
    -------
    Delta

    Raises
    ------
    ValueError
        If the deltas are of different bases, or in conflict.
    """
    deltas = [delta_info(path) for path in paths]
    if not deltas:
        raise ValueError("paths must name at least one delta; found none")
    if conflict not in CONFLICTS:
        raise ValueError(f"conflict must be one of {', '.join(CONFLICTS)}; found {conflict!r}")
    if conflict == "sum" and base is None:
        raise ValueError('conflict="sum" needs base=, the model that the deltas are of')
    for delta in deltas[1:]:
        if delta.base != deltas[0].base:
            raise ValueError(f"{delta.path}: must be of the base of {deltas[0].path}; it is of another")
    originals = tensors_of(base, "base") if conflict == "sum" else {}
    records: list[Record] = []
    with Writer(Path(out)) as writer:
        for names, members in _grouped(deltas):
            records += _merged(writer, names, members, conflict, originals)
        return finish(writer, deltas[0].base, records)


def _grouped(deltas: Sequence[Delta]) -> list[tuple[tuple[str, ...], Members]]:
    """Records of all deltas by tensor, with all its names."""
    groups: list[tuple[tuple[str, ...], Members]] = []
    where: dict[str, int] = {}
    for delta, record in [(d, r) for d in deltas for r in d.tensors]:
        hits = {where[name] for name in record.names if name in where}
        number = hits.pop() if hits else len(groups)
        names, members = groups.pop(number) if number < len(groups) else ((), [])
        if hits or any(delta is other for other, _ in members):
            raise ValueError(
                f"{delta.path}: {' and '.join(names + record.names)} must be one tensor in all deltas or apart in all"
            )
        if members and _identity(members[0][1]) != _identity(record):
            raise ValueError(
                f"{delta.path}: tensor {record.names[0]!r} must be that of {members[0][0].path}; type, shape or base "
                "content differ"
            )
        names = tuple(dict.fromkeys(names + record.names))
        groups.insert(number, (names, [*members, (delta, record)]))
        where.update(dict.fromkeys(names, number))
    return groups


def _identity(record: Record) -> tuple[Any, ...]:
    return record.dtype, record.shape, record.base


def _merged(
    writer: Writer, names: tuple[str, ...], members: Members, conflict: str, originals: Mapping[str, Slot]
) -> list[Record]:
    delta, first = members[0]
    if len(members) == 1:
        delta.copy_to(writer, first)
        return [first]
    if conflict == "sum" and DTYPES[first.dtype].is_floating_point:
        xor = _summed(members, _original(names, first, originals))
    else:
        xor = _combined(members, conflict)
    return add_tensor(writer, names, first.dtype, first.shape, first.base, xor)


def _original(names: Sequence[str], record: Record, originals: Mapping[str, Slot]) -> Tensor:
    """The bits of a base tensor."""
    for name in names:
        slot = originals.get(name)
        if slot is not None and (slot.dtype, slot.shape) == (record.dtype, record.shape):
            words = slot.read().cpu()
            if sha256(words) == record.base:
                return words
    raise ValueError(f"base must be that of the deltas; its tensor {names[0]!r} is another, or missing")


def _combined(members: Members, conflict: str) -> Tensor:
    """The XOR of a tensor's entries, the last change winning."""
    size = math.prod(members[0][1].shape)
    total = members[0][0].change(members[0][1]).dense(size)
    for delta, record in members[1:]:
        new = delta.change(record).dense(size)
        clash = int(((total != 0) & (new != 0) & (total != new)).sum())
        if clash and conflict != "last":
            raise ValueError(
                f"{delta.path}: changes {clash} entries of {record.names[0]!r} that another delta changes otherwise; "
                'conflict="last" takes the last, and "sum" adds what are no whole numbers'
            )
        total = torch.where(new != 0, new, total)
    return total


def _summed(members: Members, words: Tensor) -> Tensor:
    """The XOR of a tensor's entries; where several change one, their differences are added up."""
    dtype, size = DTYPES[members[0][1].dtype], len(words)
    last = torch.zeros_like(words)
    once, many = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    for delta, record in members:
        new = delta.change(record).dense(size)
        many |= once & (new != 0)
        once |= new != 0
        last = torch.where(new != 0, new, last)
    where = many.nonzero().squeeze(1)
    old = words[where]
    before = old.view(dtype).double()
    total = before.clone()
    for delta, record in members:
        new = delta.change(record).dense(size)[where]
        total += torch.where(new != 0, (old ^ new).view(dtype).double() - before, 0.0)
    last[where] = total.to(dtype).view(words.dtype) ^ old
    return last
