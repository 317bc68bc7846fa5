"""What the machine allows: the products of the model with its weights, and no more.

Making a token has to read every matrix of the model once, and reading a prompt has to
multiply them with as many rows as it has tokens. Here a framework does just that, over
matrices of the same shapes and number, which do not depend on each other, each shape in
the fastest of the ways that the framework has to write such a product. All of them
together are then timed as contenders are: for as many tokens, the best of two spans.
"""

import collections
import functools
import time

import models


def matrices(config):
    """Shape [in, out] of every matrix, and how many of it the layers have; the head.

    Returns:
        `(layers, head)`: a `Counter` of shapes, and the head's shape.
    """
    shapes = config.weight_shapes()
    rows, width = shapes.pop("token_embedding/embeddings")
    layers = collections.Counter(s for s in shapes.values() if len(s) == 2)
    return layers, (width, rows)


class Limit:
    """An engine without a model: `seconds` in place of `generate`."""

    def __init__(self, contender, model):
        self.ways = {"jax": Jax, "torch": Torch, "tensorflow": TensorFlow}[
            contender.backend
        ](contender.dtype)
        self.layers, self.head = matrices(models.config_of(model))
        self.item_bytes = 4 if contender.dtype == "float32" else 2

    def operations(self, rows, head_rows):
        """Multiplications and additions of the same."""
        width, vocab = self.head
        each = sum(a * b * count for (a, b), count in self.layers.items())
        return 2 * (rows * each + head_rows * width * vocab)

    @property
    def bytes_read(self):
        """Bytes of all matrices: what one token, or one prompt, has to read."""
        return self.item_bytes * self.operations(1, 1) // 2

    def load(self):
        """Nothing: matrices are made when they are multiplied."""

    def seconds(self, rows, head_rows, tokens, spans):
        """Least seconds for `rows` through the layers and `head_rows` through the head.

        Args:
            rows: of the layers' products.
            head_rows: of the head's.
            tokens: how often all of it is done in a span.
            spans: how many are timed; the best counts.

        Returns:
            Seconds, and for each shape the way that was best.
        """
        chosen, runs = {}, []
        for (inputs, outputs), count in self.layers.items():
            name, run = self._best(rows, inputs, outputs, count)
            chosen[f"{rows} x {inputs} x {outputs}"] = name
            runs.append(run)
        chosen["head"], run = self._best(head_rows, *self.head, 1)
        runs.append(run)

        def seconds_each(count):
            start = time.perf_counter()
            for _ in range(count):
                for run in runs:
                    run()
            return (time.perf_counter() - start) / count

        # What takes a second by itself needs no company.
        count = min(tokens, max(1, int(1.0 / seconds_each(1))))
        return min(seconds_each(count) for _ in range(spans)), chosen

    def _best(self, rows, inputs, outputs, count):
        """The fastest way's name, and what runs all products of a shape in it."""
        best = (float("inf"),)
        for turned in (False, True):
            shape = (outputs, inputs) if turned else (inputs, outputs)
            x, weights = self.ways.arrays((rows, inputs), shape, count)
            for name, run in self.ways.products(turned, rows, x, weights):
                run()
                best = min(best, (_shortest(run), name, run), key=lambda way: way[0])
        return best[1:]


def _shortest(run, least_seconds=0.4, least_calls=5):
    """The shortest of several calls."""
    times = []
    while len(times) < least_calls or sum(times) < least_seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if sum(times) > 10 * least_seconds:
            break
    return min(times)


class Jax:
    """Products in one compiled program; the rows alone, or given twice."""

    def __init__(self, dtype):
        import jax
        import jax.numpy as jnp

        self.jax, self.jnp, self.dtype = jax, jnp, dtype

    def arrays(self, x_shape, shape, count):
        # A program makes them, in memory of their own.
        make = self.jax.jit(
            lambda key, shape: self.jax.random.normal(key, shape, self.dtype),
            static_argnums=1,
        )
        keys = self.jax.random.split(self.jax.random.key(0), count + 1)
        return make(keys[0], x_shape), [make(key, shape) for key in keys[1:]]

    def products(self, turned, rows, x, weights):
        axes = (((1,), (1 if turned else 0,)), ((), ()))
        for kind in {self.dtype, "float32"}:
            for times in (1, 2) if rows == 1 else (1,):

                def program(x, weights, kind=kind, times=times):
                    x = self.jnp.repeat(x, times, axis=0)
                    dot = functools.partial(
                        self.jax.lax.dot_general,
                        dimension_numbers=axes,
                        preferred_element_type=kind,
                    )
                    return [dot(x, w) for w in weights]

                compiled = self.jax.jit(program)
                run = functools.partial(
                    lambda f: self.jax.block_until_ready(f(x, weights)), compiled
                )
                yield f"{'[out, in]' if turned else '[in, out]'} {kind} x{times}", run


class TensorFlow:
    """Products by XLA, and one after the other without it."""

    def __init__(self, dtype):
        import tensorflow as tf

        self.tf, self.dtype = tf, dtype

    def arrays(self, x_shape, shape, count):
        normal = functools.partial(self.tf.random.normal, dtype=self.dtype)
        return normal(x_shape), [normal(shape) for _ in range(count)]

    def products(self, turned, rows, x, weights):
        tf = self.tf
        for kind in {self.dtype, "float32"}:
            for times in (1, 2) if rows == 1 else (1,):
                for xla in (True, False):
                    # Outside of XLA there is none that changes the dtype.
                    if kind != self.dtype and not xla:
                        continue

                    @tf.function(jit_compile=xla)
                    def program(x, weights, kind=kind, times=times):
                        x = tf.repeat(x, times, axis=0)
                        return [
                            tf.raw_ops.BatchMatMulV3(
                                x=x, y=w, adj_y=turned, Tout=tf.as_dtype(kind)
                            )
                            for w in weights
                        ]

                    def run(program=program):
                        return program(x, weights)[-1].numpy()

                    way = "[out, in]" if turned else "[in, out]"
                    yield f"{way} {kind} x{times}{' XLA' if xla else ''}", run


class Torch:
    """Products called one after the other."""

    def __init__(self, dtype):
        import torch

        self.torch, self.dtype = torch, getattr(torch, dtype)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def arrays(self, x_shape, shape, count):
        options = {"dtype": self.dtype, "device": self.device}
        weights = [self.torch.randn(shape, **options) for _ in range(count)]
        return self.torch.randn(x_shape, **options), weights

    def products(self, turned, rows, x, weights):
        torch = self.torch
        parts = max(1, torch.get_num_threads())
        ways = {"linear": torch.nn.functional.linear} if turned else {"@": torch.matmul}
        if turned:
            twice = x.repeat(2, 1).T
            ways["W @ x.T"] = lambda x, w: w @ x.T
            ways["W @ x.T x2"] = lambda x, w: w @ twice
            ways["bmm, outputs divided"] = lambda x, w: torch.bmm(
                w.view(parts, w.shape[0] // parts, -1),
                (twice if rows == 1 else x.T).expand(parts, -1, -1),
            )
        else:
            ways["bmm, outputs divided"] = lambda x, w: torch.bmm(
                x.expand(parts, -1, -1),
                w.view(len(w), parts, w.shape[1] // parts).transpose(0, 1),
            )
            ways["bmm, inputs divided"] = lambda x, w: torch.bmm(
                x.view(rows, parts, x.shape[1] // parts).transpose(0, 1),
                w.view(parts, len(w) // parts, w.shape[1]),
            ).sum(0)
        if self.device == "cpu" and torch.backends.mkldnn.is_available():
            # What torch itself compiles products to; not part of what it promises.
            onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
            if onednn is not None:
                ways["oneDNN"] = lambda x, w: onednn(
                    x, w if turned else w.T, None, "none", [], ""
                )
        for name, product in ways.items():

            def run(product=product):
                with torch.no_grad():
                    for w in weights:
                        product(x, w)

            yield name, run if self.device == "cpu" else self._launched_once(run)

    def _launched_once(self, run):
        """All of it as one CUDA graph: launching each takes longer than some take."""
        run()
        graph = self.torch.cuda.CUDAGraph()
        with self.torch.cuda.graph(graph):
            run()

        def replay(kept=run):
            # With what it reads, which the graph knows by its place alone.
            graph.replay()
            self.torch.cuda.synchronize()

        return replay
