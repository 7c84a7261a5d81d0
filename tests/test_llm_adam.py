"""The pure tensor functions: against torch.optim.AdamW, and roundings by their expectation."""

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llm.adam import (  # noqa: E402
    Hyper,
    adam_direction,
    adamw_,
    compand,
    expand,
    first_direction,
    spectral_direction,
    state_free_,
    stochastic_round,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(
    st.floats(1e-5, 1e-1),
    st.floats(0, 0.99),
    st.floats(0.5, 0.9999),
    st.sampled_from([1e-8, 1e-3]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_steps_are_those_of_torch(lr, beta1, beta2, eps, weight_decay, dtype):
    ours = torch.randn(5, 3, generator=seeded(), dtype=dtype)
    theirs = torch.nn.Parameter(ours.clone())
    adamw = torch.optim.AdamW([theirs], lr, (beta1, beta2), eps, weight_decay)
    moments = torch.zeros_like(ours), torch.zeros_like(ours)
    hyper = Hyper(lr, beta1, beta2, eps, weight_decay)
    for step in range(1, 5):
        theirs.grad = torch.randn(5, 3, generator=seeded(step), dtype=dtype)
        direction = adam_direction(theirs.grad, *moments, step, hyper)
        expected = ours * (1 - lr * weight_decay) - lr * direction
        adamw_(ours, theirs.grad, *moments, step, hyper)
        adamw.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=1e-7)
        torch.testing.assert_close(ours, expected)


@given(st.floats(1e-5, 1e-1), st.floats(0, 0.99), st.sampled_from([0.0, 0.1]), st.sampled_from([1.0, 1e-25]))
def test_a_cautious_step_is_that_of_torch_where_moment_and_gradient_agree(lr, beta1, weight_decay, size):
    """Also where the product of the two underflows; weights from 0, so that the smallest step is seen."""
    ours, eps = torch.zeros(50), 1e-3 * size
    theirs = torch.nn.Parameter(ours.clone())
    adamw = torch.optim.AdamW([theirs], lr, (beta1, 0.999), eps, weight_decay)
    moments = torch.zeros_like(ours), torch.zeros_like(ours)
    hyper = Hyper(lr, beta1, 0.999, eps, weight_decay, cautious=True)
    disagreed = 0
    for step in range(1, 6):
        theirs.grad = size * torch.randn(50, generator=seeded(step))
        theirs.grad[::7] = 0.0
        before = ours.clone()
        theirs.data.copy_(ours)
        direction = adam_direction(theirs.grad, *moments, step, hyper)
        adamw_(ours, theirs.grad, *moments, step, hyper)
        adamw.step()
        mean = adamw.state[theirs]["exp_avg"]
        moves = mean.sign() * theirs.grad.sign() > 0
        assert bool((moments[0] == mean).all())  # they go on as ever
        assert bool(((direction != 0) == moves).all())
        assert weight_decay or bool(((ours != before) == moves).all())
        torch.testing.assert_close(ours[moves], theirs.detach()[moves], rtol=0, atol=1e-7)
        torch.testing.assert_close(ours[~moves], before[~moves] * (1 - lr * weight_decay), rtol=0, atol=0)
        torch.testing.assert_close(ours, before * (1 - lr * weight_decay) - lr * direction)
        disagreed += int((~moves & (theirs.grad != 0)).sum())
    assert disagreed or beta1 < 0.5


def test_the_first_direction_is_that_of_the_first_step():
    grad = torch.tensor([3.0, -1e-9, 0.0])
    zero = torch.zeros(3)
    hyper = Hyper(1.0, 0.9, 0.999, 1e-8, 0.0)
    torch.testing.assert_close(first_direction(grad, 1e-8), adam_direction(grad, zero, zero, 1, hyper))


def test_updates_without_state():
    for kind, expected in (("sign", [0.9, 1.1, 1.0]), ("sgd", [0.8, 1.3, 1.0])):
        weight = torch.ones(3)
        state_free_(weight, torch.tensor([2.0, -3.0, 0.0]), kind, 0.1)
        torch.testing.assert_close(weight, torch.tensor(expected))


@pytest.mark.parametrize("shape", [(6, 6), (5, 9), (9, 5), (3, 4, 7), (4, 2, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_spectral_direction_keeps_singular_vectors_and_levels_singular_values(shape, dtype):
    grad = torch.randn(shape, generator=seeded()).to(dtype)
    found = spectral_direction(grad)
    assert found.shape == grad.shape
    assert found.dtype == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    matrices = grad.float().reshape(*(shape if len(shape) == 3 else (1, shape[0], -1)))
    for matrix, direction in zip(matrices, found.float().reshape(matrices.shape), strict=True):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        inside = left.T @ direction @ right.T / max(matrix.shape) ** 0.5
        near = 0.1 if dtype == torch.bfloat16 else 1e-2
        assert (inside - inside.diag().diag()).abs().max() < near
        torch.testing.assert_close(left @ inside @ right * max(matrix.shape) ** 0.5, direction, atol=near * 5, rtol=0)
        level = inside.diag()[values > 0.02 * values.norm()]
        assert level.min() > 0.6
        assert level.max() < 1.3


def test_spectral_direction_of_nothing_is_nothing():
    assert torch.equal(spectral_direction(torch.zeros(3, 4)), torch.zeros(3, 4))


def test_stochastic_rounding_is_exact_in_expectation_and_goes_to_neighbours():
    value = torch.randn(50, generator=seeded()) * torch.logspace(-20, 20, 50)
    draws = torch.stack([stochastic_round(value, seeded(k)) for k in range(4000)])
    assert draws.dtype == torch.bfloat16
    spacing = value.abs() * 2**-7
    assert ((draws.float() - value).abs() <= spacing).all()
    error = (draws.double().mean(0) - value.double()).abs() / spacing.double()
    assert error.max() < 5 * 0.5 / 4000**0.5
    exact = torch.tensor([0.0, 1.0, -2.5, float("inf")])
    assert torch.equal(stochastic_round(exact, seeded()).float(), exact)


def test_small_updates_survive_in_bfloat16():
    """To the nearest, 1 - 1e-4 is 1 for ever."""
    weight = torch.ones(1000, dtype=torch.bfloat16)
    generator = seeded()
    for _ in range(100):
        weight = stochastic_round(weight.float() - 1e-4, generator)
    assert abs(float(weight.float().mean()) - 0.99) < 1e-3


@given(st.integers(1, 700), st.booleans(), st.integers(0, 5))
def test_eight_bits(n, signed, seed):
    value = torch.randn(n, generator=seeded(seed)) * 10 ** torch.randn(n, generator=seeded(seed + 1))
    value = value if signed else value.square()
    codes, scales = compand(value, signed, seeded(seed))
    assert codes.element_size() == 1
    assert scales.shape == (-(-n // 256),)
    back = expand(codes, scales)
    largest = scales.repeat_interleave(256)[:n]
    top, power = (127, 2) if signed else (255, 4)
    share = (value.abs() / largest) ** (1 / power) * top
    spacing = largest * (((share + 1.01) / top) ** power - ((share - 1.01).clamp(min=0) / top) ** power)
    assert ((back - value).abs() <= spacing + 1e-30).all()
    if not signed:
        assert ((back > 0) == (value > 0)).all()


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_exact_in_expectation(signed):
    value = torch.rand(256, generator=seeded()) + 0.01
    value = value * (-1) ** torch.arange(256) if signed else value
    mean = torch.stack([expand(*compand(value, signed, seeded(k))) for k in range(2000)]).double().mean(0)
    assert ((mean - value) / value).abs().max() < 0.01


def test_eight_bits_of_zero():
    for signed in (True, False):
        assert torch.equal(expand(*compand(torch.zeros(300), signed, seeded())), torch.zeros(300))
