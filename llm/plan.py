# SPDX-License-Identifier: BSD-3-Clause
"""How much memory fine-tuning with BlockLLM will take, and the largest budget that fits, without the memory.

Whole runs of training steps are carried out on fake tensors (:mod:`llm.ledger`): the first choice, censuses, switches
and what lies between. Fake tensors have no values, hence no scores: the optimizer is told made-up ones, which lead
what is active through the worst places by turns::

    bottom      the lowest layers: the backward pass crosses the whole model
    top         the highest layers: their gradients are there while most activations still are
    tables      the largest tensors first
    spread      rows or entries everywhere

At a place that comes twice in a row a tenth of the rows is left out the second time, so that most, not all, of what is
active stays so. The largest step of such a run is the peak.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map

from llm.blocks import Blocks, bytes_of
from llm.census import Census
from llm.choose import Chooser
from llm.compact import Part, index_dtype
from llm.ledger import PARTS, Peak, watch
from llm.moments import bytes_per_entry
from llm.optimizer import BlockLLM
from llm.settings import is_number

__all__ = ["PLACES", "Case", "Plan", "fake_model", "memory_of", "plan", "prescribe", "simulate"]

PLACES = ("bottom", "top", "tables", "tables", "spread")
TRIES = 4  # runs that look for the largest budget
CLOSE, AIM = 0.98, 0.99  # shares of the memory: near enough to it, and what a guess is to take
LEAST = 1e-4  # of the parameters: smaller budgets are not tried
LEFT_OUT = 0.1  # of the rows, at random, where a place comes again


@dataclass(frozen=True)
class Case:
    """One simulated run.

    Attributes
    ----------
    checkpointing : bool
        Whether activations are recomputed in the backward pass.
    share : float
        Of the parameters that may be active.
    peak : Peak
        Its largest moment.
    fits : bool
    """

    checkpointing: bool
    share: float
    peak: Peak
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; ``print`` shows it as a table.

    Attributes
    ----------
    memory : int
        Bytes that there are.
    parameters : int
        Entries of the model.
    cases : tuple of Case
        With and without checkpointing: the budget that was asked for, then the largest that fits.
    """

    memory: int
    parameters: int
    cases: tuple[Case, ...]

    def largest(self, checkpointing: bool) -> float | None:
        """The largest share of the parameters that may be active; None if none fits."""
        return max((c.share for c in self.cases if c.fits and c.checkpointing == checkpointing), default=None)

    def __str__(self) -> str:
        """The table, in GB of 10^9 bytes."""
        head = f"{'checkpointing':13} {'budget':>7} " + " ".join(f"{part:>11}" for part in PARTS) + f" {'peak':>8}"
        first = f"{self.parameters:,} parameters; memory {self.memory / 1e9:.2f} GB; peaks and their parts in GB"
        lines = [first, head]
        for case in self.cases:
            parts = " ".join(f"{case.peak.parts[part] / 1e9:>11.3f}" for part in PARTS)
            total, moment = str(case.peak).split(" GB in the ")
            verdict = "fits" if case.fits else "too large"
            way = "yes" if case.checkpointing else "no"
            lines.append(f"{way:13} {case.share:>7.2%} {parts} {total:>8}  {verdict}: {moment}")
        for recompute in dict.fromkeys(case.checkpointing for case in self.cases):
            share = self.largest(recompute)
            found = "no budget fits" if share is None else f"the largest budget that fits is {share:.2%}"
            lines.append(f"{'with' if recompute else 'without'} checkpointing {found}")
        return "\n".join(lines)


def plan(
    model: Any,
    batch: Any,
    *,
    budget: str | int = "24GB",
    optimizer: Mapping[str, Any] | None = None,
    checkpointing: Sequence[bool] | None = None,
    places: Sequence[str] = PLACES,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    tell: Callable[[str], Any] | None = None,
) -> Plan:
    """Predict the peak memory of training with BlockLLM, and find the largest budget that fits.

    Parameters
    ----------
    model : Module, callable, or configuration of transformers
        A module on any device ("meta" is enough; only its shapes are looked at), a function that makes one, or the
        configuration of a causal language model.
    batch : tuple of two int, Mapping, tuple or Tensor
        What the model is called with. Two numbers: so many sequences of so many tokens. Tensors may be on "meta".
    budget : str or int
        Memory of the device for tensors: such as ``"24GB"``, or bytes. Leave room for its context and for what the
        allocator wastes, which are not simulated.
    optimizer : Mapping, optional
        Options of :class:`llm.BlockLLM`; its ``budget`` is the share that is looked at first.
    checkpointing : sequence of bool, optional
        Without, with, or both. None: both, if the model can.
    places : sequence of str
        Where what is active goes in a run, of :data:`PLACES`; fewer take less time.
    loss : callable, optional
        ``loss(model, batch)``; None: the model returns it, as those of transformers do when they get labels.
    tell : callable, optional
        Gets a line before each simulated run, of which there are at most five for each way.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If an option is wrong, no loss is found, or a parameter is more than a plain tensor.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    >>> found = plan(model, torch.ones(8, 512), budget="8MB", loss=lambda model, x: model(x).square().mean())
    >>> found.cases[0].peak.parts["weights"], found.cases[0].fits
    (2101248, True)
    """
    limit = memory_of(budget)
    twin, inputs, options = fake_model(model), _inputs(batch), dict(optimizer or {})
    ours = BlockLLM(twin, **options)
    share, total = ours.budget / ours.blocks.total, ours.blocks.total
    slope = total * (bytes_per_entry(ours.settings.states) + max(p.element_size() for p in twin.parameters()))
    ours.close()
    can = any(hasattr(twin, f"{kind}_checkpointing_enable") for kind in ("activation", "gradient"))
    cases: list[Case] = []
    ways, runs = ((False, True) if can else (False,)) if checkpointing is None else checkpointing, count(1)
    for way in ways:
        _checkpoint(twin, way)

        def _largest_moment(share: float, kind: str = f"{'with' if way else 'without'} checkpointing") -> Peak:
            if tell is not None:
                tell(f"simulating run {next(runs)} of {len(ways) * (1 + TRIES)} at most: {kind}, budget {share:.2%}")
            peaks = simulate(twin, options | {"budget": share}, lambda: (loss or loss_of_model)(twin, inputs), places)
            return max(peaks, key=lambda moment: moment.total)

        tried = _approach(_largest_moment, limit, share, slope)
        best = max((s for s, peak in tried.items() if peak.total <= limit), default=share)
        cases += [Case(way, s, tried[s], tried[s].total <= limit) for s in dict.fromkeys((share, best))]
    return Plan(limit, total, tuple(cases))


def memory_of(amount: str | int, argument: str = "budget") -> int:
    """Bytes of the memory of a device.

    Parameters
    ----------
    amount : str or int
        Such as ``"24GB"``, or bytes.
    argument : str
        What an error calls it.

    Raises
    ------
    ValueError
        If it is something else, or nothing.
    """
    found: Any = bytes_of(amount) if isinstance(amount, str) else amount
    if not (is_number(found) and 1 <= found < math.inf):
        raise ValueError(f'{argument} must be memory of a device, such as "24GB"; found {amount!r}')
    return int(found)


def _approach(peak_at: Callable[[float], Peak], limit: int, share: float, slope: float) -> dict[float, Peak]:
    """Runs at ``share``, and at shares that come close to the largest that fits."""
    tried = {share: peak_at(share)}
    for _ in range(TRIES):
        fitting = [s for s, peak in tried.items() if peak.total <= limit]
        best = max(fitting, default=min(tried))
        over = min((s for s in tried if s > best and s not in fitting), default=None)
        room = limit - tried[best].total
        if (fitting and room < (1 - CLOSE) * limit) or (over is not None and over - best < 0.02 * best):
            break
        if fitting and over is not None:
            slope = (tried[over].total - tried[best].total) / (over - best)
        more = (AIM * limit - tried[best].total) / slope
        guess = min(1.0, max(LEAST, float(f"{best + more:.3g}")))
        if guess in tried:
            break
        tried[guess] = peak_at(guess)
    return tried


def _checkpoint(model: Any, on: bool) -> None:
    if on:
        from llm.hf import checkpointing

        checkpointing(model)
    else:
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False


# -- fake models and batches -----------------------------------------------------------------------


def fake_model(model: Any) -> nn.Module:
    """A model in training mode with the shapes and types of this one, and no data.

    Parameters
    ----------
    model : Module, callable, or configuration of transformers
        As for :func:`plan`; a module is not changed.

    Raises
    ------
    ValueError
        If a parameter is a tensor of tensors (quantized, or sharded).
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    if isinstance(model, nn.Module):
        twin = _twin(model, mode)
    else:
        with mode:
            twin = _of_config(model) if hasattr(model, "model_type") else model()
    config: Any = getattr(twin, "config", None)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # as it is set for training
    return twin.train()


def _twin(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy whose parameters and buffers are fake."""
    fakes: dict[int, Any] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_traceable_wrapper_subclass(tensor):
            raise ValueError(f"model: {name} is a {type(tensor).__name__}; only plain tensors can be simulated")
        with mode:
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        fakes[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    twin = copy.deepcopy(model, fakes)
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return twin


def _of_config(config: Any) -> nn.Module:
    package = importlib.import_module(type(config).__module__.partition(".")[0])
    return package.AutoModelForCausalLM.from_config(config)


def _inputs(batch: Any) -> Any:
    """Real tensors on the CPU: what a model asks of its inputs can be answered."""
    if isinstance(batch, tuple) and all(isinstance(size, int) for size in batch):
        if len(batch) != 2 or min(batch) < 1:
            raise ValueError(f"batch must be how many sequences, of how many tokens, each at least 1; found {batch}")
        ids = torch.zeros(batch, dtype=torch.int64)
        return {"input_ids": ids, "labels": ids}
    return tree_map(lambda t: torch.zeros_like(t, device="cpu") if isinstance(t, Tensor) else t, batch)


def loss_of_model(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns: ``.loss``, ``["loss"]``, the first of a tuple, or all.

    Raises
    ------
    ValueError
        If that is not a number that depends on the model.
    """
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", output)
    found = found[0] if isinstance(found, tuple | list) else found
    if not isinstance(found, Tensor) or found.numel() != 1 or not found.requires_grad:
        raise ValueError(
            "loss: the model returns none for this batch; put labels into it, or pass loss=, a function of the model "
            "and the batch"
        )
    return found


# -- runs through the worst places -----------------------------------------------------------------


def simulate(
    model: nn.Module,
    options: Mapping[str, Any],
    loss: Callable[[], Tensor],
    places: Sequence[str] = PLACES,
    steps: int | None = None,
) -> list[Peak]:
    """Peaks of a run of BlockLLM in which what is active comes by these places.

    Parameters
    ----------
    model : Module
        Fake (:func:`fake_model`), or real, which is then trained.
    options : Mapping
        Of :class:`llm.BlockLLM`. It switches at every second step, whatever they say; what ``moments="offload"`` would
        move to the CPU is dropped.
    loss : callable
        Runs the model.
    places : sequence of str
        Of :data:`PLACES`.
    steps : int, optional
        Two for every place if None.

    Returns
    -------
    list of Peak
        One for each phase of each step, in order; the first, second, fourth, sixth ... step is a census.
    """
    schedule = {"patience": None} | ({} if options.get("rule") == "full" else {"switch_every": 2})
    moments = {"moments": "reset"} if options.get("moments") == "offload" else {}

    def _make(model: nn.Module) -> BlockLLM:
        optimizer = BlockLLM(model, **{**options, **schedule, **moments})
        prescribe(optimizer, places)
        return optimizer

    return watch(model, _make, loss, steps or 2 * len(places))


def prescribe(optimizer: BlockLLM, places: Sequence[str]) -> None:
    """From now on let an optimizer choose by place, one after the other, instead of by what its censuses find."""
    chooser = optimizer._chooser
    given = {field.name: getattr(chooser, field.name) for field in dataclasses.fields(chooser)}
    optimizer._chooser = _Prescribed(**given, places=tuple(places), history=optimizer.history)
    if optimizer.parts is not None:  # chosen at construction, by a rule without scores
        optimizer.parts = _numbered(optimizer.parts, optimizer.blocks)


@dataclass(frozen=True)
class _Prescribed(Chooser):
    """Chooses as its parent does, but by made-up scores."""

    places: tuple[str, ...]
    history: list[dict[str, Any]]  # one entry for every choice so far

    def choose(self, census: Census, state: Any) -> tuple[list[Part | None], Any]:
        """As the parent's; entries have numbers already, where it would look at the gradient to say which."""
        turn = len(self.history)
        place, last = (self.places[k % len(self.places)] for k in (turn, turn - 1))
        seen = set(census.sums) if self.rule.scored else set(range(len(self.blocks.sizes)))
        parts, state = super().choose(_MadeUp(self.blocks, place, seen, turn, place == last and turn > 0), state)
        return _numbered(parts, self.blocks), state


def _numbered(parts: Sequence[Part | None], blocks: Blocks) -> list[Part | None]:
    """Parts with the first entries where the largest gradients would say which."""
    return [
        part.at(torch.arange(part.count, dtype=index_dtype(size))) if part is not None and part.index is None else part
        for part, size in zip(parts, blocks.sizes, strict=True)
    ]


class _MadeUp(Census):
    """Scores that are highest at one place; 0 for what a census has not seen yet."""

    def __init__(self, blocks: Blocks, place: str, seen: set[int], turn: int, again: bool) -> None:
        super().__init__(blocks, "grad")
        self._random, self._spread = torch.Generator().manual_seed(turn), place == "spread"
        self._left_out = LEFT_OUT if again and blocks.fine else 0.0
        height = torch.linspace(-60, 60, len(blocks.sizes))  # so far apart that visits hardly matter
        norms = {"top": 2**height, "bottom": 2**-height, "tables": torch.tensor(blocks.sizes).float() ** 4}
        norm = torch.rand(len(blocks.sizes), generator=self._random) if self._spread else norms[place]
        self._norm = norm * torch.tensor([position in seen for position in range(len(blocks.sizes))])

    def norms(self) -> Tensor:
        """Of every parameter."""
        return self._norm

    def scores(self) -> Tensor:
        """Of every block: as high as its parameter, or anything below that."""
        total = torch.zeros(len(self.blocks.cost))
        for position, first in enumerate(self.blocks.first):
            total[first : first + self.blocks.slices(position)] += self._norm[position]
        draw = torch.rand(len(total), generator=self._random)
        return total * (draw if self._spread else draw >= self._left_out)

    def histogram(self, position: int) -> Tensor:
        """All entries in the bin of their parameter, or in all bins alike."""
        size, counts = self.blocks.sizes[position], super().histogram(position).zero_()
        if self._spread:
            counts += size // len(counts)
        rank = int((self._norm < self._norm[position]).sum())
        counts[rank * len(counts) // len(self._norm)] += size - counts.sum()
        return counts
