"""Parameters to blocks: names, ties, slices, embeddings, budgets, and what is said about mistakes."""

import pytest

torch = pytest.importorskip("torch")
from small_models import VOCABULARY, WIDTH, TinyLM, net  # noqa: E402
from torch import nn  # noqa: E402

from llm import BlockLLM  # noqa: E402
from llm.blocks import Blocks, embeddings, entries_of_budget, matching, named_groups  # noqa: E402


def names(groups):
    return [name for group in groups for name, _ in group["params"]]


def test_every_form_of_parameters_gives_the_same_names():
    model = net()
    expected = [name for name, _ in model.named_parameters()]
    assert names(named_groups(model)) == expected
    assert names(named_groups(model.named_parameters())) == expected
    assert names(named_groups(model.parameters(), model)) == expected
    assert names(named_groups([{"params": model.parameters()}], model)) == expected
    assert names(named_groups([{"params": model.named_parameters(), "lr": 1.0}])) == expected
    assert names(named_groups(model.parameters())) == [f"parameter {k}" for k in range(len(expected))]


def test_groups_keep_their_options_and_are_copied():
    model = net()
    given = [{"params": list(model[2].parameters()), "weight_decay": 0.5}, {"params": model[4].weight}]
    found = named_groups(given, model)
    assert found[0]["weight_decay"] == 0.5
    assert names(found) == ["2.weight", "2.bias", "4.weight"]
    assert given[0]["params"][0] is model[2].weight


def test_tied_weights_come_once():
    model = TinyLM()
    pairs = list(model.named_parameters(remove_duplicate=False))
    assert [name for name, _ in pairs].count("head.weight") == 1
    assert names(named_groups(pairs)) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "params holds no parameter; pass a model"),
        ([("a", torch.zeros(1)), ("a", torch.zeros(1))], ValueError, "two different tensors are called 'a'"),
        ([1.0], TypeError, "must hold tensors or .* found float"),
    ],
)
def test_parameters_that_are_none(params, error, message):
    with pytest.raises(error, match=message):
        named_groups(params)


def fused():
    """Experts in one tensor, a matrix, a vector, a number, and nothing."""
    shapes = {"mlp.experts.gate_up": (4, 6, 3), "proj": (5, 3), "norm": (7,), "scale": (), "empty": (0, 3)}
    return list(shapes), [torch.Size(s) for s in shapes.values()]


@pytest.mark.parametrize(
    ("granularity", "units", "cost"),
    [
        ("tensor", (18, 15, 7, 1, 1), [18] * 4 + [15, 7, 1]),
        ("rows", (3, 3, 7, 1, 1), [3] * 24 + [3] * 5 + [7, 1]),
        ("entries", (72, 15, 7, 1, 1), [72, 15, 7, 1]),
        ("layer", (72, 15, 7, 1, 1), [72, 15, 7, 1]),
    ],
)
def test_slices_of_every_granularity(granularity, units, cost):
    blocks = Blocks.of(*fused(), granularity)
    assert blocks.units[:4] == units[:4]
    assert blocks.cost.tolist() == cost
    assert blocks.total == sum(cost)
    assert [blocks.slices(p) * blocks.units[p] for p in range(5)] == list(blocks.sizes)


def test_layers_gather_what_is_below_a_number():
    model = TinyLM(layers=2)
    pairs = list(model.named_parameters())
    blocks = Blocks.of([n for n, _ in pairs], [p.shape for _, p in pairs], "layer", apart={1})
    owners = [blocks.name(first) for first in blocks.first]
    assert owners == ["tokens.weight", "layers.0.norm.weight"] + ["layers.0"] * 5 + ["layers.1"] * 6
    assert blocks.cost.sum() == sum(p.numel() for _, p in pairs)
    assert blocks.cost[blocks.first[3]] == sum(p.numel() for p in model.layers[0].parameters()) - WIDTH


def test_blocks_have_readable_names():
    blocks = Blocks.of(*fused(), "tensor")
    assert [blocks.name(b) for b in (0, 3, 4)] == ["mlp.experts.gate_up[0]", "mlp.experts.gate_up[3]", "proj"]


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(ValueError, match=r"never: no parameter or module is called 'layer.0'; nearest: layers.0"):
        matching(["layers.0.up", "layers.0.down"], ["layer.0"], "never")
    assert matching(["layers.1.up", "layers.10.up"], "layers.1", "never") == {0}


def test_embeddings_are_found_by_module_whatever_they_are_called():
    assert embeddings(TinyLM()) == ["tokens.weight"]
    assert embeddings(TinyLM(tied=False)) == ["tokens.weight", "head.weight"]
    odd = nn.ModuleDict({"embed_tokens": nn.Linear(3, 4), "x": nn.Embedding(VOCABULARY, 2), "y": nn.Linear(2, 20)})
    assert embeddings(odd) == ["x.weight", "y.weight"]


@pytest.mark.parametrize(
    ("budget", "expected"), [(1.0, 1000), (1, 1), (0.5, 500), (5000, 1000), ("2.4 kB", 200), ("1KiB", 85)]
)
def test_budgets(budget, expected):
    assert entries_of_budget(budget, 1000, 12) == expected


@pytest.mark.parametrize("budget", [0, "1B", 1e-9])
def test_budgets_that_allow_nothing(budget):
    with pytest.raises(ValueError, match=r"budget must allow at least one entry; found .* one of 1,000 parameters"):
        entries_of_budget(budget, 1000, 12)


@pytest.mark.parametrize("budget", [0.0, -1, 1.5, 2.5, True, "12", "12 apples", "abc", None, [1]])
def test_budgets_that_are_none_say_what_one_is(budget):
    with pytest.raises(ValueError, match=r"budget must be a share above 0 and at most 1 \(0\.05\), a whole number"):
        entries_of_budget(budget, 1000, 12)


def test_unknown_granularity():
    with pytest.raises(
        ValueError, match="granularity must be one of tensor, layer, rows, neurons, entries; found 'column'"
    ):
        Blocks.of(["a"], [torch.Size([1])], "column")


class Classifier(nn.Module):
    """As in transformers: it is asked for its output embeddings, and a classifier has none."""

    def __init__(self):
        super().__init__()
        self.tokens, self.types, self.head = nn.Embedding(VOCABULARY, 4), nn.Embedding(2, 4), nn.Linear(4, 2)

    def get_output_embeddings(self):
        return None


def test_a_head_with_the_shape_of_some_table_is_no_table():
    assert embeddings(Classifier()) == ["tokens.weight", "types.weight"]
    plain = nn.Sequential(nn.Embedding(VOCABULARY, 4), nn.Embedding(4, 4), nn.Linear(4, 4))
    assert embeddings(plain) == ["0.weight", "1.weight"]


def test_what_is_named_is_not_decided_by_embeddings():
    frozen = BlockLLM(Classifier(), budget=0.9, embeddings="never", always=["types"])
    assert frozen._chooser.always == {1}
    assert frozen._chooser.never == {0}
    kept = BlockLLM(Classifier(), budget=0.99, embeddings="always", never=["types"])
    assert (kept._chooser.always, kept._chooser.never) == ({0}, {1})
    with pytest.raises(
        ValueError, match='no parameter is left to train; name fewer in never, or drop embeddings="never"'
    ):
        BlockLLM(nn.Embedding(10, 4), embeddings="never")
