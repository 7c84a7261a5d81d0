# SPDX-License-Identifier: BSD-3-Clause
"""Files of training data to rows, and rows to conversations or texts.

Files are .txt (all of it is one text), .jsonl (an object a line), .json (a list of objects) or .tsv (the first line
names the columns), each also with .gz behind it. What a row holds says what is learnt:

===============================================  ========================================  =======================
fields of a row                                  becomes                                   learnt
===============================================  ========================================  =======================
``messages``: objects with role and content      a conversation                            what the assistant says
``prompt`` and ``response`` or ``completion``    a question and its answer                 the answer
``question`` and ``answer``                      the same                                  the answer
``instruction``, ``output``, perhaps ``input``   the same, behind the earlier turns in     the answers
                                                 ``history``: [question, answer], ...
``sentence`` (or ``sentence1``, ``sentence2``)   the same                                  the label
and ``label``
``text``                                         a text                                    all of it
===============================================  ========================================  =======================
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Message", "Row", "conversation", "kind_of_file", "labelled", "read_rows", "text_of"]

Message = dict[str, str]  # role and content
_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
    ("sentence", "label"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Fields of a row, and where it stands (file and line), which opens every message about it."""

    where: str
    fields: Mapping[str, Any]


# -- files -------------------------------------------------------------------------------------------


def read_rows(path: str | Path, rename: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of a file.

    Parameters
    ----------
    path : str or Path
        .txt, .jsonl, .json or .tsv, perhaps with .gz behind it; UTF-8.
    rename : mapping of str to str, optional
        Words for labels, such as ``{"0": "negative", "1": "positive"}``.

    Raises
    ------
    ValueError
        With file and line, if something cannot be read or there is no row.
    """
    path = Path(path)
    rows = list(_READERS[kind_of_file(path)](path, _content(path)))
    if not rows:
        raise ValueError(f"{path}: holds no rows")
    return [_renamed(row, rename) for row in rows] if rename else rows


def kind_of_file(path: str | Path) -> str:
    """The end of the name of a data file that is there, without ".gz".

    Raises
    ------
    ValueError
        If it has another end, or is no file.
    """
    path = Path(path)
    kind = next((end for end in _READERS if path.name.lower().removesuffix(".gz").endswith(end)), None)
    if kind is None:
        raise ValueError(f"{path}: must end in {', '.join(_READERS)}, each also with .gz behind it")
    if not path.is_file():
        raise ValueError(f"{path}: {'is a folder; needs a file' if path.is_dir() else 'no such file'}")
    return kind


def _content(path: Path) -> str:
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as bad:
        line = raw.count(b"\n", 0, bad.start) + 1
        raise ValueError(f"{path}:{line}: must be UTF-8; found byte 0x{bad.object[bad.start]:02x}") from bad
    except (EOFError, zlib.error, gzip.BadGzipFile) as bad:
        raise ValueError(f"{path}: must be a whole gzip file ({bad})") from bad


def _rows_of_text(path: Path, content: str) -> Iterator[Row]:
    if content.strip():
        yield Row(str(path), {"text": content})


def _rows_of_jsonl(path: Path, content: str) -> Iterator[Row]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield _row(f"{path}:{number}", _parsed(f"{path}:{number}", line))


def _rows_of_json(path: Path, content: str) -> Iterator[Row]:
    rows = _parsed(str(path), content)
    if not isinstance(rows, list):
        raise ValueError(f"{path}: must hold a JSON list of objects; found {_kind(rows)}")
    for number, fields in enumerate(rows, 1):
        yield _row(f"{path}: row {number}", fields)


def _rows_of_tsv(path: Path, content: str) -> Iterator[Row]:
    head, *lines = content.split("\n")
    columns = [column.strip().lower() for column in head.split("\t")]
    if len(set(columns)) < len(columns):
        raise ValueError(f"{path}:1: the first line must name each column once; found {', '.join(columns):.200}")
    for number, line in enumerate(lines, 2):
        if line.strip():
            cells = line.split("\t")
            if len(cells) != len(columns):
                raise ValueError(f"{path}:{number}: found {len(cells)} columns; the first line names {len(columns)}")
            yield Row(f"{path}:{number}", dict(zip(columns, cells, strict=True)))


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".txt": _rows_of_text,
    ".jsonl": _rows_of_jsonl,
    ".json": _rows_of_json,
    ".tsv": _rows_of_tsv,
}


def _parsed(where: str, content: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as bad:
        line = f"line {bad.lineno}, " if bad.lineno > 1 else ""
        raise ValueError(f"{where}: must be JSON; {bad.msg} at {line}column {bad.colno}") from bad
    except (RecursionError, ValueError) as bad:  # nested too deep; a number of too many digits
        raise ValueError(f"{where}: must be JSON of reasonable depth and numbers ({bad})") from bad


def _row(where: str, fields: Any) -> Row:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: must be a JSON object; found {_kind(fields)}")
    return Row(where, fields)


def _renamed(row: Row, rename: Mapping[str, str]) -> Row:
    if "label" not in row.fields:
        return row
    label = text_of(row, "label")
    return Row(row.where, {**row.fields, "label": rename.get(label, label)})


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# -- fields ------------------------------------------------------------------------------------------


def text_of(row: Row, name: str) -> str:
    """The text in a field; a number is written out.

    Raises
    ------
    ValueError
        If it is neither, or no UTF-8 can hold it.
    """
    return _text(row.where, name, row.fields[name])


def _text(where: str, name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where}: {name} must be text; found {_kind(value)}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError as bad:
        raise ValueError(f"{where}: {name} must be text that UTF-8 can hold; found half of a surrogate pair") from bad
    return text


def _found(row: Row) -> str:
    return f"{', '.join(sorted(row.fields)) or 'none':.200}"


def labelled(row: Row) -> tuple[Row, list[str], str]:
    """Read a row as one of a classification task.

    Returns
    -------
    row : Row
        Its text is called ``sentence`` now.
    texts : list of str
        One or two.
    label : str

    Raises
    ------
    ValueError
        If it lacks a label or a text.
    """
    fields = dict(row.fields)
    if "sentence" not in fields and "text" in fields:
        fields["sentence"] = fields.pop("text")
    names = ["sentence"] if "sentence" in fields else ["sentence1", "sentence2"]
    if not {"label", *names} <= set(fields):
        raise ValueError(
            f"{row.where}: needs a label, and sentence, text, or sentence1 and sentence2; found the fields "
            f"{_found(row)}"
        )
    row = Row(row.where, fields)
    return row, [text_of(row, name) for name in names], text_of(row, "label")


def conversation(row: Row) -> list[Message] | None:
    """The messages of a row; None if it holds a text.

    Raises
    ------
    ValueError
        If it holds neither.
    """
    fields = row.fields
    if "messages" in fields:
        return _messages(row)
    if {"sentence1", "sentence2", "label"} <= set(fields):
        return _turn(text_of(row, "sentence1") + "\n" + text_of(row, "sentence2"), text_of(row, "label"))
    for asked, answered in _PAIRS:
        if asked in fields and answered in fields:
            prompt = text_of(row, asked)
            if asked == "instruction" and fields.get("input"):
                prompt += "\n" + text_of(row, "input")
            return _history(row) + _turn(prompt, text_of(row, answered))
    if "text" not in fields:
        raise ValueError(
            f"{row.where}: needs text, messages, or a pair such as prompt and response, question and answer, "
            f"instruction and output, sentence and label; found the fields {_found(row)}"
        )
    return None


def _turn(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _history(row: Row) -> list[Message]:
    turns = row.fields.get("history") or []
    if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        raise ValueError(f"{row.where}: history must be a list of [question, answer]")
    texts = [[_text(row.where, "history", text) for text in turn] for turn in turns]
    return [message for question, answer in texts for message in _turn(question, answer)]


def _messages(row: Row) -> list[Message]:
    given = row.fields["messages"]
    if not isinstance(given, list) or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in given):
        raise ValueError(f"{row.where}: messages must be a list of objects with role and content")
    messages = [{name: _text(row.where, name, m[name]) for name in ("role", "content")} for m in given]
    if not any(message["role"] == "assistant" for message in messages[1:]):
        raise ValueError(f"{row.where}: messages must hold one of the role assistant behind another one")
    return messages
