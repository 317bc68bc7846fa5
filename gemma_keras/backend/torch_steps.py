"""Steps of torch that are recorded once and then run without Python.

On a CPU what runs is the list of torch's operations (`Recorded`), on a CUDA device a
graph of its kernels (`Replayed`): in Python, a token takes longer to say than to
compute. Imported on torch alone.
"""

import functools
import math
import threading
import warnings
import weakref

import torch

from gemma_keras.backend.torch_reorder import reordered


def can_record():
    """Whether torch can: it is old, and in part not what torch promises."""
    passes = ("inline", "constant_propagation", "cse", "dce")
    names = [*(f"_jit_pass_{name}" for name in passes), "_create_function_from_graph"]
    there = all(hasattr(torch._C, name) for name in names)
    return there and hasattr(torch.jit, "trace")


def record(function, weights, arguments):
    """The graph of what `function(weights, arguments)` does, run once for it.

    Args:
        function: takes two lists of tensors, returns a tuple of them.
        weights: tensors, the first inputs of the graph.
        arguments: tensors, the others.
    """
    weights = [weight.detach() for weight in weights]

    def flat(*tensors):
        return function(tensors[: len(weights)], tensors[len(weights) :])

    with warnings.catch_warnings():
        # That shapes become constants, as they are meant to; and of its age.
        warnings.simplefilter("ignore")
        run = torch.jit.trace(flat, (*weights, *arguments), check_trace=False)
    _simplify(run.graph)
    return run.graph


def _simplify(graph):
    """Leaves out of a recorded graph what is known of its tensors beforehand.

    Those are the sizes that it asks for and computes with; conversions to the dtype
    that a tensor has, and of constants: two thirds of what it does.
    """
    torch._C._jit_pass_inline(graph)
    for node in graph.findAllNodes("aten::size"):
        tensor, axis = node.inputs()
        sizes, axis = tensor.type().sizes(), axis.toIValue()
        if sizes is not None and axis is not None:
            graph.setInsertPoint(node)
            node.output().replaceAllUsesWith(graph.insertConstant(sizes[axis]))
    for node in graph.findAllNodes("aten::to"):
        value = next(node.inputs())
        before, after = value.type(), node.output().type()
        dtype, device = after.dtype(), after.device()
        if None in (dtype, device, before.dtype()):
            continue
        if value.node().kind() == "prim::Constant":
            # From Python's memory to the device, which takes longer than a product.
            graph.setInsertPoint(node)
            made = value.toIValue().to(device=device, dtype=dtype)
            node.output().replaceAllUsesWith(graph.insertConstant(made))
        elif before.dtype() == dtype and before.device() == device:
            node.output().replaceAllUsesWith(value)
    graph.setInsertPoint(graph.return_node())
    torch._C._jit_pass_constant_propagation(graph)
    _join_views(graph)
    # Every layer finds the place in its cache.
    torch._C._jit_pass_cse(graph)
    torch._C._jit_pass_dce(graph)


_VIEWS = {f"aten::{kind}" for kind in ("reshape", "view", "squeeze", "unsqueeze")}
_VIEWS |= {f"aten::{kind}" for kind in ("select", "slice", "permute", "transpose")}


def _join_views(graph):
    """Replaces several views of a tensor, one of the other, by one or by none.

    Most of them say that an axis is there, or is not, and some turn axes of one row.
    """
    roots = {}
    for node in list(graph.nodes()):
        if not _only_reshapes(node):
            continue
        view, given = node.output(), next(node.inputs())
        root = roots[view.unique()] = roots.get(given.unique(), given)
        sizes = view.type().sizes()
        if sizes == root.type().sizes():
            view.replaceAllUsesWith(root)
        elif root is not given:
            graph.setInsertPoint(node)
            shape = graph.insertConstant(sizes)
            made = graph.insertNode(graph.create("aten::reshape", [root, shape], 1))
            made.output().setType(view.type())
            roots[made.output().unique()] = root
            view.replaceAllUsesWith(made.output())
    graph.setInsertPoint(graph.return_node())


def _only_reshapes(node):
    """Whether a node gives numbers that lie in order in memory another shape."""
    if node.kind() not in _VIEWS:
        return False
    given, view = next(node.inputs()).type(), node.output().type()
    if not isinstance(given, torch._C.TensorType):
        return False
    sizes, strides = given.sizes(), given.strides()
    if None in (sizes, strides, view.sizes()):
        return False
    step = 1
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    # Axes of more than one are in the same order, and none was left out.
    kept = [size for size in sizes if size != 1]
    turned = [i for i in _order(node, len(sizes)) if sizes[i] != 1]
    return turned == sorted(turned) and math.prod(kept) == math.prod(view.sizes())


def _order(node, count):
    """The axes of what a node is given in the order in which it gives them."""
    order, given = list(range(count)), [x.toIValue() for x in node.inputs()][1:]
    if node.kind() == "aten::permute":
        return [axis % count for axis in given[0]]
    if node.kind() == "aten::transpose":
        one, other = given
        order[one], order[other] = order[other], order[one]
    return order


class Recorded:
    """A recorded graph, called with the weights and the other arguments.

    What it computes from weights alone, such as 1 + scale of a norm, is computed once
    for each run of the program that it is part of. (Weights may change between two, and
    do not always tell: what is written through `data` counts no version.)
    """

    # Elements of a tensor that is kept: no matrix in another dtype.
    MOST = 2**16

    def __init__(self, graph, count):
        """Of a graph whose first `count` inputs are weights; it is changed."""
        self._reordered = _take_reordered(graph, count)
        self._before = self._divide(graph, count)
        self._run = torch._C._create_function_from_graph("step", graph)

    def __call__(self, kept, weights, before, arguments):
        """What the step returns, tensors.

        Args:
            kept: a dict of what one run of a program keeps.
            weights: a function that returns them.
            before: a function that is called before anything is changed.
            arguments: tensors, and integers.
        """
        before()
        if self not in kept:
            given = weights()
            values = [weight.detach() for weight in given]
            matrices = [reordered(given[i], turned) for i, turned in self._reordered]
            early = self._before(*values)
            early = early if isinstance(early, tuple) else (early,)
            kept[self] = values, (*matrices, *early)
        values, early = kept[self]
        return self._run(*values, *map(torch.as_tensor, arguments), *early)

    def _divide(self, graph, count):
        """Moves from a graph what needs nothing but its first `count` inputs.

        Returns:
            A function of these inputs to what `graph` takes from now on after its own.
        """
        before, copies = torch._C.Graph(), {}
        weights, constants, lists, moved = set(), set(), set(), {}
        changed = _changed_in_place(graph)
        for value in list(graph.inputs())[:count]:
            copies[value.unique()] = copy = before.addInput()
            copy.setType(value.type())
            weights.add(value.unique())
        for node in graph.nodes():
            inputs = {value.unique() for value in node.inputs()}
            constant = node.kind() == "prim::Constant"
            gathers = node.kind() == "prim::ListConstruct"
            known = weights | lists | moved.keys()
            if not constant:
                if not (inputs & known and inputs <= known | constants):
                    continue
                if not (gathers or self._may_move(node)):
                    continue
                if node.output().unique() in changed:
                    continue
            clone = before.createClone(node, lambda x: copies[x.unique()])
            output = node.output()
            copies[output.unique()] = before.appendNode(clone).output()
            if constant:
                constants.add(output.unique())
            elif gathers:
                lists.add(output.unique())
            else:
                moved[output.unique()] = output

        def stays(value):
            """Whether what is not moved needs it; lists are made there again."""
            for use in value.uses():
                made = next(iter(use.user.outputs()), None)
                name = None if made is None else made.unique()
                if name in moved or (name in lists and not stays(made)):
                    continue
                return True
            return False

        for value in moved.values():
            if not stays(value):
                continue
            before.registerOutput(copies[value.unique()])
            argument = graph.addInput()
            argument.setType(value.type())
            value.replaceAllUsesWith(argument)
        before.makeMultiOutputIntoTuple()
        for each in (before, graph):
            torch._C._jit_pass_dce(each)
        return torch._C._create_function_from_graph("before", before)

    def _may_move(self, node):
        """Whether a node computes one small tensor, and does nothing else."""
        if not node.kind().startswith("aten::") or node.kind().endswith("_"):
            return False
        if node.outputsSize() != 1 or node.isNondeterministic():
            return False
        found = node.output().type()
        sizes = found.sizes() if isinstance(found, torch._C.TensorType) else None
        return sizes is not None and math.prod(sizes) <= self.MOST


def _changed_in_place(graph):
    """What a graph changes, and all that this may share its memory with."""
    changed = set()
    for node in graph.nodes():
        if not node.kind().endswith("_"):
            continue
        value = next(node.inputs())
        while value.unique() not in changed:
            changed.add(value.unique())
            # What shares memory with another tensor is made of it first of all.
            value = next(value.node().inputs(), value)
    return changed


def _take_reordered(graph, count):
    """Makes arguments of the weights that a graph brings into oneDNN's order.

    Returns:
        Which of its first `count` inputs each new argument is, after its own, and
        whether it is turned.
    """
    places = {x.unique(): i for i, x in enumerate(list(graph.inputs())[:count])}
    found = {}
    for node in graph.findAllNodes("mkldnn::_reorder_linear_weight"):
        matrix = weight = next(node.inputs())
        turned = False
        while weight.node().kind() in ("aten::t", "aten::numpy_T"):
            weight, turned = next(weight.node().inputs()), not turned
        if weight.unique() not in places:
            # For one product it does not pay.
            node.output().replaceAllUsesWith(matrix)
            continue
        key = places[weight.unique()], turned
        if key not in found:
            found[key] = graph.addInput()
        node.output().replaceAllUsesWith(found[key])
    torch._C._jit_pass_dce(graph)
    return list(found)


class Replayed:
    """A recorded graph, run as CUDA graphs, each of which is launched as one.

    A CUDA graph reads and writes where it did when it was made. What a step does not
    change in place is copied to there, and from there. What it changes, such as a
    cache, stays where it is if a graph knows the place; else it moves to the place of a
    graph that nobody holds anything of, and if there is none, another graph is made.
    """

    # Graphs that are kept; another one takes as long to make as some tokens.
    MOST = 8

    def __init__(self, graph, count):
        """Of a graph whose first `count` inputs are weights."""
        self._function = torch._C._create_function_from_graph("step", graph)
        self._weights_at = None
        self._graphs = []  # the one that was used last first
        self._pool = torch.cuda.graph_pool_handle()
        self._fails = False

    def __call__(self, kept, weights, before, arguments):
        """As `Recorded`; results that are no argument, changed, are copies."""
        with _lock:
            return self._call(kept, weights, before, arguments)

    def _call(self, kept, weights, before, arguments):
        if self not in kept:
            kept[self] = values = [weight.detach() for weight in weights()]
            at = [value.data_ptr() for value in values]
            if at != self._weights_at:
                self._graphs.clear()
                self._weights_at = at
        graph = next((g for g in self._graphs if g.is_where(arguments)), None)
        if graph is None:
            graph = next((g for g in self._graphs if g.may_take(arguments)), None)
        if graph is not None:
            if graph is not self._graphs[0]:
                self._graphs.remove(graph)
                self._graphs.insert(0, graph)
            return graph(before, arguments)
        before()
        device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
        tensors = [torch.as_tensor(x, device=device) for x in arguments]
        results = self._run(kept[self], tensors)
        if not self._fails:
            self._capture(kept[self], arguments, tensors, results)
        return results

    def _run(self, weights, tensors):
        # Optimised, it would compile kernels of its own at times.
        optimize = torch._C._get_graph_executor_optimize()
        torch._C._set_graph_executor_optimize(False)
        try:
            return self._function(*weights, *tensors)
        finally:
            torch._C._set_graph_executor_optimize(optimize)

    def _capture(self, weights, arguments, tensors, results):
        places = {
            x.data_ptr(): i
            for i, x in enumerate(arguments)
            if isinstance(x, torch.Tensor) and x.numel()
        }
        changed = {}
        for i, result in enumerate(results):
            place = places.get(result.data_ptr())
            if place is not None and result.shape == tensors[place].shape:
                changed[i] = place
        run = functools.partial(self._run, weights)
        try:
            graph = _Graph(run, tensors, changed, self._pool)
        except RuntimeError as error:
            self._fails = True
            warnings.warn(
                f"Decoding is slower than it could be, without CUDA graphs: {error}",
                stacklevel=2,
            )
            return
        self._graphs.insert(0, graph)
        del self._graphs[self.MOST :]


def capture(function, inputs, pool):
    """A CUDA graph of `function(inputs)`: what launches it, where it puts results."""
    graph, stream = torch.cuda.CUDAGraph(), _capturing_stream(inputs[0].device)
    here = torch.cuda.current_stream()
    stream.wait_stream(here)
    # Not `torch.cuda.graph`, which collects garbage first.
    with torch.cuda.stream(stream):
        # Other threads may do as they please meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            results = function(inputs)
        finally:
            graph.capture_end()
    here.wait_stream(stream)
    return graph.replay, results


@functools.cache
def _capturing_stream(device):
    # One, since each stream that multiplies has memory of its own.
    return torch.cuda.Stream(device)


# Threads share where graphs read and write: one at a time, from copies to copies.
_lock = threading.Lock()
# Place of each of graphs' own tensors to what was given out last, while it is needed.
_given_out = weakref.WeakValueDictionary()


class _Graph:
    """One CUDA graph of a function of tensors.

    Up to `MOST_OWNED` bytes, it keeps what the function changes in place, for others to
    be copied to when nobody needs it any more. What is larger is known by its place.
    """

    MOST_OWNED = 2**27

    def __init__(self, function, tensors, changed, pool):
        """`changed`: number of a result to that of the argument that it is."""
        stays = set(changed.values())
        self._places = {i: tensors[i].data_ptr() for i in stays}
        self._own = {}
        if sum(tensors[i].nbytes for i in stays) <= self.MOST_OWNED:
            # Other objects, so that those that are given out can be told to be needed.
            self._own = {i: tensors[i].detach() for i in stays}
        for i in stays:
            _given_out[self._places[i]] = tensors[i]
        inputs = [
            x.detach() if i in stays else x.clone() for i, x in enumerate(tensors)
        ]
        self._replay, results = capture(function, inputs, pool)
        self._inputs = {i: x for i, x in enumerate(inputs) if i not in stays}
        self._results = [
            (changed[i], None) if i in changed else (None, x)
            for i, x in enumerate(results)
        ]
        self._seen = {}

    def is_where(self, arguments):
        """Whether what is changed in place lies where the graph expects it."""
        return all(arguments[i].data_ptr() == at for i, at in self._places.items())

    def may_take(self, arguments):
        """Whether nobody needs what would be overwritten."""
        return bool(self._own) and all(
            arguments[i].data_ptr() == at or at not in _given_out
            for i, at in self._places.items()
        )

    def __call__(self, before, arguments):
        """The results; `before` is called before arguments change."""
        arguments, targets, sources = list(arguments), [], []
        for i, target in self._inputs.items():
            value = arguments[i]
            if not isinstance(value, torch.Tensor):
                target.fill_(value)
                continue
            # Much of it is the same in all calls, such as the sampler's settings.
            seen = self._seen.get(i)
            if seen is None or seen[0] is not value or seen[1] != value._version:
                self._seen[i] = value, value._version
                targets.append(target)
                sources.append(value)
        for i, at in self._places.items():
            if arguments[i].data_ptr() != at:
                targets.append(self._own[i])
                sources.append(arguments[i])
                arguments[i] = self._own[i].detach()
            _given_out[at] = arguments[i]
        if targets:
            torch._foreach_copy_(targets, sources)
        before()
        self._replay()
        return [
            result.clone() if i is None else arguments[i] for i, result in self._results
        ]
