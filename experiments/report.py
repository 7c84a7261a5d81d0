# SPDX-License-Identifier: BSD-3-Clause
"""One HTML page with every table and picture of results/*.json: ``python -m experiments report``.

The page needs nothing but itself: its style is inside, pictures are data URIs, there is no script and no network. Its
links lead to the scripts and result files of the checkout that it was made in.

Its texts are written down elsewhere: what an experiment does in its docstring; what a table or a picture shows in
docs/*.md or README.md, as the paragraph before the marker of the table and the alternative text of the picture.
"""

from __future__ import annotations

import base64
import html
import inspect
import os
import re
from datetime import UTC, datetime
from pathlib import Path
from string import Template
from typing import Any

from markdown_it import MarkdownIt

import bcd
import experiments
from experiments import record, tables

Entry = dict[str, Any]
MACHINE = re.compile(r"<!-- table:\S+/machine -->\n.*?<!-- /table -->\n+", re.DOTALL)
CAPTION = re.compile(r"\n\n((?:[^\n#<|!].*\n)+)\n<!-- table:(\S+) -->")
PICTURE = re.compile(r"!\[([^\]]+)\]\([^)\s]*?([\w.-]+\.png)\)")
LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")
ROLE = re.compile(r":[a-z]+:(?=`)")
NOT_VERIFIED = re.compile(r"\n## Not verified\n\n(.*?)\n\n## ", re.DOTALL)

render = MarkdownIt("js-default").render  # escapes HTML


def write(out: Path) -> None:
    """Write the page to a file, whose folder is made if need be."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(out.parent), encoding="utf-8")


def page(folder: Path) -> str:
    """The page as it stands in ``folder``, from where its links start."""
    texts = captions()
    done = {name: tables.load(name) for name in experiments.names() if result_file(name).exists()}
    contents, sections = [], []
    for name, entry in done.items():
        module = experiments.module(name)
        made = module.tables(entry["results"])
        contents.append(_contents(name, entry, made))
        sections.append(_section(name, entry, module.__doc__, made, texts, folder))
    return Template(_PAGE).substitute(
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=html.escape(bcd.__version__),
        commit=record.git_commit() or "unknown",
        results=_link(experiments.RESULTS, folder),
        contents="".join(contents),
        missing="".join(f"<li>{render(line)}</li>" for line in missing(done)) or "<li>nothing</li>",
        sections="".join(sections),
    )


def result_file(name: str) -> Path:
    """Where the numbers of an experiment are."""
    return experiments.RESULTS / f"{name}.json"


def title(name: str) -> str:
    """The title of an experiment, without importing it and what it needs."""
    source = (experiments.FOLDER / f"{name}.py").read_text(encoding="utf-8")
    return re.search(r'^TITLE = "(.*)"', source, re.MULTILINE)[1]


def captions() -> dict[str, str]:
    """Markdown by "NAME/TABLE" and by the file name of a picture; what docs say comes before what README.md says."""
    found: dict[str, str] = {}
    for path in tables.documents():
        text = MACHINE.sub("", path.read_text(encoding="utf-8"))
        found |= {marker: LINK.sub(r"\1", paragraph) for paragraph, marker in CAPTION.findall(text)}
        found |= {file: shown for shown, file in PICTURE.findall(text)}
    return found


def missing(done: dict[str, Entry]) -> list[str]:
    """What the page does not have, or has only with a reservation; Markdown, one line each.

    Parameters
    ----------
    done : dict
        Result files by name.
    """
    lines = [
        f"**{title(name)}** has no results yet: `python -m experiments run {name}`"
        for name in experiments.names()
        if name not in done
    ]
    for name, entry in done.items():
        lost = [file for file in entry["pictures"] if not (experiments.RESULTS / file).exists()]
        lines += [f"**{title(name)}**: the picture {file} is not there" for file in lost]
    strays = sorted(path.name for path in experiments.RESULTS.glob("*.json") if path.stem not in done)
    lines += [f"{file} belongs to no experiment" for file in strays]
    changed = [f"`{name}`" for name, entry in done.items() if not entry["commit"] or entry["commit"].endswith("+")]
    if changed:
        lines.append(f"Measured on files that differed from the commit named (marked +): {', '.join(changed)}")
    readme = experiments.FOLDER.parent / "README.md"
    said = NOT_VERIFIED.search(readme.read_text(encoding="utf-8")) if readme.exists() else None
    return lines + (["Not verified: " + LINK.sub(r"\1", said[1])] if said else [])


# -- parts of the page --------------------------------------------------------------------------


def _contents(name: str, entry: Entry, made: dict[str, str]) -> str:
    inner = " ".join(f'<a href="#{name}-{part}">{_words(part)}</a>' for part in made)
    return (
        f'<li><a href="#{name}">{html.escape(entry["title"])}</a> <time>{entry["date"][:10]}</time>'
        f'<div class="parts">{inner}</div></li>'
    )


def _section(name: str, entry: Entry, doc: str, made: dict[str, str], texts: dict[str, str], folder: Path) -> str:
    parts = [
        f'<section id="{name}"><h2>{html.escape(entry["title"])}</h2>',
        _origin(name, entry, folder),
        _about(doc),
        *(_figure(file, texts.get(file, entry["title"])) for file in entry["pictures"]),
        *(_table(f"{name}-{part}", part, text, texts.get(f"{name}/{part}", "")) for part, text in made.items()),
    ]
    return "".join(parts) + "</section>"


def _origin(name: str, entry: Entry, folder: Path) -> str:
    """When, where and by what."""
    machine = entry["machine"]
    links = [
        f'<a href="{_link(experiments.FOLDER / f"{name}.py", folder)}">script</a>',
        f'<a href="{_link(result_file(name), folder)}">numbers (JSON)</a>',
    ]
    line = f"{entry['date'][:10]}, {machine['cpu']} ({machine['architecture']}), {machine['cores']} cores"
    facts = "".join(f"<dt>{key}</dt><dd>{html.escape(value)}</dd>" for key, value in _facts(entry).items())
    return (
        f'<p class="origin">{html.escape(line)} · {" · ".join(links)} · '
        f"<code>python -m experiments run {name}</code></p>"
        f"<details><summary>Versions and circumstances</summary><dl>{facts}</dl></details>"
    )


def _facts(entry: Entry) -> dict[str, str]:
    load = [entry.get(f"load_average_{when}") for when in ("before", "after")]
    blas = [f"{pool['internal_api']} {pool['version']}, {pool.get('architecture', '')}" for pool in entry["blas"] or []]
    return {
        "date": entry["date"],
        "commit": entry["commit"] or "unknown",
        "versions": ", ".join(f"{library} {version}" for library, version in entry["versions"].items()),
        "BLAS and OpenMP": "; ".join(blas) or "unknown",
        "seed": str(entry["seed"]),
        "took": f"{entry['seconds']:,.0f} s",
        "load of the machine": " before, ".join("unknown" if one is None else f"{one}" for one in load) + " after",
    }


def _about(doc: str) -> str:
    """What the experiment does: the first paragraph, the others folded."""
    first, _, rest = ROLE.sub("", inspect.cleandoc(doc)).partition("\n\n")
    folded = f"<details><summary>How it is measured</summary>{render(rest)}</details>" if rest else ""
    return render(first) + folded


def _figure(file: str, caption: str) -> str:
    path = experiments.RESULTS / file
    if not path.exists():  # listed by missing()
        return ""
    data, text = path.read_bytes(), html.escape(caption)
    width, height = (int.from_bytes(data[k : k + 4], "big") for k in (16, 20))  # where a PNG has them
    return (
        f'<figure><div class="wide" tabindex="0" role="region" aria-label="{text}">'
        f'<img alt="{text}" width="{width}" height="{height}" style="--half: {width // 2}px" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></div>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def _table(anchor: str, part: str, text: str, caption: str) -> str:
    box = f'<div class="wide" tabindex="0" role="region" aria-label="{_words(part)}"><table>'
    body = render(text).replace("<table>", box).replace("</table>", "</table></div>")
    return f'<h3 id="{anchor}">{_words(part)}</h3>{render(caption)}{body}'


def _words(part: str) -> str:
    return html.escape(part.replace("_", " "))


def _link(path: Path, folder: Path) -> str:
    """A relative link, so that it works wherever the checkout is."""
    return html.escape(Path(os.path.relpath(path, folder)).as_posix())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>blockdescent: measurements</title>
<style>
:root { color-scheme: light dark;
  --ink: #1c1d20; --paper: #ffffff; --soft: #595e66; --line: #d5d8dd; --head: #f3f4f6; --link: #0a55ad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e5e6e9; --paper: #17191d; --soft: #a5abb4; --line: #3a3f47; --head: #22252b; --link: #86b9ff; }
  img { filter: invert(0.91) hue-rotate(180deg); }
}
html { scroll-padding-top: 1rem; -webkit-text-size-adjust: 100%; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.25; } h1 { margin: .5rem 0; }
h2 { margin-top: 3.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { margin: 2rem 0 .4rem; font-size: 1.05rem; } h3::first-letter { text-transform: uppercase; }
p, li, dd, figcaption { max-width: 46rem; overflow-wrap: break-word; } li > p { margin: 0; }
a { color: var(--link); }
code { font-size: .88em; overflow-wrap: anywhere; } pre { overflow-x: auto; }
.origin, time, figcaption, summary, dl, .parts { color: var(--soft); font-size: .9rem; }
summary { cursor: pointer; } time { white-space: nowrap; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
nav li { margin: .4rem 0; } .parts a { margin-right: .6rem; display: inline-block; }
.wide { overflow-x: auto; }
figure { margin: 1.5rem 0; } img { display: block; max-width: 100%; height: auto; }
div:has(> table) { border: 1px solid var(--line); border-radius: 6px; width: fit-content; max-width: 100%; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; white-space: nowrap; }
th { background: var(--head); vertical-align: bottom; white-space: normal; min-width: 3.5rem; font-weight: 600; }
td { border-top: 1px solid var(--line); }
th:first-child, td:first-child { position: sticky; left: 0; text-align: left; }
td:first-child { background: var(--paper); }
@media (max-width: 40rem) { /* pictures at half size, and scrolled */
  img { min-width: var(--half); }
  th, td { padding: .28rem .5rem; }
  td:first-child { white-space: normal; min-width: 6.5rem; }
  dl { grid-template-columns: 1fr; } dt { margin-top: .3rem; font-weight: 600; }
}
@media print { .wide { overflow: visible; } }
</style></head><body>
<h1>Measurements</h1>
<p>Every table and picture of the experiments of blockdescent $version. Page made <time>$made</time> at commit $commit
from <a href="$results">results/</a>; links are relative to the checkout it was made in. Each section says when and on
which machine its numbers were taken; figures of different sections may come from different machines and commits.</p>
<nav aria-label="Contents"><h2>Contents</h2><ol>$contents</ol></nav>
<section id="missing"><h2>What is missing</h2><ul>$missing</ul></section>
<main>$sections</main>
</body></html>
"""
