# SPDX-License-Identifier: BSD-3-Clause
"""BlockLLM: AdamW on a small, changing part of the parameters (arXiv 2406.17296, Algorithms 1 and 2).

Minimise a loss f(w) over the parameters w of a model while at most ``budget`` entries are active at a time::

    every window (the backward passes between two calls of step):
        backward                   gradients of the active part stay, all others are freed or never computed
        step                       AdamW on the active part
        if it is time to switch:   the next backward is a census, in which every tensor's gradient is reduced to a
                                   score and freed; the step after it updates the old part, then chooses the new one

The first window is a census as well. Nothing was active before it, so that it keeps the gradients of the best blocks
seen so far: its step chooses and then updates what was chosen.

How long a window is, is never asked: gradients accumulate as usual, and a switch happens in ``step`` alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llm import report
from llm.adam import Hyper
from llm.blocks import matching, named_groups
from llm.census import Census
from llm.choose import make_chooser
from llm.compact import CompactGrad, Part, add_rows, index_dtype, pick_largest, replace_rows, restrict
from llm.gradients import hear_losses, narrow, norm_of, not_finite_message, stored, update_inactive, watch
from llm.moments import CHUNK, Gradient, Update, bytes_per_entry, regroup, shelve, update_, working_dtype
from llm.patience import LossWatch
from llm.replicas import made_of, numbers_of, refuse_wrapped, replicas_of
from llm.row_gradients import RowGradients, Rows
from llm.saving import check_names, check_settings, on_device, pack, unpack
from llm.settings import Settings, check_rates

__all__ = ["BlockLLM"]

SURVEYED = 1 << 20  # entries of a gradient that a census makes at a time where the modules let it
HELD = 2  # times the budget, or what moments and gradients take later: how much gradient the first window may hold


class BlockLLM(torch.optim.Optimizer):
    """AdamW on the blocks that promise the most descent, chosen anew from time to time under a budget.

    Parameters
    ----------
    params : Module, or iterable of Parameter, of (name, Parameter) or of group dicts
        As for any torch optimizer. Every parameter is registered, whatever its ``requires_grad``, which is managed
        from here on: only what is active requires grad (``close`` puts it back).
    lr, betas, eps, weight_decay
        As of :class:`torch.optim.AdamW`; defaults of the groups, which schedulers may change.
    model : Module, optional
        Where ``params`` is not a module: for names, embeddings, and losses.
    budget : float, int or str, default 0.05
        Share of the parameters, number of entries, or memory such as ``"500MB"`` (moments, gradients and indices of
        the active entries) that may be active. Default of ``rule="half"``: 0.5.
    patience : int, optional
        Switch when the loss is not below the mean of the last so many losses. Losses come from ``step(loss=loss)``,
        from ``observe(loss)``, or from the output of the model, if that is given.
    switch_every : int, optional
        Switch after so many steps. None (and patience None): never after the first choice.
    rule : {"greedy", "cyclic", "random", "half", "importance", "full"} or BlockRule
        :mod:`bcd.budget` describes them; "full" is plain AdamW on everything.
    score : {"grad", "l1", "adam"}
        Norm of the gradient; its L1-norm over the root of the block's size (with ``per_parameter``: the mean of
        ``|g|``); or the norm of Adam's direction. Entries without moments have the direction ``g / (|g| + eps)``, so
        that "adam" prefers large blocks without moments to all others.
    visit_power : float
        Scores are divided by (visit frequency)^visit_power. Greedy rule; for rows and entries with ``reach``, visits
        of tensors.
    per_parameter : bool
        Divide scores by the root of the size of the block. Greedy rule.
    mask : bool
        A tensor (or layer) that does not fit in what is left of the budget is active in part, in the entries with
        the largest gradient; False: it is passed over.
    census : {"stream", "probe"}
        At a switch score every tensor anew, or one in eight in turn, older scores losing 10% a switch.
    moments : {"reset", "offload", "keep"}
        Moments of released entries: dropped, moved to the CPU, or kept where they are. What stays active keeps its
        moments in any case.
    embeddings : {"compete", "always", "never", "auto"}
        Embedding tables (of positions and types, too) and output layers, but for those that ``always`` and ``never``
        name. "auto": compete, unless one is larger than the budget, then never.
    always, never : sequence of str
        Parameters or modules by name (``"model.norm"``).
    granularity : {"rows", "neurons", "tensor", "layer", "entries"}
        What a block is; :mod:`llm.blocks`.
    reach : float, optional
        Rows and entries are chosen inside tensors that together hold so many times the budget; None: in all.
    inactive : {"freeze", "sign", "sgd", "spectral"}
        Update inactive entries as their gradients come, without state: ``w -= inactive_scale * lr * sign(g)``, or
        ``g``, or, for matrices, the :func:`spectral direction <llm.adam.spectral_direction>` of ``g``, which takes
        some products of a matrix with itself. Every gradient is then computed. Refuses accumulation. For pre-training,
        where a token table learns badly by signs: its rows have small gradients in one direction at most steps and a
        large one in the other at few, so let it be active (``embeddings="always"``).
    inactive_scale : float
        See ``inactive``.
    precision : {"auto", "stochastic", "fp32-active"}
        Parameters below float32: round new weights stochastically (bfloat16), or keep float32 copies of active
        entries. "auto": the first for bfloat16, the second for float16.
    states : {"fp32", "bf16", "8bit"}
        How moments are stored.
    max_grad_norm : float, optional
        Clip the norm of the gradient of the active entries.
    in_backward : bool
        Update each tensor as its gradient comes and free that at once. Refuses accumulation and clipping.
    ramp : int
        What becomes active at a switch (not at the first choice) reaches the full rate after so many steps.
    cautious : bool
        Entries whose first moment and gradient have opposite signs, or whose gradient is 0, wait for the next step,
        but for weight decay (arXiv 2411.16085, without its rescaling, so that steps are shorter and the best rate is
        higher: 1.7 to 3 times as high in our fine-tuning).
    seed : int
        Of the rules that draw and of stochastic rounding; torch's generators are never touched.
    process_group : "world", "alone" or ProcessGroup, optional
        Of several processes that hold the same model, bare, and see different batches: ``step`` averages what is
        active over them (:mod:`llm.replicas`), and ``patience`` goes by the mean of their losses. All start from the
        first one's weights. The first step chooses and updates nothing. Not with ``in_backward``, ``inactive``,
        single entries, or GradScaler. "alone": each process trains a model of its own. Must be given where
        torch.distributed runs several processes, but for ``rule="full"``.

    Raises
    ------
    ValueError
        If a setting or a name is unknown, a number is out of range (also in a group), or the budget is below the
        smallest block.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    >>> opt = BlockLLM(model, lr=1e-2, budget=0.3)
    >>> for _ in range(3):
    ...     loss = model(torch.ones(4, 8)).square().mean()
    ...     opt.zero_grad()
    ...     loss.backward()
    ...     _ = opt.step(loss=loss)
    >>> sum(opt.active().values()) <= 0.3 * 81
    True
    """

    def __init__(
        self,
        params: Any,
        lr: float = 5e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        model: nn.Module | None = None,
        budget: Any = None,
        patience: int | None = None,
        switch_every: int | None = 200,
        rule: Any = "greedy",
        score: str = "grad",
        visit_power: float = 1.0,
        per_parameter: bool = False,
        mask: bool = True,
        census: str = "stream",
        moments: str = "reset",
        embeddings: str = "compete",
        always: Sequence[str] = (),
        never: Sequence[str] = (),
        granularity: str = "rows",
        reach: float | None = None,
        inactive: str = "freeze",
        inactive_scale: float = 0.1,
        precision: str = "auto",
        states: str = "fp32",
        max_grad_norm: float | None = None,
        in_backward: bool = False,
        ramp: int = 10,
        cautious: bool = False,
        seed: int = 0,
        process_group: Any = None,
    ) -> None:
        options = {name: value for name, value in locals().items() if name in Settings.__dataclass_fields__}
        self.settings = Settings(**options).checked()
        rates = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        check_rates(rates)
        model = params if isinstance(params, nn.Module) else model
        groups = named_groups(params, model)
        super().__init__(groups, rates)
        self._where = [(g, k) for g, group in enumerate(self.param_groups) for k in range(len(group["params"]))]
        names = [name for group in self.param_groups for name in group["param_names"]]
        self._group = process_group
        refuse_wrapped(model, self._params(), self.settings, process_group)
        self._chooser = make_chooser(self.settings, names, self._params(), model)
        self.blocks = self._chooser.blocks
        self._replicas = replicas_of(process_group, self.settings, self._params())
        if self._replicas is not None:
            others = [] if model is None else [*model.parameters(), *model.buffers()]
            tensors = {id(tensor): tensor for tensor in (*self._params(), *others)}
            self._replicas.begin(made_of(self.settings, self.param_groups), tensors.values())
        self._start(model)

    # -- construction ------------------------------------------------------------------------------

    def _start(self, model: nn.Module | None) -> None:
        """State before the first window."""
        self.steps, self.seed = 0, self.settings.seed
        self.history: list[dict[str, Any]] = []
        self.since = 0  # steps since the last switch
        self.reason = "first"
        self.grad_norm: float | None = None  # of the active entries, before clipping
        self.parts: list[Part | None] | None = None  # by position; None before the first choice
        self.census_on = False
        self.rule_state = self._chooser.init(self.seed)
        self.census = Census(self.blocks, self.settings.score)
        self.losses = LossWatch(self.settings.patience)
        self._updated: set[int] = set()  # in this window, by a hook
        self._by_rows: set[int] = set()  # scored in this census without their whole gradient
        self._generators: dict[torch.device, torch.Generator] = {}
        self._required = [p.requires_grad for p in self._params()]
        self._hooks: list[Any] = []
        self._watched: list[int] = []  # identities of the tensors with hooks
        self._model = weakref.ref(model) if model is not None else None
        self._row_gradients: RowGradients | None = None
        listens = model is not None and self.settings.patience is not None
        self._loss_hook = hear_losses(self, model) if listens and model is not None else None
        if self._chooser.rule.scored:
            self._begin_census()
        else:
            self._switch()
        self._manage()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: blocks are made of all parameters at construction."""
        if hasattr(self, "blocks"):
            raise ValueError(
                "BlockLLM takes all parameters at construction, frozen ones included, and activates them itself; "
                "make a new optimizer of all groups"
            )
        check_rates(param_group)
        super().add_param_group(param_group)

    # -- parameters --------------------------------------------------------------------------------

    def _params(self) -> list[Tensor]:
        """By position. Always read from the groups: sharding replaces tensors there."""
        return [p for group in self.param_groups for p in group["params"]]

    def param(self, position: int) -> Tensor:
        """The parameter at a position."""
        group, place = self._where[position]
        return self.param_groups[group]["params"][place]

    def _hyper(self, position: int) -> Hyper:
        """The numbers of its group as they are now."""
        group = self.param_groups[self._where[position][0]]
        beta1, beta2 = group["betas"]
        lr, eps, weight_decay = (float(group[name]) for name in ("lr", "eps", "weight_decay"))
        return Hyper(lr, float(beta1), float(beta2), eps, weight_decay, self.settings.cautious)

    def _manage(self) -> None:
        """Let exactly those parameters require grad whose gradients are wanted, and see to the hooks."""
        params = self._params()
        if self._watched != [id(p) for p in params]:
            for handle in self._hooks:
                handle.remove()
            self._hooks, self._watched = watch(self, params), [id(p) for p in params]
            self._cover(params)
        if self._row_gradients is not None:
            rows = self._active_rows()
            self._row_gradients.use(rows, self._surveyed(rows))
        wanted = self._wanted()
        for position, p in enumerate(params):
            if p.is_floating_point():
                p.requires_grad_(position in wanted)

    def _cover(self, params: list[Tensor]) -> None:
        """Prepare the modules of the model to compute gradients of active rows only."""
        if self._row_gradients is not None:
            self._row_gradients.remove()
            self._row_gradients = None
        model = self._model() if self._model is not None else None
        if model is not None and self.blocks.fine and self.settings.inactive == "freeze":
            norms = not self.settings.in_backward  # a norm's weight would change before the rest of its backward
            columns = {k for k, found in enumerate(self.blocks.columns) if found}
            self._row_gradients = RowGradients(self, model, params, norms, columns)

    def _active_rows(self) -> dict[int, Tensor]:
        """Positions that are active in rows, with these."""
        return {
            k: part.where
            for k, part in enumerate(self.parts or [])
            if part is not None and part.unit == self.blocks.units[k] and part.count > 0 and self.blocks.slices(k) > 1
        }

    def _surveyed(self, rows: Mapping[int, Tensor]) -> set[int]:
        """Positions whose rows a census scores without their whole gradient: idle ones, and those active in rows."""
        if not self.census_on:
            return set()
        return {k for k in self.census.turns | set(rows) if self.blocks.slices(k) > 1}

    def _wanted(self) -> set[int]:
        every = set(range(len(self.blocks.sizes))) - self._chooser.never
        active = {k for k, part in enumerate(self.parts or []) if part is not None}
        if self.settings.inactive != "freeze" or self.parts is None:
            return every
        return active | self.census.turns if self.census_on else active

    def _generator(self, position: int) -> torch.Generator:
        """For roundings of this step, from this parameter on: begins anew, so that nothing needs saving."""
        device = self.param(position).device
        generator = self._generators.setdefault(device, torch.Generator(device=device))
        return generator.manual_seed(((self.seed * 1_000_003 + self.steps) * 1_000_003 + position) % 2**63)

    # -- gradients, as they come -------------------------------------------------------------------

    @torch.no_grad()
    def arrived(self, position: int, param: Tensor) -> None:
        """Post-accumulate hook: score, keep, use or free one tensor's gradient."""
        grad = param.grad
        if grad is None or isinstance(grad, CompactGrad):  # compact: autograd has added to it in place
            return
        if grad.is_sparse:
            grad = param.grad = grad.to_dense()
        hyper = self._hyper(position)
        if self.census_on:
            if position in self._by_rows and self._row_gradients is not None:  # used outside of its modules as well
                self._row_gradients.leave(position)
            self.census.add(position, grad, *self._with_moments(position), hyper=hyper)
            if self.parts is None:
                self._hold()
                return
        part = self.parts[position] if self.parts is not None else None
        if self._replicas is not None and part is not None and part.index is None:
            return  # which entries are active is known once the gradient is averaged
        part = self._part_of(position, grad)
        early = part is not None and self.settings.in_backward
        kept = None if part is None or early else restrict(grad, part)
        idle = self.settings.inactive != "freeze" and not (part is not None and part.unit == grad.numel())
        if idle or early:
            self._once(position)
        if early:  # no copy of the active entries is made
            norm_of([self.blocks.names[position]], [grad])
            self._apply([(position, grad)])
        if idle:
            lr = hyper.lr * self.settings.inactive_scale
            update_inactive(param, grad, part, self.settings.inactive, lr, self._generator(position))
        if kept is not grad:
            param.grad = kept

    @torch.no_grad()
    def arrived_rows(self, position: int, grad: Tensor) -> None:
        """Hook of a slot: keep or use the gradient of a parameter's active rows."""
        part, param = self.parts[position], self.param(position)  # type: ignore[index]
        if self.census_on and param.grad is None:  # the first of the window
            _, cohorts = self._with_moments(position)
            self.census.correct_rows(position, grad, part, cohorts, self._hyper(position))  # type: ignore[arg-type]
        if param.grad is not None:
            grad = grad.add_(restrict(param.grad, part).active)  # type: ignore[arg-type, attr-defined]
        if self.settings.in_backward:
            self._once(position)
            norm_of([self.blocks.names[position]], [grad])
            self._apply([(position, CompactGrad(grad, part, param.shape))])  # type: ignore[arg-type]
        else:
            param.grad = CompactGrad(grad, part, param.shape)  # type: ignore[arg-type]

    def by_rows(self, position: int) -> bool:
        """In a census: whether a gradient shall come by rows. The first window holds whole ones while there is room."""
        if position in self._chooser.always:
            return False
        grad, size = self.param(position).grad, self.blocks.sizes[position]
        if self.parts is not None or position in self._by_rows or isinstance(grad, CompactGrad):
            return True
        return grad is None and size > SURVEYED and not self._has_room(size)

    @torch.no_grad()
    def use_rows(self, position: int, gradient: Callable[[Rows], Tensor]) -> bool:
        """Update active rows, a few at a time, as their gradient is made for the second time; the first finds its norm.

        False: the gradient is wanted at once, through :meth:`arrived_rows`.
        """
        part, unit = self.parts[position], self.blocks.units[position]  # type: ignore[index]
        scored = self.census_on and self.settings.score == "adam"
        late = scored or not self.settings.in_backward or self.param(position).grad is not None
        if part is None or late or part.entries <= SURVEYED or unit >= CHUNK:
            return False
        self._once(position)
        pieces = part.where.split(max(1, SURVEYED // unit))
        dtype = working_dtype(self.param(position).dtype)
        norms = [torch.linalg.vector_norm(gradient(rows), dtype=dtype) for rows in pieces]
        norm_of([self.blocks.names[position]], [torch.stack(norms)])
        self._apply([(position, gradient)])
        return True

    @torch.no_grad()
    def survey(self, position: int, gradient: Callable[[Rows], Tensor], more: bool) -> None:
        """Score the rows of a parameter, a few at a time; in the first window keep those that are chosen so far."""
        param, hyper = self.param(position), self._hyper(position)
        count, step = self.blocks.slices(position), max(1, SURVEYED // self.blocks.units[position])
        places = (slice(a, min(a + step, count)) for a in range(0, count, step))
        sums = torch.cat([self.census.of_rows(gradient(place), hyper) for place in places])
        self.census.enter(position, sums, more=more)
        self._by_rows.add(position)
        if isinstance(param.grad, CompactGrad) and self.parts is None:
            param.grad.active.add_(gradient(param.grad.part.where))
        elif self.parts is None:
            part = self._chosen_so_far(position, sums)
            param.grad = None if part is None else CompactGrad(gradient(part.where).to(param.dtype), part, param.shape)

    @torch.no_grad()
    def survey_rows(self, position: int, rows: Tensor, grad: Tensor, others: Tensor | None) -> None:
        """Score rows of a token table; ``others``: what its head had there."""
        param, first = self.param(position), not self.census.seen(position)
        total = grad if others is None else others + grad
        old = self.census.sums[position] if others is not None else grad.new_zeros(len(param), dtype=torch.float32)
        sums = old.index_copy(0, rows.long(), self.census.of_rows(total, self._hyper(position)))
        self.census.enter(position, sums)
        self._by_rows.add(position)
        if self.parts is None and first:
            param.grad = replace_rows(param, rows, total.to(param.dtype))
            self._hold()
        elif self.parts is None and isinstance(param.grad, CompactGrad):
            add_rows(param.grad, rows, grad)

    def _part_of(self, position: int, grad: Tensor) -> Part | None:
        """What is active of a parameter; entries that were chosen by number are found now, by their gradient."""
        part = self.parts[position] if self.parts is not None else None
        if part is not None and part.index is None:
            part = self._adopt(position, pick_largest(grad, part.count))
        return part

    def _with_moments(self, position: int) -> tuple[Part | None, list[dict[str, Any]]]:
        """The part that a parameter's moments are of, and its cohorts."""
        state = self.state.get(self.param(position), {})
        cohorts = state.get("cohorts", [])
        if not cohorts:
            return None, []
        unit, index = state["unit"], state["index"]
        columns = self.blocks.columns[position] and unit == self.blocks.units[position]
        return Part(unit, len(index), index, columns), cohorts

    def _once(self, position: int) -> None:
        if position in self._updated:
            raise RuntimeError(
                "in_backward=True and inactive= change weights during the backward pass, so that a second backward "
                f"before step() would see changed weights ({self.blocks.names[position]} came twice); drop them to "
                "accumulate gradients"
            )
        self._updated.add(position)

    def _hold(self) -> None:
        """First window: drop gradients that will not be chosen once there are too many."""
        if not (self._has_room(0) or self.census.not_finite()):
            self._narrow_all()

    def _has_room(self, more: int) -> bool:
        """Whether the first window may hold so many more entries."""
        params = self._params()
        held = sum(stored(p.grad).numel() for p in params if p.grad is not None)
        size = max(p.element_size() for p in params)
        later = bytes_per_entry(self.settings.states) + (0 if self.settings.in_backward else size)
        return held + more <= min(HELD, max(1.0, later / size)) * self.budget

    def _narrow_all(self) -> list[Part | None]:
        """Cut all gradients down to what would be chosen now. Returns that."""
        params = self._params()
        held = [k for k, p in enumerate(params) if p.grad is not None]
        parts, _ = self._chooser.choose(self.census, self.rule_state)
        for position in sorted(held, key=lambda k: parts[k] is not None):  # what is dropped makes room for copies
            narrow(params[position], parts[position])
        return parts

    def _chosen_so_far(self, position: int, sums: Tensor) -> Part | None:
        """First window: what of a parameter would be chosen now; the worst row where gradients are not finite."""
        if self.census.not_finite():
            return self.blocks.part(position, sums.argmax().view(1))
        part = self._narrow_all()[position]
        return part if part is None else part.at(part.where.to(sums.device))

    # -- the step ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """Update the active entries, then switch if it is time.

        Parameters
        ----------
        closure : callable, optional
            Computes the loss and its gradients anew.
        loss : Tensor or float, optional
            Of this step, for ``patience``. :meth:`observe` does the same.

        Returns
        -------
        What the closure returned.

        Raises
        ------
        ValueError
            If the loss or a gradient is not finite (nothing is updated then), or a loss is missing that ``patience``
            needs. Without any gradient it does nothing, like every torch optimizer.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        loss = result if loss is None else loss
        if loss is not None:
            self.observe(loss)
        refuse_wrapped(self._model() if self._model is not None else None, self._params(), self.settings, self._group)
        idle, seen = self._told()
        if idle:
            return result
        first = self.parts is None
        if first:
            self._score_late_gradients()
        if self._replicas is not None:
            self._exchange()
        if first:
            self._switch()
        self._update_all()
        self._end_window(seen, first)
        return result

    def _told(self) -> tuple[bool, float | None]:
        """Whether there is nothing to do, and the loss of the window; in several processes, of all together."""
        idle, loss, wrong = self._is_rehearsal(), None, None
        try:
            loss = None if idle else self.losses.close()
        except ValueError as error:
            wrong = error
        if self._replicas is not None:
            entries = self.history[-1]["entries"] if self.history else []
            rates = [numbers_of(group) for group in self.param_groups]
            state = f"step {self.steps}, {self.since} since a switch, groups {rates}, active {sum(entries)}"
            counted = f"{state}, {self.census_on} {len(self.history)} {entries}"
            idle, loss = self._replicas.agree(idle, loss, wrong is not None, state, counted)
            self.losses.last = loss if loss is not None else self.losses.last
        if wrong is not None:
            raise wrong
        if idle:
            self.losses.discard()
        return idle, loss

    def _exchange(self) -> None:
        """Several processes: make the scores and gradients of this window the same in all of them."""
        if self.census_on:
            self._replicas.merge(self.census)  # type: ignore[union-attr]
        if self.parts is None:  # what each held is what was best in its own batch
            for p in self._params():
                p.grad = None
        else:
            active = [(self.param(k), part) for k, part in enumerate(self.parts) if part is not None]
            self._replicas.average(active)  # type: ignore[union-attr]

    def observe(self, loss: Any) -> None:
        """Tell the loss of this step before :meth:`step`, once or for every accumulated batch.

        Parameters
        ----------
        loss : Tensor with one entry, or float
        """
        self.losses.observe(loss)

    def _is_rehearsal(self) -> bool:
        """Whether there is nothing to do: no gradient, or the zero gradients at lr 0 that checkpointing tries."""
        grads = [stored(p.grad) for p in self._params() if p.grad is not None]
        if not grads and not self._updated:
            return True
        idle = not self._updated and all(float(group["lr"]) == 0 for group in self.param_groups)
        return idle and not any(bool(grad.any()) for grad in grads)

    def _score_late_gradients(self) -> None:
        """First window: gradients that no hook saw, because they were set by hand or tensors were replaced."""
        for position, p in enumerate(self._params()):
            if p.grad is not None and position not in self.census.sums and position not in self._chooser.never:
                self.census.add(position, p.grad, hyper=self._hyper(position))

    def _update_all(self) -> None:
        together = self._held()
        found = [pair for pairs in together.values() for pair in pairs]
        norm = norm_of([self.blocks.names[k] for k, _ in found], [grad for _, grad in found])
        limit = self.settings.max_grad_norm
        scale = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        self.grad_norm = norm if found else self.grad_norm
        del found  # so that each gradient can be freed as it is used
        for pairs in together.values():
            self._apply(pairs, scale)

    def _held(self) -> dict[Any, list[tuple[int, Any]]]:
        """Positions and gradients of what is active, by device; with in_backward each for itself."""
        found: dict[Any, list[tuple[int, Any]]] = {}
        for position, part in enumerate(self.parts or []):
            param = self.param(position)
            if part is not None and param.grad is not None:
                grad = param.grad
                if part.index is None or not isinstance(grad, CompactGrad):
                    grad = restrict(grad, self._part_of(position, grad))  # type: ignore[arg-type]
                found.setdefault(position if self.settings.in_backward else param.device, []).append((position, grad))
        return found

    def _apply(self, grads: list[tuple[int, Gradient]], scale: float = 1.0) -> None:
        """Update parameters that are on one device; takes their gradients off the list as it goes."""
        generator = self._generator(grads[0][0])
        update_(self._updates(grads), states=self.settings.states, scale=scale, generator=generator)

    def _updates(self, grads: list[tuple[int, Gradient]]) -> Iterator[Update]:
        while grads:
            position, grad = grads.pop(0)
            param = self.param(position)
            part = self.parts[position]  # type: ignore[index]
            if "cohorts" not in self.state.get(param, {}):
                part = self._adopt(position, part)  # type: ignore[arg-type]
            precision = self.settings.precision
            if precision == "auto":
                precision = "fp32-active" if param.dtype == torch.float16 else "stochastic"
            cohorts, hyper = self.state[param]["cohorts"], self._hyper(position)
            yield Update(param, grad, part, cohorts, hyper, precision)  # type: ignore[arg-type]
            if self.settings.in_backward:
                param.grad = None

    # -- switching ---------------------------------------------------------------------------------

    def _end_window(self, loss: float | None, first: bool) -> None:
        self.steps += 1
        self.since += 1
        self._updated.clear()
        stalled = self.losses.stalled(loss)
        if self.census_on and not first:
            self._switch()
            stalled = False
        every, ahead = self.settings.switch_every, int(self._chooser.rule.scored)
        if stalled or (every is not None and self.since >= every - ahead):
            self.reason = "patience" if stalled else "switch_every"
            if self._chooser.rule.scored:
                self._begin_census()
            else:
                self._switch()
        self._manage()

    def _begin_census(self) -> None:
        self.census_on, self._by_rows = True, set()
        idle = [k for k in range(len(self.blocks.sizes)) if not self.parts or self.parts[k] is None]
        idle = [k for k in idle if k not in self._chooser.never]
        self.census.begin(idle, probe=self.settings.census == "probe" and self.parts is not None)
        for p in self._params():
            if isinstance(p.grad, CompactGrad):  # used; a gradient added to it would not be scored
                p.grad = None

    def _switch(self) -> None:
        """Choose by what the census found, and put that in place."""
        bad = self.census.not_finite()
        if bad:
            raise ValueError(not_finite_message(bad))
        parts, self.rule_state = self._chooser.choose(self.census, self.rule_state)
        self._place(parts, self.reason)

    def _place(self, parts: list[Part | None], reason: str) -> None:
        first, params = self.parts is None, self._params()
        self.parts = list(parts)
        self.history.append({"step": self.steps, "reason": reason, "entries": [p.entries if p else 0 for p in parts]})
        self.census_on, self.since = False, 0
        self.losses.switched()
        for position, part in enumerate(parts):
            param = params[position]
            if first:
                narrow(param, part)
            elif isinstance(param.grad, CompactGrad):
                param.grad = None  # used, and of another part; gone before moments are moved
            if part is None:
                param.grad = None
                left = shelve(self.state.pop(param, {}), self.settings.moments, self._generator(position))
                if left:
                    self.state[param] = left
        for position, part in enumerate(parts):
            param = params[position]
            if part is not None and part.index is not None:
                part = self.parts[position] = part.at(part.index.to(param.device))
                if param in self.state:  # otherwise its state is made at its first update
                    self._adopt(position, part)

    def _adopt(self, position: int, part: Part) -> Part:
        """Make ``part`` the active one, with the moments that it inherits; its order may change."""
        param = self.param(position)
        ramp = self.settings.ramp if len(self.history) > 1 else 0
        before = self.state.get(param, {})
        state, part = regroup(before, part, ramp, self.settings.moments, self._generator(position))
        self.state[param] = state
        self.parts[position] = part  # type: ignore[index]
        return part

    def activate(self, blocks: Sequence[str] | Mapping[str, int]) -> None:
        """Choose by hand, from the next window on: for experiments and for simulations of memory.

        Parameters
        ----------
        blocks : sequence of str, or mapping of str to int
            Names of parameters or modules, whole; or numbers of slices (the first rows, say) of parameters.

        Raises
        ------
        ValueError
            If a name is unknown or the budget is exceeded.
        """
        parts: list[Part | None] = [None] * len(self.blocks.sizes)
        for name in blocks:
            for position in matching(self.blocks.names, [name], "activate"):
                size, fine = self.blocks.sizes[position], self.blocks.granularity == "entries"
                slices = size if fine else self.blocks.slices(position)
                index = torch.arange(blocks[name] if isinstance(blocks, Mapping) else slices, dtype=index_dtype(size))
                parts[position] = Part(1, len(index), index) if fine else self.blocks.part(position, index)
        active = sum(part.entries for part in parts if part is not None)
        if active > self.budget:
            raise ValueError(f"activate: budget allows {self.budget} active entries; found {active}")
        self._place(parts, "by hand")
        self._manage()

    # -- saving ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer; the selection lies in the first group, from where every checkpoint format takes it."""
        packed = super().state_dict()
        packed["param_groups"][0]["selection"] = pack(self)
        return packed

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on where ``state_dict`` was taken, bit for bit; dtypes stay as they were saved.

        Raises
        ------
        ValueError
            If it is of another kind of optimizer, of other parameters, or of settings that its state does not fit.
        """
        groups = [dict(group) for group in state_dict["param_groups"]]
        selection = groups[0].pop("selection", None)
        if selection is None:
            raise ValueError(
                "state_dict is not of BlockLLM: it lacks the selection in its first group; start with a new optimizer"
            )
        check_names(self.blocks.names, groups)
        check_settings(self, selection)
        saved = [key for group in groups for key in group["params"]]
        super().load_state_dict({"state": {}, "param_groups": groups})
        place = dict(zip(saved, self._params(), strict=True))
        for key, state in state_dict["state"].items():
            self.state[place[key]] = on_device(state, place[key].device)
        unpack(self, selection)
        self._by_rows.clear()
        self._updated.clear()
        self._manage()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients; they are set to None whatever ``set_to_none`` says, since most are not stored."""
        super().zero_grad(set_to_none=True)
        if self.census_on:
            self.census.restart()
        self._by_rows.clear()
        self._updated.clear()

    # -- what users look at ------------------------------------------------------------------------

    def active(self) -> dict[str, int]:
        """Active entries by name of the parameter; empty before the first choice."""
        parts = enumerate(self.parts or [])
        return {self.blocks.names[k]: part.entries for k, part in parts if part is not None}

    @property
    def budget(self) -> int:
        """How many entries may be active."""
        return self._chooser.budget

    @property
    def loss(self) -> float | None:
        """Of the last step, if it was told or heard."""
        return self.losses.last

    def report(self) -> dict[str, Any]:
        """Who is active, memory by part and the history of switches; see :func:`llm.report.report`."""
        return report.report(self)

    def plot(self, path: Any = None) -> Any:
        """A picture of which parameters were active when; see :func:`llm.report.plot`."""
        return report.plot(self, path)

    def close(self) -> None:
        """Take all hooks off the model and give ``requires_grad`` back as it was found."""
        for handle in self._hooks:
            handle.remove()
        if self._loss_hook is not None:
            self._loss_hook.remove()
        if self._row_gradients is not None:
            self._row_gradients.remove()
        self._hooks, self._watched, self._loss_hook, self._row_gradients = [], [], None, None
        for p, required in zip(self._params(), self._required, strict=True):
            p.requires_grad_(required)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler, which divides gradients before ``step``: too late for updates during the backward."""
        if self._replicas is not None:
            raise ValueError(
                "GradScaler skips a step by the gradients of one process, process_group averages them later; train in "
                "bfloat16 or float32"
            )
        if self.settings.in_backward or self.settings.inactive != "freeze":
            setting = "in_backward=True" if self.settings.in_backward else f"inactive={self.settings.inactive!r}"
            raise ValueError(f"{setting} uses gradients before GradScaler unscales them; drop it, or train in bfloat16")
        return False
