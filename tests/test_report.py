# SPDX-License-Identifier: BSD-3-Clause
"""The report: every number and picture is on the page, and the page needs nothing but itself."""

import base64
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import experiments
from experiments import record, report, tables
from experiments.__main__ import app
from experiments.figures import panels

VOID = {"meta", "img", "br", "hr", "link", "input", "source", "wbr"}
LOADS = {"src", "srcset", "poster", "data", "background"}


class Reader(HTMLParser):
    """What a page holds; refuses what is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.loads, self.styles = [], [], [], [], [], []
        self.cells, self.unboxed, self.text = set(), 0, ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" else []
        self.loads += [value for key, value in attrs.items() if key in LOADS or (key == "href" and tag != "a")]
        if tag in ("table", "img"):
            self.unboxed += self.open[-1:] != [("div", "wide")]
        if tag not in VOID:
            self.open.append((tag, attrs.get("class")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        inside = [tag for tag, _ in self.open]
        if inside[-1:] == ["style"]:
            self.styles.append(data)
        if {"td", "th"} & set(inside):
            self.cells.add(data.strip())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def real(folder):
    """The page of the results of this checkout."""
    report.write(folder / "report.html")
    return Reader((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A checkout with one experiment that has results, and one that has none."""
    (tmp_path / "experiments").mkdir()
    for name in ("toy", "other"):
        code = f'"""What {name} does: a < b.\n\nHow, with :mod:`x.y`.\n"""\n\nTITLE = "A {name} & its <numbers>"\n'
        (tmp_path / "experiments" / f"{name}.py").write_text(code)
    (tmp_path / "docs").mkdir()
    results = tmp_path / "experiments" / "results"
    results.mkdir()
    monkeypatch.setattr(experiments, "FOLDER", tmp_path / "experiments")
    monkeypatch.setattr(experiments, "RESULTS", results)
    monkeypatch.setattr(record, "RESULTS", results)
    monkeypatch.setattr(record, "git_commit", lambda: "0123456789ab+")
    module = SimpleNamespace(
        __doc__="What toy does: a < b.\n\nHow, with :mod:`x.y`.\n",
        TITLE="A toy & its <numbers>",
        SEED=1,
        run=lambda quick: {"number": 5, "pictures": {"": panels(1, 1)[0]}},
        tables=lambda results: {"the_one": tables.markdown(["a", "b < c"], [["`x`", f"{results['number']}"]])},
    )
    monkeypatch.setattr(experiments, "module", lambda name: module)
    record.record("toy", module, quick=False)
    return tmp_path


# -- the page of this checkout ------------------------------------------------------------------


def test_nothing_is_loaded(real):
    assert "script" not in real.tags
    assert "link" not in real.tags
    assert "iframe" not in real.tags
    assert all(address.startswith("data:image/png;base64,") for address in real.loads)
    assert not re.search(r"url\(|@import|https?:", "".join(real.styles))


def test_links_lead_somewhere(real, folder):
    assert len(set(real.ids)) == len(real.ids)
    for link in real.links:
        if link.startswith("#"):
            assert link[1:] in real.ids
        else:
            assert (folder / link).resolve().exists(), link


@pytest.mark.parametrize("name", experiments.names())
def test_every_table_and_picture_is_on_the_page(real, name):
    if not report.result_file(name).exists():
        assert report.title(name) in real.text
        assert f"python -m experiments run {name}" in real.text
        return
    entry = tables.load(name)
    pictures = {base64.b64decode(address.partition(",")[2]) for address in real.loads}
    assert all((experiments.RESULTS / file).read_bytes() in pictures for file in entry["pictures"])
    assert entry["date"] in real.text
    assert entry["machine"]["cpu"] in real.text
    for part, text in experiments.module(name).tables(entry["results"]).items():
        assert f"{name}-{part}" in real.ids
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
        plain = {cell.strip() for row in rows[:1] + rows[2:] for cell in row if re.fullmatch(r"[\w., /-]+", cell)}
        assert plain <= real.cells


def test_wide_things_scroll_in_boxes_of_their_own(real):
    assert real.unboxed == 0
    assert real.tags.count("table") > 5


def test_both_schemes_are_styled(real):
    style = "".join(real.styles)
    assert "prefers-color-scheme: dark" in style
    light, dark = (set(re.findall(r"(--\w+):", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL))
    assert light == dark == set(re.findall(r"var\((--\w+)\)", style)) - {"--half"}


# -- its parts ----------------------------------------------------------------------------------


def test_the_command_writes_the_page(toy, monkeypatch):
    monkeypatch.chdir(toy)
    assert CliRunner().invoke(app, ["report", "--out", "made/here.html"]).exit_code == 0
    page = Reader((toy / "made" / "here.html").read_text(encoding="utf-8"))
    assert "../experiments/toy.py" in page.links
    assert "../experiments/results/toy.json" in page.links


def test_text_is_escaped_and_roles_are_gone(toy):
    page = Reader(report.page(toy))
    assert "A toy & its <numbers>" in page.text
    assert "What toy does: a < b." in page.text
    assert "How, with x.y." in page.text
    assert {"a", "b < c", "x", "5"} <= page.cells
    assert "numbers" not in page.tags


def test_captions_come_from_the_documents(toy):
    (toy / "README.md").write_text("# T\n\nFrom README:\n\n<!-- table:toy/the_one -->\n<!-- /table -->\n")
    assert report.captions() == {"toy/the_one": "From README:\n"}
    (toy / "docs" / "a.md").write_text(
        "## H\n\nAn earlier paragraph.\n\nFrom [docs](x.md),\ntwo lines:\n\n"
        "<!-- table:toy/machine -->\n*when and where*\n<!-- /table -->\n\n"
        "<!-- table:toy/the_one -->\n| old |\n<!-- /table -->\n\n### alone\n\n<!-- table:toy/two -->\n<!-- /table -->\n"
        "\n![What it shows](../experiments/results/toy.png)\n"
    )
    assert report.captions() == {"toy/the_one": "From docs,\ntwo lines:\n", "toy.png": "What it shows"}
    page = Reader(report.page(toy))
    assert "two lines:" in page.text
    assert "What it shows" in page.text


def test_what_is_missing_is_said(toy):
    (toy / "experiments" / "results" / "toy.png").unlink()
    (toy / "experiments" / "results" / "old.json").write_text("{}")
    (toy / "README.md").write_text("# T\n\n## Not verified\n\nNo [GPU](gpu.md).\n\n## Citing\n")
    page = Reader(report.page(toy))
    for said in (
        "A other & its <numbers> has no results yet: python -m experiments run other",
        "the picture toy.png is not there",
        "old.json belongs to no experiment",
        "files that differed from the commit named (marked +): toy",
        "Not verified: No GPU.",
    ):
        assert said in page.text
    assert page.loads == []


def test_nothing_missing_is_said_as_well(toy):
    (toy / "experiments" / "other.py").unlink()
    file = toy / "experiments" / "results" / "toy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "abc"}))
    assert report.missing({"toy": json.loads(file.read_text())}) == []
    assert "What is missing" in Reader(report.page(toy)).text
