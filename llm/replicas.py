# SPDX-License-Identifier: BSD-3-Clause
"""Several processes that hold the same model and see different batches: what they tell each other.

Weights, moments and choices are the same in all of them after every step, since each computes them from the same means:
of the gradients of the active entries (``budget`` times what DistributedDataParallel sends), and in a census of the
scores, one number for every block. The mean of squared gradients over the processes' batches takes the place of the
square of the mean, as with one batch a score is that of this batch.

Processes must reach :meth:`llm.BlockLLM.step` equally often. A block that had no gradient in one of them (an expert
that no token chose) counts as zeros there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.census import Census
from llm.compact import CompactGrad, Part
from llm.gradients import stored
from llm.settings import Settings

__all__ = ["Replicas", "refuse_wrapped", "replicas_of"]

BUCKET = 1 << 23  # entries sent together


@dataclass(frozen=True)
class Replicas:
    """The processes of a group.

    Attributes
    ----------
    group : ProcessGroup
    size : int
        How many they are, at least 2.
    device : device
        Where numbers lie that are exchanged.
    """

    group: Any
    size: int
    device: torch.device

    def begin(self, settings: Settings, names: Sequence[str], tensors: Iterable[Tensor]) -> None:
        """Compare what must be equal, then give all processes the first one's tensors.

        Raises
        ------
        ValueError
            In all processes, if settings or names of parameters differ.
        """
        mine = [repr(settings), list(names)]
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, mine, group=self.group)
        for rank, other in enumerate(every):
            if other != every[0]:
                what = "settings" if other[0] != every[0][0] else "parameters"
                raise ValueError(
                    "all processes of process_group must make the same optimizer; "
                    f"found other {what} in process {rank} than in process 0"
                )
        first = dist.get_global_rank(self.group, 0)
        with torch.no_grad():
            for tensor in tensors:
                held = tensor.detach().contiguous()
                dist.broadcast(held, first, group=self.group)
                if held.data_ptr() != tensor.data_ptr():
                    tensor.copy_(held)

    def all(self, value: bool) -> bool:
        """Whether it is true in every process."""
        flag = torch.tensor([float(value)], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return bool(flag)

    def mean(self, value: float) -> float:
        """Of one number from each process."""
        total = torch.tensor([value], dtype=torch.float32, device=self.device)
        dist.all_reduce(total, group=self.group)
        return float(total) / self.size

    def merge(self, census: Census) -> None:
        """Put the mean over the processes in the place of the scores of this census."""
        counts = [census.blocks.slices(k) for k in range(len(census.blocks.names))]
        seen = torch.zeros(len(counts), device=self.device)
        sums = [torch.zeros(0, device=self.device)]
        for position, count in enumerate(counts):
            there = census.seen(position)
            seen[position] = float(there)
            sums.append(census.sums[position].to(self.device) if there else seen.new_zeros(count))
        together = torch.cat([seen, *sums])
        dist.all_reduce(together, group=self.group)
        together /= self.size
        found = together[len(counts) :].split(counts)
        for position in together[: len(counts)].nonzero().flatten().tolist():
            old = census.sums.get(position)
            census.replace(position, found[position].to(old.device if old is not None else self.device))

    def average(self, active: Sequence[tuple[Tensor, Part]]) -> None:
        """Put the mean over the processes in the place of the gradients of active parameters.

        Parameters
        ----------
        active : sequence of (Tensor, Part)
            Parameters, of which each process may lack the gradients of some, and their parts. A gradient that all lack
            stays None.
        """
        here = torch.tensor([float(param.grad is not None) for param, _ in active], device=self.device)
        dist.all_reduce(here, dist.ReduceOp.MAX, group=self.group)
        grads = []
        for (param, part), somewhere in zip(active, here.tolist(), strict=True):
            if somewhere and param.grad is None:
                param.grad = _zeros(param, part)
            if param.grad is not None:
                grads.append(stored(param.grad))
        for bucket in _buckets(grads):
            flat = torch.cat([grad.reshape(-1) for grad in bucket]).div_(self.size)
            dist.all_reduce(flat, group=self.group)
            for grad, mean in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
                grad.copy_(mean.view(grad.shape))


def _zeros(param: Tensor, part: Part) -> Tensor:
    if part.index is None:
        return torch.zeros_like(param)
    return CompactGrad(param.new_zeros(part.count, part.unit), part, param.shape)


def _buckets(grads: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one kind that are sent together, in an order that is the same everywhere."""
    kinds: dict[Any, list[Tensor]] = {}
    for grad in grads:
        kinds.setdefault((grad.device, grad.dtype), []).append(grad)
    for alike in kinds.values():
        bucket: list[Tensor] = []
        for grad in alike:
            if bucket and sum(other.numel() for other in bucket) + grad.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(grad)
        yield bucket


def replicas_of(process_group: Any, settings: Settings, params: Sequence[Tensor]) -> Replicas | None:
    """The processes of ``process_group``; None if that is None or has one process only.

    Raises
    ------
    ValueError
        If there is no such group, or if a setting does not go with several processes.
    """
    if process_group is None:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "process_group needs torch.distributed: start the script with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    if isinstance(process_group, str) and process_group != "world":
        raise ValueError(f'process_group must be "world", a ProcessGroup or None; found {process_group!r}')
    group = dist.group.WORLD if process_group == "world" else process_group
    size = dist.get_world_size(group)
    for name, value, found in (
        ("in_backward", True, settings.in_backward),
        ("granularity", "entries", settings.granularity),
        ("inactive", settings.inactive, settings.inactive if settings.inactive != "freeze" else None),
    ):
        if value == found:
            raise ValueError(
                f"{name}={value!r} uses the gradient of a process before it can be averaged over those of "
                "process_group; drop one of them"
            )
    return Replicas(group, size, params[0].device) if size > 1 else None


def refuse_wrapped(model: nn.Module | None, params: Sequence[Tensor], settings: Settings) -> None:
    """Raise for a model whose gradients another tool averages or cuts, unless all are computed at every step.

    Raises
    ------
    ValueError
        With what to do instead.
    """
    if settings.rule == "full":
        return
    kinds = {cls.__name__ for cls in type(model).__mro__} | {type(p).__name__ for p in params}
    found = kinds & {"DistributedDataParallel", "FullyShardedDataParallel", "DTensor", "FlatParameter"}
    if found:
        raise ValueError(
            f"BlockLLM averages the gradients of its active entries itself; found {min(found)}, which would hold or "
            'send a gradient of every parameter. Pass the bare model and process_group="world", or use rule="full"'
        )
