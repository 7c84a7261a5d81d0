"""The kernel of a GPU against the operations of PyTorch: on a GPU, or in Triton's interpreter.

Without a GPU: ``make test-kernel``.
"""

import copy
import os
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton", reason="Triton, which comes with PyTorch for CUDA, is not installed")
CUDA = torch.cuda.is_available()
if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no CUDA device, and TRITON_INTERPRET=1 is not set", allow_module_level=True)

from small_models import TinyLM, batches, net, tokens, train, train_on_itself  # noqa: E402

from llm import BlockLLM, fused_gpu, moments  # noqa: E402
from llm.adam import Hyper, adamw_  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
TYPES = (torch.float32, torch.bfloat16)
GRANULARITIES = ("rows", "neurons", "tensor", "layer", "entries")


def like_the_weight(layout, dtype, n):
    """A weight (a matrix of 30 rows of n entries), what is active of it, and that as a table of 4 rows."""
    weight = torch.randn(30, n, device=DEVICE).to(dtype)
    if layout == "consecutive":
        weight = weight.view(-1)
        return weight, 5, weight[5 : 5 + 4 * n].view(4, n)
    weight = weight.t().contiguous().t() if layout == "columns" else weight
    index = torch.tensor([3, 29, 7, 0], dtype=torch.int32 if layout == "rows" else torch.int64, device=DEVICE)
    return weight, index, weight[index.long()]


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("layout", ["rows", "columns", "consecutive"])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("moment", TYPES)
@pytest.mark.parametrize("n", [1, 48, 700])
def test_it_takes_the_step_of_adamw(cautious, layout, dtype, moment, n):
    torch.manual_seed(n)
    weight, where, active = like_the_weight(layout, dtype, n)
    before = weight.clone()
    mean, square = (0.1 * torch.rand(4, n, device=DEVICE) for _ in range(2))
    mean, square, grad = mean.to(moment), square.to(moment), torch.randn(4, n, device=DEVICE).to(dtype)
    grad[0, 0] = 0
    expected = [x.float().clone() for x in (active, mean, square)]
    hyper = Hyper(1e-2, 0.9, 0.999, 1e-8, 0.1, cautious)
    adamw_(expected[0], 0.5 * grad.float(), *expected[1:], 3, hyper)
    fused_gpu.adamw_entries_(weight, where, grad, mean, square, 3, hyper, 0.5, 77)
    after = weight[5 : 5 + 4 * n].view(4, n) if layout == "consecutive" else weight[where.long()]
    for found, wanted in zip((after, mean, square), expected, strict=True):
        step = 2**-7 if found.dtype == torch.bfloat16 else 1e-6  # a place of the type
        torch.testing.assert_close(found.float(), wanted, rtol=step, atol=1e-7)
    untouched = torch.ones_like(before, dtype=torch.bool)
    if layout == "consecutive":
        untouched[5 : 5 + 4 * n] = False
    else:
        untouched[where.long()] = False
    assert torch.equal(weight[untouched], before[untouched])


def test_roundings_are_unbiased_and_independent():
    n = 20_000
    value = 1 + 2**-10  # between two numbers of bfloat16, an eighth of the way up
    still = Hyper(0.0, 0.0, 0.0, 1e-8, 0.0)  # moments become the gradient and its square, weights stay
    ups = []
    for seed in (0, 1):
        grad = torch.full((n,), value, device=DEVICE)
        mean, square = (torch.zeros(n, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        weight = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
        move = still._replace(lr=value)  # to -value, in one step
        fused_gpu.adamw_entries_(weight, 0, grad, mean, square, 1, move, 1.0, seed)
        ups += [mean.float() > 1, square.float() > 1, weight.float() < -1]
    for up, share in zip(ups, [1 / 8, 1 / 4, 1 / 8] * 2, strict=True):
        assert up.float().mean().item() == pytest.approx(share, abs=5 * (share / n) ** 0.5)
    table = torch.stack(ups).float()
    correlation = torch.corrcoef(table) - torch.eye(6, device=DEVICE)
    assert correlation.abs().max() < 5 / n**0.5


def test_what_does_not_fit_together_is_refused():
    one, two = torch.zeros(1, device=DEVICE), torch.zeros(2, device=DEVICE)
    hyper = Hyper(0.1, 0.9, 0.999, 1e-8, 0.0)
    with pytest.raises(ValueError, match="equally many"):
        fused_gpu.adamw_entries_(two, 0, one, two, two, 1, hyper, 1.0, 0)
    fused_gpu.adamw_entries_(two, 0, one[:0], two[:0], two[:0], 1, hyper, 1.0, 0)  # nothing is active


def test_seeds_of_all_sizes():
    found = [fused_gpu._seeds(seed) for seed in (0, 1, 2**40, 2**63 + 2**20, -1)]
    assert len(set(found)) == 5
    assert all(0 <= x < 2**31 for pair in found for x in pair)


@pytest.fixture
def interpreted(monkeypatch):
    """Without a GPU: what a GPU would do, and how often."""
    calls = []
    step = moments._step_on_gpu

    def counted(*args):
        calls.append(args)
        step(*args)

    monkeypatch.setattr(moments, "_step_on_gpu", counted)
    if not CUDA:
        monkeypatch.setattr(fused_gpu, "fits", lambda weight, moment, *how: {weight.dtype, moment.dtype} <= {*TYPES})
        monkeypatch.setattr(moments._Span, "in_rows", property(lambda span: False))
    return calls


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
def test_a_run_is_that_of_the_operations(granularity, in_backward, cautious, interpreted, monkeypatch):
    """With switches, so that slices of several ages are in a tensor, weight decay and clipping."""
    options = {"granularity": granularity, "in_backward": in_backward, "cautious": cautious, "switch_every": 3}
    options |= {} if in_backward else {"max_grad_norm": 0.5}
    monkeypatch.setattr(moments, "SMALL", 8)
    finals = []
    for fused in (True, False):
        if not fused:
            assert interpreted
            interpreted.clear()
            monkeypatch.setattr(fused_gpu, "fits", lambda *args: False)
        torch.manual_seed(0)
        model = net().to(DEVICE)
        optimizer = BlockLLM(model, 1e-2, weight_decay=0.1, budget=0.3, **options)
        data = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(9)]
        losses = train(model, optimizer, data)
        finals.append((optimizer.active(), losses, torch.nn.utils.parameters_to_vector(model.parameters())))
    assert not interpreted
    assert finals[0][0] == finals[1][0]
    torch.testing.assert_close(finals[0][1:], finals[1][1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("states", ["fp32", "bf16"])
def test_bfloat16_trains(granularity, states, interpreted):
    torch.manual_seed(0)
    model = TinyLM(layers=2, width=32, vocabulary=40, tied=True).to(DEVICE, torch.bfloat16)
    optimizer = BlockLLM(model, 3e-3, budget=0.3, granularity=granularity, states=states, switch_every=10)
    x = tokens(1, rows=4, length=8, vocabulary=40)[0].to(DEVICE)
    losses = train_on_itself(model, optimizer, x)
    assert losses[-1] < 0.7 * losses[0]
    assert len(interpreted) >= 40


def test_a_resumed_run_goes_on_bit_for_bit(interpreted):
    """The seeds of the roundings come from the step and the parameter alone."""
    x = tokens(1, rows=4, length=8, vocabulary=40)[0].to(DEVICE)

    def start(seed):
        torch.manual_seed(seed)
        model = TinyLM(layers=2, width=32, vocabulary=40, tied=True).to(DEVICE, torch.bfloat16)
        return model, BlockLLM(model, 3e-3, budget=0.3, states="bf16", switch_every=3)

    def go(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(x, x)["loss"].backward()
            optimizer.step()

    model, optimizer = start(0)
    go(model, optimizer, 5)
    other, second = start(1)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(model, optimizer, 5)
    go(other, second, 5)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_all_of_one_age_is_updated_at_once(granularity, interpreted, monkeypatch):
    """However large it is, unless the pieces of its gradient are copies."""
    monkeypatch.setattr(moments, "SMALL", 8)
    monkeypatch.setattr(moments, "CHUNK", 4)
    model = net().to(DEVICE)
    optimizer = BlockLLM(model, 1e-2, budget=0.3, granularity=granularity, switch_every=3)
    data = [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(1)]
    train(model, optimizer, data)
    large = [n for n in optimizer.active().values() if n > 8]
    spans = [args[0] for args in interpreted]
    assert sorted(span.size for span in spans if span.size > 8) == sorted(large)


@pytest.mark.parametrize("layout", ["rows", "columns", "consecutive"])
def test_gradients_of_another_type(layout):
    torch.manual_seed(0)
    weight, where, active = like_the_weight(layout, torch.bfloat16, 48)
    mean, square, grad = torch.zeros(4, 48, device=DEVICE), torch.zeros(4, 48, device=DEVICE), torch.randn(4, 48)
    expected = [active.float().clone(), mean.clone(), square.clone()]
    grad, hyper = grad.to(DEVICE), Hyper(1e-2, 0.9, 0.999, 1e-8, 0.1)
    adamw_(expected[0], grad, *expected[1:], 1, hyper)
    fused_gpu.adamw_entries_(weight, where, grad, mean, square, 1, hyper, 1.0, 77)
    torch.testing.assert_close(mean, expected[1])
    torch.testing.assert_close(square, expected[2])


def test_vectors_with_gaps():
    """Their neighbours in memory stay."""
    base = torch.zeros(40, 2, device=DEVICE)
    mean, square, grad = torch.zeros(30, device=DEVICE), torch.zeros(30, device=DEVICE), torch.ones(30, device=DEVICE)
    hyper = Hyper(1e-2, 0.9, 0.999, 1e-8, 0.0)
    fused_gpu.adamw_entries_(base[:, 0], 7, grad, mean, square, 1, hyper, 1.0, 0)
    wanted = torch.zeros(40, 2, device=DEVICE)
    wanted[7:37, 0] = -1e-2
    torch.testing.assert_close(base, wanted)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("moment", TYPES)
def test_it_is_tried_before_it_is_used(dtype, moment, rows, cautious, monkeypatch):
    """A kernel that fails, or computes something else, is not used, and that is told once."""
    fused_gpu._works.cache_clear()
    how = torch.device(DEVICE), dtype, moment, rows, cautious
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert fused_gpu._works(*how)
    finally:
        torch.set_default_dtype(before)
    step = fused_gpu.adamw_entries_

    def fails(*args):
        raise RuntimeError("no compiler")

    def differs(weight, *args):
        step(weight, *args)
        weight[..., -1] *= 1.02

    for wrong, words in ((fails, "no compiler"), (differs, "not close")):
        monkeypatch.setattr(fused_gpu, "adamw_entries_", wrong)
        fused_gpu._works.cache_clear()
        with pytest.warns(UserWarning, match=f"(?s)takes longer: .*{words}"):
            assert not fused_gpu._works(*how)
        assert not fused_gpu._works(*how)
    fused_gpu._works.cache_clear()


COMPILED = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from llm.fused_gpu import _kernel

names = _kernel.arg_names
whole = "start", "unit", "across", "along", "total", "seed", "other"
for weight, moment, grad, rows, cautious in itertools.product(*[("fp32", "bf16")] * 3, *[(True, False)] * 2):
    kinds = dict.fromkeys(names, "fp32") | dict.fromkeys(whole, "i32")
    kinds |= {"weight": "*" + weight, "grad": "*" + grad, "exp_avg": "*" + moment, "exp_avg_sq": "*" + moment}
    kinds |= {"where": ("*i64" if cautious else "*i32") if rows else "*" + weight}
    kinds |= dict.fromkeys(("ROWS", "CAUTIOUS", "BLOCK"), "constexpr")
    fixed = {(names.index(k),): v for k, v in (("ROWS", rows), ("CAUTIOUS", cautious), ("BLOCK", 1024))}
    if not rows or cautious:
        del kinds["unit"]
        kinds, fixed = {"unit": "constexpr"} | kinds, fixed | {(names.index("unit"),): 1}
    for capability in (80, 90):
        made = triton.compile(ASTSource(_kernel, kinds, fixed), target=GPUTarget("cuda", capability, 32))
        assert ".entry _kernel" in made.asm["ptx"]
print("compiled")
"""


def test_it_compiles_for_gpus_that_are_not_here(tmp_path):
    """For every type, in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.split() == ["compiled"], done.stderr[-2000:]
