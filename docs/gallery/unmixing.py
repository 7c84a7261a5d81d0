# SPDX-License-Identifier: BSD-3-Clause
"""Unmixing: every pixel is a mixture of known spectra, with shares on the simplex."""

import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import gaussian_filter

import bcd

rng = np.random.default_rng(0)
side, bands, names = 40, 120, ["water", "soil", "grass", "rock"]
wave = np.linspace(0, 1, bands)
centres, widths = rng.random((4, 5)), rng.uniform(0.05, 0.25, (4, 5))
spectra = np.exp(-(((wave - centres[..., None]) / widths[..., None]) ** 2)).sum(axis=1)  # shape (4, bands)
field = np.array([gaussian_filter(rng.standard_normal((side, side)), 5) for _ in names])
true = np.exp(30 * field) / np.exp(30 * field).sum(axis=0)  # shares of each pixel
image = np.einsum("kb,kij->ijb", spectra, true) + 0.05 * rng.standard_normal((side, side, bands))

qp = bcd.QP(spectra @ spectra.T)  # one matrix, one solve a pixel: min |S'x - pixel|^2 / 2 on the simplex
found = np.zeros_like(true)
for i, j in np.ndindex(side, side):
    found[:, i, j] = qp.solve(-spectra @ image[i, j], total=1, lower=0).x

free = np.linalg.solve(spectra @ spectra.T, np.einsum("kb,ijb->kij", spectra, image).reshape(4, -1)).reshape(true.shape)
print(f"root mean square error of the shares: {np.sqrt(np.mean((found - true) ** 2)):.4f} on the simplex,")
print(f"{np.sqrt(np.mean((free - true) ** 2)):.4f} without constraints ({np.mean(free < 0):.0%} of them negative)")

figure, axes = plt.subplots(2, 4, figsize=(10, 4.9), layout="constrained")
for k, name in enumerate(names):
    axes[0, k].imshow(true[k], vmin=0, vmax=1, cmap="viridis")
    shown = axes[1, k].imshow(found[k], vmin=0, vmax=1, cmap="viridis")
    axes[0, k].set_title(name)
for ax in axes.flat:
    ax.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("true share")
axes[1, 0].set_ylabel("found")
figure.colorbar(shown, ax=axes, shrink=0.8)
figure.savefig("unmixing.png", dpi=144)
