# SPDX-License-Identifier: BSD-3-Clause
"""Every file that bcd reads, broken in every way: no crash, no hang, nothing unpickled, one clear sentence.

test_libsvm.py and test_cli.py have the errors one by one; here whole files are drawn, and the commands that read them
run. Commands get little time and few steps, so that a run that hangs is seen.
"""

import bz2
import gzip
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from typer.testing import CliRunner

import bcd
from bcd import cli, libsvm
from bcd.result import Status

run = CliRunner()
SOON = 30.0  # seconds, of which compiling takes most
few = settings(max_examples=40)
READY = {0, 2, 3, 4}  # see bcd/cli.py


def outcome(*words):
    """Run ``bcd``; whatever it reads, it ends soon, with an exit code of its own and one line that says why."""
    started = time.perf_counter()
    done = run.invoke(cli.app, [str(word) for word in words])
    assert time.perf_counter() - started < SOON
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code in READY, done.output
    if done.exit_code == 2:
        *notes, last = done.stderr.splitlines()
        assert last.startswith("bcd: ")
        assert all(note.startswith("bcd: warning:") for note in notes)
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def damaged(content, most=6):
    """Strategy: the same bytes with pieces replaced, removed, repeated or put in."""
    edit = st.tuples(st.integers(0, len(content)), st.integers(0, 20), st.binary(max_size=8) | st.just(content[:30]))

    def apply(edits):
        data = content
        for at, length, piece in edits:
            data = data[:at] + piece + data[at + length :]
        return data

    return st.lists(edit, min_size=1, max_size=most).map(apply)


# -- npz problems -------------------------------------------------------------------------------


def packed(save=np.savez, **arrays):
    stream = io.BytesIO()
    save(stream, **arrays)
    return stream.getvalue()


GOOD = {"Q": np.diag([1.0, 2.0, 4.0]), "c": np.ones(3), "lower": 0.0, "total": 7.0}
wild = st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from([0.0, -0.0, 1e308, -1e308, 5e-324, 1e-160])
tame = st.integers(-3, 3).map(float)
number = st.one_of(tame, tame, wild)
any_array = hnp.arrays(
    st.one_of(hnp.scalar_dtypes(), hnp.unicode_string_dtypes(max_len=3), hnp.byte_string_dtypes(max_len=3)),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)


def vector(of):
    return of.map(np.float64) | hnp.arrays(np.float64, 3, elements=of)


@st.composite
def problems(draw):
    """Arrays of an npz: most of them fit each other, some are anything at all."""
    A = draw(hnp.arrays(np.float64, (3, 3), elements=draw(st.sampled_from([tame, tame, tame, number]))))
    with np.errstate(all="ignore"):
        Q = A @ A.T if draw(st.booleans()) else A + A.T
    arrays = {"Q": Q} if draw(st.booleans()) else {"F": A, "D": draw(vector(st.floats(0, 2)))}
    optional = {
        "c": vector(number), "x0": vector(number), "lower": vector(st.sampled_from([-np.inf, -1.0, 0.0])),
        "upper": vector(st.sampled_from([np.inf, 3.0, 1.0])), "total": vector(number).filter(lambda a: a.ndim == 0),
    }  # fmt: skip
    for name, strategy in optional.items():
        if draw(st.booleans()):
            arrays[name] = draw(strategy)
    if draw(st.integers(0, 3)) == 0:
        arrays["groups"] = draw(hnp.arrays(np.int64, 3, elements=st.integers(-1, 2)))
        arrays["total"] = draw(hnp.arrays(np.float64, st.sampled_from([(1,), (2,), (2, 2)]), elements=number))
    if draw(st.booleans()):
        arrays[draw(st.sampled_from([*sorted(cli.FIELDS), "other"]))] = draw(any_array)
    return arrays


@given(arrays=problems(), rule=st.sampled_from(sorted(bcd.RULES)))
@settings(max_examples=150)
def test_any_arrays_are_solved_or_refused(folder, arrays, rule):
    file = folder / "any.npz"
    np.savez(file, **arrays)
    done = outcome("solve", file, "--rule", rule, "--max-iter", 100, "--time-limit", 2, "--json")
    if done.exit_code != 2:
        answer = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert np.isfinite(answer["x"]).all()
        assert answer["status"] in {status.name.lower() for status in Status}


@given(data=damaged(packed(**GOOD)) | damaged(packed(np.savez_compressed, **GOOD)) | st.binary(max_size=200))
@settings(max_examples=150)
def test_damaged_archives_are_read_or_refused(folder, data):
    """The checksums of zip catch most damage; what they miss must be refused or be a problem."""
    refused_or_read(folder / "damaged.npz", data)


def refused_or_read(file, data):
    file.write_bytes(data)
    said = None
    try:
        problem, _ = cli.load_problem(file)
        assert problem.n >= 1
    except ValueError as error:
        said = str(error)
    assert said is None or "\n" not in said


def archive(**members):
    """A zip with right checksums around any content."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
    return stream.getvalue()


def npy(header, body=b"", version=(1, 0)):
    """An array as np.save writes it, with any header."""
    length = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + length + header + body


PIECES = [
    b"{", b"}", b"(", b")", b"'descr'", b"'fortran_order'", b"'shape'", b": ", b", ", b"'<f8'", b"'|O'", b"'<U9'",
    b"'V8'", b"[('a', '<f8')]", b"True", b"False", b"None", b"3", b"-1", b"999999999999", b"-", b"[]", b"'''",
    b"\n", b"\xff", b"\x00", b"(" * 90, b"-" * 3000, b"__import__('os')", b"0x", b"L",
]  # fmt: skip
PLAIN = b"{'descr': '<f8', 'fortran_order': False, 'shape': (3, 3), }"


@given(
    header=st.lists(st.sampled_from(PIECES), max_size=14).map(b"".join) | damaged(PLAIN),
    body=st.binary(max_size=80),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]),
    name=st.sampled_from(["Q.npy", "Q", "total.npy", "total", "../Q.npy", "x.npy"]),
)
@settings(max_examples=150)
def test_any_header_of_an_array_is_read_or_refused(folder, header, body, version, name):
    refused_or_read(folder / "header.npz", archive(**{name: npy(header, body, version)}))


@pytest.mark.parametrize("shape", ["(1000000, 1000000)", "(10**9,)", "(-3, 3)", "(3, 3", "(2**70,)", "()"])
def test_a_header_that_lies_about_its_size_is_refused(folder, shape):
    """Eight terabytes are claimed by eight bytes."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    file = folder / "large.npz"
    file.write_bytes(archive(**{"Q.npy": npy(header, bytes(8))}))
    done = outcome("solve", file)
    assert done.exit_code == 2


def test_what_is_no_array_in_an_archive_is_refused(folder):
    file = folder / "bytes.npz"
    for name in ("Q", "total", "x0"):
        good = {f"{field}.npy": packed_one(value) for field, value in GOOD.items()}
        file.write_bytes(archive(**good, **{name: b"hi"}))
        done = outcome("solve", file)
        assert done.exit_code == 2
        assert "plain arrays" in done.stderr


def packed_one(value):
    stream = io.BytesIO()
    np.save(stream, value)
    return stream.getvalue()


# -- nothing is unpickled -----------------------------------------------------------------------


class Trap:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return open, (self.mark, "w")


def test_pickles_are_refused_wherever_they_are_put(tmp_path):
    mark, file = tmp_path / "unpickled", tmp_path / "file"
    trap = Trap(mark)
    array = io.BytesIO()
    np.save(array, np.array([trap, trap]), allow_pickle=True)
    contents = [
        pickle.dumps(trap),
        packed(Q=np.array([trap, trap])),
        packed(**{**GOOD, "x0": np.array([[trap]])}),
        array.getvalue(),
        archive(**{"Q.npy": pickle.dumps(trap)}),
        archive(**{"Q": pickle.dumps(trap)}),
        archive(**{"Q.npy": npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps(trap))}),
        gzip.compress(pickle.dumps(trap)),
    ]
    (tmp_path / "good.svm").write_text("1 1:1\n-1 1:-1\n")
    for content in contents:
        file.write_bytes(content)
        for words in (
            ["solve", file],
            ["svm", "train", file, tmp_path / "model"],
            ["svm", "predict", tmp_path / "good.svm", file],
            ["svm", "predict", file, file],
            ["svm", "path", file, "--num", 1],
        ):
            assert outcome(*words).exit_code == 2, words
    assert not mark.exists()
    with pytest.raises(ValueError, match="line 1"):
        libsvm.load_model(file)
    pickle.loads(contents[0]).close()  # the trap would have worked
    assert mark.exists()


# -- LIBSVM's model files -----------------------------------------------------------------------

MODEL = b"""svm_type nu_svc
kernel_type polynomial
degree 2
gamma 0.5
coef0 1
nr_class 3
total_sv 4
rho 0.25 -1 0.5
label 1 -1 7
nr_sv 2 1 1
SV
1 0.5 1:0.5 3:-1
0.5 -1 2:2
-1.5 1 1:1 2:1e-3
-0.5 -0.5 1:-1
"""
DATA = b"1 1:0.5 3:-1\n-1 2:2 4:1 # a comment\n7 1:1 2:1e-3\n1 3:2\n-1 1:-1\n7 2:-1\n"
finite = st.floats(allow_nan=False, allow_infinity=False)
modest = st.floats(-100, 100, allow_subnormal=False)


@st.composite
def models(draw, value=finite):
    """Any model that a file can hold."""
    svm_type = draw(st.sampled_from(sorted(libsvm.TYPES)))
    kernel = draw(st.sampled_from(sorted(libsvm.KERNELS)))
    classifier = svm_type in libsvm.CLASSIFIERS
    k = draw(st.integers(2, 4)) if classifier else 2
    n_sv = draw(st.lists(st.integers(0, 3), min_size=k, max_size=k)) if classifier else [draw(st.integers(0, 5))]
    total, width = sum(n_sv), draw(st.integers(1, 4))
    entries = draw(hnp.arrays(np.float64, (total, width), elements=st.just(0.0) | value))
    numbers = {name: draw(value) for name in libsvm.NEEDS.get(kernel, ()) if name == "coef0"}
    if "gamma" in libsvm.NEEDS.get(kernel, ()):
        numbers["gamma"] = abs(draw(value))
    if kernel == "polynomial":
        numbers["degree"] = draw(st.integers(0, 5))
    labels = draw(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=k, max_size=k, unique=True)) if classifier else []
    empty = np.empty(0, np.int64)
    return libsvm.Model(
        svm_type=svm_type,
        kernel=kernel,
        coef=draw(hnp.arrays(np.float64, (k - 1, total), elements=value)),
        vectors=sp.csr_array((total, 0)) if kernel == "precomputed" else sp.csr_array(entries),
        rho=draw(hnp.arrays(np.float64, k * (k - 1) // 2, elements=value)),
        labels=np.array(labels, np.int64),
        n_sv=np.array(n_sv, np.int64) if classifier else empty,
        rows=draw(hnp.arrays(np.int64, total, elements=st.integers(0, 9))) if kernel == "precomputed" else empty,
        **numbers,
    )


@given(model=models())
def test_any_model_is_read_as_it_was_written(folder, model):
    libsvm.write_model(model, folder / "any.model")
    back = libsvm.read_model(folder / "any.model")
    for name in ("svm_type", "kernel", "degree", "gamma", "coef0"):
        if name in ("svm_type", "kernel") or name in libsvm.NEEDS.get(model.kernel, ()):
            assert getattr(back, name) == getattr(model, name)
    for name in ("coef", "rho", "labels", "n_sv", "rows"):
        np.testing.assert_array_equal(getattr(back, name), getattr(model, name))
    width = back.vectors.shape[1]  # a file does not know of columns without entries at the end
    np.testing.assert_array_equal(back.vectors.toarray(), model.vectors.toarray()[:, :width])
    assert not model.vectors.toarray()[:, width:].any()


@given(model=models(modest))
@few
def test_any_model_predicts_by_the_command(folder, model):
    libsvm.write_model(model, folder / "modest.model")
    text = b"".join(b"%d 0:%d 1:1 2:-2 3:0.5\n" % (y, k + 1) for k, y in enumerate((1, -1)))
    (folder / "modest.svm").write_bytes(text if model.kernel == "precomputed" else text.replace(b"0:", b"# "))
    done = outcome("svm", "predict", folder / "modest.svm", folder / "modest.model", folder / "out", "--json")
    if done.exit_code == 0:
        assert len(json.loads(done.stdout)["predictions"]) == 2
        assert len((folder / "out").read_text().split()) == 2


@given(model=damaged(MODEL), data=st.just(DATA) | damaged(DATA))
@settings(max_examples=100)
def test_damaged_models_and_data_predict_or_are_refused(folder, model, data):
    (folder / "damaged.model").write_bytes(model)
    (folder / "damaged.svm").write_bytes(data)
    outcome("svm", "predict", folder / "damaged.svm", folder / "damaged.model")


# -- svmlight data ------------------------------------------------------------------------------


@given(data=damaged(DATA) | st.binary(max_size=60), packing=st.sampled_from([("", bytes), (".gz", gzip.compress)]))
@settings(max_examples=150)
def test_damaged_data_are_read_or_refused(folder, data, packing):
    suffix, pack = packing
    data_read_or_refused(folder / f"any.svm{suffix}", pack(data))


@given(data=damaged(gzip.compress(DATA, mtime=0)) | damaged(bz2.compress(DATA)))
@settings(max_examples=100)
def test_damaged_compressed_data_are_read_or_refused(folder, data):
    for suffix in (".gz", ".bz2"):
        data_read_or_refused(folder / f"packed{suffix}", data)


def data_read_or_refused(file, content):
    file.write_bytes(content)
    for precomputed in (False, True):
        said = None
        try:
            X, y = libsvm.read_data(file, precomputed=precomputed)
            assert X.shape[0] == len(y) > 0
            assert np.isfinite(y).all()
        except (ValueError, OSError) as error:
            said = str(error)
        assert said is None or "\n" not in said


@given(data=damaged(DATA), words=st.sampled_from([["-s", 0], ["-s", 1, "-n", 0.1], ["-s", 2], ["-s", 3], ["-t", 4]]))
@settings(max_examples=60)
def test_damaged_data_train_or_are_refused(folder, data, words):
    (folder / "train.svm").write_bytes(data)
    done = outcome("svm", "train", folder / "train.svm", *words, "--time-limit", 1, "--model", folder / "trained")
    if done.exit_code != 2:
        libsvm.read_model(folder / "trained")


WIDE = """
import resource, sys
from bcd import cli
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)
cli.app(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_the_largest_index_takes_no_memory(tmp_path, kernel):
    """A dense vector of that many columns would take 16 GB; what does not fit must be said, not attempted."""
    (tmp_path / "wide.svm").write_text("1 1:1 2147483647:1\n-1 1:-1 2:1\n1 1:2\n-1 1:-2\n")
    words = ["svm", "train", "wide.svm", "m", "-t", kernel, "-g", "0.5"], ["svm", "predict", "wide.svm", "m"]
    for one in words:
        done = subprocess.run(
            [sys.executable, "-c", WIDE, *one], cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
        )
        assert done.returncode in (0, 2), done.stderr
        assert "Traceback" not in done.stderr
        if done.returncode == 2:
            return


# -- paths --------------------------------------------------------------------------------------


@pytest.fixture
def at(tmp_path):
    """Good files, a folder, an empty file, and a link in a circle."""
    np.savez(tmp_path / "p.npz", **GOOD)
    (tmp_path / "d.svm").write_bytes(DATA)
    (tmp_path / "m.model").write_bytes(MODEL)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    return tmp_path


INPUTS = ["missing", "folder", "empty", "circle", "p.npz/inside", "x" * 300, "\udcff"]


@pytest.mark.parametrize("name", INPUTS)
def test_what_is_no_file_cannot_be_read(at, name):
    file = f"{at}/{name}"
    for words in (
        ["solve", file],
        ["svm", "train", file, at / "out"],
        ["svm", "predict", file, at / "m.model"],
        ["svm", "predict", at / "d.svm", file],
        ["svm", "path", file],
    ):
        assert outcome(*words).exit_code == 2, words
    assert not (at / "out").exists()


OUTPUTS = {
    "a missing folder": "nowhere/file.png",
    "a folder": "folder",
    "a file as a folder": "empty/file.png",
    "a circle of links": "circle/file.png",
    "too long a name": "x" * 300 + ".png",
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_cannot_be_written_is_refused_before_the_work(at, name, monkeypatch):
    """Nothing has been solved or trained when it is said."""
    worked = []
    monkeypatch.setattr(bcd, "minimize", lambda *args, **options: worked.append(args))
    monkeypatch.setattr("bcd.svm.solve_dual", lambda *args, **options: worked.append(args))
    target = at / OUTPUTS[name]
    for words in (
        ["solve", at / "p.npz", "--out", target],
        ["solve", at / "p.npz", "--plot", target],
        ["svm", "train", at / "d.svm", target],
        ["svm", "train", at / "d.svm", "--model", target],
        ["svm", "predict", at / "d.svm", at / "m.model", target],
    ):
        assert outcome(*words).exit_code == 2, words
    assert worked == []


def test_a_picture_that_matplotlib_does_not_draw_is_refused_before_the_work(at):
    done = outcome("solve", at / "p.npz", "--plot", at / "run.doc", "--out", at / "x.npz")
    assert done.exit_code == 2
    assert "a picture must end in one of" in done.stderr
    assert not (at / "x.npz").exists()


def test_folders_of_pictures_cannot_be_files(at):
    for words in (["demo", "--out", at / "empty"], ["svm", "path", at / "d.svm", "--num", 1, "--out", at / "empty"]):
        started = time.perf_counter()
        done = outcome(*words)
        assert done.exit_code == 2, words
        assert str(at / "empty") in done.stderr
        assert time.perf_counter() - started < 5


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_files_and_folders_without_permission(at):
    (at / "locked").mkdir(mode=0o500)
    (at / "kept").touch(mode=0o400)
    for target in (at / "locked" / "file", at / "kept"):
        assert "no permission" in outcome("solve", at / "p.npz", "--out", target).stderr
        assert "no permission" in outcome("svm", "train", at / "d.svm", "--model", target).stderr
    (at / "full").mkdir()
    (at / "full" / "m").touch()
    (at / "full").chmod(0o500)
    assert outcome("svm", "train", at / "d.svm", at / "full" / "m").exit_code == 0  # in place
    assert (at / "full" / "m").read_bytes().startswith(b"svm_type")
    (at / "p.npz").chmod(0)
    done = run.invoke(cli.app, ["solve", str(at / "p.npz")])
    assert done.exit_code == 2
    assert "is not readable" in " ".join(done.stderr.split())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a file that is always full")
def test_a_full_disk_is_named(at):
    """Through a link: should a regression replace its target, it would be the link."""
    full = at / "full"
    full.symlink_to("/dev/full")
    for words in (
        ["solve", at / "p.npz", "--out", full],
        ["svm", "train", at / "d.svm", full],
        ["svm", "predict", at / "d.svm", at / "m.model", full],
    ):
        done = outcome(*words)
        assert done.exit_code == 2, words
        assert "No space left on device" in done.stderr


def test_a_pipe_is_written_to_and_stays_a_pipe(at):
    """The model goes to whoever reads; it does not take the place of the pipe (or of /dev/null)."""
    pipe, read = at / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert outcome("svm", "train", at / "d.svm", pipe).exit_code == 0
    reader.join(10)
    assert read[0].startswith(b"svm_type c_svc")
    assert pipe.is_fifo()


def test_a_link_stays_a_link(at):
    (at / "link").symlink_to(at / "real")
    assert outcome("svm", "train", at / "d.svm", at / "link").exit_code == 0
    assert (at / "link").is_symlink()
    assert (at / "real").read_bytes().startswith(b"svm_type c_svc")
