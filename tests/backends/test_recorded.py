"""Graphs of torch's operations: what is left out of them changes nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_keras import backend

pytestmark = pytest.mark.skipif(backend.NAME != "torch", reason="torch records steps")


@st.composite
def views(draw):
    """A shape, and views of a tensor of that shape, one of the other."""
    sizes = st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=1, max_size=5)
    shape = sizes = draw(sizes)
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(
            st.sampled_from(["reshape", "unsqueeze", "select", "permute", "cut"])
        )
        count = len(sizes)
        axis = draw(st.integers(0, count - 1)) if count else 0
        if kind == "reshape":
            whole = int(np.prod(sizes))
            sizes = draw(st.sampled_from([[whole], [1, whole], [whole, 1, 1]]))
            steps.append((kind, sizes))
        elif kind == "unsqueeze":
            sizes = [*sizes[:axis], 1, *sizes[axis:]]
            steps.append((kind, axis))
        elif kind == "select" and count > 1:
            index = draw(st.integers(0, sizes[axis] - 1))
            sizes = [*sizes[:axis], *sizes[axis + 1 :]]
            steps.append((kind, axis, index))
        elif kind == "permute" and count > 1:
            order = draw(st.permutations(range(count)))
            sizes = [sizes[i] for i in order]
            steps.append((kind, order))
        elif kind == "cut" and count:
            least = draw(st.integers(0, sizes[axis] - 1))
            sizes = [*sizes[:axis], sizes[axis] - least, *sizes[axis + 1 :]]
            steps.append((kind, axis, least))
    return shape, steps


def look(x, steps):
    for kind, *how in steps:
        if kind == "cut":
            x = x.narrow(how[0], how[1], x.shape[how[0]] - how[1])
        elif kind == "reshape":
            x = x.reshape(how[0])
        else:
            x = getattr(x, kind)(*how)
    return x


@given(views(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_views_that_are_joined_show_the_same(found, turned):
    """Also of a tensor that lies otherwise in memory, or that is changed in between."""
    import torch

    from gemma_keras.backend import torch_steps

    shape, steps = found
    start = torch.arange(float(np.prod(shape)))

    def function(weights, arguments):
        x = arguments[0] * 2.0
        if turned:
            x = x.reshape(shape[::-1]).permute(tuple(range(len(shape)))[::-1])
        else:
            x = x.reshape(shape)
        view = look(x, steps)
        x.add_(1.0)
        return view * 3.0, look(view, [("unsqueeze", 0), ("select", 0, 0)]) + 1.0

    expected = function([], [start])
    graph = torch_steps.record(function, [], [start])
    run = torch._C._create_function_from_graph("run", graph)
    for one, two in zip(run(start), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)
        assert one.shape == two.shape


def test_what_only_says_that_axes_are_there_is_left_out():
    import torch

    from gemma_keras.backend import torch_steps

    def function(weights, arguments):
        (x,) = arguments
        x = (x + 1.0).reshape(1, 1, 4, 6).transpose(1, 0).unsqueeze(2)
        return (x.permute(0, 2, 1, 3, 4)[0, 0, 0].reshape(4, 6) * 2.0,)

    graph = torch_steps.record(function, [], [torch.ones(4, 6)])
    kinds = [n.kind() for n in graph.nodes() if n.kind() != "prim::Constant"]
    assert [k for k in kinds if "Tuple" not in k] == ["aten::add", "aten::mul"]


def test_what_is_made_of_weights_is_made_once_unless_it_is_changed():
    import torch

    from gemma_keras.backend import torch_steps

    def function(weights, arguments):
        codes, scales = weights
        low, high = torch.bitwise_and(codes, 15), torch.bitwise_right_shift(codes, 4)
        numbers = torch.cat([low, high], dim=1).float().reshape(2, 2, 2)
        numbers *= scales[..., None]
        numbers += 1.0
        kept = torch.cat([scales + 1.0, scales.expand(2, 2)]).square()
        return arguments[0] @ numbers.reshape(4, 2), kept.sum() + arguments[0].sum()

    weights = [torch.randint(0, 256, (2, 2), dtype=torch.uint8), torch.rand(2, 2)]
    graph = torch_steps.record(function, weights, [torch.ones(3, 4)])
    run, kept = torch_steps.Recorded(graph, len(weights)), {}
    made = [n.kind() for n in graph.nodes()]
    assert "aten::square" not in made and "aten::mul_" in made
    for _ in range(3):
        x = torch.rand(3, 4)
        found = run(kept, lambda: weights, lambda: None, [x])
        for one, two in zip(found, function(weights, [x]), strict=True):
            torch.testing.assert_close(one, two)
