"""A language model of 20,000 random weights with a byte-level tokenizer, as a folder, and files to learn from."""

import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ["<|end|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LENGTH = 64  # that the model can read


def tokenizer(chat_template=None):
    """Every byte is a token."""
    symbols = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({symbol: k for k, symbol in enumerate(symbols)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    special = {"eos_token": SPECIAL[0], "pad_token": SPECIAL[0]}
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    wrapped.chat_template = chat_template
    return wrapped


def model(seed=0, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": LENGTH}
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.2}
    config = transformers.LlamaConfig(**{**sizes, **heads, **special, **options})
    return transformers.LlamaForCausalLM(config)


def classifier(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "max_position_embeddings": LENGTH, "num_labels": 2}
    config = transformers.BertConfig(**sizes, **heads, pad_token_id=0, initializer_range=0.2)
    return transformers.BertForSequenceClassification(config)


def save(folder, made=None, chat_template=None):
    """Write a model folder; returns its path as text."""
    (made or model()).save_pretrained(folder)
    tokenizer(chat_template).save_pretrained(folder)
    return str(folder)


def write(path, rows):
    """Rows as JSONL or TSV; returns the path as text."""
    if path.suffix == ".tsv":
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def questions(n=40):
    """What follows in the alphabet."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = ((letters[k % 23], letters[k % 23 + 1 : k % 23 + 2 + k % 3]) for k in range(n))
    return [{"prompt": f"after {a}", "response": b} for a, b in pairs]


def reviews(n=24):
    """Sentences whose label is in their first word."""
    return [{"sentence": f"{('bad', 'good')[k % 2]} film {k}", "label": k % 2} for k in range(n)]
