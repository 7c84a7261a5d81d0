# SPDX-License-Identifier: BSD-3-Clause
"""From rows to token ids and labels, and from these to batches.

:mod:`llm.rows` says which files and fields there are. Conversations are written by the chat template of the tokenizer;
where it has none, message by message, the answers closed by the end-of-text token. What is not learnt (prompts, and
what the template puts around them) has the label -100. A text is cut every ``max_length`` tokens, anything else that
is longer loses its end.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm.rows import Message, Row, conversation, labelled, read_rows, text_of

__all__ = [
    "IGNORED",
    "Batches",
    "Choice",
    "Example",
    "collate",
    "load_choices",
    "load_examples",
    "load_labelled",
    "split",
]

IGNORED = -100  # the label of a token that is not learnt
ANSWER = "|||"  # in a template: what stands behind it is learnt
PLAIN = "plain"  # the template that passes over the tokenizer's chat template
MOST_LABELS = 100  # that a language model is asked to choose from
Piece = tuple[str, bool]  # a text, and whether it is learnt
_log = logging.getLogger("llm")


@dataclass(frozen=True, slots=True)
class Example:
    """What a model sees at a time.

    Attributes
    ----------
    ids : list of int
        Tokens.
    labels : list of int
        Of a language model: as long as ``ids``, the token itself where it is learnt (it is predicted from the tokens
        before it) and -100 elsewhere. Of a classifier: one class.
    """

    ids: list[int]
    labels: list[int]


@dataclass(frozen=True, slots=True)
class Choice:
    """One row with every label that it might have; ``options[right]`` has its own."""

    options: list[Example]
    right: int


# -- loading -----------------------------------------------------------------------------------------


def load_examples(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    template: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> list[Example]:
    r"""Examples for a language model.

    Parameters
    ----------
    path : str or Path
    tokenizer : object
        As of transformers: called with a text it returns ``input_ids``; ``eos_token_id``; perhaps ``chat_template``
        and ``apply_chat_template``.
    max_length : int
        Tokens of an example at most. Rows of which nothing to learn is left are passed over; a warning in the log
        says how many.
    template : str, optional
        ``"plain"``: no chat template. Or a text with fields in braces, such as ``"Q: {question}\nA:||| {answer}"``:
        what stands behind ``|||`` is learnt, or everything where there is none.
    rename : mapping of str to str, optional
        Words for labels.

    Raises
    ------
    ValueError
        With file and line, if something cannot be read or nothing can be learnt.
    """
    encoder = _Encoder(tokenizer, max_length, template)
    found = [encoder.examples(row) for row in read_rows(path, rename)]
    empty = sum(not examples for examples in found)
    if empty == len(found):
        raise ValueError(f"{path}: no row has a token to learn within max_length={max_length}; raise it")
    if empty:
        message = "%s: %d of %d rows have no token to learn within max_length=%d and are passed over"
        _log.warning(message, path, empty, len(found), max_length)
    return [example for examples in found for example in examples]


def load_labelled(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    classes: Mapping[int, str],
    rename: Mapping[str, str] | None = None,
) -> list[Example]:
    """Examples for a classifier: texts with the number of their class.

    Parameters
    ----------
    path, tokenizer, max_length, rename
        As of :func:`load_examples`; rows hold a label, and ``sentence``, ``text``, or ``sentence1`` and ``sentence2``.
    classes : mapping of int to str
        Names by number (``model.config.id2label``); a label is a name or a number.

    Raises
    ------
    ValueError
        With file and line, if something cannot be read or a label is of no class.
    """
    numbers = {str(k): k for k in classes} | {name: k for k, name in classes.items()}
    examples = []
    for row in read_rows(path, rename):
        row, texts, label = labelled(row)
        if label not in numbers:
            raise ValueError(f"{row.where}: label must be one of {', '.join(numbers)}; found {label!r}")
        ids = tokenizer(*texts, truncation=True, max_length=max_length)["input_ids"]
        examples.append(Example(list(ids), [numbers[label]]))
    return examples


def load_choices(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int,
    template: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> tuple[list[Choice], list[str]]:
    """Rows of which a language model shall tell the label: each with every label of the file behind its text.

    Parameters
    ----------
    path, tokenizer, max_length, template, rename
        As of :func:`load_examples`; what is too long loses its beginning.

    Returns
    -------
    choices : list of Choice
    labels : list of str
        In the order of ``options``.

    Raises
    ------
    ValueError
        With file and line, if something cannot be read; or if there is nothing to choose from.
    """
    encoder = _Encoder(tokenizer, max_length, template)
    rows = [labelled(row) for row in read_rows(path, rename)]
    labels = sorted({label for _, _, label in rows})
    if not 2 <= len(labels) <= MOST_LABELS:
        raise ValueError(f"{path}: must hold from 2 to {MOST_LABELS} different labels; found {len(labels)}")
    choices = []
    for row, _, own in rows:
        whole = [encoder.whole(Row(row.where, {**row.fields, "label": label})) for label in labels]
        options = [Example(e.ids[-max_length:], e.labels[-max_length:]) for e in whole]
        choices.append(Choice(options, labels.index(own)))
    return choices, labels


# -- from rows to tokens -----------------------------------------------------------------------------


class _Encoder:
    """A tokenizer, a length and a template."""

    def __init__(self, tokenizer: Any, max_length: int, template: str | None) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens; found {max_length}")
        self.custom = None if template == PLAIN else template
        if self.custom is not None and not re.search(r"\{\w+\}", self.custom):
            raise ValueError(
                f"template must be {PLAIN!r} or name fields in braces, such as 'Q: {{question}} A:{ANSWER} {{answer}}'"
                f"; found {template!r}"
            )
        self.tokenizer, self.max_length = tokenizer, max_length
        self.chats = template is None and bool(getattr(tokenizer, "chat_template", None))
        bos: Any = getattr(tokenizer, "bos_token_id", None)
        eos: Any = getattr(tokenizer, "eos_token_id", None)
        starts = bos is not None and list(tokenizer("")["input_ids"])[:1] == [bos]
        self.begin: list[int] = [bos] if starts else []
        self.end: list[int] = [] if eos is None else [eos]

    def examples(self, row: Row) -> list[Example]:
        """All that can be learnt of a row; may be none."""
        if self.custom is None and conversation(row) is None:
            ids = self.begin + self._tokens(text_of(row, "text")) + self.end
            pieces = [ids[a : a + self.max_length] for a in range(0, len(ids), self.max_length)]
            return [Example(piece, piece) for piece in pieces if len(piece) > 1]
        whole = self.whole(row)
        ids, labels = whole.ids[: self.max_length], whole.labels[: self.max_length]
        return [Example(ids, labels)] if any(label != IGNORED for label in labels[1:]) else []

    def whole(self, row: Row) -> Example:
        """One example of a row that holds a conversation or fills the template, of whatever length."""
        messages = None if self.custom is not None else conversation(row) or []
        chats = messages is not None and self.chats
        begin, end = (self.begin[:0], self.end[:0]) if chats else (self.begin, self.end)  # a chat template writes both
        ids, labels = list(begin), [IGNORED] * len(begin)
        for text, learnt in self._pieces(row, messages):
            tokens = self._tokens(text) + (end if learnt else [])
            ids += tokens
            labels += tokens if learnt else [IGNORED] * len(tokens)
        return Example(ids, labels)

    def _pieces(self, row: Row, messages: list[Message] | None) -> list[Piece]:
        if messages is None:
            return _filled(str(self.custom), row)
        if self.chats:
            return self._chat(row, messages)
        answers = [message["role"] == "assistant" for message in messages]
        return [(m["content"] + ("" if a else "\n"), a) for m, a in zip(messages, answers, strict=True)]

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _chat(self, row: Row, messages: list[Message]) -> list[Piece]:
        """What the chat template writes; the answers are learnt with the mark that ends them."""
        pieces: list[Piece] = []
        written, done = self._render(row, messages, False), 0
        for k, message in enumerate(messages):
            if k and message["role"] == "assistant":
                asked = self._render(row, messages[:k], True)
                answered = self._render(row, messages[: k + 1], False)
                if len(asked) >= done and answered.startswith(asked) and written.startswith(answered):
                    pieces += [(written[done : len(asked)], False), (written[len(asked) : len(answered)], True)]
                    done = len(answered)
        if not pieces:
            raise ValueError(
                f"{row.where}: with the tokenizer's chat template no answer begins with the prompt for it, so that "
                f"they cannot be told apart; use template={PLAIN!r}"
            )
        return pieces

    def _render(self, row: Row, messages: list[Message], prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except Exception as refused:  # a template is a program that raises what it likes
            raise ValueError(
                f"{row.where}: the tokenizer's chat template refuses this conversation ({refused}); change it, or use "
                f"template={PLAIN!r}"
            ) from refused


def _filled(template: str, row: Row) -> list[Piece]:
    def value(match: re.Match[str]) -> str:
        """What stands in the place of a field in braces."""
        if match[1] not in row.fields:
            found = ", ".join(sorted(row.fields))
            raise ValueError(f"{row.where}: the template names the field {match[1]!r}; found {found:.200}")
        return text_of(row, match[1])

    parts = [re.sub(r"\{(\w+)\}", value, part) for part in template.split(ANSWER, 1)]
    return [(parts[0], len(parts) == 1), *((part, True) for part in parts[1:])]


# -- batches -----------------------------------------------------------------------------------------


def split(examples: Sequence[Example], held_out: int, seed: int) -> tuple[list[Example], list[Example]]:
    """A training part and a held-out part, drawn at random.

    Parameters
    ----------
    examples : sequence of Example
    held_out : int
        Examples to hold out; at most a tenth of all, or one where that is less.
    seed : int

    Returns
    -------
    train, held : list of Example
        The draw depends on the seed and the number of examples alone. A single example is for training.
    """
    most = max(1, len(examples) // 10) if len(examples) > 1 else 0
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(held_out, most)
    return [examples[k] for k in order[count:]], [examples[k] for k in order[:count]]


class Batches:
    """An endless stream of shuffled batches. Number k is a function of examples, size, seed and k: k is all its state.

    Each epoch has an order of its own; what is left at its end and does not fill a batch is passed over.

    Parameters
    ----------
    examples : sequence of Example
        Not empty.
    size : int
        Examples of a batch.
    seed : int

    Examples
    --------
    >>> batches = Batches([Example([k, k], [k, k]) for k in range(5)], size=2, seed=0)
    >>> batches.per_epoch
    2
    >>> batches[7] == batches[7]
    True
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int) -> None:
        if not examples or size < 1:
            raise ValueError(f"batches need examples and a positive size; found {len(examples)} and {size}")
        self.examples, self.size, self.seed = examples, min(size, len(examples)), seed
        self._epoch, self._order = -1, [0]

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return len(self.examples) // self.size

    def __getitem__(self, k: int) -> list[Example]:
        epoch, place = divmod(k, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch + 1) % 2**63)
            self._epoch, self._order = epoch, torch.randperm(len(self.examples), generator=generator).tolist()
        return [self.examples[i] for i in self._order[place * self.size : (place + 1) * self.size]]


def collate(examples: Iterable[Example], pad: int, device: Any = None) -> dict[str, Tensor]:
    """Pad on the right.

    Parameters
    ----------
    examples : iterable of Example
    pad : int
        Token to pad with.
    device : optional

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask``, shape (examples, tokens of the longest), and ``labels``, shape (examples,
        labels of the longest); int64.

    Examples
    --------
    >>> collate([Example([5, 6, 7], [-100, 6, 7]), Example([8, 9], [8, 9])], pad=0)["labels"]
    tensor([[-100,    6,    7],
            [   8,    9, -100]])
    """
    examples = list(examples)
    padded = {
        "input_ids": _padded([example.ids for example in examples], pad),
        "attention_mask": _padded([[1] * len(example.ids) for example in examples], 0),
        "labels": _padded([example.labels for example in examples], IGNORED),
    }
    return {name: tensor.to(device) for name, tensor in padded.items()}


def _padded(rows: list[list[int]], value: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.int64)
