"""Tiny models, batches and a training loop for the tests of llm; bytes alive, counted at every operation."""

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH, LENGTH, CLASSES = 20, 8, 4, 5


def net(seed=0):
    """An embedding and three linear layers, 1045 parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH),
        nn.Flatten(),
        nn.Linear(LENGTH * WIDTH, 16),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, CLASSES),
    )


def batches(n, rows=6, seed=1):
    """Random tokens whose label is a function of them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        x = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=generator)
        found.append((x, x.sum(1) % CLASSES))
    return found


def loss_of(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def train(model, optimizer, data, tell=False):
    """Losses of one step a batch."""
    losses = []
    for batch in data:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step(**({"loss": loss} if tell else {}))
        losses.append(loss.item())
    return losses


def train_on_itself(model, optimizer, x, steps=40):
    """Losses of a language model that learns one batch of tokens."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(x, x)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def changed(model, before):
    """By name: which entries differ."""
    return {name: (p.detach() != b) for (name, p), b in zip(model.named_parameters(), before, strict=True)}


class Block(nn.Module):
    """A residual layer that returns its loss-relevant features."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class TinyLM(nn.Module):
    """Token table, layers and a head that shares the table; layers may be checkpointed."""

    def __init__(self, layers=3, width=WIDTH, checkpointing=None, tied=True, seed=0, vocabulary=VOCABULARY):
        torch.manual_seed(seed)
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self.checkpointing = checkpointing

    def forward(self, x, labels=None):
        hidden = self.tokens(x)
        if self.checkpointing == "reentrant" and not hidden.requires_grad:
            hidden.requires_grad_(True)
        for layer in self.layers:
            if self.checkpointing:
                hidden = checkpoint(layer, hidden, use_reentrant=self.checkpointing == "reentrant")
            else:
                hidden = layer(hidden)
        logits = self.head(hidden)
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def tokens(n, rows=3, length=5, seed=1, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocabulary, (rows, length), generator=generator) for _ in range(n)]


class Bytes(TorchDispatchMode):
    """Bytes of all storages that came out of an operation in this block and are alive: now, and at most.

    Those of the weights are left out.
    """

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and type(tensor) is torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.weights:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return out

    def now(self):
        self.alive = {key: (ref, size) for key, (ref, size) in self.alive.items() if not ref.expired()}
        return sum(size for _, size in self.alive.values())
