# SPDX-License-Identifier: BSD-3-Clause
"""When the loss has stopped improving: ``loss_t >= mean of the last m losses``, all since the last switch.

A window is what happens between two optimizer steps; its loss is the mean of what was observed in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["LossWatch", "loss_of"]


def loss_of(output: Any) -> Tensor | None:
    """The scalar loss in what a model returns: ``output.loss``, ``output["loss"]``, the first of a tuple, itself."""
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif hasattr(output, "loss"):
        output = output.loss
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    scalar = isinstance(output, Tensor) and output.numel() == 1 and output.is_floating_point()
    return output.detach() if scalar else None


class LossWatch:
    """Losses since the last switch.

    Parameters
    ----------
    patience : int or None
        m; None: it never says that the loss has stopped improving.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.losses: list[float] = []
        self.last: float | None = None
        self._told: list[Any] = []
        self._heard: list[Tensor] = []
        self._shares = False  # losses that were heard add up to that of the window

    def observe(self, loss: Any) -> None:
        """Take a loss of this window that the user passed."""
        self._told.append(loss.detach() if isinstance(loss, Tensor) else loss)

    def hear(self, output: Any, share: bool = False) -> None:
        """Take the loss in the output of a model; what the user passes in the same window counts instead.

        Parameters
        ----------
        output
            What the model returned.
        share : bool
            Whether its loss is divided over the whole window already, so that losses add up rather than average.
        """
        loss = loss_of(output)
        if loss is not None:
            self._heard.append(loss)
            self._shares = share

    def close(self) -> float | None:
        """The loss of the window that ends here, None if there was none.

        Raises
        ------
        ValueError
            If it is not finite, or missing while there is patience.
        """
        seen = [float(loss) for loss in self._told or self._heard]
        parts = 1 if self._shares and not self._told else len(seen)
        self.discard()
        if not seen and self.patience is not None:
            raise ValueError(
                f"patience={self.patience} needs the loss of every step: call step(loss=loss), or observe(loss) before "
                "step(), or pass a model that returns its loss; or set patience=None and switch_every=a number of steps"
            )
        loss = sum(seen) / parts if seen else None
        if loss is not None and not math.isfinite(loss):
            raise ValueError(
                f"loss must be finite; found {loss}. Nothing was updated. Lower lr, clip (max_grad_norm=1.0), or look "
                "at the batch that gave it"
            )
        self.last = loss
        return loss

    def stalled(self, loss: float | None) -> bool:
        """Whether ``loss`` is no better than the mean of the last m; remembers it."""
        m = self.patience
        if m is None or loss is None:
            return False
        full = len(self.losses) >= m
        stalled = full and loss >= sum(self.losses[-m:]) / m
        self.losses = [*self.losses[-m:], loss][-m:]
        return stalled

    def switched(self) -> None:
        """Begin a new history."""
        self.losses = []

    def discard(self) -> None:
        """Forget this window."""
        self._told, self._heard, self._shares = [], [], False
