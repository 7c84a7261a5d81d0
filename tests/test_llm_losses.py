"""Losses from the logits of learnt tokens alone, against those of transformers and of torch."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import tiny_lm  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from test_llm_models import DECODERS, SIZES, decoder, gpt2  # noqa: E402
from torch import nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from llm import BlockLLM  # noqa: E402
from llm import losses as module  # noqa: E402
from llm.losses import losses_of  # noqa: E402

IGNORED = -100


def gemma2():
    """Squeezes its logits after the head."""
    config = transformers.Gemma2Config(**SIZES, final_logit_softcapping=2.0, sliding_window=8, pad_token_id=0)
    return transformers.Gemma2ForCausalLM(config)


def granite():
    """Divides its logits after the head."""
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=3.0, pad_token_id=0))


MADE = {**{name: lambda name=name: decoder(name) for name in DECODERS}}
MADE |= {"GPT-2": gpt2, "Gemma 2": gemma2, "Granite": granite}


def masked(k=0):
    """Three examples of seven tokens: the prompt and the end of two are not learnt, nor anything of the last."""
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(k))
    labels = ids.clone()
    labels[0, :3] = labels[1, :1] = labels[1, 5:] = labels[2] = IGNORED
    return {"input_ids": ids, "labels": labels}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", MADE)
def test_losses_and_gradients_are_those_of_transformers(name):
    torch.manual_seed(0)
    model, batch = MADE[name]().eval(), masked()  # without dropout
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(out.shape))
    losses = losses_of(model, batch)
    hook.remove()
    assert seen == [(1, 4 + 4, 64)]  # learnt tokens alone reach the head
    assert losses.dtype == torch.float32
    assert losses[2] == 0
    mine = gradients(model, losses.sum() / 8)
    output = model(**batch)
    assert output.logits.shape == (3, 7, 64)  # the head is as it was
    torch.testing.assert_close(losses.sum() / 8, output.loss)
    theirs = gradients(model, output.loss)
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_every_example_has_its_own_loss():
    torch.manual_seed(0)
    model, batch = decoder("Llama"), masked(1)
    together = losses_of(model, batch)
    for k in range(3):
        alone = losses_of(model, {name: value[k : k + 1] for name, value in batch.items()})
        torch.testing.assert_close(alone[0], together[k], rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
    torch.manual_seed(0)
    model, batch = decoder("Llama").bfloat16(), masked()
    losses = losses_of(model, batch)
    assert losses.dtype == torch.float32
    mine, theirs = gradients(model, losses.sum() / 8), gradients(model, model(**batch).loss)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_classes(shape):
    model = tiny_lm.classifier().eval()
    labels = torch.tensor([1, 0])
    batch = {"input_ids": torch.tensor([[3, 4], [5, 6]]), "labels": labels}
    losses = losses_of(model, batch | {"labels": labels.view(shape)})
    torch.testing.assert_close(losses.mean(), model(**batch).loss)


class Plain(nn.Module):
    """A model that does not say which of its modules is the head."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 64))

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.layers(input_ids))


class Reshaped(Plain):
    """Its head reads something else than (examples, tokens, width)."""

    def get_output_embeddings(self):
        return self.layers[1]

    def forward(self, input_ids):
        hidden = self.layers[0](input_ids)
        return SimpleNamespace(logits=self.layers[1](hidden.flatten(0, 1)).view(*input_ids.shape, 64))


@pytest.mark.parametrize("kind", [Plain, Reshaped])
def test_a_model_that_makes_all_logits(kind):
    torch.manual_seed(0)
    model, batch = kind(), masked()
    logits, labels = model(batch["input_ids"]).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    expected = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    losses = losses_of(model, batch)
    torch.testing.assert_close(losses.sum(), expected)
    for a, b in zip(gradients(model, losses.sum()), gradients(model, expected), strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_learnt():
    model, batch = decoder("Llama"), masked()
    losses = losses_of(model, batch | {"labels": torch.full_like(batch["labels"], IGNORED)})
    assert losses.tolist() == [0, 0, 0]
    assert not any(bool(grad.any()) for grad in gradients(model, losses.sum()))


class Combined(Reshaped):
    """Multiplies logits by something of every token, so that few logits do not fit."""

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.layers(input_ids) * (1 + input_ids[..., None]))


class Last(Plain):
    """Returns logits of the last tokens alone."""

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.layers(input_ids)[:, -2:])


@pytest.mark.parametrize("kind", [Combined, Last])
def test_logits_of_other_tokens_are_refused(kind):
    """Also where their number happens to be that of the learnt tokens, or of the tokens of an example."""
    ids = torch.randint(3, 64, (2, 4))
    labels = torch.full_like(ids, IGNORED)
    labels[:, 2:] = ids[:, 2:]
    with pytest.raises(ValueError, match="logits for"):
        losses_of(kind(), {"input_ids": ids, "labels": labels})


@pytest.mark.parametrize("low", [False, True])
def test_with_rows_of_blockllm_and_autocast(low):
    """The head is one of its layers of rows; the same run as with the model's own loss."""
    finals = []
    for own in (False, True):
        torch.manual_seed(0)
        model = decoder("Qwen3, tied")
        optimizer = BlockLLM(model, 1e-3, budget=0.3, granularity="rows", switch_every=2)
        for step in range(5):
            with torch.autocast("cpu", torch.bfloat16, enabled=low):
                batch = masked(step)
                loss = model(**batch).loss if own else losses_of(model, batch).sum() / 8
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        finals.append((loss.detach(), nn.utils.parameters_to_vector(model.parameters())))
    torch.testing.assert_close(*finals, rtol=1e-2 if low else 1e-4, atol=1e-2 if low else 1e-5)


def test_the_head_is_as_it_was_after_an_error():
    model = decoder("Llama")
    with pytest.raises(IndexError):
        losses_of(model, masked() | {"input_ids": torch.full((3, 7), 64)})
    head = model.get_output_embeddings()
    assert not head._forward_pre_hooks
    assert not head._forward_hooks
    losses_of(model, masked())
    losses_of(frozen(model), masked())
    assert not head._forward_pre_hooks
    assert not head._forward_hooks


def test_a_compiled_model():
    """The hook is not compiled into it."""
    torch.manual_seed(0)
    model = decoder("Llama")
    compiled = torch.compile(model, backend="eager")
    for k in range(2):
        batch = masked(k)
        batch["labels"][0, 3 + k] = IGNORED
        pair = losses_of(compiled, batch), losses_of(model, batch)
        torch.testing.assert_close(*pair)
        found = [gradients(model, losses.sum()) for losses in pair]
        torch.testing.assert_close(*found)


def test_shapes_alone():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = decoder("Llama")
        batch = {name: mode.from_tensor(value) for name, value in masked().items()}
        losses = losses_of(model, batch)
        losses.sum().backward()
        assert losses.shape == (3,)


def test_the_gradient_is_written_over_the_logits_once():
    logits = torch.randn(5, 7, requires_grad=True)
    inner = logits * 1.0
    losses = module._CrossEntropy.apply(inner, torch.arange(5))
    (grad,) = torch.autograd.grad(losses.sum(), inner, retain_graph=True)
    assert grad.data_ptr() == inner.data_ptr()
    with pytest.raises(RuntimeError, match="once"):
        losses.sum().backward()
    losses = module._CrossEntropy.apply(logits * 1.0, torch.arange(5))
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(losses.sum(), logits, create_graph=True)


@given(
    st.integers(1, 9),
    st.integers(2, 40),
    st.sampled_from([1e-3, 1.0, 30.0, 1e4]),
    st.integers(1, 100),
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=60)
def test_cross_entropy_is_that_of_torch(rows, words, spread, together, seed, dtype):
    """For logits of any size, in pieces of any size."""
    generator = torch.Generator().manual_seed(seed)
    x = (spread * torch.randn(rows, words, generator=generator, dtype=torch.float64)).to(dtype)
    targets, weights = torch.randint(words, (rows,), generator=generator), torch.rand(rows, generator=generator)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.TOGETHER, "cpu", together)
        losses = module._CrossEntropy.apply(first * 1.0, targets)
        (losses * weights).sum().backward()
    expected = nn.functional.cross_entropy(second, targets, reduction="none")
    (expected * weights).sum().backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * max(1.0, spread)} if dtype == torch.float32 else {}
    torch.testing.assert_close(losses, expected, **tolerance)
    torch.testing.assert_close(first.grad, second.grad, **tolerance)


# -- heads that are not trained --------------------------------------------------------------------


@contextmanager
def calls_of(module_):
    """Shapes of what a linear layer returns, without a hook, or how often a model runs."""
    seen, patch = [], pytest.MonkeyPatch()
    linear = nn.functional.linear

    def see(x, weight, bias=None):
        out = linear(x, weight, bias)
        if weight is module_.weight:
            seen.append(out.shape)
        return out

    def run(*args, **kwargs):
        seen.append(None)
        return type(module_).forward(module_, *args, **kwargs)

    if isinstance(module_, nn.Linear):
        patch.setattr(nn.functional, "linear", see)
    else:
        module_.forward = run
    try:
        yield seen
    finally:
        patch.undo()
        module_.__dict__.pop("forward", None) if not isinstance(module_, nn.Linear) else None


def frozen(model):
    """The model without training of its head (and of the token table, where that is the same)."""
    model.get_output_embeddings().requires_grad_(False)
    return model


@pytest.mark.parametrize("name", MADE)
def test_a_frozen_head_reads_one_token_and_gives_the_same(name):
    torch.manual_seed(0)
    model, batch = frozen(MADE[name]()).eval(), masked()
    whole = name in ("Gemma 2", "Granite")  # what they do with their logits has to be differentiated
    for turn in range(2):
        with calls_of(model.get_output_embeddings()) as seen, calls_of(model) as runs:
            losses = losses_of(model, batch)
        assert seen == [(1, 1, 64)] * (turn == 0) + [(1, 8 if whole else 1, 64)]  # the first one tells which
        assert len(runs) == 2 - turn
        mine = gradients(model, losses.sum() / 8)
        output = model(**batch)
        assert output.logits.shape == (3, 7, 64)
        torch.testing.assert_close(losses.sum() / 8, output.loss)
        for a, b in zip(mine, gradients(model, output.loss), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", MADE)
def test_without_gradients_any_head_reads_one_token(name):
    torch.manual_seed(0)
    model, batch = MADE[name]().eval(), masked()
    expected = losses_of(model, batch)
    with torch.no_grad(), calls_of(model.get_output_embeddings()) as seen:
        torch.testing.assert_close(losses_of(model, batch), expected)
    assert seen[-1] == (1, 8 if name in ("Gemma 2", "Granite") else 1, 64)
    with torch.inference_mode(), calls_of(model.get_output_embeddings()) as seen:
        torch.testing.assert_close(losses_of(model, batch), expected)
    assert seen == [(1, 8, 64)]  # which does not tell whether tensors have been changed


def test_modes_and_random_numbers_are_as_they_were():
    """Whether a model returns what its head gives is found out in evaluation mode; only once."""
    torch.manual_seed(0)
    model = frozen(gpt2())
    model.transformer.h[0].eval()
    before = [m.training for m in model.modules()], torch.get_rng_state()
    with calls_of(model) as runs:
        module._returns(model, model.get_output_embeddings(), {"input_ids": masked()["input_ids"]}, (3, 7))
    assert len(runs) == 1
    assert ([m.training for m in model.modules()], before[0]) == (before[0], before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert model.get_output_embeddings() in module._returned


def test_frozen_and_nothing_is_learnt():
    model = frozen(decoder("Llama"))
    batch = masked()
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    losses = losses_of(model, batch)
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0]
    assert not any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


class Doubled(nn.Module):
    """Changes its logits in place, in some batches only."""

    def __init__(self, head):
        super().__init__()
        self.table, self.head = nn.Embedding(64, 16), head
        self.doubles = True

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids):
        logits = self.head(self.table(input_ids))
        return SimpleNamespace(logits=logits.mul_(2) if self.doubles else logits)


@pytest.mark.parametrize("first", [False, True])
def test_logits_that_change_in_place(first):
    """In some batches, whatever the first one has told."""
    torch.manual_seed(0)
    model, batch = Doubled(nn.Linear(16, 64)), masked()
    for doubles in (first, not first, first):
        model.doubles = doubles
        expected = losses_of(model.requires_grad_(True), batch)
        wanted = gradients(model, expected.sum())[:1]
        losses = losses_of(frozen(model), batch)
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(gradients(model, losses.sum()), wanted)


class Swapped(Doubled):
    """Uses other weights than those that it holds afterwards."""

    def forward(self, input_ids):
        held, self.head.weight = self.head.weight, nn.Parameter(2 * self.head.weight, requires_grad=False)
        out = super().forward(input_ids)
        self.head.weight = held
        return out


def test_weights_that_are_there_for_a_moment():
    torch.manual_seed(0)
    model, batch = Swapped(nn.Linear(16, 64, bias=False)), masked()
    model.doubles = False
    losses = losses_of(frozen(model), batch)
    model.head.weight.mul_(2)
    plain = Doubled(model.head)
    plain.table, plain.doubles = model.table, False
    torch.testing.assert_close(losses, losses_of(plain, batch))


class Called(Doubled):
    """Its head reads all tokens, and then some."""

    def forward(self, input_ids):
        out = super().forward(input_ids)
        self.head(self.table(input_ids)[:, :2])
        return out


def test_a_head_that_is_called_twice():
    torch.manual_seed(0)
    model, batch = Called(nn.Linear(16, 64)), masked()
    model.doubles = False
    expected = losses_of(model, batch)
    torch.testing.assert_close(losses_of(frozen(model), batch), expected)
    module._returned[model.head] = True
    torch.testing.assert_close(losses_of(model, batch), expected)


def test_logits_of_other_tokens_are_refused_with_a_frozen_head():
    ids = torch.randint(3, 64, (2, 4))
    labels = torch.full_like(ids, IGNORED)
    labels[:, 2:] = ids[:, 2:]
    with pytest.raises(ValueError, match="logits for"):
        losses_of(frozen(Combined()), {"input_ids": ids, "labels": labels})


class Twice(nn.Linear):
    """A head of a class of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_heads_that_are_not_plain_linear_layers_read_all_learnt_tokens():
    torch.manual_seed(0)
    hooked = nn.Linear(16, 64)
    hooked.register_forward_hook(lambda m, args, output: 2 * output)
    wrapped = nn.Linear(16, 64)
    wrapped.forward = lambda x: 2 * nn.functional.linear(x, wrapped.weight, wrapped.bias)
    for head in (Twice(16, 64), hooked, wrapped):
        model, batch = Doubled(head), masked()
        model.doubles = False
        trained = losses_of(model, batch)
        with calls_of(head) as seen:
            torch.testing.assert_close(losses_of(frozen(model), batch), trained)
        assert seen == [(1, 8, 64)]
    model = Doubled(nn.Linear(16, 64))
    model.doubles = False
    trained = losses_of(model, batch)
    hook = nn.modules.module.register_module_forward_hook(lambda m, args, out: out)
    with calls_of(model.head) as seen:
        torch.testing.assert_close(losses_of(frozen(model), batch), trained)
    hook.remove()
    assert seen == [(1, 8, 64)]


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_head_in_low_precision(low, bias):
    """Logits are rounded as the model's are, sums are not; the gradient is as near to float64's as before."""
    torch.manual_seed(0)
    model, batch = Doubled(nn.Linear(16, 64, bias=bias)), masked()
    model.doubles = False
    exact = copy.deepcopy(model).double()
    (expected,) = gradients(frozen(exact), losses_of(exact, batch).sum())
    found = []
    for trained in (True, False):
        ours = copy.deepcopy(model) if low else copy.deepcopy(model).bfloat16()
        ours.head.requires_grad_(trained)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            losses = losses_of(ours, batch)
        assert losses.dtype == torch.float32
        losses.sum().backward()
        assert ours.table.weight.grad.dtype == (torch.float32 if low else torch.bfloat16)
        found.append((losses, (ours.table.weight.grad - expected).norm() / expected.norm()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    assert found[1][1] < max(1.2 * found[0][1], 4e-3)


@given(
    st.integers(0, 9),
    st.integers(2, 40),
    st.sampled_from([1e-3, 1.0, 30.0, 1e3]),
    st.integers(1, 100),
    st.booleans(),
    st.integers(0, 99),
    st.sampled_from([torch.float32, torch.float64]),
)
@settings(deadline=None, max_examples=60)
def test_losses_of_a_head_are_those_of_torch(rows, words, spread, together, bias, seed, dtype):
    """For pieces of any size."""
    generator = torch.Generator().manual_seed(seed)
    x, weight, offset = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((rows, 5), (words, 5), (words,))
    )
    x *= spread
    targets, weights = (
        torch.randint(words, (rows,), generator=generator),
        torch.rand(rows, generator=generator).to(dtype),
    )
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.APART, "cpu", together)
        losses = module._HeadLoss.apply(first, weight, offset if bias else None, targets)
        (losses * weights).sum().backward()
    logits = nn.functional.linear(second, weight, offset if bias else None)
    expected = nn.functional.cross_entropy(logits, targets, reduction="none")
    (expected * weights).sum().backward()
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, spread)} if dtype == torch.float32 else {}
    torch.testing.assert_close(losses, expected, **tolerance)
    torch.testing.assert_close(first.grad, second.grad, **tolerance)


def test_a_frozen_head_is_differentiated_once_only():
    x = torch.randn(5, 3, requires_grad=True)
    losses = module._HeadLoss.apply(x, torch.randn(7, 3), None, torch.arange(5))
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(losses.sum(), x, create_graph=True)
    first, second = (torch.autograd.grad(losses.sum(), x, retain_graph=True) for _ in range(2))
    torch.testing.assert_close(first, second)


def test_float16_keeps_small_shares():
    """Of four thousand words, each of which has less than float16 can hold; behind a scaled loss, as of GradScaler."""
    torch.manual_seed(0)
    weight = 0.01 * torch.randn(4000, 16)
    weight[:, 0] += 0.25
    weight[7] = torch.eye(16)[1]
    x, weight, target = (18.5 * torch.eye(16)[1:2]).half(), weight.half(), torch.tensor([7])
    (module._HeadLoss.apply(x.requires_grad_(), weight, None, target) * 2**14).sum().backward()
    share = nn.functional.linear(x, weight).detach().double().softmax(1)  # of the logits that float16 holds
    share[0, 7] -= 1
    assert share[0, 8:].max() < 2**-25
    exact = 2**14 * share @ weight.double()
    assert (x.grad.double() - exact).norm() < 0.03 * exact.norm()


def test_no_array_of_the_size_of_the_logits_is_made():
    class Largest(TorchDispatchMode):
        """Entries of the largest tensor that was made."""

        entries = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.entries = max([self.entries, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    model, found = Doubled(nn.Linear(16, 1000)), []
    model.doubles = False
    ids = torch.randint(64, (4, 101), generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(module.APART, "cpu", 20_000)
        for trained in (True, False):
            model.head.requires_grad_(trained)
            with Largest() as largest:
                losses_of(model, {"input_ids": ids, "labels": ids}).sum().backward()
            found.append(largest.entries)
    assert found == [400 * 1000, 20_000]


def test_neurons_with_a_frozen_table_train_as_with_the_loss_of_the_model():
    finals = []
    for own in (False, True):
        torch.manual_seed(0)
        model = decoder("Qwen3, tied")
        optimizer = BlockLLM(model, 1e-3, budget=0.3, granularity="neurons", embeddings="never", switch_every=2)
        with calls_of(model.get_output_embeddings()) as seen:
            for step in range(5):
                batch = masked(step)
                loss = model(**batch).loss if own else losses_of(model, batch).sum() / 8
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert own or set(seen) == {(1, 1, 64)}
        finals.append((loss.detach(), nn.utils.parameters_to_vector(model.parameters())))
    torch.testing.assert_close(*finals, rtol=1e-4, atol=1e-5)


def test_a_compiled_model_with_a_frozen_head():
    torch.manual_seed(0)
    model = frozen(decoder("Llama"))
    compiled = torch.compile(model, backend="eager")
    for k in range(2):
        batch = masked(k)
        pair = losses_of(compiled, batch), losses_of(model, batch)
        torch.testing.assert_close(*pair)
        found = [gradients(model, losses.sum()) for losses in pair]
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize("freeze", [False, True])
def test_a_trainer_with_these_losses(tmp_path, low, freeze):
    """As in the documentation; the same run as with the model's own loss, with accumulated gradients."""
    pytest.importorskip("accelerate")

    class LeanTrainer(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if return_outputs:
                return super().compute_loss(model, inputs, True, num_items_in_batch)
            learnt = (inputs["labels"][:, 1:] != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
            return losses_of(model, inputs).sum() / learnt

    rows = [{name: value[k % 2] for name, value in masked(k // 2).items()} for k in range(12)]
    options = {"max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "report_to": "none"}
    arguments = transformers.TrainingArguments(str(tmp_path), learning_rate=1e-2, use_cpu=True, bf16=low, **options)
    finals = []
    for kind in (transformers.Trainer, LeanTrainer):
        torch.manual_seed(0)
        model = frozen(decoder("Llama")) if freeze else decoder("Llama")
        trainer = kind(model, arguments, train_dataset=rows, eval_dataset=rows)
        trainer.train()
        assert trainer.evaluate()["eval_loss"] > 0
        finals.append(nn.utils.parameters_to_vector(model.parameters()))
    torch.testing.assert_close(*finals, rtol=1e-3, atol=2e-2 if low else 1e-4)
