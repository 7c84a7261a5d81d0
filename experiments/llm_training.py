# SPDX-License-Identifier: BSD-3-Clause
"""One run: the training loop that all methods share, and the pass that measures memory.

The seed decides the batches and their order, so that the methods see the same ones. Training runs on a CUDA device
multiply float32 matrices in TF32. CPU seconds are those of the process in a few steps on a CPU (batches are made
before), in turn with steps of AdamW in another process. Memory is counted in a pass of its own on a CPU, since counting
slows a run down: the bytes of every live tensor after each operation. Of a run on a CUDA device the most that PyTorch
had allocated is noted as well.
"""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from experiments import llm_tasks
from experiments.llm_batches import Batch, Task
from experiments.llm_common import COST, CPU, MEMORY, START, Matrix, Unit, end_with_parent
from experiments.llm_methods import SHORT, Method, layers
from experiments.llm_report import Measure, criterion
from llm import BlockLLM

EVALUATIONS = 5  # of a run, at equal distances
FEW = 25  # steps; shorter runs are evaluated at the end only
MEMORY_STEPS = 2 * SHORT + 1  # the first choice, two censuses, and a step after each
HEAVY_STEPS = SHORT  # at the worst place, a census among them
PEER_RATE = 1e-5  # of AdamW, while it is timed beside a method

Results = dict[str, Any]
LossOf = Callable[[nn.Module, Batch], Tensor]


# -- training -----------------------------------------------------------------------------------


def evaluated(steps: int) -> list[int]:
    """After which steps the held-out examples are looked at."""
    if steps < FEW:
        return [steps]
    return sorted({math.ceil(steps * k / EVALUATIONS) for k in range(1, EVALUATIONS + 1)})


def train(task: Task, method: Method, lr: float, seed: int) -> Results:
    """Train and evaluate.

    Returns
    -------
    dict
        ``points``: for every evaluation ``step``, ``tokens`` so far, the mean loss of training since the one before
        (``train``), and :func:`score`; ``seconds`` of all steps; ``diverged``: whether a loss was not finite, which
        ends the run; the truth of the task; ``allocated``: bytes at most in the steps, on a CUDA device;
        ``selection`` (BlockLLM).
    """
    model, optimizer = method.build(task.model, lr, seed, task.head)
    torch.manual_seed(seed)
    stops = evaluated(len(task.batches))
    seconds = 0.0
    allocated = 0
    losses: list[float] = []
    points: list[Results] = []
    for step, batch in enumerate(task.batches, 1):
        began = time.perf_counter()
        losses.append(update(model, optimizer, batch, lr * task.rate(step), task.loss))
        seconds += time.perf_counter() - began
        if not math.isfinite(losses[-1]):
            break
        if step in stops:
            allocated = max(allocated, _allocated())
            tokens = sum(b.tokens for b in task.batches[:step])
            since = losses[points[-1]["step"] if points else 0 :]
            point = {"step": step, "tokens": tokens, "train": _mean(since)}
            points.append(point | score(task, model))
            print(f"  step {step}: {points[-1]['value']:.4f}, {seconds:.0f} s", flush=True)
            _allocated()
    diverged = not math.isfinite(losses[-1])
    result = {"points": points, "seconds": round(seconds, 2), "diverged": diverged, "allocated": allocated}
    return result | task.truth | _selection(optimizer)


def _allocated() -> int:
    """The most bytes that PyTorch had allocated on the CUDA device since the last question; 0 without a device."""
    if not torch.cuda.is_available():
        return 0
    found = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return found


def _mean(values: list[float]) -> float:
    return round(sum(values) / len(values), 5)


def _selection(optimizer: torch.optim.Optimizer) -> Results:
    """What BlockLLM had active at the end, and when it chose."""
    if not isinstance(optimizer, BlockLLM):
        return {}
    report = optimizer.report()
    kept = {name: report[name] for name in ("budget", "active entries", "share")}
    return {"selection": kept | {"switches": [switch["step"] for switch in report["history"]]}}


def update(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float, loss_of: LossOf) -> float:
    """One step at a learning rate. Returns its loss; nan if a gradient was refused because it was not finite."""
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    value = float(loss.detach())
    if not math.isfinite(value):
        return value
    loss.backward()
    told = {"loss": value} if isinstance(optimizer, BlockLLM) else {}  # for patience: not all models return it
    try:
        optimizer.step(**told)
    except ValueError as error:
        if "finite" not in str(error):
            raise
        return math.nan
    return value


@torch.no_grad()
def score(task: Task, model: nn.Module) -> Results:
    """What the held-out examples say.

    Returns
    -------
    dict
        ``value``: the loss, over all label tokens; ``losses``: of every example, summed over its tokens, or for
        classifiers ``predicted``: a digit an example.
    """
    model.eval()
    parts = [task.score(model, batch) for batch in task.held_out]
    losses = [loss for part in parts for loss in part["losses"]]
    value = round(sum(losses) / sum(task.truth.get("weights", [1] * len(losses))), 5)
    if "predicted" in parts[0]:
        return {"value": value, "predicted": "".join(str(k) for part in parts for k in part["predicted"])}
    return {"value": value, "losses": [round(loss, 3) for loss in losses]}


def start(task: Task) -> Results:
    """The model before training."""
    return {"points": [{"step": 0, "cpu": 0.0, "tokens": 0} | score(task, task.model)]} | task.truth


# -- CPU seconds --------------------------------------------------------------------------------


def cost(task: Task, method: Method, lr: float, seed: int, adamw: Callable[[], float]) -> Results:
    """CPU seconds of a few steps, each followed by one of AdamW, so that a busy machine slows down both.

    Parameters
    ----------
    task, method, lr, seed
        Of the run.
    adamw : callable
        Takes a step of AdamW and returns its CPU seconds (:func:`adamw_beside`).

    Returns
    -------
    dict
        ``step`` and ``switch``: CPU seconds of a median step, and what one with a switch takes more; ``tokens`` of a
        step; ``adamw``: CPU seconds of AdamW's median step.
    """
    model, optimizer = method.with_timed_periods().build(task.model, lr, seed, task.head)
    torch.manual_seed(seed)
    batch = middle(task)
    pairs = []
    for _ in range(1 + method.timed_steps(len(task.batches), len(layers(model)))):
        pairs.append([_seconds(task, model, optimizer, batch, lr), adamw()])
    switched = {s["step"] for s in optimizer.report()["history"]} if isinstance(optimizer, BlockLLM) else set()
    plain = [own for k, (own, _) in enumerate(pairs[1:], 2) if k not in switched]
    others = [own for k, (own, _) in enumerate(pairs[1:], 2) if k in switched]
    step = statistics.median(plain)
    return {
        "step": step,
        "switch": statistics.median(others) - step if others else 0.0,
        "tokens": batch.tokens,
        "adamw": statistics.median(adamw for _, adamw in pairs[1:]),
    }


def middle(task: Task) -> Batch:
    """The batch of median size."""
    return sorted(task.batches, key=lambda b: b.inputs["input_ids"].numel())[len(task.batches) // 2]


@contextlib.contextmanager
def adamw_beside(unit: Unit) -> Iterator[Callable[[], float]]:
    """Steps of AdamW in a process of its own: a function that takes one and returns its CPU seconds.

    In one process a method would find, or not find, the memory that the other has just freed.

    Raises
    ------
    RuntimeError
        By the function, if the process has failed, with what it said.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve_steps, args=(unit, there), daemon=True)
    process.start()
    there.close()

    def step() -> float:
        """Ask for one."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: what it said is still there
            here.send(None)
        found = here.recv()
        if isinstance(found, str):
            raise RuntimeError(f"the process with AdamW's steps has failed: {found}")
        return float(found)

    try:
        yield step
    finally:
        here.close()
        process.join()


def _serve_steps(unit: Unit, pipe: Any) -> None:
    """In a process: take a step of AdamW whenever asked, until the other end is closed. An error is sent in words."""
    end_with_parent()
    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            task = llm_tasks.make(unit.data, unit.seed, max(1, unit.steps))
            model, optimizer = Method("adamw", ()).build(task.model, PEER_RATE, unit.seed, task.head)
            batch = middle(task)
            while True:
                pipe.recv()
                pipe.send(_seconds(task, model, optimizer, batch, PEER_RATE))
        except (OSError, ValueError, RuntimeError) as error:
            pipe.send(f"{type(error).__name__}: {error}")


def _seconds(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float) -> float:
    """CPU seconds of a step."""
    began = time.process_time()
    if not math.isfinite(update(model, optimizer, batch, lr, task.loss)):
        raise ValueError(f"the loss must be finite while time is measured; lower the rate {lr:g}")
    return time.process_time() - began


# -- memory -------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that came out of an operation in this block and are alive: now, and at most.

    Temporary memory inside an operation (of a singular value decomposition, say) is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def watch(self, value: Any) -> None:
        """Count the storages of all tensors in ``value`` until they are freed."""
        for tensor in tree_iter(value):
            if is_plain(tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    weakref.finalize(storage, self._freed, key)
                self.now += size - self._known.get(key, 0)
                self._known[key] = size

    def _freed(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what came out."""
        out = func(*args, **(kwargs or {}))
        self.watch(out)
        self.peak = max(self.peak, self.now)
        return out


def measure(task: Task, method: Method, lr: float, seed: int) -> Results:
    """Memory of a few steps on the largest batch: the first one, switches, and for BlockLLM the worst place.

    Returns
    -------
    dict
        Bytes: ``peak`` of everything alive, ``natural`` (the same while the method chose by itself), ``state`` of the
        optimizer at most, ``weights`` of the model as it came.
    """
    weights = sum(storages([*task.model.parameters(), *task.model.buffers()]).values())
    model, optimizer = method.with_short_periods().build(task.model, lr, seed, task.head)
    batch = max(task.batches, key=lambda b: b.inputs["input_ids"].numel())
    live = LiveBytes()
    live.watch([*model.parameters(), *model.buffers(), *tensors_of(optimizer)])
    state = max(_step(live, task, model, optimizer, batch, lr) for _ in range(MEMORY_STEPS))
    natural = live.peak
    if method.ours and isinstance(optimizer, BlockLLM):
        optimizer.activate(lowest(optimizer))
        state = max(state, *(_step(live, task, model, optimizer, batch, lr) for _ in range(HEAVY_STEPS)))
    return {"peak": live.peak, "natural": natural, "state": state, "weights": weights}


def _step(
    live: LiveBytes, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, lr: float
) -> int:
    """One counted step. Returns the bytes of the optimizer's state after it."""
    with live:
        loss = update(model, optimizer, batch, lr, task.loss)
    if not math.isfinite(loss):
        raise ValueError(f"the loss must be finite while memory is measured; lower the rate {lr:g}")
    return state_bytes(optimizer, model)


def lowest(optimizer: BlockLLM) -> dict[str, int]:
    """Slices of the layers that fill the budget from the bottom up: then a backward pass crosses the whole model.

    What is always active comes first.
    """
    blocks = optimizer.blocks
    head = sorted(optimizer._chooser.always)
    inside = [k for k, name in enumerate(blocks.names) if ".layer" in name and k not in head]
    left, chosen = optimizer.budget, {}
    for position in [*head, *inside]:
        unit = 1 if blocks.granularity == "entries" else blocks.units[position]
        taken = min(blocks.sizes[position], left) // unit
        left -= taken * unit
        if taken:
            chosen[blocks.names[position]] = taken
    return chosen


def is_plain(tensor: Any) -> bool:
    """Whether it is a dense tensor with a storage of its own, not a wrapper."""
    return isinstance(tensor, Tensor) and type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided


def tensors_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """All tensors that an optimizer holds, also in projectors and in the optimizer inside it; no modules."""
    seen: set[int] = set()
    waiting: list[Any] = [vars(optimizer)]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type) and not callable(value):
            waiting.append(vars(value))


def state_bytes(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    """Bytes of what an optimizer holds beside weights and gradients: moments, indices, projections, copies."""
    params = list(model.parameters())
    outside = storages([*params, *(p.grad for p in params)])
    return sum(size for key, size in storages(tensors_of(optimizer)).items() if key not in outside)


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of the storages of these tensors, each once."""
    found = (tensor.untyped_storage() for tensor in tensors if is_plain(tensor))
    return {storage._cdata: storage.nbytes() for storage in found}


# -- matrices and units -------------------------------------------------------------------------


def matrix_of(
    name: str,
    methods: Mapping[str, Method],
    extras: Mapping[str, Method],
    steps: Mapping[str, int],
    seeds: tuple[int, ...],
    measures: Mapping[str, Measure],
    expected: Mapping[str, float],
) -> Matrix:
    """Those of the methods that are installed, on the data sets of ``steps``; arguments as of :class:`Matrix`."""
    every = {**methods, **extras}

    def settings(unit: Unit) -> Results:
        """All that a unit's result depends on besides itself."""
        own = {"method": every[unit.method].settings()} if unit.method else {}
        own |= {"timed": "in turn with AdamW in a process of its own"} if unit.kind == COST else {}
        own |= llm_tasks.MEASURED.get(unit.data, {}) if unit.kind in (COST, MEMORY) else {}
        return {"task": llm_tasks.SETTINGS[unit.data]} | own

    return Matrix(
        name=name,
        data=tuple(steps),
        methods=tuple(name for name, method in methods.items() if method.installed),
        extras=tuple(name for name, method in extras.items() if method.installed),
        grid=lambda data, method: every[method].grid,
        seeds=dict.fromkeys(steps, seeds),
        steps=steps,
        settings=settings,
        criterion={data: criterion(measure) for data, measure in measures.items()},
        memory=True,
        expected=expected,
    )


def quick_of(which: Matrix, methods: tuple[str, ...], steps: int) -> Matrix:
    """These methods at their middle rate for a few steps, on the first data set and seed."""
    data = which.data[0]
    return replace(
        which,
        data=(data,),
        methods=methods,
        extras=(),
        grid=lambda data, method: which.grid(data, method)[1:2],
        seeds={data: which.seeds[data][:1]},
        steps={data: steps},
        memory=False,
    )


def carry_out(unit: Unit, methods: Mapping[str, Method]) -> Results:
    """The result of a unit."""
    task = llm_tasks.make(unit.data, unit.seed, max(1, unit.steps))
    if unit.device != CPU:
        gc.collect()  # a model of an earlier unit of this process may still be in a cycle of references
        _allocated()
        task = moved(task, unit.device)
    if unit.kind == START:
        return start(task)
    method = methods[unit.method]
    if unit.kind == COST:
        with adamw_beside(unit) as adamw:
            return cost(task, method, method.grid[0], unit.seed, adamw)
    if unit.kind == MEMORY:
        return measure(task, method, method.grid[0], unit.seed)
    return train(task, method, unit.lr, unit.seed)


def moved(task: Task, device: str) -> Task:
    """The task on a device."""
    torch.set_float32_matmul_precision("high")

    def there(batch: Batch) -> Batch:
        return Batch({name: value.to(device) for name, value in batch.inputs.items()}, batch.tokens)

    batches, held_out = ([there(batch) for batch in part] for part in (task.batches, task.held_out))
    return task._replace(model=task.model.to(device), batches=batches, held_out=held_out)
