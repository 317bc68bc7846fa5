"""Weights in 4 bits that suit what a model reads: GPTQ, block after block.

Texts go through the model once. Where they meet a projection, the second moments of its
inputs are taken, by which it is rounded (`gptq.py`); the blocks after it see what the
rounded ones make of the texts. So there is one block's input of every token in memory,
and the moments of one block.

Keras has GPTQ as well. What it keeps is another layout, with whole numbers for offsets,
and its function for one matrix is not public.
"""

import dataclasses
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
        count = min(_BATCH, len(rows))
        return [
            _batch([[pieces[i] for i in row] for row in rows[i : i + count]], count, size)
            for i in range(0, len(rows), count)
        ]


def _token_ids(source, preprocessor):
    """Lists of ids, one for each text, pair or chat."""
    if isinstance(source, list | tuple) and source:
        if all(map(_is_ids, source)):
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
    with backend.no_gradient():
        _walk(backbone, chosen, batches, calibration.damping, progress)


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


class _Run:
    """A batch on its way: what it is before the next block, and what blocks ask for.

    Attributes:
        x: the residual stream [B, T, D].
        tables: rotary tables by kind of layer.
        masks: attention masks by kind of layer.
        counts: float32 [B * T, 1], 1 where there is a token.
    """

    def __init__(self, backbone, inputs):
        inputs = {name: ops.convert_to_tensor(x) for name, x in inputs.items()}
        self.x = backbone.embed(inputs)
        self.tables, self.masks = backbone.surroundings(inputs, self.x.shape[1])
        self.counts = ops.cast(ops.reshape(inputs["padding_mask"], (-1, 1)), "float32")

    def through(self, block, kind):
        """The residual stream after a block."""
        return block.call(self.x, self.tables[kind], self.masks[kind])


def _walk(backbone, chosen, batches, damping, progress):
    """Round block after block."""
    embedding = backbone.token_embedding
    if embedding.path in chosen:
        embedding.pack(chosen[embedding.path])
    runs = [_Run(backbone, inputs) for inputs in batches]
    kinds, blocks = backbone.config.layer_kinds, backbone.blocks
    for done, (block, kind) in enumerate(zip(blocks, kinds, strict=True), 1):
        rounded = _round_block(block, kind, chosen, runs, damping)
        if done < len(blocks):
            for run in runs:
                run.x = run.through(block, kind)
        for layer, arrays in rounded:
            layer.pack(chosen[layer.path], arrays)
        if progress is not None:
            progress(done, len(blocks))


def _round_block(block, kind, chosen, runs, damping):
    """Pairs of a layer and its arrays; the layers hold what these restore, in floats.

    In floats products are quicker than of codes, which are restored each time.
    """
    stages = []
    for stage in block.projections:
        layers = [layer for layer in stage if layer.path in chosen]
        if layers:
            stages.append(layers)
    moments, rounded = _moments(block, kind, [stage[0] for stage in stages], runs), []
    for layers, of_inputs in zip(stages, moments, strict=True):
        if not np.isfinite(of_inputs).all():
            raise ValueError(
                f"{layers[0].path}: its inputs are NaN or infinite. The model is half "
                "quantised now: load it again, in another dtype."
            )
        for layer in layers:
            packing = chosen[layer.path]
            matrix = backend.to_numpy(layer.weight).T
            if packing.bits == 4:
                size = packing.group_size
                arrays = round_to_outputs(matrix, of_inputs, size, damping)
            else:
                arrays = pack(matrix, packing)
            layer.weight.assign(unpack(arrays, packing).T)
            rounded.append((layer, arrays))
    return rounded


def _moments(block, kind, layers, runs):
    """X^T X of the inputs X [tokens, in] of each of some projections, in numpy."""
    totals = [0.0] * len(layers)

    def watch(number, counts):
        def add(inputs):
            rows = ops.reshape(ops.cast(inputs, "float32"), (-1, inputs.shape[-1]))
            rows = rows * counts
            totals[number] += ops.matmul(ops.transpose(rows), rows)

        return add

    try:
        for run in runs:
            for number, layer in enumerate(layers):
                layer.watch = watch(number, run.counts)
            run.through(block, kind)
    finally:
        for layer in layers:
            layer.watch = None
    return [backend.to_numpy(total) for total in totals]
