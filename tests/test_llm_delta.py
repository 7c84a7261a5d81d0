"""Sparse deltas: exact both ways, short, safe to read, and all or nothing."""

import hashlib
import itertools
import json
import os
import pickle
import signal
import tempfile
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from small_models import Bytes, TinyLM, batches, net, tokens, train  # noqa: E402
from torch import nn  # noqa: E402

from llm import BlockLLM, delta_file, tensor_files  # noqa: E402
from llm import delta as delta_module  # noqa: E402
from llm.delta import (  # noqa: E402
    apply_delta,
    delta_info,
    list_deltas,
    merge_deltas,
    remove_delta,
    save_delta,
    swap_deltas,
)
from llm.delta_file import Change, encode  # noqa: E402
from llm.tensor_files import CODES, DTYPES, WORDS, Writer, read_header  # noqa: E402

EVERY = ["tensor", "layer", "rows", "neurons", "entries"]
BY_WIDTH = {1: "U8", 2: "BF16", 4: "F32", 8: "F64"}


def bits(tensor):
    """Row by row, as integers."""
    return tensor.detach().contiguous().view(WORDS[tensor.element_size()]).flatten()


def state(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(bits(a[name]), bits(b[name])) for name in a)


def random_bits(shape, dtype, seed=0):
    """Any bit pattern, NaN payloads and negative zeros among them (but True and False as they are)."""
    generator = torch.Generator().manual_seed(seed)
    words = WORDS[dtype.itemsize]
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    return raw.view(words).view(dtype).view(shape)


def changed_at(tensor, hit, seed=1):
    """A copy with other bits where ``hit``."""
    out = bits(tensor).clone()
    hit = hit.flatten()
    out[hit] ^= torch.ones_like(out[hit]) if tensor.dtype == torch.bool else _odd(out[hit], seed)
    return out.view(tensor.dtype).view(tensor.shape)


def _odd(words, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 100, words.shape, generator=generator).to(words.dtype) | 1


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


# -- exact, short ----------------------------------------------------------------------------------


@st.composite
def changes(draw):
    """A tensor of any type and shape, and which of its entries change: none, some, rows, all."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    base = random_bits(shape, dtype, draw(st.integers(0, 99)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    share = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    per = shape if draw(st.booleans()) else (*shape[:1], *(1 for _ in shape[1:]))
    hit = (torch.rand(per, generator=generator) < share).expand(shape)
    return base, hit


@given(st.lists(changes(), min_size=1, max_size=3))
def test_on_and_off_are_exact_for_every_type_and_shape(cases):
    base = {f"w{k}": tensor for k, (tensor, _) in enumerate(cases)}
    tuned = {f"w{k}": changed_at(tensor, hit) for k, (tensor, hit) in enumerate(cases)}
    model = {name: tensor.clone() for name, tensor in base.items()}
    with tempfile.TemporaryDirectory() as folder:
        delta = save_delta(base, tuned, f"{folder}/a")
        assert delta.entries == sum(int(hit.sum()) for _, hit in cases)
        assert apply_delta(model, delta.path) == delta
        assert same(model, tuned)
        assert remove_delta(model, delta.path) == delta
        assert same(model, base)


def test_what_compares_equal_or_never_equal_is_told_apart(path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base = {"w": torch.tensor([0.0, -0.0, 1.0, 2.0], dtype=dtype)}
        tuned = {"w": torch.tensor([-0.0, 0.0, float("nan"), 2.0], dtype=dtype)}
        payload = {"w": tuned["w"].clone()}
        bits(payload["w"])[2] ^= 1  # another NaN
        assert torch.isnan(payload["w"][2])
        assert save_delta(base, tuned, path).entries == 3
        apply_delta(base, path)
        assert same(base, tuned)
        assert save_delta(tuned, payload, path).entries == 1
        assert save_delta(payload, payload, path).entries == 0


@given(changes())
def test_the_shortest_form_is_taken(case):
    """Over all runs of the last axes, with an index or bits; and it says what changed."""
    base, hit = case
    if not hit.any():
        return
    xor = bits(base) ^ bits(changed_at(base, hit))
    change, stored = encode(xor, base.shape)
    size, width, costs = base.numel(), base.element_size(), []
    for axis in range(base.ndim + 1):
        unit = base[(0,) * axis].numel()
        slices, count = size // unit, int(hit.reshape(-1, unit).any(1).sum())
        costs.append(count * unit * width + (0 if count == slices else min(4 * count, (slices + 7) // 8)))
    assert sum(t.nbytes for t in stored.values()) == min(costs)
    assert torch.equal(change.dense(size), xor)


@pytest.mark.parametrize("width", sorted(BY_WIDTH))
def test_bytes_of_a_changed_entry(width, path):
    """The table of the documentation: whole tensors and rows cost the entry alone, single entries a place besides."""
    base = {"w": random_bits((400, 100), DTYPES[BY_WIDTH[width]])}
    for hit, place in (
        (torch.ones(400, 100, dtype=torch.bool), 0.0),
        ((torch.arange(400) % 10 == 0)[:, None].expand(400, 100), 50 / 4000),
        ((torch.arange(40_000) % 100 == 0).view(400, 100), 4.0),
        ((torch.arange(40_000) % 20 == 7).view(400, 100), 20 / 8),
    ):
        delta = save_delta(base, {"w": changed_at(base["w"], hit)}, path)
        assert (delta.bytes - _header_bytes(path)) / delta.entries == pytest.approx(width + place, rel=0.02)


def _header_bytes(path):
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("granularity", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_an_optimizer_changed(granularity, dtype, path):
    """No more than was active; rows as rows; and the optimizer's model itself goes back and forth in place."""
    model = net().to(dtype)
    base = state(model)
    optimizer = BlockLLM(model, 1e-2, budget=0.1, granularity=granularity, switch_every=None)
    train(model, optimizer, batches(4))
    tuned, where = state(model), [p.data_ptr() for p in model.parameters()]
    delta = save_delta(base, model, path)
    assert 0 < delta.entries <= optimizer.budget
    if granularity == "rows":
        assert all(r.slices * r.unit <= optimizer.active()[r.names[0]] for r in delta.tensors)
    remove_delta(model, path)
    assert same(state(model), base)
    apply_delta(model, path)
    assert same(state(model), tuned)
    assert [p.data_ptr() for p in model.parameters()] == where
    other = net().to(dtype)
    apply_delta(other, path)
    assert same(state(other), tuned)


def test_layouts_that_are_no_vectors(path):
    conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    base = state(conv)
    tuned = {name: changed_at(t.contiguous(), t > 0) for name, t in base.items()}
    save_delta(base, tuned, path)
    apply_delta(conv, path)
    assert same(state(conv), tuned)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    remove_delta(conv, path)
    assert same(state(conv), base)


def test_a_compiled_model_has_the_names_of_the_plain_one(path):
    model = net()
    base, compiled = state(model), torch.compile(model, backend="eager")
    with torch.no_grad():
        model[2].bias += 1
    assert [r.names for r in save_delta(base, compiled, path).tensors] == [("2.bias",)]
    remove_delta(compiled, path)
    assert same(state(model), base)


def test_autograd_sees_that_weights_have_changed(path):
    model = net()
    base = state(model)
    save_delta(base, {n: t + 1 for n, t in base.items()}, path)
    loss = model(batches(1)[0][0]).square().sum()
    apply_delta(model, path)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- tied weights ----------------------------------------------------------------------------------


def tied_pair():
    model, base = TinyLM(), state(TinyLM())
    with torch.no_grad():
        model.tokens.weight[3] += 1
    return model, base


def test_tied_weights_are_stored_once(path):
    tuned, _ = tied_pair()
    delta = save_delta(TinyLM(), tuned, path)
    assert [(r.names, r.slices) for r in delta.tensors] == [(("tokens.weight", "head.weight"), 1)]
    model = TinyLM()
    apply_delta(model, path)
    assert same(state(model), state(tuned))
    assert model.head.weight is model.tokens.weight


@pytest.mark.parametrize("kept", ["tokens.weight", "head.weight"])
def test_a_file_with_one_of_the_names_will_do(kept, path, tmp_path):
    """As save_pretrained writes it."""
    tuned, base = tied_pair()
    single = {n: t for n, t in base.items() if n not in ("tokens.weight", "head.weight") or n == kept}
    safetensors.save_file(single, tmp_path / "model.safetensors")
    for one in (TinyLM(), tmp_path / "model.safetensors"):
        save_delta(one, tuned, path)
        for target in (TinyLM(), single):
            apply_delta(target, path)
            found = target.state_dict() if target is not single else target
            assert torch.equal(found[kept], tuned.tokens.weight)
            remove_delta(target, path)
            assert torch.equal(found[kept], base[kept])


def test_untied_copies_are_changed_each(path):
    tuned, base = tied_pair()
    save_delta(TinyLM(), tuned, path)
    apply_delta(base, path)
    assert same(base, state(tuned))
    remove_delta(base, path)
    assert same(base, state(TinyLM()))


def test_copies_of_tied_weights(path):
    """A state dict of clones, as bases are often kept: stored once if the tuned model is tied; it fits in any case."""
    tuned, base = tied_pair()
    assert [r.names for r in save_delta(base, tuned, path).tensors] == [("head.weight", "tokens.weight")]
    for one in (tuned, state(tuned)):
        save_delta(base, one, path)
        for target in (TinyLM(), state(TinyLM())):
            apply_delta(target, path)
            assert same(state(target) if isinstance(target, nn.Module) else target, state(tuned))
            remove_delta(target, path)
            assert same(state(target) if isinstance(target, nn.Module) else target, base)


def test_deltas_that_tie_differently_do_not_merge(path, tmp_path):
    tuned, base = tied_pair()
    save_delta(base, tuned, path)
    save_delta(base, state(tuned), tmp_path / "b")
    for paths in ([path, tmp_path / "b"], [tmp_path / "b", path]):
        with pytest.raises(ValueError, match="must be one tensor in all deltas or apart in all"):
            merge_deltas(paths, tmp_path / "m")


def test_ties_that_do_not_fit_are_refused(path):
    tied, apart = TinyLM(), state(TinyLM())
    changed = {n: t.clone() for n, t in apart.items()}
    changed["head.weight"][0] += 1
    with pytest.raises(ValueError, match=r"tokens\.weight and head\.weight are one tensor in base but differ in tuned"):
        save_delta(tied, changed, path)
    save_delta(apart, changed, path)
    save_delta(apart, {n: t + len(n) for n, t in apart.items()}, path)
    before = state(tied)
    with pytest.raises(ValueError, match=r"'head.weight' and 'tokens.weight' in different ways, which are one tensor"):
        apply_delta(tied, path)
    assert same(state(tied), before)


# -- folders ---------------------------------------------------------------------------------------


def folder_of(tensors, folder, shards):
    """A model folder with other files beside; content of all files."""
    folder.mkdir()
    (folder / "extra").mkdir()
    for file in ("config.json", "extra/model.safetensors"):
        (folder / file).write_text("{}")
    names = sorted(tensors)
    if shards == 1:
        safetensors.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return files_of(folder)
    where = {name: f"model-{1 + k % shards:05}-of-{shards:05}.safetensors" for k, name in enumerate(names)}
    for file in set(where.values()):
        safetensors.save_file({n: tensors[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return files_of(folder)


def files_of(folder):
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_go_on_and_off_to_the_byte(shards, dtype, tmp_path, path):
    base = state(net().to(dtype))
    tuned = {n: changed_at(t, torch.rand(t.shape, generator=torch.Generator()) < 0.2) for n, t in base.items()}
    tuned["4.bias"] = base["4.bias"]
    plain = folder_of(base, tmp_path / "base", shards)
    goal = folder_of(tuned, tmp_path / "tuned", shards)
    delta = save_delta(tmp_path / "base", str(tmp_path / "tuned"), path)
    assert delta.tensors == save_delta(base, tuned, tmp_path / "b").tensors
    apply_delta(tmp_path / "base", path)
    assert files_of(tmp_path / "base") == goal
    remove_delta(str(tmp_path / "base"), path)
    assert files_of(tmp_path / "base") == plain
    apply_delta(tmp_path / "base", path, out=tmp_path / "new")
    assert files_of(tmp_path / "new") == goal
    assert files_of(tmp_path / "base") == plain
    remove_delta(tmp_path / "new", path, out=str(tmp_path / "old"))
    assert files_of(tmp_path / "old") == plain
    assert sorted(f.name for f in tmp_path.iterdir()) == ["a.safetensors", "b", "base", "new", "old", "tuned"]


def test_single_files_are_models_too(tmp_path, path):
    base = state(net())
    safetensors.save_file(base, tmp_path / "m.safetensors")
    before = (tmp_path / "m.safetensors").read_bytes()
    save_delta(tmp_path / "m.safetensors", {n: t + 1 for n, t in base.items()}, path)
    apply_delta(tmp_path / "m.safetensors", path, out=tmp_path / "n.safetensors")
    assert torch.equal(safetensors.load_file(tmp_path / "n.safetensors")["2.bias"], base["2.bias"] + 1)
    assert (tmp_path / "m.safetensors").read_bytes() == before
    apply_delta(tmp_path / "m.safetensors", path)
    assert (tmp_path / "m.safetensors").read_bytes() == (tmp_path / "n.safetensors").read_bytes()


def test_a_folder_with_one_file_of_another_name_is_a_model(tmp_path, path):
    (tmp_path / "m").mkdir()
    safetensors.save_file(state(net()), tmp_path / "m" / "weights.safetensors")
    assert save_delta(net(), tmp_path / "m", path).entries == 0
    safetensors.save_file(state(net()), tmp_path / "m" / "more.safetensors")
    with pytest.raises(ValueError, match=r"must hold model.safetensors, or .*; found 2 of these"):
        save_delta(net(), tmp_path / "m", path)


def test_pickles_are_never_read(tmp_path, path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "bang"),)

    (tmp_path / "m").mkdir()
    for name in ("pytorch_model.bin", "model.pt"):
        (tmp_path / "m" / name).write_bytes(pickle.dumps(Bomb()))
    for one in (tmp_path / "m", tmp_path / "m" / "model.pt"):
        with pytest.raises(ValueError, match=r"Weights in pickles|no safetensors file|no JSON"):
            save_delta(one, net(), path)
    assert not (tmp_path / "bang").exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("[]", "weight_map must map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "weight_map must map names of tensors to files of the same"),
        ('{"weight_map": {"a": 3}}', "weight_map must map"),
        ('{"weight_map": {"a": "b.safetensors"}}', "b.safetensors: no such file"),
        ('{"weight_map": {"a": "one.safetensors"}}', "tensor 'a' must be in one.safetensors, which lacks it"),
        ('{"weight_map": ', "the index is no JSON"),
    ],
)
def test_indices_of_shards(index, message, tmp_path, path):
    (tmp_path / "m").mkdir()
    safetensors.save_file({"b": torch.ones(1)}, tmp_path / "m" / "one.safetensors")
    (tmp_path / "m" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        save_delta(tmp_path / "m", net(), path)


def test_models_of_transformers(tmp_path, path):
    """A tied model in a folder and in memory; what was saved loads."""
    transformers = pytest.importorskip("transformers")
    from test_llm_models import decoder

    torch.manual_seed(0)
    model = decoder("Qwen3, tied")
    model.save_pretrained(tmp_path / "base", max_shard_size="8KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    with torch.no_grad():
        model.model.embed_tokens.weight[5] += 1
        model.model.layers[1].mlp.up_proj.weight.add_(1)
    delta = save_delta(tmp_path / "base", model, path)
    assert [r.names[0].rsplit(".", 2)[1] for r in delta.tensors] == ["embed_tokens", "up_proj"]
    apply_delta(tmp_path / "base", path, out=tmp_path / "tuned")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert same(state(loaded), state(model))
    remove_delta(loaded, path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert same(state(loaded), state(again))


# -- all or nothing --------------------------------------------------------------------------------


def pair():
    base = state(net())
    return base, {n: changed_at(t, torch.ones_like(t, dtype=torch.bool)) for n, t in base.items()}


@pytest.mark.parametrize("at", range(1, 7))
@pytest.mark.parametrize("late", [False, True])
def test_whatever_comes_between_leaves_the_model_as_it_was(at, late, path, monkeypatch):
    base, tuned = pair()
    save_delta(base, tuned, path)
    model, calls, write = net(), [], delta_module._write

    def torn(*arguments):
        calls.append(1)
        if len(calls) == at and not late:
            raise KeyboardInterrupt
        write(*arguments)
        if len(calls) == at:
            raise MemoryError

    monkeypatch.setattr(delta_module, "_write", torn)
    for start, act in ((base, apply_delta), (tuned, remove_delta)):
        model.load_state_dict(start)
        calls.clear()
        with pytest.raises(MemoryError if late else KeyboardInterrupt):
            act(model, path)
        assert same(state(model), start)


def test_two_ctrl_c_in_a_row(path, monkeypatch):
    """The second comes while the first is being undone."""
    base, tuned = pair()
    save_delta(base, tuned, path)
    model, put, count = net(), Change.put, [0]

    def pressed(self, words, values):
        put(self, words, values)
        count[0] += 1
        if count[0] in (3, 5):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Change, "put", pressed)
    with pytest.raises(KeyboardInterrupt):
        apply_delta(model, path)
    assert count[0] >= 5
    assert same(state(model), base)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("at", range(1, 7))
def test_files_are_replaced_all_or_none(at, tmp_path, path, monkeypatch):
    base, tuned = pair()
    before = folder_of(base, tmp_path / "m", 3)
    save_delta(base, tuned, path)
    replace, calls = os.replace, []

    def torn(source, target):
        calls.append(target)
        if len(calls) == at:
            raise OSError("no space left")
        replace(source, target)

    monkeypatch.setattr(os, "replace", torn)
    with pytest.raises(OSError, match="no space left"):
        apply_delta(tmp_path / "m", path)
    monkeypatch.undo()
    assert files_of(tmp_path / "m") == before
    assert not [f for f in (tmp_path / "m").iterdir() if f.name.startswith(".")]


@pytest.mark.parametrize("at", [1, 2])
def test_a_process_killed_between_two_files_is_undone_at_the_next_look(at, tmp_path, path, monkeypatch):
    base, tuned = pair()
    before, goal = folder_of(base, tmp_path / "m", 3), folder_of(tuned, tmp_path / "t", 3)
    save_delta(base, tuned, path)
    replace, calls = os.replace, []

    def killed(source, target):
        if ".delta-" in str(source) and not str(source).endswith(".part"):
            calls.append(target)
            if len(calls) > at:
                raise SystemExit
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        patch.setattr(tensor_files, "_undo", lambda folder: None)
        with pytest.raises(SystemExit):
            apply_delta(tmp_path / "m", path)
    changed = [name for name in goal if (tmp_path / "m" / name).read_bytes() != before[name]]
    assert len(changed) == at
    apply_delta(tmp_path / "m", path)
    assert files_of(tmp_path / "m") == goal


def test_a_failed_save_leaves_the_old_file(path, tmp_path, monkeypatch):
    base, tuned = pair()
    save_delta(base, tuned, path)
    before = path.read_bytes()
    tuned["6.bias"] = tuned["6.bias"].double()
    with pytest.raises(ValueError, match=r"tensor '6.bias' must have one type and shape; found F32 of shape \[5\] in"):
        save_delta(base, tuned, path)

    def full(source, target, length):
        target.write(source.read(100))
        raise OSError("no space left")

    monkeypatch.setattr("shutil.copyfileobj", full)
    with pytest.raises(OSError, match="no space left"):
        save_delta(base, {n: t + 2 for n, t in base.items()}, path)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("files", [False, True])
def test_memory_holds_a_few_tensors(files, tmp_path, path, monkeypatch):
    """However many there are."""
    base = {f"w{k}": torch.randn(64, 256) for k in range(40)}
    tuned = {n: t + 1 for n, t in base.items()}
    one = base["w0"].nbytes
    if files:
        folder_of(base, tmp_path / "m", 3)
    for act in (
        lambda: save_delta(tmp_path / "m" if files else base, tuned, path),
        lambda: apply_delta(tmp_path / "m" if files else base, path),
        lambda: remove_delta(tmp_path / "m" if files else base, path),
    ):
        with Bytes(nn.ParameterList([nn.Parameter(t) for t in [*base.values(), *tuned.values()]])) as memory:
            act()
        assert memory.peak < 8 * one


# -- what is refused -------------------------------------------------------------------------------


def test_a_delta_goes_on_its_base_alone(path):
    base, tuned = pair()
    save_delta(base, tuned, path)
    model = {n: t.clone() for n, t in base.items()}
    with pytest.raises(ValueError, match=r"a.safetensors: is not applied to the model"):
        remove_delta(model, path)
    apply_delta(model, path)
    with pytest.raises(ValueError, match=r"a.safetensors: is already applied to the model"):
        apply_delta(model, path)
    model["4.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"tensor '4.weight' of the model is not that of the base with this delta on"):
        remove_delta(model, path)
    assert not same(model, base)
    with pytest.raises(ValueError, match=r"tensor '0.weight' must be F32 of shape \[20, 8\] in the model; found BF16"):
        apply_delta({n: t.bfloat16() for n, t in base.items()}, path)
    with pytest.raises(ValueError, match=r"changes tensor '6.bias', which the model lacks"):
        apply_delta({n: t for n, t in base.items() if n != "6.bias"}, path)
    assert apply_delta({**base, "another": torch.ones(2)}, path).entries == 1045


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda b, t: (b, {**t, "x": torch.ones(1)}), "base must have the tensors of tuned; it lacks 'x'"),
        (lambda b, t: ({**b, "x": torch.ones(1)}, t), "tuned must have the tensors of base; it lacks 'x'"),
        (lambda b, t: ([b], t), "base must be a module, a state dict, a folder or a file; found list"),
        (lambda b, t: (b, "nowhere"), "nowhere: no such file or folder"),
        (lambda b, t: ({**b, "x": 3.0}, t), "base: 'x' must be a plain tensor; found float"),
        (lambda b, t: ({"x": torch.ones(1, device="meta")}, t), "must be a dense tensor with data, .* on meta"),
        (lambda b, t: ({"x": torch.ones(1, dtype=torch.complex128)}, t), "of a type that safetensors can store"),
        (lambda b, t: ({"x": torch.eye(2).to_sparse()}, t), "must be a dense tensor with data"),
        (lambda b, t: (overlapping(), t), "base: 'x' and 'y' share memory in part; make one of them a copy"),
    ],
)
def test_models_that_do_not_fit(arguments, message, path):
    base, tuned = pair()
    with pytest.raises(ValueError, match=message):
        save_delta(*arguments(base, tuned), path)
    assert not path.exists()


def overlapping():
    row = torch.arange(5.0)
    return {"x": row[:3], "y": row[2:]}


def test_places_where_nothing_can_be_written(tmp_path, path):
    base, tuned = pair()
    for bad in (tmp_path / "no" / "a", tmp_path):
        with pytest.raises(ValueError, match="must be a file in a folder that exists"):
            save_delta(base, tuned, bad)
    save_delta(base, tuned, path)
    with pytest.raises(ValueError, match=r"out='x' needs a model that is a folder or a file; found dict"):
        apply_delta(base, path, out="x")
    folder_of(base, tmp_path / "m", 1)
    for bad in (tmp_path / "m", tmp_path / "no" / "a"):
        with pytest.raises(ValueError, match="must be a new name in a folder that exists"):
            apply_delta(tmp_path / "m", path, out=bad)


def test_other_files_and_later_versions(path, tmp_path):
    safetensors.save_file({"x": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"a.safetensors: is no delta: its metadata lack format"):
        delta_info(path)
    with Writer(path) as writer:
        writer.finish({"format": delta_file.FORMAT, "version": "2"})
    with pytest.raises(ValueError, match=r"a.safetensors: has version '2'; this program reads version '1'"):
        delta_info(path)
    with pytest.raises(ValueError, match="no such file"):
        delta_info(tmp_path / "none")


# -- hostile files ---------------------------------------------------------------------------------


def small_pair():
    """Every form in one file: whole, rows by index and by bits, entries; two types; tied."""
    shared = random_bits((40, 6), torch.float32, 5)
    base = {
        "whole": random_bits((3, 2), torch.bfloat16),
        "tied": shared,
        "tied.too": shared,
        "rows": random_bits((300, 6), torch.float32, 2),
        "entries": random_bits((50, 7), torch.uint8, 3),
        "same": random_bits((2,), torch.int64, 4),
    }
    few = torch.arange(300) == 7
    hits = {
        "whole": torch.ones(3, 2),
        "tied": (torch.arange(40) % 2)[:, None].expand(40, 6),
        "rows": few[:, None].expand(300, 6),
        "entries": (torch.arange(350) == 300).view(50, 7),
        "same": torch.zeros(2),
    }
    tuned = {name: changed_at(base[name], hit.bool()) for name, hit in hits.items()}
    return base, {**tuned, "tied.too": tuned["tied"]}


def put_file(content):
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "bad.safetensors"
    path.write_bytes(content)
    return folder, path


def message(act):
    """Of the ValueError; None if there is none."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return None


def refused_or_right(content):
    """Reading, applying and merging end in a ValueError that names the file, the model untouched, or in success."""
    base, tuned = small_pair()
    folder, path = put_file(content)
    with folder:
        for act in (
            lambda: delta_info(path),
            lambda: apply_delta(base, path),
            lambda: merge_deltas([path, path], Path(folder.name) / "merged"),
        ):
            before = {name: tensor.clone() for name, tensor in base.items()}
            said = message(act)
            assert said is None or "bad.safetensors" in said
            assert same(base, before) or (said is None and same(base, tuned))
    return same(base, tuned)


def good():
    folder, path = put_file(b"")
    with folder:
        save_delta(*small_pair(), path)
        return path.read_bytes()


GOOD = None


def content():
    global GOOD
    GOOD = GOOD or good()
    return GOOD


def test_the_file_that_is_spoilt_below_has_every_form():
    folder, path = put_file(content())
    with folder:
        kinds = {name.rpartition(".")[2] for name in read_header(path)[1]}
    assert kinds == {"xor", "index", "bits"}
    assert refused_or_right(content())


@given(st.binary(max_size=300))
def test_bytes_of_any_kind(data):
    assert not refused_or_right(data)
    assert not refused_or_right(len(data).to_bytes(8, "little") + data)


@given(st.data())
def test_truncated_files(data):
    size = data.draw(st.integers(0, len(content()) - 1))
    assert not refused_or_right(content()[:size])
    assert not refused_or_right(content() + b"\0" * (1 + size % 9))


@settings(max_examples=200)
@given(st.data())
def test_flipped_bits(data):
    """Found wherever they are, but for blanks of the JSON."""
    spoilt = bytearray(content())
    for _ in range(data.draw(st.integers(1, 3))):
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= data.draw(st.integers(1, 255))
    refused_or_right(bytes(spoilt))


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-400, 400) | st.integers(2**31, 2**70),
    st.sampled_from([0, 1, 2, 3, 6, 7, 40, 300, 350, 2**31, 2**62]),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["F32", "U8", "I64", "BF16", "BOOL", "F4", "whole", "tied", "rows", "0" * 64]),
    st.lists(st.integers(-2, 400), max_size=4),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def paths_of(value, at=()):
    """Where something stands in nested JSON."""
    yield at
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from paths_of(one, (*at, key))


def altered(value, at, new):
    if not at:
        return new
    out = value.copy()
    if new is DROP and len(at) == 1:
        del out[at[0]]
    else:
        out[at[0]] = altered(value[at[0]], at[1:], new)
    return out


DROP = object()


def rebuilt(header, data):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def taken_apart():
    length = int.from_bytes(content()[:8], "little")
    return json.loads(content()[8 : 8 + length]), content()[8 + length :]


@settings(max_examples=200)
@given(st.data())
def test_altered_headers(data):
    header, rest = taken_apart()
    at = data.draw(st.sampled_from([p for p in paths_of(header) if p]))
    refused_or_right(rebuilt(altered(header, at, data.draw(VALUES | st.just(DROP))), rest))


@settings(max_examples=200)
@given(st.data())
def test_altered_records_with_a_new_seal(data):
    """Whoever alters a file on purpose can compute hashes as well: nothing may break, no model half changed."""
    header, rest = taken_apart()
    metadata = header["__metadata__"]
    records = json.loads(metadata["tensors"])
    at = data.draw(st.sampled_from(list(paths_of(records))))
    new = data.draw(VALUES | st.just(DROP))
    metadata["tensors"] = json.dumps(altered(records, at, new) if at or new is not DROP else [])
    sealed = "\n".join(metadata[key] for key in ("format", "version", "base", "tensors"))
    metadata["sha256"] = hashlib.sha256(sealed.encode("utf-8", "surrogatepass")).hexdigest()
    refused_or_right(rebuilt(header, rest))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ([], "the header must be a JSON object; found list"),
        ({"__metadata__": {"a": 1}}, "__metadata__ must map strings to strings"),
        ({"a": 5}, "tensor 'a' must have one of the types BOOL, .*; found None"),
        ({"a": {**ENTRY, "dtype": "F4"}}, "must have one of the types .*; found 'F4'"),
        ({"a": {**ENTRY, "shape": [2.0]}}, r"must have a shape and data_offsets; found \[2\.0\], \[0, 8\]"),
        ({"a": {**ENTRY, "shape": [True, 2]}}, "must have a shape and data_offsets"),
        ({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, "must have a shape and data_offsets"),
        ({"a": {**ENTRY, "data_offsets": [-8, 0]}}, "must have a shape and data_offsets"),
        ({"a": {**ENTRY, "shape": [3]}}, r"tensor 'a' of F32 and shape \[3\] cannot lie at \[0, 8\]"),
        ({"a": {**ENTRY, "shape": [2**62, 2**62]}}, "cannot lie at"),
        ({"a": ENTRY, "b": ENTRY}, "tensors must fill the data without gaps; byte"),
        ({"a": ENTRY, "b": {**ENTRY, "data_offsets": [4, 12]}}, "tensors must fill the data without gaps; byte"),
        ({"a": {**ENTRY, "data_offsets": [8, 16]}}, "tensors must fill the data without gaps; byte"),
        ({}, r"must have \d+ bytes by its header; found \d+"),
        ({"a": {**ENTRY, "data_offsets": [0, 8]}, "b": {**ENTRY, "data_offsets": [8, 16]}}, None),
    ],
)
def test_rules_of_safetensors(header, said, path):
    path.write_bytes(rebuilt(header, bytes(16)))
    if said is None:
        assert sorted(read_header(path)[1]) == ["a", "b"]
    else:
        with pytest.raises(ValueError, match=said):
            read_header(path)


def test_headers_that_are_no_json(path):
    for text in (b"{", b"\xff", b"[" * 100_000, b'{"a": NaN'):
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        with pytest.raises(ValueError, match=r"a\.safetensors: the header is no JSON"):
            read_header(path)
    path.write_bytes((2**40).to_bytes(8, "little"))
    with pytest.raises(ValueError, match=r"is cut short, or no .* \(8 bytes, a header of 1099511627776\)"):
        read_header(path)


def test_what_metadata_say_is_sealed(path):
    """A number that nothing else would contradict."""
    delta = save_delta(*small_pair(), path)
    entries = f'entries\\":{delta.tensors[1].entries}'.encode()
    path.write_bytes(path.read_bytes().replace(entries, entries[:-1] + b"5"))
    with pytest.raises(ValueError, match=r"a\.safetensors: the metadata are damaged"):
        delta_info(path)


@pytest.mark.parametrize("index", [[-1], [300], [2**31 - 1]])
def test_slices_that_do_not_exist(index, path):
    """With right hashes everywhere."""
    base, tuned = small_pair()
    delta = save_delta({"rows": base["rows"]}, {"rows": tuned["rows"]}, path)
    (record,) = delta.tensors
    xor, where = delta.change(record).xor, torch.tensor(index, dtype=torch.int32)
    with Writer(path) as writer:
        writer.add("rows.index", where)
        writer.add("rows.xor", xor)
        data = tensor_files.sha256(where, xor)
        delta_file.finish(writer, delta.base, [delta_file.Record(**{**vars(record), "data": data})])
    with pytest.raises(ValueError, match="'rows' must name 1 of 300 slices in ascending order"):
        apply_delta(base, path)


def test_damage_of_the_data_is_found_before_anything_is_touched(path):
    """In the last tensor, on the way on and on the way off."""
    base, tuned = small_pair()
    save_delta(base, tuned, path)
    spoilt = bytearray(path.read_bytes())
    spoilt[-1] ^= 1
    path.write_bytes(spoilt)
    for act, model in ((apply_delta, base), (remove_delta, tuned)):
        before = {n: t.clone() for n, t in model.items()}
        with pytest.raises(ValueError, match=r"a.safetensors: the data of tensor '\w+' are damaged"):
            act(model, path)
        assert same(model, before)


@given(st.data())
def test_spoilt_shards_are_refused_by_name(data):
    """Model files are read with the same care."""
    with tempfile.TemporaryDirectory() as folder:
        shard = Path(folder) / "model.safetensors"
        safetensors.save_file({"a": torch.ones(3), "b": torch.zeros(2, 2, dtype=torch.bfloat16)}, shard)
        spoilt = bytearray(shard.read_bytes())
        spoilt[data.draw(st.integers(0, len(spoilt) - 1))] ^= data.draw(st.integers(1, 255))
        shard.write_bytes(spoilt[: data.draw(st.integers(0, len(spoilt)) | st.just(len(spoilt)))])
        said = message(lambda: read_header(shard))
        assert said is None or "model.safetensors" in said
        if said is None:
            theirs, ours = safetensors.load_file(shard), read_header(shard)[1]
            assert {n: bits(t).tolist() for n, t in theirs.items()} == {n: t.read().tolist() for n, t in ours.items()}


def test_files_are_plain_safetensors(path):
    """Readable with the package, aligned, and described."""
    base, tuned = small_pair()
    delta = save_delta(base, tuned, path)
    loaded = safetensors.load_file(path)
    assert torch.equal(loaded["whole.xor"].flatten(), bits(base["whole"]) ^ bits(tuned["whole"]))
    with safetensors.safe_open(path, "pt") as file:
        assert [r["names"] for r in json.loads(file.metadata()["tensors"])] == [
            ["entries"],
            ["rows"],
            ["tied", "tied.too"],
            ["whole"],
        ]
        assert file.metadata()["version"] == "1"
    places = read_header(path)[1]
    assert all(place.start % DTYPES[place.dtype].itemsize == 0 for place in places.values())
    assert {name: (CODES[t.dtype], tuple(t.shape)) for name, t in loaded.items()} == {
        name: (place.dtype, place.shape) for name, place in places.items()
    }
    assert set(delta.as_dict()) == {"path", "base", "bytes", "entries", "tensors"}
    json.dumps(delta.as_dict())
    text = str(delta)
    assert "4 tensors" in text
    assert "tied = tied.too" in text
    assert "1 of 300 slices of 6" in text
    assert "whole" in text


# -- many deltas -----------------------------------------------------------------------------------


def three(tmp_path):
    """A base, and three models that change rows 0-3, 2-5 and 6-7 of one matrix, and one of them another tensor."""
    base = {
        "w": torch.randn(8, 4, generator=torch.Generator().manual_seed(0)),
        "n": torch.arange(3),
        "z": torch.ones(2),
    }
    models = []
    for k, rows in enumerate((slice(0, 4), slice(2, 6), slice(6, 8))):
        tuned = {name: t.clone() for name, t in base.items()}
        tuned["w"][rows] += k + 1
        models.append(tuned)
    models[2]["z"][0] = models[0]["w"][0, 0] = -0.0  # which no sum gives
    paths = [tmp_path / f"{k}.safetensors" for k in range(3)]
    for path, tuned in zip(paths, models, strict=True):
        save_delta(base, tuned, path)
    return base, models, paths


def applied(base, path):
    model = {name: t.clone() for name, t in base.items()}
    apply_delta(model, path)
    return model


@pytest.mark.parametrize("conflict", ["error", "last", "sum"])
def test_disjoint_deltas_merge_to_the_bit(conflict, tmp_path):
    base, models, paths = three(tmp_path)
    merge_deltas([paths[0], paths[2]], tmp_path / "m", conflict=conflict, base=base)
    found = applied(base, tmp_path / "m")
    rows = torch.cat([models[0]["w"][:4], base["w"][4:6], models[2]["w"][6:]])
    assert same(found, {"w": rows, "n": base["n"], "z": models[2]["z"]})


def test_conflicts_are_settled_as_asked(tmp_path):
    base, models, paths = three(tmp_path)
    out = tmp_path / "m"
    with pytest.raises(ValueError, match=r"1.safetensors: changes 8 entries of 'w' that another delta changes other"):
        merge_deltas(paths, out)
    assert not out.exists()
    merge_deltas(paths, out, conflict="last")
    found = applied(base, out)["w"]
    assert torch.equal(found, torch.cat([models[0]["w"][:2], models[1]["w"][2:6], models[2]["w"][6:]]))
    merge_deltas(paths, out, conflict="sum", base=base)
    found = applied(base, out)["w"]
    torch.testing.assert_close(found[2:4], base["w"][2:4] + 3)
    assert torch.equal(bits(found[:2]), bits(models[0]["w"][:2]))
    assert torch.equal(bits(found[4:6]), bits(models[1]["w"][4:6]))


def test_equal_changes_agree_but_add_up(tmp_path):
    base, models, paths = three(tmp_path)
    merge_deltas([paths[0], paths[0]], tmp_path / "m")
    assert same(applied(base, tmp_path / "m"), models[0])
    merge_deltas([paths[0], paths[0]], tmp_path / "m", conflict="sum", base=base)
    torch.testing.assert_close(applied(base, tmp_path / "m")["w"][1:4], base["w"][1:4] + 2)


def test_opposite_changes_cancel(tmp_path):
    base = {"w": torch.full((3,), 1.5, dtype=torch.bfloat16)}
    for k, step in enumerate((0.25, -0.25)):
        save_delta(base, {"w": base["w"] + step}, tmp_path / f"{k}")
    assert merge_deltas([tmp_path / "0", tmp_path / "1"], tmp_path / "m", conflict="sum", base=base).tensors == ()


def test_one_delta_merged_is_itself(tmp_path):
    _, _, paths = three(tmp_path)
    merge_deltas(paths[2:], tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == paths[2].read_bytes()


def test_merging_what_does_not_belong_together(tmp_path):
    base, _, paths = three(tmp_path)
    other = {**base, "z": base["z"] + 5}
    save_delta(other, {**other, "n": base["n"] + 1}, tmp_path / "x")
    with pytest.raises(ValueError, match=r"x: must be of the base of .*0.safetensors; it is of another"):
        merge_deltas([paths[0], tmp_path / "x"], tmp_path / "m")
    with pytest.raises(ValueError, match="paths must name at least one delta; found none"):
        merge_deltas([], tmp_path / "m")
    with pytest.raises(ValueError, match="conflict must be one of error, last, sum; found 'first'"):
        merge_deltas(paths, tmp_path / "m", conflict="first")
    with pytest.raises(ValueError, match='conflict="sum" needs base='):
        merge_deltas(paths, tmp_path / "m", conflict="sum")
    with pytest.raises(ValueError, match="base must be that of the deltas; its tensor 'w' is another, or missing"):
        merge_deltas(paths, tmp_path / "m", conflict="sum", base={**base, "w": base["w"] + 1})


def test_whole_numbers_are_not_added(tmp_path):
    base = {"n": torch.arange(4)}
    for k in (1, 2):
        save_delta(base, {"n": base["n"] + 8 * k}, tmp_path / f"{k}")
    with pytest.raises(ValueError, match='"sum" adds what are no whole numbers'):
        merge_deltas([tmp_path / "1", tmp_path / "2"], tmp_path / "m", conflict="sum", base=base)


def test_tied_names_meet_in_a_merge(tmp_path):
    """A delta from a file with one of the names, and one from the module with both."""
    first, _ = tied_pair()
    second = TinyLM()
    with torch.no_grad():
        second.tokens.weight[7] -= 1
    one_name = {n: t for n, t in TinyLM().state_dict().items() if n != "tokens.weight"}
    save_delta(one_name, {n: t for n, t in first.state_dict().items() if n in one_name}, tmp_path / "0")
    save_delta(TinyLM(), second, tmp_path / "1")
    merge_deltas([tmp_path / "0", tmp_path / "1"], tmp_path / "m")
    model = TinyLM()
    apply_delta(model, tmp_path / "m")
    assert torch.equal(model.tokens.weight[3], first.tokens.weight[3])
    assert torch.equal(model.tokens.weight[7], second.tokens.weight[7])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 9))
@settings(max_examples=12)
def test_deltas_are_swapped_on_one_base(order, seed):
    """In any order, and the base comes back in the end."""
    base = state(net())
    model = net()
    generator = torch.Generator().manual_seed(seed)
    tuned = [
        {n: changed_at(t, torch.rand(t.shape, generator=generator) < 0.3, k) for n, t in base.items()} for k in range(5)
    ]
    with tempfile.TemporaryDirectory() as folder:
        paths = [f"{folder}/{k}" for k in range(5)]
        for path, one in zip(paths, tuned, strict=True):
            save_delta(base, one, path)
        apply_delta(model, paths[order[0]])
        for old, new in itertools.pairwise(order):
            swap_deltas(model, paths[old], paths[new])
            assert same(state(model), tuned[new])
        remove_delta(model, paths[order[-1]])
        assert same(state(model), base)


def test_a_swap_that_fails_leaves_the_old_delta_on(tmp_path):
    base, models, paths = three(tmp_path)
    save_delta({**base, "w": base["w"] + 1}, {**base, "w": base["w"] + 2}, tmp_path / "x")
    model = applied(base, paths[0])
    with pytest.raises(ValueError, match="tensor 'w' of the model is not that of the base"):
        swap_deltas(model, paths[0], tmp_path / "x")
    assert same(model, models[0])


def test_two_deltas_at_once_are_refused_with_advice(tmp_path):
    base, _, paths = three(tmp_path)
    model = applied(base, paths[0])
    with pytest.raises(ValueError, match="take off what was put on since, or make one delta of several with merge_del"):
        apply_delta(model, paths[1])


def test_deltas_of_a_folder(tmp_path):
    _, _, paths = three(tmp_path)
    safetensors.save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("no delta")
    assert [delta.path for delta in list_deltas(tmp_path)] == paths
    with pytest.raises(ValueError, match="nothing: no such folder"):
        list_deltas(tmp_path / "nothing")
    (tmp_path / "x.safetensors").write_bytes(b"spoilt")
    with pytest.raises(ValueError, match=r"x.safetensors: is cut short, or no safetensors file \(6 bytes"):
        list_deltas(tmp_path)


def test_a_run_continues_after_a_detour_over_the_base(path):
    """Optimizer state is untouched: taking off and putting on again changes nothing."""
    finals = []
    for detour in (False, True):
        model = TinyLM()
        base, optimizer = state(model), BlockLLM(model, 1e-2, budget=0.2, switch_every=3)
        for k, x in enumerate(tokens(8)):
            if detour and k == 5:
                save_delta(base, model, path)
                remove_delta(model, path)
                apply_delta(model, path)
            optimizer.zero_grad()
            model(x, x)["loss"].backward()
            optimizer.step()
        finals.append(state(model))
    assert same(*finals)
