"""Several processes with one model: the same choices and weights in all, those of one process that sees every row."""

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import two_processes  # noqa: E402
from small_models import net  # noqa: E402

from llm import BlockLLM  # noqa: E402


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo")
def test_two_processes():
    two_processes.run(two_processes.all_of_it)


def test_without_torchrun_it_says_what_is_missing():
    with pytest.raises(ValueError, match=r"process_group needs torch\.distributed: start the script with torchrun"):
        BlockLLM(net(), process_group="world")


def test_one_process_is_as_without_a_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        optimizer = BlockLLM(net(), process_group="world")
    finally:
        dist.destroy_process_group()
    assert optimizer._replicas is None
