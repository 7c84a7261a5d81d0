"""Unchanged on small random models of transformers: decoders, encoders, vision, mixtures of experts."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from small_models import changed, copies  # noqa: E402

from llm import BlockLLM  # noqa: E402
from llm.blocks import embeddings  # noqa: E402

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
}
DECODERS = {
    "Llama": ("LlamaConfig", {}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3, tied": ("Qwen3Config", {"tie_word_embeddings": True}),
    "Gemma": ("GemmaConfig", {}),
    "Mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3 MoE": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}),
}


def decoder(name):
    kind, options = DECODERS[name]
    config = getattr(transformers, kind)(**SIZES, **options, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.AutoModelForCausalLM.from_config(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1)
    return transformers.GPT2LMHeadModel(config)


def bert():
    sizes = {k: v for k, v in SIZES.items() if k not in ("num_key_value_heads", "head_dim")}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_labels=3))


def vit():
    sizes = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)
    )


def inputs(name, model, k):
    generator = torch.Generator().manual_seed(k)
    if name == "ViT":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator), "labels": torch.tensor([0, 2])}
    ids = torch.randint(3, 64, (2, 6), generator=generator)
    return {"input_ids": ids, "labels": torch.tensor([0, 2]) if name == "BERT" else ids}


MODELS = {**{name: None for name in DECODERS}, "GPT-2": gpt2, "BERT": bert, "ViT": vit}


@pytest.mark.parametrize("granularity", ["tensor", "layer", "rows", "neurons", "entries"])
@pytest.mark.parametrize("name", MODELS)
def test_training_with_switches(name, granularity):
    """Losses fall on one batch; nothing but what is active ever moves; gradients are freed."""
    torch.manual_seed(0)
    model = MODELS[name]() if MODELS[name] else decoder(name)
    optimizer = BlockLLM(model, 1e-2, budget=0.15, granularity=granularity, switch_every=4, patience=50)
    losses, batch = [], inputs(name, model, 0)
    for _ in range(13):
        before, active = copies(model), optimizer.active()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        moved = {n: int(m.sum()) for n, m in changed(model, before).items() if m.any()}
        active = active or optimizer.active()
        assert all(count <= active.get(n, 0) for n, count in moved.items()), moved
        optimizer.zero_grad()
        losses.append(loss.item())
    assert optimizer.loss == pytest.approx(losses[-1])
    assert [s["step"] for s in optimizer.history] == [0, 4, 8, 12]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3 MoE"])
def test_experts_of_a_fused_tensor_are_blocks(name):
    model = decoder(name)
    optimizer = BlockLLM(model, 1e-2, budget=0.1, granularity="tensor")
    fused = [k for k, n in enumerate(optimizer.blocks.names) if "experts" in n]
    assert fused
    assert all(optimizer.blocks.slices(k) == 4 for k in fused)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama", ["model.embed_tokens.weight", "lm_head.weight"]),
        ("Qwen3, tied", ["model.embed_tokens.weight"]),
        ("GPT-2", ["transformer.wte.weight", "transformer.wpe.weight"]),
    ],
)
def test_embeddings(name, expected):
    assert embeddings(MODELS[name]() if MODELS[name] else decoder(name)) == expected


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_checkpointing_of_transformers_changes_nothing():
    finals = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = decoder("Llama")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = BlockLLM(model, 1e-2, budget=0.1, switch_every=2)
        for k in range(6):
            optimizer.zero_grad()
            model(**inputs("Llama", model, k)).loss.backward()
            optimizer.step()
        finals.append((copies(model), optimizer.history))
    assert finals[0][1] == finals[1][1]
    for p, q in zip(*(f[0] for f in finals), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
