# SPDX-License-Identifier: BSD-3-Clause
"""The compiled AdamW step on rows is that of llm.adam, whose step is torch's."""

import pytest

torch = pytest.importorskip("torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from llm.adam import Hyper, adamw_  # noqa: E402
from llm.fused import adamw_rows_, fits  # noqa: E402


def start(rows, width, spread, seed, kind):
    """Weights of more rows than are active, which rows, their gradient and moments; some entries are 0."""
    generator = torch.Generator().manual_seed(seed)
    total = rows + 3
    weight = torch.randn(total, width, generator=generator)
    index = torch.randperm(total, generator=generator)[:rows].to(kind)
    grad, mean = (spread * torch.randn(rows, width, generator=generator) for _ in range(2))
    grad[grad.abs() < 0.1 * spread] = 0
    square = spread**2 * torch.rand(rows, width, generator=generator)
    return weight, index, grad, mean, square


@given(
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from([1e-6, 1.0, 1e4]),
    st.integers(0, 99),
    st.sampled_from([torch.int32, torch.int64]),
    st.sampled_from([0.9, 0.3]),
    st.booleans(),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([1.0, 0.3]),
    st.integers(1, 50),
)
@settings(deadline=None, max_examples=100)
def test_float32_moments(rows, width, spread, seed, kind, beta1, cautious, decay, scale, step):
    weight, index, grad, mean, square = start(rows, width, spread, seed, kind)
    hyper = Hyper(1e-2, beta1, 0.95, 1e-8, decay, cautious)
    expected = [weight[index.long()], mean.clone(), square.clone()]
    others = weight.clone().index_fill_(0, index.long(), 0)
    adamw_(expected[0], grad * scale, expected[1], expected[2], step, hyper)
    adamw_rows_(weight, index, grad, mean, square, step, hyper, scale, torch.Generator())
    for found, wanted in zip((weight[index.long()], mean, square), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1e-7 * (0.1 if found is not mean else spread))
    assert torch.equal(weight.index_fill_(0, index.long(), 0), others)


@pytest.mark.parametrize("cautious", [False, True])
def test_bfloat16_moments_are_rounded_to_a_neighbour_and_right_in_the_mean(cautious):
    weight, index, grad, mean, square = start(3, 64, 1.0, 0, torch.int32)
    mean, square = mean.bfloat16(), square.bfloat16()
    hyper = Hyper(1e-2, 0.9, 0.95, 1e-8, 0.0, cautious)
    exact = [weight[index.long()], mean.float(), square.float()]
    adamw_(exact[0], grad, exact[1], exact[2], 7, hyper)
    generator, draws = torch.Generator().manual_seed(1), 4000
    totals = [torch.zeros(3, 64, dtype=torch.float64) for _ in range(2)]
    for _ in range(draws):
        w, m, v = weight.clone(), mean.clone(), square.clone()
        adamw_rows_(w, index, grad, m, v, 7, hyper, 1.0, generator)
        torch.testing.assert_close(w[index.long()], exact[0], rtol=1e-5, atol=1e-7)  # moves by the exact moments
        for total, found, true in zip(totals, (m, v), exact[1:], strict=True):
            assert bool(((found.float() - true).abs() <= 2**-7 * true.abs()).all())
            total += found
    for total, true in zip(totals, exact[1:], strict=True):
        deviation = (total / draws - true) / true.abs().clamp(min=1e-30)
        assert (
            deviation.abs().max() < 5 * 2**-8 / draws**0.5
        )  # a draw is off by 2^-8 of its size at most, and as a rule
        assert deviation.mean().abs() < 5 * 2**-8 / (draws * deviation.numel()) ** 0.5


def test_noise_does_not_repeat_from_row_to_row_or_step_to_step():
    """Of equal entries in between two values of bfloat16 about half go up, each for itself."""
    value = 1 + 2**-8
    weight, index = torch.zeros(40, 64), torch.arange(40)
    hyper, generator = Hyper(0.0, 0.0, 0.0, 1e-8, 0.0), torch.Generator().manual_seed(0)
    ups = []
    for _ in range(50):
        mean, square = (torch.zeros(40, 64, dtype=torch.bfloat16) for _ in range(2))
        adamw_rows_(weight, index, torch.full((40, 64), value), mean, square, 1, hyper, 1.0, generator)
        ups.append((mean.float() > value).double())
    ups = torch.stack(ups)
    noise = 5 * 0.5 / ups[0].numel() ** 0.5
    assert (ups.mean((1, 2)) - 0.5).abs().max() < noise
    centred = (ups - 0.5) * 2
    for shifted in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(1, 2)):
        assert (centred * shifted).mean().abs() < 5 / centred.numel() ** 0.5


def test_the_same_generator_gives_the_same_rounding():
    made = []
    for _ in range(2):
        weight, index, grad, mean, square = start(4, 33, 1.0, 5, torch.int64)
        mean, square = mean.bfloat16(), square.bfloat16()
        generator = torch.Generator().manual_seed(3)
        for step in (1, 2):
            adamw_rows_(weight, index, grad, mean, square, step, Hyper(1e-2, 0.9, 0.95, 1e-8, 0.0), 1.0, generator)
        made.append((weight, mean, square))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_what_it_knows():
    weight = torch.zeros(2, 2)
    assert fits(weight, weight)
    assert fits(weight, weight.bfloat16())
    assert not fits(weight.double(), weight.double())
    assert not fits(weight.bfloat16(), weight.bfloat16())
    assert not fits(weight, weight.to(torch.int8))
    assert not fits(weight.to("meta"), weight.to("meta"))


def test_rows_without_a_gradient_are_refused():
    """The compiled loop would read past its end."""
    weight, index, grad, mean, square = start(4, 33, 1.0, 5, torch.int64)
    for arrays in ((grad[:3], mean, square), (grad, mean[:3], square), (grad, mean, square[:3])):
        with pytest.raises(ValueError, match="equally many"):
            adamw_rows_(weight, index, *arrays, 1, Hyper(1e-2, 0.9, 0.95, 1e-8, 0.0), 1.0, torch.Generator())
