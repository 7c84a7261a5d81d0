"""What must hold whatever the model, the scores and the options: budgets, order, visits, moments."""

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import nn  # noqa: E402

from llm import BlockLLM  # noqa: E402
from llm.adam import Hyper  # noqa: E402
from llm.census import Census  # noqa: E402
from llm.choose import make_chooser  # noqa: E402
from llm.compact import Part  # noqa: E402
from llm.moments import regroup, shelve  # noqa: E402
from llm.settings import Settings  # noqa: E402

SHAPES = st.lists(st.sampled_from([(3, 4), (2, 7), (5,), (6, 2), (1, 3), (2,), (4, 4)]), min_size=1, max_size=7)
GRANULARITIES = ["tensor", "layer", "rows", "neurons", "entries"]


def settings(**options):
    defaults = BlockLLM.__init__.__kwdefaults__
    return Settings(
        **{**{k: v for k, v in defaults.items() if k in Settings.__dataclass_fields__}, **options}
    ).checked()


def grads_of(shapes, seed):
    """Different in every entry, and zero nowhere."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def named(grads):
    return [f"layers.{k // 2}.w{k}" for k in range(len(grads))]


def chosen(grads, names, **options):
    """Parts chosen from these gradients, by name, resolved."""
    asked = settings(**options)
    chooser = make_chooser(asked, names, grads, None)
    census = Census(chooser.blocks, "grad")
    for position, grad in enumerate(grads):
        census.add(position, grad, hyper=Hyper(1.0, 0.9, 0.99, 1e-8, 0.0))
    parts, state = chooser.choose(census, chooser.init(asked.seed))
    return chooser, dict(zip(names, parts, strict=True)), state


def chooser_unit(shape, granularity):
    """Entries of a slice, worked out anew."""
    entries = torch.Size(shape).numel()
    return entries // shape[0] if granularity == "rows" and len(shape) > 1 else entries


OPTIONS = {
    "granularity": st.sampled_from(GRANULARITIES),
    "budget": st.floats(0.05, 1.0),
    "mask": st.booleans(),
    "reach": st.sampled_from([None, 1.0, 2.0, 4.0]),
    "rule": st.sampled_from(["greedy", "cyclic", "random", "half", "importance"]),
    "per_parameter": st.booleans(),
}


@given(SHAPES, st.integers(0, 999), st.fixed_dictionaries(OPTIONS))
def test_the_budget_is_neither_exceeded_nor_left_to_a_block_that_fits(shapes, seed, options):
    if options["granularity"] == "entries":
        options["rule"] = "greedy"
    grads = grads_of(shapes, seed)
    budget = int(options["budget"] * sum(g.numel() for g in grads))
    if budget < 1:
        return
    try:
        chooser, parts, _ = chosen(grads, named(grads), **options)
    except ValueError:  # nothing fits, which only a rule that takes no parts can say
        sizes = [chooser_unit(shape, options["granularity"]) for shape in shapes]
        assert options["granularity"] == "layer" or min(sizes) > budget
        assert not options["mask"] or options["granularity"] == "rows"
        return
    spent = sum(part.entries for part in parts.values() if part is not None)
    most = min(budget, int(0.5 * chooser.blocks.total)) if options["rule"] == "half" else budget
    assert 0 < spent <= most or options["rule"] == "half"
    tensors_first = (
        options["granularity"] == "rows" and options["reach"] and options["rule"] in ("greedy", "importance")
    )
    for position, (name, part) in enumerate(parts.items()):
        unit = 1 if options["granularity"] == "entries" else chooser.blocks.units[position]
        left = grads[position].numel() - (part.entries if part else 0)
        if left and not (tensors_first and part is None) and options["granularity"] != "layer":
            assert unit > most - spent, (name, unit, left)
    if options["mask"] and options["granularity"] in ("tensor", "layer", "entries"):
        assert spent == most


@given(
    SHAPES, st.integers(0, 999), st.sampled_from(GRANULARITIES), st.floats(0.1, 1.0), st.randoms(use_true_random=False)
)
def test_the_choice_does_not_depend_on_the_order_of_the_parameters(shapes, seed, granularity, budget, random):
    grads = grads_of(shapes, seed)
    names = named(grads)
    order = random.sample(range(len(grads)), len(grads))
    if int(budget * sum(g.numel() for g in grads)) < 1:
        return
    found = []
    for way in (range(len(grads)), order):
        try:
            _, parts, _ = chosen(
                [grads[k] for k in way],
                [names[k] for k in way],
                granularity=granularity,
                budget=budget,
                visit_power=1.0,
            )
        except ValueError:
            parts = {}
        found.append(
            {n: (p.unit, sorted(p.index.tolist()) if p.index is not None else p.count) for n, p in parts.items() if p}
        )
    if granularity == "entries":  # of the bin that the threshold cuts, tensors are served in order
        counts = [{n: c for n, (_, c) in f.items()} for f in found]
        assert sum(counts[0].values()) == sum(counts[1].values())
    else:
        assert found[0] == found[1]


@given(st.integers(2, 6), st.integers(0, 99), st.sampled_from(["tensor", "rows"]))
def test_equal_blocks_are_interchangeable(n, seed, granularity):
    """The same gradients in another order: as many of each, and the first of equals is taken."""
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    grads = [grad.clone() for _ in range(n)]
    _, parts, _ = chosen(grads, [f"w{k}" for k in range(n)], granularity=granularity, budget=1.0 / n, reach=1.0)
    taken = [name for name, part in parts.items() if part is not None]
    assert taken == ["w0"]


@given(SHAPES, st.integers(0, 99), st.integers(1, 5))
def test_visits_only_ever_lower_what_was_visited(shapes, seed, times):
    grads = grads_of(shapes, seed)
    chooser, _, state = chosen(grads, named(grads), granularity="tensor", budget=0.5)
    census = Census(chooser.blocks, "grad")
    for position, grad in enumerate(grads):
        census.add(position, grad, hyper=Hyper(1.0, 0.9, 0.99, 1e-8, 0.0))
    before = state
    for _ in range(times):
        parts, state = chooser.choose(census, state)
        hit = torch.tensor([part is not None for part in parts])
        assert torch.equal(state.visits - before.visits, hit.long())
        ratio = chooser.rule.priority(census.scores(), chooser.blocks.cost, state) / chooser.rule.priority(
            census.scores(), chooser.blocks.cost, before
        )
        assert hit.all() or ratio[hit].max() <= ratio[~hit].min()
        before = state


@st.composite
def switches(draw):
    """A tensor of 24 entries, and active parts of it one after the other; None: inactive."""
    units = st.sampled_from([1, 4, 24])
    found = []
    for _ in range(draw(st.integers(1, 5))):
        unit = draw(units)
        index = draw(st.permutations(range(24 // unit)))[: draw(st.integers(0, 24 // unit))]
        found.append(Part(unit, len(index), torch.tensor(index, dtype=torch.int32)) if index else None)
    return found


@given(switches(), st.sampled_from(["reset", "offload", "keep"]))
def test_moments_follow_their_entries_through_any_switches(parts, moments):
    """Each moment is marked with its entry and the switch at which it was made, and never strays."""
    state, expected, shelf = {}, {}, {}  # expected, shelf: entry -> mark
    generator = torch.Generator()
    for number, part in enumerate(parts, 1):
        unit_before = state.get("unit")
        if part is None:
            released = expected
            state, expected = shelve(state, moments, generator), {}
        else:
            state, part = regroup(state, part, 0, moments, generator)
            entries = [int(s) * part.unit + k for s in part.index for k in range(part.unit)]
            released = {e: m for e, m in expected.items() if e not in entries}
            expected, lo = {}, 0
            for cohort in state["cohorts"]:
                mine = entries[lo * part.unit : (lo + cohort["count"]) * part.unit]
                if "exp_avg" not in cohort:
                    marks = torch.tensor([float(100 * number + e) for e in mine]).view(-1, part.unit)
                    cohort.update(exp_avg=marks, exp_avg_sq=-marks, step=number)
                assert [m % 100 for m in cohort["exp_avg"].flatten().tolist()] == mine
                assert torch.equal(cohort["exp_avg_sq"], -cohort["exp_avg"])
                assert {m // 100 for m in cohort["exp_avg"].flatten().tolist()} == {cohort["step"]}
                expected.update(zip(mine, cohort["exp_avg"].flatten().tolist(), strict=True))
                lo += cohort["count"]
            assert sorted(expected) == sorted(entries)
        shelf = {} if moments == "reset" else {**shelf, **released}
        held = {int(m) % 100 for r in state.get("shelf", []) for m in r["exp_avg"].flatten().tolist()}
        assert held <= set(shelf)
        assert moments == "reset" or part is not None or unit_before is None or set(released) <= held


@given(st.integers(1, 4), st.sampled_from(GRANULARITIES), st.floats(0.05, 1.0), st.integers(0, 9))
def test_training_keeps_to_the_budget_at_every_step(layers, granularity, budget, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(layers)])
    optimizer = BlockLLM(model, 1e-2, budget=budget, granularity=granularity, switch_every=2, seed=seed)
    for _ in range(4):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(torch.randn(3, 5)).square().sum().backward()
        optimizer.step()
        moved = sum(int((p.detach() != b).sum()) for p, b in zip(model.parameters(), before, strict=True))
        assert moved <= optimizer.budget
        assert sum(optimizer.active().values()) <= optimizer.budget
