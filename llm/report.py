# SPDX-License-Identifier: BSD-3-Clause
"""What a BlockLLM optimizer is doing: who is active, what that costs, and who was active when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm.blocks import Blocks
from llm.compact import CompactGrad

if TYPE_CHECKING:
    from llm.optimizer import BlockLLM

__all__ = ["memory", "plot", "report"]

DRAWN = 80  # parameters that a picture can name


def report(optimizer: BlockLLM) -> dict[str, Any]:
    """Plain values for a log.

    Returns
    -------
    dict
        ``steps``, ``switches`` (the first choice included), ``budget`` and ``active entries`` (counts), ``share`` of
        all parameters, ``active`` (entries by parameter), ``grad norm`` and ``loss`` of the last step (None if
        unknown), ``memory`` (:func:`memory`) and ``history``: per switch its step, reason and active entries.
    """
    active = optimizer.active()
    return {
        "steps": optimizer.steps,
        "switches": len(optimizer.history),
        "budget": optimizer.budget,
        "active entries": sum(active.values()),
        "share": sum(active.values()) / optimizer.blocks.total,
        "active": active,
        "grad norm": optimizer.grad_norm,
        "loss": optimizer.loss,
        "memory": memory(optimizer),
        "history": [
            {**switch, "entries": dict(zip(optimizer.blocks.names, switch["entries"], strict=True))}
            for switch in optimizer.history
        ],
    }


def memory(optimizer: BlockLLM) -> dict[str, int]:
    """Bytes of what is alive now: weights, gradients, moments, indices, float32 copies, and what lies on the shelf."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    bytes_of = dict.fromkeys(("weights", "gradients", "moments", "indices", "masters", "shelf"), 0)
    bytes_of["weights"] = sum(p.nbytes for p in params)
    grads = [p.grad.active if isinstance(p.grad, CompactGrad) else p.grad for p in params if p.grad is not None]
    bytes_of["gradients"] = sum(grad.nbytes for grad in grads)
    for state in optimizer.state.values():
        for cohort in state.get("cohorts", ()):
            masters = cohort["master"].nbytes if "master" in cohort else 0
            bytes_of["masters"] += masters
            bytes_of["moments"] += sum(t.nbytes for t in tensors_in(cohort)) - masters
        bytes_of["indices"] += state["index"].nbytes if "index" in state else 0
        bytes_of["shelf"] += sum(t.nbytes for t in tensors_in(state.get("shelf", [])))
    return bytes_of


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors inside dicts and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(inner)


def plot(optimizer: BlockLLM, path: Any = None) -> Any:
    """Active share of every parameter (of every layer, where parameters are many) between switches.

    The input is below.

    Parameters
    ----------
    optimizer : BlockLLM
    path : str or Path, optional
        Where to save the picture.

    Returns
    -------
    matplotlib.figure.Figure
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    names, shares = _shares(optimizer)
    edges = [switch["step"] for switch in optimizer.history] + [max(optimizer.steps, 1)]
    figure = Figure(figsize=(8, max(3.0, 0.12 * len(names))), layout="constrained")
    axes = figure.subplots()
    colours: dict[str, Any] = {"cmap": "Blues", "norm": PowerNorm(0.5, 0, 1)}  # small shares are told apart
    for k, share in enumerate(shares):
        width = max(edges[k + 1] - edges[k], 0)
        extent = (edges[k], edges[k] + width, -0.5, len(names) - 0.5)
        if width:
            image = axes.imshow(share[:, None].numpy(), extent=extent, aspect="auto", origin="lower", **colours)
    if len(shares) and edges[-1] > edges[0]:
        axes.set_xlim(edges[0], edges[-1])
        figure.colorbar(image, label="active share")
    axes.set_yticks(range(len(names)), names, fontsize=5)
    axes.set(xlabel="step", ylim=(-0.5, len(names) - 0.5))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _shares(optimizer: BlockLLM) -> tuple[list[str], Tensor]:
    """What is drawn: names, and active shares of shape (switches, names)."""
    blocks = optimizer.blocks
    entries = torch.tensor([switch["entries"] for switch in optimizer.history], dtype=torch.float64)
    entries = entries.view(len(optimizer.history), len(blocks.names))
    if len(blocks.names) <= DRAWN:
        return list(blocks.names), entries / torch.tensor(blocks.sizes).clamp(min=1)
    layers = Blocks.of(blocks.names, blocks.shapes, "layer")
    together = entries.new_zeros(len(entries), len(layers.cost))
    together.index_add_(1, torch.tensor(layers.first), entries)
    return [layers.name(k) for k in range(len(layers.cost))], together / layers.cost.clamp(min=1)
