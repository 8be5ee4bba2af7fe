"""The largest score in two passes, as graphs for a CPU find it, is the one that argmax finds."""

import pytest
import torch

from mtpdecode.sampling import largest

INF = float("inf")
ROWS = {
    "ties": torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0]),
    "all alike": torch.zeros(5),
    "forbidden": torch.tensor([-INF, -2.0, -INF, -1.0, -1.0]),
    "all forbidden": torch.full((5,), -INF),
    "the last": torch.arange(5.0),
    "a hole": torch.tensor([5.0, 1.0, float("nan"), 9.0, float("nan")]),
    "no numbers": torch.full((5,), float("nan")),
}


@pytest.fixture(scope="module", autouse=True)
def compiled():
    torch._dynamo.reset()
    yield torch.compile(largest, backend="aot_eager", fullgraph=True, dynamic=True)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROWS)
def test_is_argmax(compiled, name, dtype):
    scores = torch.stack([ROWS[name], ROWS["ties"]])[:, None].to(dtype)
    assert torch.equal(compiled(scores), scores.argmax(-1))
    assert torch.equal(largest(scores), scores.argmax(-1))


def test_the_graph_has_two_passes():
    """Else the test above would compare argmax with itself."""
    graphs = []

    def seen(graph, _):
        graphs.append({node.target for node in graph.graph.nodes if node.op.startswith("call")})
        return graph.forward

    scores = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(torch.compile(largest, backend=seen)(scores), scores.argmax(-1))
    (names,) = graphs
    assert {"amax", "amin"} <= names
    assert "argmax" not in names
