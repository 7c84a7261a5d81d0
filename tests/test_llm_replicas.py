"""Several processes with one model: the same choices and weights in all, those of one process that sees every row."""

import pytest

torch = pytest.importorskip("torch")
import torch.distributed as dist  # noqa: E402
import two_processes  # noqa: E402
from small_models import net  # noqa: E402

from llm import BlockLLM  # noqa: E402


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="needs torch.distributed with gloo")
@pytest.mark.parametrize(("check", "size"), [("all_of_it", 2), ("the_last_two_of_three", 3)])
def test_several_processes(check, size):
    two_processes.run(getattr(two_processes, check), size)


def test_without_torchrun_it_says_what_is_missing():
    with pytest.raises(ValueError, match=r"process_group needs torch\.distributed: start the script with torchrun"):
        BlockLLM(net(), process_group="world")


def test_one_process_is_as_without_a_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        made = [BlockLLM(net(), process_group=group, in_backward=True) for group in ("world", None)]
    finally:
        dist.destroy_process_group()
    assert all(optimizer._replicas is None and optimizer._row_gradients is not None for optimizer in made)


def test_what_dtensor_has_cut_is_refused(tmp_path):
    """Before training, and where tensors are swapped after the optimizer was made."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = torch.nn.Linear(4, 4)
        optimizer = BlockLLM(model, budget=0.5)
        cut = torch.nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
        for rule in ("greedy", "full"):
            with pytest.raises(ValueError, match=r"found DTensor\. Let every process hold the whole model"):
                BlockLLM([("weight", cut)], budget=None if rule == "full" else 0.5, rule=rule)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.param_groups[0]["params"][0] = cut
        with pytest.raises(ValueError, match="found DTensor"):
            optimizer.step()
    finally:
        dist.destroy_process_group()
