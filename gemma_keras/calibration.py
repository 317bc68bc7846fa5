"""Weights in 4 bits that suit what a model reads: GPTQ, block after block.

Texts go through the model once. Where they meet a projection, the second moments of its
inputs are taken, by which it is rounded (`gptq.py`); the blocks after it see what the
rounded ones make of the texts. So there is one block's input of every token in memory,
and the moments of one block.

Keras has GPTQ as well. What it keeps is another layout, with whole numbers for offsets,
and its function for one matrix is not public.
"""

import dataclasses
import functools
import os
import warnings
from typing import Any

import numpy as np
from keras import ops

from gemma_keras import backend, bins, data, distribution
from gemma_keras.gptq import round_to_outputs
from gemma_keras.projection import adapted_layers
from gemma_keras.quantization import pack, unpack

# Rows that go through a block at a time.
_BATCH = 8


@dataclasses.dataclass(frozen=True)
class Calibration:
    """What a model reads while its weights are rounded, and how much of it.

    Attributes:
        data: texts, pairs or chats, as `fit` takes them; or the path of a file of them,
            a `.txt` file being one text; or a list of arrays of token ids.
        num_samples: most rows that are read. Of more, they are spread evenly.
        sequence_length: tokens of a row. Texts that are longer go on in the next one,
            those that are shorter share one without seeing each other.
        damping: how much what was not read counts, as a share of the mean of what was.

    Raises:
        ValueError: a number is out of its range.
    """

    data: Any
    num_samples: int = 128
    sequence_length: int = 512
    damping: float = 0.01

    def __post_init__(self):
        for name, least in (("num_samples", 1), ("sequence_length", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name} must be a whole number from {least}, got {value!r}."
                )
        if not 0 < self.damping <= 1:
            raise ValueError(
                f"damping must be above 0 and at most 1, got {self.damping!r}."
            )

    @classmethod
    def get(cls, value):
        """A `Calibration` of one, or of its data."""
        return value if isinstance(value, cls) else cls(value)

    @classmethod
    def of_keras(cls, config, tokenizer):
        """A `Calibration` that does what a `keras.quantizers.GPTQConfig` says.

        Args:
            config: the config.
            tokenizer: the model's; None if it has none.

        Raises:
            ValueError: the config asks for what is not kept so.
        """
        for name, value in (
            ("weight_bits", 4),
            ("symmetric", False),
            ("activation_order", False),
            ("per_channel", True),
            ("quantization_layer_structure", None),
        ):
            given = getattr(config, name)
            if given != value:
                raise ValueError(
                    f"Of GPTQConfig, {name} must be {value!r} here, got {given!r}."
                )
        if config.tokenizer is not None and config.tokenizer != tokenizer:
            raise ValueError(
                "Of GPTQConfig, tokenizer must be the model's own, "
                "lm.preprocessor.tokenizer, or None: texts are encoded as for fit."
            )
        data = config.dataset
        return cls(
            data if isinstance(data, str | os.PathLike | dict) else list(data),
            config.num_samples,
            config.sequence_length,
            config.hessian_damping,
        )

    def batches(self, preprocessor, longest):
        """Inputs of the backbone: a list of dicts of arrays [B, T].

        Args:
            preprocessor: of the model; None if the data are token ids.
            longest: tokens that the model was trained for, which no row exceeds.

        Raises:
            ValueError: there is nothing to read in the data, or no tokenizer to.
        """
        size = min(self.sequence_length, longest)
        pieces = [
            piece
            for ids in _token_ids(self.data, preprocessor)
            for piece in _pieces(ids, size, preprocessor)
        ]
        lengths = np.array([len(piece) for piece in pieces], int)
        if not len(lengths) or lengths.max() < 2:
            raise ValueError(
                "There is nothing to calibrate with: the data holds no text of two "
                "tokens."
            )
        size = int(min(size, lengths.sum()))
        rows = bins.best_fit(lengths, size)
        if len(rows) > self.num_samples:
            spread = np.linspace(0, len(rows) - 1, self.num_samples).round()
            rows = [rows[i] for i in spread.astype(int)]
        rows = [[pieces[i] for i in row] for row in rows]
        count = min(_BATCH, len(rows))
        return [
            _batch(rows[start : start + count], count, size)
            for start in range(0, len(rows), count)
        ]


def _token_ids(source, preprocessor):
    """Lists of ids, one for each text, pair or chat."""
    if isinstance(source, list | tuple) and source and all(map(_is_ids, source)):
        return [np.asarray(ids).reshape(-1).tolist() for ids in source]
    if preprocessor is None:
        raise ValueError(
            "This model has no preprocessor, so it reads no text: calibrate with a "
            "list of arrays of token ids."
        )
    if isinstance(source, str | os.PathLike) and str(source).endswith(".txt"):
        with open(os.path.expanduser(source), encoding="utf-8") as file:
            source = [file.read()]
    return preprocessor.token_ids(data.read_rows(source))


def _is_ids(x):
    if isinstance(x, list | tuple):
        return bool(x) and isinstance(x[0], int)
    return hasattr(x, "dtype") and "int" in str(x.dtype)


def _pieces(ids, size, preprocessor):
    """Ids in runs of at most `size`, each with the <bos> that the first one has."""
    bos = None if preprocessor is None else preprocessor.tokenizer.bos_token_id
    first = ids[:1] if ids[:1] == [bos] else []
    for start in range(len(first), len(ids), size - len(first)):
        yield [*first, *ids[start : start + size - len(first)]]


def _batch(rows, count, size):
    """Arrays of rows, each a list of lists of ids that do not see each other."""
    names = ("token_ids", "positions", "segment_ids")
    arrays = {name: np.zeros((count, size), "int32") for name in names}
    for i, row in enumerate(rows):
        start = 0
        for segment, ids in enumerate(row, 1):
            end = start + len(ids)
            arrays["token_ids"][i, start:end] = ids
            arrays["positions"][i, start:end] = np.arange(len(ids))
            arrays["segment_ids"][i, start:end] = segment
            start = end
    return {**arrays, "padding_mask": arrays["segment_ids"] > 0}


def quantise(backbone, quantization, calibration, preprocessor=None, progress=None):
    """Keep the matrices of a `GemmaBackbone` in 4 bits, rounded by what it reads.

    The embedding, and what `quantization` keeps in 8 bits, is rounded to the nearest.

    Args:
        backbone: the `GemmaBackbone`.
        quantization: a `Quantization`, `"int4"`.
        calibration: a `Calibration`.
        preprocessor: as in `Calibration.batches`.
        progress: called as `progress(done, total)` after each block.

    Raises:
        ValueError: nothing to calibrate with; what `Quantizable.choose` refuses; or the
            model computes what is not finite, which leaves it half quantised.
    """
    if quantization.mode != "int4":
        raise ValueError(
            "Calibration is for int4: in int8, codes are as good when they are the "
            "nearest."
        )
    if distribution.is_set():
        raise ValueError(
            "Calibrate without a distribution, save the model, and load it under one."
        )
    chosen = backbone.choose(quantization)
    batches = calibration.batches(preprocessor, backbone.config.max_position)
    _check_weights(backbone, chosen)
    _warn_of_few(batches, backbone.config)
    embedding = backbone.token_embedding
    if embedding.path in chosen:
        embedding.pack(chosen[embedding.path])
    walk = _Walk(backbone, chosen, batches, calibration.damping)
    kinds, blocks = backbone.config.layer_kinds, backbone.blocks
    for done, (block, kind) in enumerate(zip(blocks, kinds, strict=True), 1):
        rounded = walk.round_block(block, kind)
        if done < len(blocks):
            walk.pass_on(block, kind)
        for layer, arrays in rounded:
            layer.pack(chosen[layer.path], arrays)
        if progress is not None:
            progress(done, len(blocks))


def _check_weights(backbone, chosen):
    for path, layer in adapted_layers(backbone).items():
        if path in chosen and not backend.all_finite(layer.weight.value):
            raise ValueError(f"{path}: holds NaN or infinite numbers.")


def _warn_of_few(batches, config):
    tokens = sum(int(inputs["padding_mask"].sum()) for inputs in batches)
    if tokens < config.ffn_dim:
        warnings.warn(
            f"{tokens:,} tokens are few to calibrate with, where inputs have up to "
            f"{config.ffn_dim:,} numbers: the weights will suit these tokens more than "
            "others. Some ten thousands are usual.",
            stacklevel=5,
        )


class _Walk:
    """Texts on their way through a backbone whose blocks are rounded one by one.

    Attributes:
        runs: for each batch the residual stream [B, T, D] before the next block, rotary
            tables and masks by kind of layer, and where there are tokens, float32
            [B * T, 1].
    """

    def __init__(self, backbone, chosen, batches, damping):
        self.chosen, self.damping = chosen, damping
        self._through = backend.LayerProgram(_through)
        self._moments = {}
        begin = backend.LayerProgram(_begin)
        self.runs = [list(begin(backbone, inputs)) for inputs in batches]

    def pass_on(self, block, kind):
        """Have all texts go through a block."""
        for run in self.runs:
            x, tables, masks, _ = run
            run[0] = self._through(block, x, tables[kind], masks[kind])

    def round_block(self, block, kind):
        """Pairs of a layer and its arrays.

        The layers hold what these restore, in floats: products are quicker than of
        codes, which are restored each time.
        """
        stages = {}
        for number, stage in enumerate(block.projections()):
            layers = [layer for layer in stage if layer.path in self.chosen]
            if layers:
                stages[number] = layers
        moments, rounded = self._moments_of(block, kind, tuple(stages)), []
        for layers, of_inputs in zip(stages.values(), moments, strict=True):
            if not np.isfinite(of_inputs).all():
                raise ValueError(
                    f"{layers[0].path}: its inputs are NaN or infinite. The model is "
                    "half quantised now: load it again, in another dtype."
                )
            rounded += [(layer, self._round(layer, of_inputs)) for layer in layers]
        return rounded

    def _round(self, layer, moments):
        packing = self.chosen[layer.path]
        matrix = backend.to_numpy(layer.weight).T
        if packing.bits == 4:
            size = packing.group_size
            arrays = round_to_outputs(matrix, moments, size, self.damping)
        else:
            arrays = pack(matrix, packing)
        layer.weight.assign(unpack(arrays, packing).T)
        return arrays

    def _moments_of(self, block, kind, stages):
        """X^T X of the inputs X [tokens, in] of each of some stages, in numpy."""
        if stages not in self._moments:
            add = functools.partial(_add_moments, stages)
            self._moments[stages] = backend.LayerProgram(add)
        projections = block.projections()
        sizes = [projections[number][0].columns for number in stages]
        totals = [np.zeros((size, size), "float32") for size in sizes]
        for x, tables, masks, counts in self.runs if stages else ():
            totals = self._moments[stages](
                block, totals, x, tables[kind], masks[kind], counts
            )
        return [backend.to_numpy(total) for total in totals]


def _begin(backbone, inputs):
    inputs = {name: ops.convert_to_tensor(x) for name, x in inputs.items()}
    x = backbone.embed(inputs)
    tables, masks = backbone.surroundings(inputs, x.shape[1])
    counts = ops.cast(ops.reshape(inputs["padding_mask"], (-1, 1)), "float32")
    return x, tables, masks, counts


def _through(block, x, table, mask):
    return block.call(x, table, mask)


def _add_moments(stages, block, totals, x, table, mask, counts):
    """`totals` with the moments of a batch added to them."""
    totals = [ops.convert_to_tensor(total) for total in totals]
    projections = block.projections()
    layers = [projections[number][0] for number in stages]

    def add(number, inputs):
        rows = ops.reshape(ops.cast(inputs, "float32"), (-1, inputs.shape[-1]))
        rows = rows * counts
        totals[number] = totals[number] + ops.matmul(ops.transpose(rows), rows)

    try:
        for number, layer in enumerate(layers):
            layer.watch = functools.partial(add, number)
        block.call(x, table, mask)
    finally:
        for layer in layers:
            layer.watch = None
    return totals
