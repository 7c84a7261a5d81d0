# SPDX-License-Identifier: BSD-3-Clause
"""Training steps whose memory is counted: models, methods, and one run of them, simulated or real.

A simulated run works on fake tensors (:mod:`llm.ledger`). A real one has a process of its own,
``python -m experiments.llm_memory_runs JSON``, and says how much resident memory the process took besides.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments import FOLDER
from experiments.svm_workers import reset_peak, resident
from llm import BlockLLM
from llm.ledger import Peak, watch
from llm.plan import PLACES, fake_model, simulate

LR = 1e-4
MODELS: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "Llama 60M": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    },
    "Llama 6M": {  # of quick runs
        "vocab_size": 8000,
        "hidden_size": 256,
        "intermediate_size": 688,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


class Method(NamedTuple):
    """What trains a model.

    Attributes
    ----------
    optimizer : callable
        From the model; as :func:`llm.ledger.watch` wants it.
    prepare : callable
        What is trained in place of the model.
    backward : callable
        Of the loss and the optimizer.
    steps : int
    """

    optimizer: Callable[[nn.Module], Any]
    prepare: Callable[[Any], nn.Module] = lambda model: model
    backward: Callable[[Tensor, Any], Any] = lambda loss, optimizer: loss.backward()
    steps: int = 2


class Stepless:
    """Stands for optimizers that work during the backward pass."""

    def __init__(self, *inner: Any) -> None:
        self.inner = inner

    @property
    def state(self) -> list[Any]:
        """Of all of them."""
        return [getattr(optimizer, "state", None) for optimizer in self.inner]

    def step(self) -> None:
        """Nothing is left to do."""

    def zero_grad(self) -> None:
        """Nothing is left to drop."""


# -- methods -----------------------------------------------------------------------------------------


def adamw(**options: Any) -> Method:
    """torch.optim.AdamW."""
    return Method(lambda model: torch.optim.AdamW(trainable(model), lr=LR, **options))


def trainable(model: nn.Module) -> list[Tensor]:
    """The parameters that require grad."""
    return [p for p in model.parameters() if p.requires_grad]


def adamw_in_backward() -> Method:
    """One AdamW for each tensor, which steps as its gradient comes."""

    def optimizer(model: nn.Module) -> Stepless:
        inner = {p: torch.optim.AdamW([p], lr=LR, foreach=False) for p in model.parameters()}

        def use(p: Tensor) -> None:
            inner[p].step()
            p.grad = None

        for p in inner:
            p.register_post_accumulate_grad_hook(use)
        return Stepless(*inner.values())

    return Method(optimizer)


def galore(rank: int) -> Method:
    """galore-torch: low-rank projections of the matrices inside layers, AdamW for the rest."""

    def optimizer(model: nn.Module) -> Any:
        from galore_torch import GaLoreAdamW

        low = [p for name, p in model.named_parameters() if p.dim() == 2 and ("attn" in name or "mlp" in name)]
        rest = [p for p in model.parameters() if not any(p is q for q in low)]
        projection = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([{"params": rest}, {"params": low} | projection], lr=LR, no_deprecation_warning=True)

    return Method(optimizer)


def badam(mode: str) -> Method:
    """badam: one layer at a time, with a float32 copy where weights are bfloat16; a new layer at every step."""

    def optimizer(model: nn.Module) -> Any:
        from badam import BlockOptimizer

        base = torch.optim.AdamW(model.parameters(), lr=LR, foreach=False)
        named = list(model.named_parameters())
        return BlockOptimizer(base, named, switch_block_every=1, switch_mode=mode, verbose=0)

    return Method(optimizer, steps=3)


def lora(rank: int) -> Method:
    """peft, adapters on all linear layers in the type of the weights, AdamW."""

    def prepare(model: Any) -> nn.Module:
        import peft

        options = {"r": rank, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        before = torch.get_default_dtype()
        torch.set_default_dtype(next(model.parameters()).dtype)
        try:
            return peft.get_peft_model(model, peft.LoraConfig(**options), autocast_adapter_dtype=False)
        finally:
            torch.set_default_dtype(before)

    return Method(lambda model: torch.optim.AdamW(trainable(model), lr=LR, foreach=False), prepare)


def lomo() -> Method:
    """lomo-optim: SGD during the backward pass."""

    def optimizer(model: nn.Module) -> Stepless:
        from lomo_optim import Lomo

        return Stepless(Lomo(model, lr=LR))

    return Method(optimizer, backward=lambda loss, optimizer: optimizer.inner[0].fused_backward(loss, LR))


PEERS: dict[str, Callable[[], Method]] = {
    "AdamW, foreach": lambda: adamw(foreach=True),
    "AdamW, one tensor at a time": lambda: adamw(foreach=False),
    "AdamW, fused": lambda: adamw(fused=True),
    "AdamW, in the backward": adamw_in_backward,
    "SGD": lambda: Method(lambda model: torch.optim.SGD(model.parameters(), lr=LR, foreach=False)),
    "GaLore r128": lambda: galore(128),
    "BAdam, from the top": lambda: badam("descending"),
    "BAdam, from the bottom": lambda: badam("ascending"),
    "LoRA r64": lambda: lora(64),
    "LoRA r8": lambda: lora(8),
    "LOMO": lomo,
}


# -- runs --------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What is run.

    Attributes
    ----------
    model : str
        Of MODELS.
    method : str or Mapping
        Of PEERS, or options of BlockLLM.
    shape : tuple of int
        Sequences, and tokens of each.
    dtype : str
        Of the weights.
    checkpointing : bool
    places : tuple of str or None
        Where BlockLLM is active, one after the other; None: where it chooses by itself (real runs only).
    steps : int or None
        Of BlockLLM; None: two for every place.
    """

    model: str
    method: str | Mapping[str, Any]
    shape: tuple[int, int] = (1, 512)
    dtype: str = "bfloat16"
    checkpointing: bool = True
    places: tuple[str, ...] | None = PLACES
    steps: int | None = None


def build(run: Run) -> Any:
    """The model of a run with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**MODELS[run.model], max_position_embeddings=4096, use_cache=False)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, run.dtype))
    try:
        return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def peaks_of(run: Run, simulated: bool) -> list[Peak]:
    """The peaks of the phases of a run, whose model is fake if it is simulated."""
    method = PEERS[run.method]() if isinstance(run.method, str) else None
    with torch.device("meta" if simulated else "cpu"):
        model: Any = build(run)
        model = method.prepare(model) if method else model
    model = fake_model(model) if simulated else model
    if run.checkpointing:
        from llm.hf import checkpointing

        checkpointing(model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, MODELS[run.model]["vocab_size"], run.shape, generator=generator)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    if method is None and run.places is not None:
        return simulate(model, run.method, loss, run.places, run.steps)  # type: ignore[arg-type]
    if method is None:
        options = {**run.method, "switch_every": 2}  # type: ignore[dict-item]
        return watch(model, lambda model: BlockLLM(model, LR, **options), loss, 2 * len(PLACES))
    made: list[Any] = []

    def make(model: nn.Module) -> Any:
        made.append(method.optimizer(model))
        return made[0]

    return watch(model, make, loss, method.steps, lambda value: method.backward(value, made[0]))


def largest(peaks: list[Peak]) -> dict[str, Any]:
    """The largest of some peaks, as plain values."""
    peak = max(peaks, key=lambda peak: peak.total)
    return {"bytes": peak.total, "parts": peak.parts, "step": peak.step, "phase": peak.phase, "census": peak.census}


def simulated(run: Run) -> dict[str, Any]:
    """The largest moment of a simulated run; says so if the method is not installed."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # what peers say
            warnings.simplefilter("ignore")
            return largest(peaks_of(run, True))
    except ImportError as error:
        return {"missing": str(error)}


def measured(run: Run) -> dict[str, Any]:
    """The same of a real run in a process of its own, and ``resident``: bytes that the process grew by."""
    # blocks of a megabyte and more go back to the system as they are freed, so that what is resident is alive
    surroundings = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-W", "ignore", "-m", "experiments.llm_memory_runs", json.dumps(run._asdict())]
    done = subprocess.run(command, cwd=FOLDER.parent, env=surroundings, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        if "ModuleNotFoundError" in last:
            return {"missing": last}
        raise RuntimeError(f"{run.model}, {run.method}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def main(text: str) -> None:
    """A real run, told and answered in JSON."""
    told = json.loads(text)
    run = Run(**{**told, "shape": tuple(told["shape"]), "places": told["places"] and tuple(told["places"])})
    import transformers  # noqa: F401  what it takes is none of the run's

    torch.manual_seed(0)
    reset_peak()
    before = resident("VmRSS")
    peaks = peaks_of(run, False)
    grown = resident("VmHWM") - before  # not getrusage, which begins with the peak of the process that started this one
    megabyte = 1 << 20
    print(json.dumps(largest(peaks) | {"resident": round(grown * megabyte)}))


if __name__ == "__main__":
    main(sys.argv[1])
