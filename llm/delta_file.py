# SPDX-License-Identifier: BSD-3-Clause
"""The file of a sparse delta: which entries of which tensors changed, and how; a safetensors file.

With the bits of a base tensor and of the tuned one as integers b and t, a delta stores ``x = b XOR t`` where it is not
zero. Putting it on is ``b XOR x = t`` and taking it off ``t XOR x = b``: one value for both ways, exact for every
type, NaN payloads and -0.0 included. A tensor of n entries is seen as a table of s = n / unit slices of consecutive
entries (rows, experts, the whole tensor, or with unit 1 single entries; the shortest form is taken), m of them changed:

==============  =======================================  ========================================================
in the file     type and shape                           content
==============  =======================================  ========================================================
``NAME.xor``    U8, I16, I32 or I64, (m, unit)           x, slice after slice; integers are as wide as an entry
``NAME.index``  I32, or I64 where s >= 2^31, (m,)        which slices, ascending; absent where all of them changed
``NAME.bits``   U8, (ceil(s / 8),)                       the same, one bit a slice, lowest first, if that is shorter
==============  =======================================  ========================================================

The metadata hold ``format``, ``version``, ``base`` (a hash of the contents of all base tensors, whatever their names),
``tensors`` (JSON: one :class:`Record` for each changed tensor) and ``sha256`` (of the other four). Records carry the
hash of the base tensor, so that a delta goes on its base alone, and of their data, so that damage is found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm.tensor_files import CODES, DTYPES, WORDS, Stored, Writer, is_natural, parse_json, read_header, sha256

__all__ = ["FORMAT", "VERSION", "Change", "Delta", "Record", "add_tensor", "delta_info", "encode", "finish", "said"]

FORMAT, VERSION = "blockdescent delta", "1"


# -- one changed tensor ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What a delta says about one changed tensor.

    Attributes
    ----------
    names : tuple of str
        Several if the tensor is tied; its data are stored once, under the first.
    dtype : str
        As safetensors calls it.
    shape : tuple of int
    unit : int
        Entries of a slice.
    slices : int
        Stored slices.
    entries : int
        Entries that changed; x is 0 in the others of the stored slices.
    base : str
        SHA-256 of the bytes of the base tensor, row by row.
    data : str
        SHA-256 of what is stored: index or bits if there are any, then x.
    """

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    unit: int
    slices: int
    entries: int
    base: str
    data: str

    @property
    def total(self) -> int:
        """Slices of the tensor, changed or not."""
        return math.prod(self.shape) // self.unit


@dataclass(frozen=True)
class Change:
    """The difference of two tensors.

    Attributes
    ----------
    unit : int
    index : Tensor of int64, shape (m,), or None
        Changed slices, ascending. None: all.
    xor : Tensor of integers, shape (m, unit)
    """

    unit: int
    index: Tensor | None
    xor: Tensor

    def take(self, words: Tensor) -> Tensor:
        """A copy of the changed slices of a tensor's bits, shape (m, unit)."""
        table = words.view(-1, self.unit)
        return table.clone() if self.index is None else table[self.index.to(words.device)]

    def put(self, words: Tensor, values: Tensor) -> None:
        """Write the changed slices."""
        table = words.view(-1, self.unit)
        if self.index is None:
            table.copy_(values)
        else:
            table[self.index.to(words.device)] = values

    def toggled(self, words: Tensor) -> Tensor:
        """The changed slices as they are on the other side, shape (m, unit)."""
        return self.take(words).bitwise_xor_(self.xor.to(words.device))

    def dense(self, size: int) -> Tensor:
        """The XOR of all entries, shape (size,)."""
        words = torch.zeros(size, dtype=self.xor.dtype)
        self.put(words, self.xor)
        return words


def encode(xor: Tensor, shape: Sequence[int]) -> tuple[Change, dict[str, Tensor]]:
    """The shortest form of a difference that is not zero.

    Parameters
    ----------
    xor : Tensor of integers, shape (n,)
    shape : sequence of int
        Of the tensor. Slices are runs of its last axes: an entry, a row, ..., the whole.

    Returns
    -------
    Change
    dict of str to Tensor
        What is stored, by suffix.

    Examples
    --------
    >>> change, stored = encode(torch.tensor([0, 0, 0, 0, 7, 8]), (3, 2))
    >>> change.unit, stored
    (2, {'bits': tensor([4], dtype=torch.uint8), 'xor': tensor([[7, 8]])})
    """
    changed, width = xor != 0, xor.element_size()
    options: list[tuple[int, int, int, bool]] = []
    for unit in sorted({math.prod(shape[axis:]) for axis in range(len(shape) + 1)}, reverse=True):
        hit = changed.view(-1, unit).any(1)
        count, mask = int(hit.sum()), -(-len(hit) // 8)
        place = 0 if count == len(hit) else min(mask, count * _index_type(len(hit)).itemsize)
        options.append((count * unit * width + place, len(options), unit, place == mask))
    _, _, unit, by_bits = min(options)
    table, hit = xor.view(-1, unit), changed.view(-1, unit).any(1)
    if bool(hit.all()):
        return Change(unit, None, table), {"xor": table}
    index = hit.nonzero().squeeze(1)
    table = table[index]
    if by_bits:
        bits = torch.from_numpy(np.packbits(hit.numpy(), bitorder="little"))
        return Change(unit, index, table), {"bits": bits, "xor": table}
    return Change(unit, index, table), {"index": index.to(_index_type(len(hit))), "xor": table}


def _index_type(slices: int) -> torch.dtype:
    return torch.int32 if slices < 2**31 else torch.int64


# -- a file ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Delta:
    """The header of a delta file; printing it shows a table.

    Attributes
    ----------
    path : Path
    base : str
        Hash of the content of the base model, the same for all deltas of one base.
    tensors : tuple of Record
    bytes : int
        Of the file.
    """

    path: Path
    base: str
    tensors: tuple[Record, ...]
    bytes: int
    _places: Mapping[str, Stored] = field(repr=False, compare=False)

    @property
    def entries(self) -> int:
        """Entries that changed."""
        return sum(record.entries for record in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "path": str(self.path),
            "base": self.base,
            "bytes": self.bytes,
            "entries": self.entries,
            "tensors": [dataclasses.asdict(record) for record in self.tensors],
        }

    def __str__(self) -> str:
        each = f", {self.bytes / self.entries:.2f} a changed entry" if self.entries else ""
        lines = [
            f"{self.path}: {len(self.tensors)} tensors, {self.entries:,} entries changed, {self.bytes:,} bytes{each}",
            f"base {self.base}",
        ]
        for r in self.tensors:
            what = "whole" if r.slices == r.total else f"{r.slices:,} of {r.total:,} slices of {r.unit:,}"
            lines.append(f"  {' = '.join(r.names)}  {r.dtype} {list(r.shape)}  {r.entries:,} entries, {what}")
        return "\n".join(lines)

    def change(self, record: Record) -> Change:
        """The difference of one tensor.

        Raises
        ------
        ValueError
            If it is damaged.
        """
        stored = {key.rpartition(".")[2]: self._places[key].read() for key in _keys(record, self._places)}
        name, table = record.names[0], stored["xor"].view(record.slices, record.unit)
        if sha256(*stored.values()) != record.data:
            raise ValueError(f"{self.path}: the data of tensor {name!r} are damaged")
        if len(stored) == 1:
            return Change(record.unit, None, table)
        if "bits" in stored:
            index = torch.from_numpy(np.unpackbits(stored["bits"].numpy(), bitorder="little").nonzero()[0])
        else:
            index = stored["index"].long()
        ascending = len(index) == record.slices and bool((index.diff() > 0).all())
        if not ascending or int(index[0]) < 0 or int(index[-1]) >= record.total:
            raise ValueError(
                f"{self.path}: tensor {name!r} must name {record.slices} of {record.total} slices in ascending order"
            )
        return Change(record.unit, index, table)

    def copy_to(self, writer: Writer, record: Record) -> None:
        """Store one tensor's difference in another file as it is here; ValueError if it is damaged."""
        xor = self.change(record).xor
        for key in _keys(record, self._places):
            writer.add(key, xor if key.endswith(".xor") else self._places[key].read())


def _keys(record: Record, places: Mapping[str, Stored]) -> list[str]:
    """Names of what is stored for a record: where, if not everywhere, and x."""
    name = record.names[0]
    where = f"{name}.bits" if f"{name}.bits" in places else f"{name}.index"
    return [f"{name}.xor"] if record.slices == record.total else [where, f"{name}.xor"]


def add_tensor(
    writer: Writer, names: tuple[str, ...], dtype: str, shape: tuple[int, ...], base: str, xor: Tensor
) -> list[Record]:
    """Store the difference of one tensor, whose base has the hash ``base``: its record, or none if it is zero."""
    entries = int(torch.count_nonzero(xor))
    if not entries:
        return []
    change, stored = encode(xor, shape)
    for suffix, words in stored.items():
        writer.add(f"{names[0]}.{suffix}", words)
    return [Record(names, dtype, shape, change.unit, len(change.xor), entries, base, sha256(*stored.values()))]


def finish(writer: Writer, base: str, records: Sequence[Record]) -> Delta:
    """Put the file in place."""
    text = json.dumps([dataclasses.asdict(record) for record in records], separators=(",", ":"))
    seal = _seal(base, text)
    writer.finish({"format": FORMAT, "version": VERSION, "base": base, "tensors": text, "sha256": seal})
    return delta_info(writer.path)


def _seal(base: str, text: str) -> str:
    return hashlib.sha256("\n".join((FORMAT, VERSION, base, text)).encode("utf-8", "surrogatepass")).hexdigest()


# -- reading ---------------------------------------------------------------------------------------


def delta_info(path: str | os.PathLike[str]) -> Delta:
    """What a delta file says about itself. The header is checked whole; data are not read.

    Raises
    ------
    ValueError
        If it is no delta, is damaged, or is of a later version; the message names the file.
    """
    path = Path(path)
    metadata, places = read_header(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: is no delta: its metadata lack format {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path}: has version {metadata.get('version')!r}; this program reads version {VERSION!r}")
    base, text = metadata.get("base", ""), metadata.get("tensors", "")
    if metadata.get("sha256") != _seal(base, text):
        raise ValueError(f"{path}: the metadata are damaged; they have another sha256")
    raw = parse_json(path, text, "the list of tensors")
    if not isinstance(raw, list) or not _is_hash(base):
        raise ValueError(f"{path}: base must be a SHA-256 and tensors a JSON array")
    records = tuple(_record(path, entry) for entry in raw)
    names = [name for record in records for name in record.names]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}: tensors must have distinct names")
    _check_places(path, records, places)
    return Delta(path, base, records, path.stat().st_size, places)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _record(path: Path, raw: Any) -> Record:
    """A record from JSON, with everything that can be checked without its data."""
    fields = [f.name for f in dataclasses.fields(Record)]
    if not isinstance(raw, dict) or sorted(raw) != sorted(fields):
        raise ValueError(f"{path}: a tensor must be an object with {', '.join(fields)}")
    names, shape = raw["names"], raw["shape"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: names of a tensor must be an array of strings; found {names!r}")
    numbers = [raw["unit"], raw["slices"], raw["entries"], *(shape if isinstance(shape, list) else [None])]
    known = isinstance(raw["dtype"], str) and raw["dtype"] in DTYPES
    if not known or not all(is_natural(n) for n in numbers) or not (_is_hash(raw["base"]) and _is_hash(raw["data"])):
        raise ValueError(f"{path}: tensor {names[0]!r} has a field that is not what it must be")
    record = Record(**{**raw, "names": tuple(names), "shape": tuple(shape)})
    size = math.prod(shape)
    cut = 0 < size < 2**63 and record.unit > 0 and size % record.unit == 0 and 0 < record.slices <= record.total
    if not cut or not record.slices <= record.entries <= record.slices * record.unit:
        raise ValueError(
            f"{path}: tensor {names[0]!r} of shape {shape} cannot have {record.entries} changed entries in "
            f"{record.slices} slices of {record.unit}"
        )
    return record


def _check_places(path: Path, records: Sequence[Record], places: Mapping[str, Stored]) -> None:
    """The file stores what its records say, and nothing else."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for record in records:
        index = (CODES[_index_type(record.total)], (record.slices,))
        bits = ("U8", (-(-record.total // 8),))
        xor = (CODES[WORDS[DTYPES[record.dtype].itemsize]], (record.slices, record.unit))
        kinds = {"index": index, "bits": bits, "xor": xor}
        expected |= {key: kinds[key.rpartition(".")[2]] for key in _keys(record, places)}
    found = {key: (place.dtype, place.shape) for key, place in places.items()}
    for key in sorted(expected.keys() | found.keys()):
        if expected.get(key) != found.get(key):
            wanted, there = (said(*known[key]) if key in known else "absent" for known in (expected, found))
            raise ValueError(f"{path}: {key!r} must be {wanted} by the metadata; found {there}")


def said(dtype: str, shape: Sequence[int]) -> str:
    """Type and shape for a message."""
    return f"{dtype} of shape {list(shape)}"
