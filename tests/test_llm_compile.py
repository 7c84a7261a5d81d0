"""torch.compile: the same run, and at most one compilation for each set of tensors that require grad."""

import pytest

torch = pytest.importorskip("torch")
from small_models import TinyLM, copies, tokens  # noqa: E402

from llm import BlockLLM  # noqa: E402


class Counting:
    """A backend that runs graphs as they are traced, forward and backward, and counts them."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, module, inputs):
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.compilers import nop

        self.graphs += 1
        return aot_autograd(fw_compiler=nop)(module, inputs)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("options", [{"granularity": "layer", "rule": "cyclic"}, {"granularity": "tensor"}, {}])
def test_a_compiled_model_trains_the_same_and_recompiles_once_per_set(options):
    finals = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model, backend, sets = TinyLM(), Counting(), set()
        run = torch.compile(model, backend=backend) if compiled else model
        optimizer = BlockLLM(model, 1e-2, budget=0.3, switch_every=3, **options)
        for x in tokens(12):
            optimizer.zero_grad()
            sets.add(tuple(p.requires_grad for p in model.parameters()))
            run(x, x)["loss"].backward()
            optimizer.step()
        finals.append((copies(model), optimizer.history))
    assert 0 < backend.graphs <= len(sets)
    assert len(sets) > 1
    assert finals[0][1] == finals[1][1]
    for p, q in zip(*(f[0] for f in finals), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
