# SPDX-License-Identifier: BSD-3-Clause
"""What is trained on what: models, batches in the order of a seed, and held-out examples that are always the same.

========== ================================ ==============================================================
name       model                            data (in the folder that BCD_DATA names)
========== ================================ ==============================================================
gsm8k      SmolLM2-135M-Instruct            llm/math: problems of at most 128 tokens, loss on the answer
lima       the same                         llm/sft: the first 128 tokens of a conversation, loss on the output
sst2       MiniLM-L6 encoder, new head      llm/glue/SST-2
cola       the same                         llm/glue/CoLA
rte        the same                         llm/glue/RTE
reviews    a small Llama from scratch       llm/text: movie reviews in windows of 128 tokens
addresses  that Llama, trained on reviews   llm/text: speeches of US presidents in the same tokens
========== ================================ ==============================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from experiments import llm_classes, llm_small, llm_tuning
from experiments.llm_batches import Task
from experiments.llm_files import data_file

TASKS: dict[str, Callable[[int, int], Task]] = {
    "gsm8k": partial(llm_tuning.task, "gsm8k", llm_tuning.problems, False),
    "lima": partial(llm_tuning.task, "lima", llm_tuning.conversations, True),
    "sst2": partial(llm_classes.task, "sst2", llm_classes.sst2_rows),
    "cola": partial(llm_classes.task, "cola", llm_classes.cola_rows),
    "rte": partial(llm_classes.task, "rte", llm_classes.rte_rows),
    "reviews": partial(llm_small.task, llm_small.small_llama, "reviews", llm_small.reviews),
    "addresses": partial(llm_small.task, llm_small.based_llama, "addresses", llm_small.addresses),
}
FILES: dict[str, tuple[str, ...]] = {
    "gsm8k": ("math/gsm8k_train.jsonl.gz",),
    "lima": ("sft/lima.json.gz",),
    "sst2": ("glue/SST-2/train.tsv.gz", "glue/SST-2/dev.tsv.gz"),
    "cola": ("glue/CoLA/train.tsv.gz", "glue/CoLA/dev.tsv.gz"),
    "rte": ("glue/RTE/train.tsv.gz", "glue/RTE/dev.tsv.gz"),
    "reviews": ("text/movie_reviews.jsonl.gz",),
    "addresses": ("text/movie_reviews.jsonl.gz", "text/us_addresses.txt.gz"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("gsm8k", "lima"), llm_tuning.SETTINGS),
    **dict.fromkeys(("sst2", "cola", "rte"), llm_classes.SETTINGS),
    "reviews": llm_small.SETTINGS,
    "addresses": llm_small.SETTINGS | {"base": llm_small.BASE},
}
MEASURED = {
    name: {"logits": "of label tokens"} for name in ("gsm8k", "lima")
}  # more settings of memory and time; losses differ by rounding
PACKAGED = {
    **dict.fromkeys(("gsm8k", "lima"), llm_tuning.smollm2),
    **dict.fromkeys(("sst2", "cola", "rte"), llm_classes.minilm),
}


def make(name: str, seed: int, steps: int) -> Task:
    """The task of a name.

    Raises
    ------
    FileNotFoundError
        If its data or the package of its model are missing.
    """
    return TASKS[name](seed, steps)


def check(names: Iterable[str]) -> None:
    """See that the data and the models of these tasks are there.

    Raises
    ------
    FileNotFoundError
        If not, with what to do.
    """
    for name in names:
        for path in FILES[name]:
            data_file(path)
        if name in PACKAGED:
            PACKAGED[name]()
