# SPDX-License-Identifier: BSD-3-Clause
"""Which parameters of a small language model BlockLLM trains when."""

from pydoc_data.topics import topics

import torch
from torch import nn

from llm import BlockLLM

text = "\n".join(topics.values()).encode("ascii", "ignore")
data = torch.tensor(list(text[:400_000]))
torch.manual_seed(0)


class CharLM(nn.Module):
    """A transformer that predicts the next character."""

    def __init__(self, width=64, layers=4, length=64):
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 128)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, x):
        """Scores of the next character, shape (rows, length, 128)."""
        x = self.tokens(x) + self.places.weight
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.head(x)


model = CharLM()
optimizer = BlockLLM(model, lr=3e-3, budget=0.1, granularity="tensor", switch_every=20)
losses = []
for _ in range(190):
    start = torch.randint(0, len(data) - 65, (16,))
    batch = data[start[:, None] + torch.arange(65)]
    loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(loss=loss)
    losses.append(loss.item())

report = optimizer.report()
total = sum(p.numel() for p in model.parameters())
print(f"loss {losses[0]:.2f} -> {sum(losses[-20:]) / 20:.2f} nats a character; {report['switches']} choices")
print(f"{report['active entries']:,} of {total:,} parameters active, {report['memory']['moments']:,} bytes of moments")
print(f"(AdamW would keep {8 * total:,})")
optimizer.plot("activity.png")
