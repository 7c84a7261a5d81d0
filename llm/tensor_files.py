# SPDX-License-Identifier: BSD-3-Clause
"""Tensors as bits, one at a time: in memory, in safetensors files and in model folders.

A safetensors file is the length n of its header (8 bytes, little-endian), n bytes of JSON, and the data. The JSON maps
each name to ``dtype``, ``shape`` and ``data_offsets``, the range of its bytes in the data; ``__metadata__`` maps
strings to strings; the ranges fill the data without gaps. Here one tensor is read or changed without the others, and a
file is written without holding its content. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeGuard

import torch
from torch import Tensor, nn

__all__ = [
    "CODES",
    "DTYPES",
    "WORDS",
    "Live",
    "Stored",
    "Writer",
    "is_natural",
    "parse_json",
    "read_header",
    "replace_files",
    "replacing",
    "sha256",
    "tensors_of",
]

WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers of so many bytes
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}
DTYPES: dict[str, torch.dtype] = {code: getattr(torch, name) for code, name in _NAMES.items() if hasattr(torch, name)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors package
_UNDO = ".delta-undo"  # folder of the files that an unfinished replacement has to put back


# -- tensors ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Live:
    """A tensor in memory.

    Attributes
    ----------
    tensor : Tensor
        Strided, of a type that safetensors knows, on any device.
    """

    tensor: Tensor

    @property
    def dtype(self) -> str:
        """As safetensors calls it, such as ``"BF16"``."""
        return CODES[self.tensor.dtype]

    @property
    def shape(self) -> tuple[int, ...]:
        """As of any tensor."""
        return tuple(self.tensor.shape)

    @property
    def key(self) -> Any:
        """Equal for tied tensors, and for these alone."""
        t = self.tensor
        return t.device, t.data_ptr(), self.shape, t.stride(), t.dtype

    def read(self) -> Tensor:
        """Its bits as integers of shape (n,), row by row; shares memory with it where its layout allows."""
        return self.tensor.detach().view(WORDS[self.tensor.element_size()]).reshape(-1)

    def write(self, words: Tensor) -> None:
        """Take over what was changed in the integers that :meth:`read` gave."""
        if not self.tensor.is_contiguous():
            self.tensor.detach().view(words.dtype).copy_(words.view(self.shape))


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes
    ----------
    path : Path
    dtype : str
        As safetensors calls it.
    shape : tuple of int
    start, stop : int
        The range of its bytes in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def key(self) -> Any:
        """Of this tensor alone."""
        return self.path, self.start, self.stop

    def read(self) -> Tensor:
        """Its bits as new integers of shape (n,)."""
        width = DTYPES[self.dtype].itemsize
        words = torch.empty((self.stop - self.start) // width, dtype=WORDS[width])
        with self.path.open("rb") as file:
            file.seek(self.start)
            if file.readinto(words.numpy().data) != self.stop - self.start:
                raise ValueError(f"{self.path}: has become shorter while it was read")
        return words


def sha256(*tensors: Tensor) -> str:
    """The SHA-256 of the bytes of these tensors, one after the other, in hexadecimal digits."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(tensor.cpu().contiguous().numpy().data)
    return total.hexdigest()


def tensors_of(model: Any, argument: str) -> dict[str, Live] | dict[str, Stored]:
    """The tensors of a model by name.

    Parameters
    ----------
    model : Module, mapping of str to Tensor, str or Path
        A path names a safetensors file, or a folder with ``model.safetensors``, with shards and
        ``model.safetensors.index.json``, or with one file ``*.safetensors``.
    argument : str
        What errors call it.

    Raises
    ------
    ValueError
        If it is none of these, or a file is not what it must be.
    """
    if isinstance(model, nn.Module):
        model = getattr(model, "_orig_mod", model).state_dict()  # of what torch.compile wraps
    if isinstance(model, Mapping):
        live = {name: Live(_plain(tensor, f"{argument}: {name!r}")) for name, tensor in model.items()}
        _check_overlaps(live, argument)
        return live
    if isinstance(model, str | os.PathLike):
        return _stored(Path(model))
    raise ValueError(f"{argument} must be a module, a state dict, a folder or a file; found {type(model).__name__}")


def _plain(tensor: Any, what: str) -> Tensor:
    if type(tensor) not in (Tensor, nn.Parameter):
        raise ValueError(f"{what} must be a plain tensor; found {type(tensor).__name__}")
    if tensor.is_meta or tensor.layout != torch.strided or tensor.dtype not in CODES:
        raise ValueError(
            f"{what} must be a dense tensor with data, of a type that safetensors can store; found {tensor.dtype}, "
            f"{tensor.layout}, on {tensor.device}"
        )
    return tensor


def _check_overlaps(live: Mapping[str, Live], argument: str) -> None:
    """Tensors are one and the same, or apart."""
    spans = []
    for name, slot in {slot.key: (name, slot) for name, slot in live.items() if slot.tensor.numel()}.values():
        t = slot.tensor
        last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        spans.append((str(t.device), t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size(), name))
    for (device, _, stop, name), (other_device, start, _, other) in itertools.pairwise(sorted(spans)):
        if device == other_device and start < stop:
            raise ValueError(f"{argument}: {name!r} and {other!r} share memory in part; make one of them a copy")


# -- reading ---------------------------------------------------------------------------------------


def is_natural(value: Any) -> bool:
    """Whether this is 0, 1, ..., 2^63 - 1 (True and 1.0 are not)."""
    return type(value) is int and 0 <= value < 2**63


def parse_json(path: Path, text: bytes | str, what: str) -> Any:
    """The value of a JSON text; ValueError that names the file otherwise."""
    try:
        return json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as broken:
        raise ValueError(f"{path}: {what} is no JSON ({broken})") from broken


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Stored]]:
    """Metadata of a safetensors file, and where its tensors lie.

    Raises
    ------
    ValueError
        If the file breaks a rule of the format.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path}: is cut short, or no safetensors file ({size} bytes, a header of {length})")
        header = parse_json(path, file.read(length), "the header")
    if not isinstance(header, dict):
        raise ValueError(f"{path}: the header must be a JSON object; found {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: __metadata__ must map strings to strings")
    places = {name: _place(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_ranges(path, places, 8 + length, size)
    return metadata, places


def _place(path: Path, name: str, entry: Any, begin: int) -> Stored:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {name!r} must have one of the types {', '.join(DTYPES)}; found {dtype!r}")
    if not (_are_natural(shape) and _are_natural(offsets) and len(offsets) == 2):
        raise ValueError(f"{path}: tensor {name!r} must have a shape and data_offsets; found {shape!r}, {offsets!r}")
    start, stop = offsets
    if stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"{path}: tensor {name!r} of {dtype} and shape {shape} cannot lie at {offsets}")
    return Stored(path, dtype, tuple(shape), begin + start, begin + stop)


def _are_natural(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(is_natural(value) for value in values)


def _check_ranges(path: Path, places: Mapping[str, Stored], begin: int, size: int) -> None:
    end = begin
    for start, stop in sorted((place.start, place.stop) for place in places.values()):
        if start != end:
            raise ValueError(f"{path}: tensors must fill the data without gaps; byte {min(start, end)} does not fit")
        end = stop
    if end != size:
        raise ValueError(f"{path}: must have {end} bytes by its header; found {size}")


def _stored(model: Path) -> dict[str, Stored]:
    if model.is_file():
        return read_header(model)[1]
    if not model.is_dir():
        raise ValueError(f"{model}: no such file or folder")
    _undo(model)
    single, index = model / "model.safetensors", model / "model.safetensors.index.json"
    if index.is_file() and not single.is_file():
        return _sharded(index)
    files = [single] if single.is_file() else sorted(model.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(
            f"{model}: must hold model.safetensors, or shards and model.safetensors.index.json, or one .safetensors "
            f"file; found {len(files)} of these. Weights in pickles (.bin, .pt) are never read; save them as "
            "safetensors first"
        )
    return read_header(files[0])[1]


def _sharded(index: Path) -> dict[str, Stored]:
    content = parse_json(index, index.read_bytes(), "the index")
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(f, str) and Path(f).name == f for f in shards.values()):
        raise ValueError(f"{index}: weight_map must map names of tensors to files of the same folder")
    headers = {file: read_header(index.parent / file)[1] for file in sorted(set(shards.values()))}
    for name, file in shards.items():
        if name not in headers[file]:
            raise ValueError(f"{index}: tensor {name!r} must be in {file}, which lacks it")
    return {name: headers[file][name] for name, file in shards.items()}


# -- writing ---------------------------------------------------------------------------------------


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file beside ``path`` that takes its place at the end, if nothing goes wrong."""
    part = path.with_name(f".{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


class Writer:
    """A safetensors file that is told tensor by tensor; use it in a ``with`` statement.

    Data wait in nameless temporary files beside the target, one for each width of integers, so that every tensor ends
    up aligned.

    Parameters
    ----------
    path : Path
        Replaced by :meth:`finish`, not before.
    """

    def __init__(self, path: Path) -> None:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: must be a file in a folder that exists")
        self.path = path
        self._data: dict[int, IO[bytes]] = {}
        self._told: dict[int, list[tuple[str, torch.Size]]] = {width: [] for width in sorted(WORDS, reverse=True)}
        self._stack = ExitStack()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def add(self, name: str, words: Tensor) -> None:
        """Append integers of a type in ``WORDS``."""
        width = words.element_size()
        if width not in self._data:
            folder = self.path.absolute().parent
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
            self._data[width] = self._stack.enter_context(file)
        self._data[width].write(words.cpu().contiguous().numpy().data)
        self._told[width].append((name, words.shape))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Put the file in place."""
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        end = 0
        for width, told in self._told.items():
            for name, shape in told:
                start, end = end, end + shape.numel() * width
                header[name] = {"dtype": CODES[WORDS[width]], "shape": list(shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with replacing(self.path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for width in self._told:
                if width in self._data:
                    self._data[width].seek(0)
                    shutil.copyfileobj(self._data[width], file, 1 << 20)


def replace_files(folder: Path, fresh: Path) -> None:
    """Move the files of ``fresh`` over those of the same name in ``folder``: all of them or, if it fails, none.

    If the process is killed halfway, the next look at the folder through :func:`tensors_of` puts the old ones back.
    """
    names = sorted(file.name for file in fresh.iterdir())
    kept = fresh / "kept"
    kept.mkdir()
    for name in names:
        try:
            os.link(folder / name, kept / name)
        except OSError:  # a file system without links
            shutil.copyfile(folder / name, kept / name)
    os.rename(kept, folder / _UNDO)
    try:
        for name in names:
            os.replace(fresh / name, folder / name)
        os.rename(folder / _UNDO, kept)
    except BaseException:
        _undo(folder)
        raise


def _undo(folder: Path) -> None:
    kept = folder / _UNDO
    if kept.is_dir():
        for file in kept.iterdir():
            os.replace(file, folder / file.name)
        shutil.rmtree(kept)  # two names of one file are not renamed: they stay
