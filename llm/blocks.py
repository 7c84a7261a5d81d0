# SPDX-License-Identifier: BSD-3-Clause
"""From the parameters of a model to blocks: what may be active, what it costs, and who says so.

Every parameter has a position, counted through ``param_groups``, and is cut into slices of ``unit`` consecutive
entries. A block is a slice, or (``granularity="layer"``) all slices of one layer:

===========  ==================================================================  =========================
granularity  a block is                                                          unit of a matrix (r, c)
===========  ==================================================================  =========================
``tensor``   one parameter; one expert of a tensor that fuses several experts    r c
``layer``    everything below the first number in the name, such as              r c
             ``model.layers.7``; a parameter without a number is a block
``rows``     one row (the first axis: an output of a linear layer, a token)      c
``neurons``  the same; one column where a layer writes what is inside of an      c, or r
             attention or a feed-forward block back into the stream
             (:data:`WRITERS`): an input of that layer
``entries``  one parameter, of which any entries may be active                   r c
===========  ==================================================================  =========================

Only the shape of a parameter is kept here, never the tensor: sharding replaces tensors inside ``param_groups``.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llm.compact import Part, index_dtype

__all__ = [
    "GRANULARITIES",
    "WRITERS",
    "Blocks",
    "bytes_of",
    "embeddings",
    "entries_of_budget",
    "matching",
    "named_groups",
]

GRANULARITIES = ("tensor", "layer", "rows", "neurons", "entries")
WRITERS = (  # names of linear layers that write into the residual stream
    *("o_proj", "out_proj", "output.dense", "attention.dense", "self_attention.dense", "self_attn.dense", "out_lin"),
    *("down_proj", "dense_4h_to_h", "lin2", "fc2", "fc_out", "wo", "Wo"),
)
_BYTES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def named_groups(params: Any, model: nn.Module | None = None) -> list[dict[str, Any]]:
    """Parameter groups as :class:`torch.optim.Optimizer` takes them, every parameter with a name and once.

    Parameters
    ----------
    params : Module, or iterable of Parameter, of (name, Parameter) or of group dicts
        Group dicts hold ``"params"`` (either kind of iterable) and options such as ``lr`` or ``weight_decay``.
    model : Module, optional
        Where nameless parameters are looked up; without it they are called by their position.

    Returns
    -------
    list of dict
        Copies, whose ``"params"`` are lists of (name, Parameter). A tensor met again (tied weights) is left out.

    Raises
    ------
    ValueError
        If there is no parameter, or two bear one name.
    TypeError
        If something is not a tensor.

    Examples
    --------
    >>> [name for name, _ in named_groups(nn.Linear(2, 3))[0]["params"]]
    ['weight', 'bias']
    """
    if isinstance(params, nn.Module):
        model, params = params, list(params.named_parameters())
    elements = [params] if isinstance(params, Mapping | Tensor) else list(params)
    grouped = bool(elements) and isinstance(elements[0], Mapping)
    groups: list[dict[str, Any]] = [dict(e) for e in elements] if grouped else [{"params": elements}]
    known = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
    seen: set[int] = set()
    for group in groups:
        group["params"] = _named(group, known, seen)
    names = [name for group in groups for name, _ in group["params"]]
    if not names:
        raise ValueError("params holds no parameter; pass a model, its parameters() or its named_parameters()")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"params must have distinct names; two different tensors are called {twice!r}")
    return groups


def _named(group: dict[str, Any], known: dict[int, str], seen: set[int]) -> list[tuple[str, Tensor]]:
    given = group["params"]
    given = [given] if isinstance(given, Tensor) else list(given)
    given_names = group.pop("param_names", None)
    if given_names is not None:
        given = list(zip(given_names, given, strict=True))
    pairs = []
    for element in given:
        name, tensor = element if isinstance(element, tuple) else (None, element)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"params must hold tensors or (name, tensor) pairs; found {type(tensor).__name__}")
        if id(tensor) not in seen:
            pairs.append((name or known.get(id(tensor), f"parameter {len(seen)}"), tensor))
            seen.add(id(tensor))
    return pairs


def embeddings(model: nn.Module) -> list[str]:
    """Names of embedding tables (of positions and types, too) and of output layers, found by module, not by name.

    Parameters
    ----------
    model : Module
        An output layer is what ``get_output_embeddings()`` returns; without that method, a linear layer with the shape
        of the largest table.

    Returns
    -------
    list of str
        Names of parameters, a tied one once.
    """
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    found = {id(m.weight) for m in tables}
    ask = getattr(model, "get_output_embeddings", None)
    if callable(ask):
        head = ask()
        found |= {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
    elif tables:
        shape = max((m.weight.shape for m in tables), key=lambda shape: shape.numel())
        found |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m.weight.shape == shape}
    return [name for name, p in model.named_parameters() if id(p) in found]


def entries_of_budget(budget: Any, total: int, bytes_per_entry: float) -> int:
    """How many entries a budget allows.

    Parameters
    ----------
    budget : float, int or str
        A share in (0, 1]; a count of entries; or an amount of memory such as ``"500MB"`` or ``"1.5GiB"``.
    total : int
        Entries of all parameters.
    bytes_per_entry : float
        What an active entry costs (moments, gradient, index).

    Returns
    -------
    int
        At least 1 and at most ``total``.

    Examples
    --------
    >>> entries_of_budget(0.05, 1000, 8), entries_of_budget(70, 1000, 8), entries_of_budget("4kB", 1000, 8)
    (50, 70, 500)
    """
    memory = bytes_of(budget) if isinstance(budget, str) else None
    if memory is not None:
        entries = int(memory / bytes_per_entry)
    elif isinstance(budget, float) and 0 < budget <= 1:
        entries = int(budget * total)
    elif isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0:
        entries = budget
    else:
        raise ValueError(
            f"budget must be a share above 0 and at most 1 (0.05), a whole number of entries (100_000), or memory for "
            f'moments, gradients and indices of the active entries ("500MB"); found {budget!r}'
        )
    if entries < 1:
        raise ValueError(
            f"budget must allow at least one entry; found {budget!r}, which is less than one of {total:,} parameters"
        )
    return min(entries, total)


def bytes_of(amount: str) -> float | None:
    """Bytes of an amount of memory; None where the text is none.

    Examples
    --------
    >>> bytes_of("500MB"), bytes_of("1.5 GiB"), bytes_of("500")
    (500000000.0, 1610612736.0, None)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]I?)?B\s*", amount.upper())
    return float(match[1]) * _BYTES[match[2] or ""] if match else None


@dataclass(frozen=True)
class Blocks:
    """Names, sizes and costs of the blocks of a list of parameters.

    Attributes
    ----------
    names : tuple of str
        Of the parameters, by position.
    shapes : tuple of torch.Size
    units : tuple of int
        Entries of a slice; a parameter has ``size // unit`` of them.
    first : tuple of int
        The block of a parameter's first slice; its other slices follow. Parameters of a layer share one block.
    cost : Tensor of int64, shape (blocks,)
        Entries of each block; on the CPU.
    granularity : str
    columns : tuple of bool
        Whether the slices of a parameter are its columns.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    units: tuple[int, ...]
    first: tuple[int, ...]
    cost: Tensor
    granularity: str
    columns: tuple[bool, ...]
    sizes: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(math.prod(shape) for shape in self.shapes))

    @classmethod
    def of(
        cls, names: Sequence[str], shapes: Sequence[torch.Size], granularity: str, apart: Iterable[int] = ()
    ) -> Blocks:
        """Cut parameters of these names and shapes; those at the positions ``apart`` belong to no layer.

        Raises
        ------
        ValueError
            If the granularity is unknown.
        """
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}; found {granularity!r}")
        pairs = list(zip(names, shapes, strict=True))
        columns = [granularity == "neurons" and _writes(name, shape) for name, shape in pairs]
        units = [_unit(name, shape, granularity) for name, shape in pairs]
        first: list[int] = []
        cost: list[int] = []
        layers: dict[str, int] = {}
        for position, (name, shape, unit) in enumerate(zip(names, shapes, units, strict=True)):
            slices = math.prod(shape) // unit
            layer = _layer(name) if granularity == "layer" and position not in apart else name
            number = layers.setdefault(layer, len(cost))
            if number < len(cost):
                cost[number] += unit * slices
            else:
                cost += [unit] * slices
            first.append(number)
        costs = torch.tensor(cost, dtype=torch.int64)
        return cls(tuple(names), tuple(shapes), tuple(units), tuple(first), costs, granularity, tuple(columns))

    @property
    def total(self) -> int:
        """Entries of all parameters."""
        return sum(self.sizes)

    def slices(self, position: int) -> int:
        """Number of slices of a parameter."""
        return self.sizes[position] // self.units[position]

    def part(self, position: int, index: Tensor) -> Part:
        """Some slices of a parameter."""
        columns = self.columns[position]
        return Part(self.units[position], len(index), index.to(index_dtype(self.sizes[position])), columns)

    @property
    def fine(self) -> bool:
        """Whether blocks are rows (or columns) of matrices."""
        return self.granularity in ("rows", "neurons")

    def name(self, block: int) -> str:
        """A readable name, such as ``layers.0.mlp.weight[17]`` for row 17, ``[:, 17]`` for column 17."""
        if self.granularity == "layer":
            name = self.names[self.first.index(block)]
            return _layer(name) if self.first.count(block) > 1 else name
        position = max(i for i, first in enumerate(self.first) if first <= block)
        place = f"{':, ' if self.columns[position] else ''}{block - self.first[position]}"
        return self.names[position] if self.slices(position) == 1 else f"{self.names[position]}[{place}]"


def matching(names: Sequence[str], patterns: str | Iterable[str], argument: str) -> set[int]:
    """Positions of the parameters that names or prefixes (``model.layers.3``) stand for.

    Raises
    ------
    ValueError
        If one stands for none, with the nearest names.

    Examples
    --------
    >>> matching(["layers.0.weight", "layers.0.bias", "head.weight"], ["layers.0"], "never")
    {0, 1}
    """
    found: set[int] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = {i for i, name in enumerate(names) if name == pattern or name.startswith(pattern + ".")}
        if not hits:
            parts = [name.split(".") for name in names]
            prefixes = {".".join(part[:k]) for part in parts for k in range(1, len(part) + 1)}
            near = difflib.get_close_matches(pattern, sorted(prefixes), 3, 0.4)
            raise ValueError(
                f"{argument}: no parameter or module is called {pattern!r}; nearest: {', '.join(near) or 'none'}"
            )
        found |= hits
    return found


def _layer(name: str) -> str:
    """The name up to its first number."""
    parts = name.split(".")
    numbered = [k for k, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbered[0] + 1]) if numbered else name


def _writes(name: str, shape: torch.Size) -> bool:
    """Whether it is a matrix in a numbered layer that is called like one of :data:`WRITERS`."""
    module, inside = "." + name.removesuffix(".weight"), _layer(name) != name
    called = name.endswith(".weight") and module.endswith(tuple(f".{writer}" for writer in WRITERS))
    return len(shape) == 2 and inside and called


def _unit(name: str, shape: torch.Size, granularity: str) -> int:
    size = math.prod(shape)
    if size == 0:
        return 1
    fused = len(shape) == 3 and "expert" in name.lower()
    if granularity == "neurons" and _writes(name, shape):
        return shape[0]
    if granularity in ("rows", "neurons") and len(shape) >= 2:
        return size // (shape[0] * shape[1] if fused else shape[0])
    return size // shape[0] if granularity == "tensor" and fused else size
