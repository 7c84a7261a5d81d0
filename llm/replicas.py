# SPDX-License-Identifier: BSD-3-Clause
"""Several processes that hold the same model and see different batches: what they tell each other.

Weights, moments and choices are the same in all of them after every step, since each computes them from the same means:
of the gradients of the active entries (``budget`` times what DistributedDataParallel sends), and in a census of the
scores, one number for every block: the mean of what the processes found (of squares, or of absolute values for
``score="l1"``) takes the place of the score of the mean gradient.

Processes must reach :meth:`llm.BlockLLM.step` equally often; there each learns whether all are in the same state, and
an error of one is an error in all. A block that had no gradient in one of them (an expert that no token chose) counts
as zeros there.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm.census import Census
from llm.compact import CompactGrad, Part
from llm.gradients import stored
from llm.settings import Settings

__all__ = ["Replicas", "made_of", "numbers_of", "refuse_wrapped", "replicas_of"]

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

    def begin(self, made: dict[str, str], tensors: Iterable[Tensor]) -> None:
        """Compare how the optimizers were made, then give all processes the first one's tensors.

        Parameters
        ----------
        made : dict of str to str
            What must be the same, by name.
        tensors : iterable of Tensor
            Sparse ones and views that repeat an entry are left out.

        Raises
        ------
        ValueError
            In all processes, if something differs.
        """
        every: list[Any] = [None] * self.size
        dist.all_gather_object(every, made, group=self.group)
        for rank, other in enumerate(every):
            name = next((key for key in {**every[0], **other} if other.get(key) != every[0].get(key)), None)
            if name is not None:
                raise ValueError(
                    f"all processes of process_group must make the same optimizer; found {name} = {other.get(name)} in "
                    f"process {rank}, {every[0].get(name)} in process 0"
                )
        first = dist.get_global_rank(self.group, 0)
        with torch.no_grad():
            for tensor in tensors:
                if tensor.layout == torch.strided and tensor.numel() and 0 not in tensor.stride():
                    held = tensor.detach().contiguous()
                    dist.broadcast(held.view(-1).view(torch.uint8), first, group=self.group)
                    if held.data_ptr() != tensor.data_ptr():
                        tensor.copy_(held)

    def agree(self, idle: bool, loss: float | None, wrong: bool, said: str, state: str) -> tuple[bool, float | None]:
        """Whether all are idle, and the mean of the losses that there are.

        Parameters
        ----------
        idle : bool
            Whether this process has nothing to do.
        loss : float or None
        wrong : bool
            Whether it is missing or not finite, which this process reports itself.
        said, state : str
            What must be the same everywhere, in short for the error, and whole.

        Raises
        ------
        ValueError
            In all other processes where the loss of one is wrong.
        RuntimeError
            In all processes, if the state of one is another.
        """
        mine = [float(idle), float(loss is not None), loss or 0.0, float(wrong), float(zlib.crc32(state.encode()))]
        every = [torch.zeros(len(mine), dtype=torch.float64, device=self.device) for _ in range(self.size)]
        dist.all_gather(every, torch.tensor(mine, dtype=torch.float64, device=self.device), group=self.group)
        rows = torch.stack(every).tolist()
        other = next((rank for rank, row in enumerate(rows) if row[4] != rows[0][4]), None)
        if other is not None:
            raise RuntimeError(
                f"process {other} of process_group is in another state than process 0: other learning rates, numbers "
                "of steps, or active blocks. Use the same scheduler in all, call step() equally often, and load the "
                f"same checkpoint in all. This one: {said}"
            )
        bad = [rank for rank, row in enumerate(rows) if row[3]]
        if bad and not wrong:
            raise ValueError(f"the loss of process {bad[0]} is missing or not finite; nothing was updated")
        told = [row[2] for row in rows if row[1]]
        return all(row[0] for row in rows), sum(told) / len(told) if told else None

    def merge(self, census: Census) -> None:
        """Put the mean over the processes in the place of the scores of this census."""
        counts = [census.blocks.slices(k) for k in range(len(census.blocks.names))]
        seen = torch.zeros(len(counts), dtype=torch.float32, device=self.device)
        sums = [seen.new_zeros(0)]
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
            census.replace(position, found[position].clone().to(old.device if old is not None else self.device))

    def average(self, active: Sequence[tuple[Tensor, Part]]) -> None:
        """Put the mean over the processes in the place of the gradients of active parameters.

        Parameters
        ----------
        active : sequence of (Tensor, Part)
            Parameters, of which each process may lack the gradients of some, and their parts. A gradient that all lack
            stays None.
        """
        here = [float(param.grad is not None) for param, _ in active]
        anywhere = torch.tensor(here, dtype=torch.float32, device=self.device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=self.group)
        grads = []
        for (param, part), somewhere in zip(active, anywhere.tolist(), strict=True):
            if somewhere and param.grad is None:
                param.grad = _zeros(param, part)
            if param.grad is not None:
                grads.append(stored(param.grad))
        for bucket in _buckets(grads):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0].div_(self.size), group=self.group)
                continue
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


def _running() -> int:
    """How many processes torch.distributed runs here."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def replicas_of(process_group: Any, settings: Settings, params: Sequence[Tensor]) -> Replicas | None:
    """The processes of ``process_group``; None if that is None or "alone", or has one process only.

    Raises
    ------
    ValueError
        If there is no such group, or if a setting does not go with several processes.
    """
    if process_group is None or process_group == "alone":
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "process_group needs torch.distributed: start the script with torchrun and call "
            "torch.distributed.init_process_group() first"
        )
    group = dist.group.WORLD if isinstance(process_group, str) and process_group == "world" else process_group
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            'process_group must be "world", "alone", a ProcessGroup that this process belongs to, or None; '
            f"found {process_group!r}"
        )
    size = dist.get_world_size(group)
    if size == 1:
        return None
    for name, early in (
        ("in_backward", settings.in_backward),
        ("granularity", settings.granularity == "entries"),
        ("inactive", settings.inactive != "freeze"),
    ):
        if early:
            raise ValueError(
                f"{name}={getattr(settings, name)!r} uses the gradient of a process before it can be averaged over "
                "those of process_group; drop one of them"
            )
    return Replicas(group, size, params[0].device)


def made_of(settings: Settings, groups: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What an optimizer was made of, by name."""
    made: dict[str, str] = {}
    for field in fields(settings):
        value = getattr(settings, field.name)
        if field.name in ("always", "never"):
            value = sorted(value)
        elif field.name == "rule" and not isinstance(value, str):
            value = value if is_dataclass(value) else type(value)
        made[field.name] = repr(value)
    for k, group in enumerate(groups):
        made[f"numbers of group {k}"] = numbers_of(group)
        pairs = zip(group["param_names"], group["params"], strict=True)
        made[f"parameters of group {k}"] = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in pairs])
    return made


def numbers_of(group: dict[str, Any]) -> str:
    """Rate, betas, eps and weight decay as they are now."""
    beta1, beta2 = group["betas"]
    return repr([float(value) for value in (group["lr"], beta1, beta2, group["eps"], group["weight_decay"])])


def refuse_wrapped(model: nn.Module | None, params: Sequence[Tensor], settings: Settings, told: Any) -> None:
    """Raise for gradients that another tool averages or cuts.

    Parameters
    ----------
    model : Module or None
    params : sequence of Tensor
    settings : Settings
    told : "world", "alone", ProcessGroup or None
        The argument ``process_group``.

    Raises
    ------
    ValueError
        With what to do instead.
    """
    kinds = {cls.__name__ for cls in type(model).__mro__} | {type(p).__name__ for p in params}
    cut = kinds & {"FullyShardedDataParallel", "FSDPModule", "DTensor", "FlatParameter"}
    if cut:
        raise ValueError(
            f"BlockLLM does not work on a model that FSDP or DTensor has cut; found {min(cut)}. Let every process hold "
            'the whole model, bare, and pass process_group="world"'
        )
    if settings.rule == "full":
        return
    if "DistributedDataParallel" in kinds:
        raise ValueError(
            "BlockLLM averages the gradients of its active entries itself; found DistributedDataParallel, which sends "
            'a gradient of every parameter. Pass the bare model and process_group="world", or use rule="full"'
        )
    if told is None and _running() > 1:
        raise ValueError(
            f'process_group is missing, and {_running()} processes run: pass "world" if they train one model (bare, '
            'not in DistributedDataParallel, which goes with rule="full" alone), or "alone" if each trains its own'
        )
