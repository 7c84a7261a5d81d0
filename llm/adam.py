# SPDX-License-Identifier: BSD-3-Clause
"""AdamW on tensors: the update, its direction, and the roundings of low precision. No classes, no state.

With gradient g, moments m and v and the t-th step (Loshchilov, Hutter, arXiv 1711.05101; the operations and their
order are those of :class:`torch.optim.AdamW`)::

    w <- w - lr * weight_decay * w
    m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
    w <- w - lr * m^ / (sqrt(v^) + eps),    m^ = m / (1 - beta1^t),  v^ = v / (1 - beta2^t)

A cautious update (Liang, Chen, Liu, Liu, arXiv 2411.16085) leaves an entry where it is, but for weight decay, while m
and g have opposite signs or one of them is 0. What moves, moves as far as before: the rescaling of the paper, by the
share of such entries in a tensor, is left to the rate, so that an update does not depend on what is updated together.

Everything works in place on float32 (or float64) tensors of one shape.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "GROUP",
    "Hyper",
    "adam_direction",
    "adamw_",
    "compand",
    "decode",
    "expand",
    "first_direction",
    "spectral_direction",
    "state_free_",
    "stochastic_round",
]

GROUP = 256  # entries that share a scale in 8-bit states
NEWTON_SCHULZ = 5  # steps towards the factor of a gradient


class Hyper(NamedTuple):
    """Numbers of one parameter group."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    cautious: bool = False

    def terms(self, step: int, scale: float) -> tuple[float, ...]:
        """What step number ``step`` needs where it is compiled, with the gradient times ``scale``."""
        root, rate = (1 - self.beta2**step) ** 0.5, -self.lr / (1 - self.beta1**step)
        keep = 1 - self.lr * self.weight_decay
        return scale, keep, 1 - self.beta1, self.beta2, 1 - self.beta2, root, self.eps, rate


def adamw_(weight: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, hyper: Hyper) -> None:
    """Step number ``step`` (from 1) of AdamW; changes weight and both moments.

    Examples
    --------
    >>> w, m, v = torch.ones(1), torch.zeros(1), torch.zeros(1)
    >>> adamw_(w, torch.tensor([5.0]), m, v, 1, Hyper(0.1, 0.9, 0.999, 1e-8, 0.0))
    >>> w
    tensor([0.9000])
    """
    if hyper.weight_decay:
        weight.mul_(1 - hyper.lr * hyper.weight_decay)
    exp_avg.lerp_(grad, 1 - hyper.beta1)
    exp_avg_sq.mul_(hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
    root = (1 - hyper.beta2**step) ** 0.5
    mean = _agreeing(exp_avg, grad) if hyper.cautious else exp_avg
    weight.addcdiv_(mean, exp_avg_sq.sqrt().div_(root).add_(hyper.eps), value=-hyper.lr / (1 - hyper.beta1**step))


def _agreeing(mean: Tensor, grad: Tensor) -> Tensor:
    """``mean`` where its sign is that of the gradient, else 0."""
    return mean * (mean.sign() == grad.sign())


def adam_direction(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, hyper: Hyper) -> Tensor:
    """``m^ / (sqrt(v^) + eps)`` as step number ``step`` would have it after this gradient; changes nothing."""
    mean = torch.lerp(exp_avg, grad, 1 - hyper.beta1)
    mean = _agreeing(mean, grad) if hyper.cautious else mean
    square = (exp_avg_sq * hyper.beta2).addcmul_(grad, grad, value=1 - hyper.beta2)
    root = square.sqrt_().div_((1 - hyper.beta2**step) ** 0.5).add_(hyper.eps)
    return mean.div_(1 - hyper.beta1**step).div_(root)


def first_direction(grad: Tensor, eps: float) -> Tensor:
    """The same for an entry without moments: ``g / (|g| + eps)``, Adam's first step."""
    return grad / grad.abs().add_(eps)


def state_free_(weight: Tensor, grad: Tensor, kind: str, lr: float) -> None:
    """``w <- w - lr * sign(g)``, or ``g`` in place of its sign if kind is "sgd"."""
    weight.add_(grad.sign() if kind == "sign" else grad, alpha=-lr)


def spectral_direction(grad: Tensor) -> Tensor:
    """Steepest descent in the spectral norm: nearly ``sqrt(max(m, n)) U V'`` of a gradient ``U S V'``.

    Five Newton-Schulz steps with the coefficients of Muon (K. Jordan, 2024; the norm: Bernstein, Newhouse, arXiv
    2409.20325) bring all but the smallest singular values to between 0.7 and 1.2. The factor gives entries a root mean
    square of about 1, that of their signs.

    Parameters
    ----------
    grad : Tensor, shape (m, n), (k, m, n) for k matrices, or (m, ...) for one matrix of m rows

    Returns
    -------
    Tensor
        Of its shape; in bfloat16 if ``grad`` is that, else in float32 or wider. Zero where ``grad`` is.
    """
    matrix = grad if grad.dim() <= 3 else grad.flatten(1)
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x if x.dtype == torch.bfloat16 else x.to(torch.promote_types(x.dtype, torch.float32))
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(NEWTON_SCHULZ):
        square = x @ x.mT
        x = torch.add(3.4445 * x, torch.add(-4.7750 * square, square @ square, alpha=2.0315) @ x)
    return (x.mT if tall else x).mul(max(matrix.shape[-2:]) ** 0.5).reshape(grad.shape)


def stochastic_round(value: Tensor, generator: torch.Generator) -> Tensor:
    """Float32 to bfloat16, up or down with probabilities that make the expectation exact.

    Parameters
    ----------
    value : Tensor of float32
    generator : Generator
        On the device of ``value``.

    Returns
    -------
    Tensor of bfloat16
        ``value`` itself where bfloat16 can hold it.
    """
    bits = value.contiguous().view(torch.int32)
    words = torch.empty(-(-bits.numel() // 4), dtype=torch.int64, device=bits.device)
    noise = words.random_(-(1 << 63), None, generator=generator).view(torch.int16)[: bits.numel()]  # four of a word
    noise = noise.view(bits.shape).to(torch.int32).add_(1 << 15)  # uniform on 0, ..., 65535
    return noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def compand(value: Tensor, signed: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Eight bits an entry: code c stands for ``scale * (c / 127)^2`` with c's sign, or ``scale * (c / 255)^4``.

    The scale is the largest of each 256 consecutive entries. Rounding is stochastic and exact in expectation, but a
    positive entry of an unsigned tensor never becomes 0 (a second moment divides).

    Parameters
    ----------
    value : Tensor of float32, shape (n,)
        Non-negative unless ``signed``.
    signed : bool
    generator : Generator

    Returns
    -------
    codes : Tensor of int8 (signed) or uint8, shape (n,)
    scales : Tensor of float32, shape (ceil(n / 256),)
    """
    groups = torch.nn.functional.pad(value, (0, -value.numel() % GROUP)).view(-1, GROUP)
    scale = groups.abs().amax(1)
    share = (groups / scale.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)).view(-1)[: value.numel()]
    del groups
    top, power = (127, 2) if signed else (255, 4)
    size = share.abs()
    code = size.pow(1 / power).mul_(top).floor_().clamp_(max=top - 1)
    below = (code / top).pow_(power)
    gap = ((code + 1) / top).pow_(power).sub_(below)
    draw = torch.empty_like(size).uniform_(generator=generator)
    code += draw.mul_(gap) < below.sub_(size).neg_()
    if signed:
        return code.copysign_(share).to(torch.int8), scale
    return torch.where(size > 0, code.clamp_(min=1), code).to(torch.uint8), scale


def expand(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 values that :func:`compand` stored."""
    return decode(codes, scales.repeat_interleave(GROUP)[: codes.numel()])


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The same where every entry comes with the scale of its group."""
    share = codes.float()
    share = share.abs().mul_(share).div_(127**2) if codes.dtype == torch.int8 else share.div_(255).pow_(4)
    return share.mul_(scale)
