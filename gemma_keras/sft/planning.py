"""What fine-tuning takes of memory, told from shapes, before anything is loaded.

A step's peak is what stays (the program, weights, the adapter and its optimizer), what
each block keeps for the backward pass, and the largest of what comes and goes: one
block's work, or one tile of the loss. The numbers that a block keeps for each token
are counted from backbone.py, where the backends differ: torch keeps what autograd asks
for, XLA, which compiles for JAX and TensorFlow, what it does not care to compute again.
tools/bench/plan.py compares the sum with runs.
"""

import dataclasses
import math
import os

from gemma_keras import backend, registry
from gemma_keras.loading import open_source
from gemma_keras.lora_config import EMBEDDING, LoraConfig, layer_shapes
from gemma_keras.loss import chunk_sizes
from gemma_keras.packed import MANY_BYTES
from gemma_keras.quantization import MODES, Quantization
from gemma_keras.registry import DTYPE_BYTES

# Numbers that an optimizer keeps for each trained one; Adafactor next to none.
MOMENTS = {"adamw": 2, "adam": 2, "lion": 1, "muon": 2, "sgd": 0, "adafactor": 0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What a backend takes on a CPU for itself, and what its blocks keep.

    Attributes:
        base: bytes of the process with Keras and the tokenizer, before a model.
        compiled: bytes that compiling takes and leaves.
        of_layer: the same for each layer.
        of_variable: the same for each variable that is trained.
        of_packed: the same for each matrix in few bits that is restored by parts.
        xla: whether XLA decides what is kept: the terms of a sum in its place, where
            several operations begin with the sum; and, on a CPU, float32 in place of
            narrower floats.
        kept: bytes that blocks keep on a CPU in place of each that is counted.
        snapshots: whether a checkpoint is copied before it is written.
        heads: how often the loss holds the gradient of a head that is trained.
    """

    base: float
    compiled: float
    of_layer: float = 0.0
    of_variable: float = 0.0
    of_packed: float = 0.0
    xla: bool
    kept: float = 1.0
    snapshots: bool
    heads: int


# Measured on a CPU: see tools/bench/LOG.md.
PROGRAMS = {
    "jax": Program(
        base=0.43e9,
        compiled=0.33e9,
        of_layer=5e6,
        of_variable=1e6,
        xla=True,
        snapshots=False,
        heads=2,
    ),
    "torch": Program(
        base=0.65e9, compiled=0.05e9, xla=False, kept=1.5, snapshots=True, heads=1
    ),
    "tensorflow": Program(
        base=0.80e9,
        compiled=0.29e9,
        of_layer=30e6,
        of_variable=3.5e6,
        of_packed=25e6,
        xla=True,
        snapshots=True,
        heads=2,
    ),
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes that a run takes, part by part.

    Attributes:
        parts: name to bytes of what a training step holds at its peak.
        loading: bytes at the peak of loading the model, before the first step.
    """

    parts: dict[str, int]
    loading: int

    @property
    def total(self):
        """Bytes at the peak of the run."""
        return max(self.loading, sum(self.parts.values()))


def plan(config, memory=None):
    """What a run takes, and what would fit.

    Nothing but the checkpoint's config is read, and no preset is fetched for it.

    Args:
        config: a `RunConfig`; its data and folder do not matter.
        memory: bytes that there are; the accelerator's, or those that the machine has
            left, if None.

    Returns:
        `(plan, memory, proposals)`: the `Plan`; the bytes that there are; and up to
        three pairs of a dict of changed options and their `Plan`, best first. If the
        run fits, these are larger batches that do too; otherwise, what makes it fit.

    Raises:
        ValueError: as `RunConfig.resolved`.
        CheckpointError: `config.preset` cannot be read.
    """
    model, stored, packings = _facts(config.preset)
    config = config.resolved(model, stored, packings)
    there = backend.device_memory()
    device = "cpu" if there is None else "gpu"
    memory = memory or there or _free_memory()

    def of(changes):
        run = dataclasses.replace(config, **changes)
        return predict(model, run, stored, backend.NAME, device, packings)

    found = of({})
    if found.total <= memory:
        candidates = _larger(config)
    else:
        candidates = _smaller(config, frozen=bool(packings))
    proposals = [(changes, of(changes)) for changes in candidates]
    return found, memory, [pair for pair in proposals if pair[1].total <= memory][:3]


def _facts(source):
    """`(config, dtype, packings)` of a model; a preset is not fetched for them."""
    preset = registry.known_as(source)
    if preset is not None and not preset.available:
        return preset.config, "bfloat16", {}
    with open_source(source) as checkpoint:
        return checkpoint.config, checkpoint.dtype, checkpoint.packings


def _larger(config):
    """Changes that make batches larger."""
    return [{"batch_size": config.batch_size * 2**i} for i in range(7, 0, -1)]


def _smaller(config, frozen):
    """Changes that take less: what learns the same first, shorter rows last.

    The bits of `frozen` weights stay as they are.
    """
    rows, steps = config.batch_size, config.accumulation
    batches = [{"batch_size": rows, "accumulation": steps}]
    while rows % 2 == 0:
        rows, steps = rows // 2, steps * 2
        batches.append({"batch_size": rows, "accumulation": steps})
    modes = [config.quantize]
    if not (config.full or frozen or config.quantize):
        modes += MODES
    length = config.sequence_length
    wanted = [
        {**batch, "remat": remat, "quantize": mode, "sequence_length": length // part}
        for part in (1, 2, 4)
        if length // part >= 2  # the fewest that a row may have
        for mode in modes
        for batch in batches
        for remat in sorted({config.remat, True})
    ]
    now = config.as_dict()
    return [{k: v for k, v in w.items() if v != now[k]} for w in wanted][1:]


def _free_memory():
    """Bytes that the machine has left, or has in all if it does not say."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return backend.memory_left() or total


def predict(model, run, stored, name, device="cpu", packings=None):
    """The `Plan` of a run.

    Args:
        model: the `GemmaConfig`.
        run: a `RunConfig` with its `sequence_length` filled in.
        stored: dtype of the checkpoint, which `dtype="auto"` takes.
        name: the backend's, `"jax"`, `"torch"` or `"tensorflow"`.
        packings: those of a checkpoint that is quantised, by the layers' paths.
        device: `"cpu"`, where the process itself counts too, or `"gpu"`.
    """
    program = PROGRAMS[name]
    step = _Step(model, run, stored, program, packings or {}, device == "cpu")
    base = program.base if device == "cpu" else 0
    kept, work = step.kept(), max(step.work(), step.loss())
    snapshot = step.snapshot()
    if program.xla:
        # What a step held is given back before a checkpoint is written.
        snapshot = max(0, snapshot - kept - work)
    parts = {
        "program": base + (step.compiled() if device == "cpu" else 0),
        "weights": step.weights(),
        "adapter and optimizer": step.trained(),
        "copy for a checkpoint": snapshot,
        "kept by blocks": kept,
        "work of a block or of the loss": work,
    }
    loading = base + step.loading()
    return Plan({k: round(v) for k, v in parts.items() if v}, round(loading))


class _Step:
    """Counts what one step of a run holds, in bytes."""

    def __init__(self, model, run, stored, program, packings, on_cpu):
        self.model, self.run, self.program = model, run, program
        self.stored = DTYPE_BYTES[stored.removeprefix("mixed_")]
        self.packings = packings
        if run.quantize:
            self.packings = Quantization(run.quantize).packings(model)
        holds = stored if run.dtype == "auto" else run.dtype
        self.mixed = holds.startswith("mixed_")
        self.compute = DTYPE_BYTES[holds.removeprefix("mixed_")]
        self.held = 4 if self.mixed else self.compute
        self.share = program.kept if on_cpu else 1.0
        self.widened = program.xla and on_cpu and self.compute < 4
        if self.widened:
            self.compute = 4
        self.tokens = run.batch_size * run.sequence_length
        self.scores = model.num_query_heads * run.sequence_length
        self.lora = None
        if not run.full:
            self.lora = LoraConfig(
                rank=run.lora_rank, targets=run.lora_targets or None, dora=run.dora
            )

    def compiled(self):
        """What a compiled step takes on a CPU."""
        program = self.program
        layers = program.of_layer * self.model.num_layers
        variables = program.of_variable * self._variables()
        shapes = layer_shapes(self.model)
        parted = sum(4 * math.prod(shapes[path]) > MANY_BYTES for path in self.packings)
        return program.compiled + layers + variables + program.of_packed * parted

    def _variables(self):
        """How many variables are trained."""
        if self.lora is None:
            return len(self.model.weight_shapes())
        return (2 + self.lora.dora) * len(self._adapted())

    def _adapted(self):
        """Paths of the layers with an adapter."""
        return [path for path in layer_shapes(self.model) if self.lora.adapts(path)]

    def _kinds_adapted(self):
        """Names of layers with an adapter within a block."""
        return {path.rpartition("/")[2] for path in self._adapted()}

    def weights(self):
        """The weights as they are held, and as they are computed with."""
        total = 0
        for path, shape in self.model.weight_shapes().items():
            packing = self.packings.get(path.rpartition("/")[0])
            if packing is None:
                total += self.held * math.prod(shape)
                continue
            rows, columns = shape if path.endswith("embeddings") else shape[::-1]
            for made, dtype in packing.shapes(rows, columns).values():
                total += math.prod(made) * {"bfloat16": 2, "float32": 4}.get(dtype, 1)
        if self.mixed:
            # The kernels once more, as they are computed with.
            total += self.compute * sum(map(math.prod, self._kernels().values()))
        if self.widened and self.held < 4 and EMBEDDING not in self.packings:
            # The head's bits, which the loss cuts from.
            total += self.held * math.prod(layer_shapes(self.model)[EMBEDDING])
        return total

    def loading(self):
        """The most that loading holds; the embedding is read first.

        It lies in the file's pages then, and in memory of its own where it is cast, or
        where the backend takes no other.
        """
        numbers = math.prod(layer_shapes(self.model)[EMBEDDING])
        if self.run.quantize:
            return self.weights() + max(self.stored, self.held) * numbers
        if not self.program.xla and self.stored == self.held:
            return self.weights()
        return max(self.weights(), (self.stored + self.held) * numbers)

    def _kernels(self):
        shapes = layer_shapes(self.model)
        return {path: shape for path, shape in shapes.items() if path != EMBEDDING}

    def _learned(self):
        """One copy of what is trained."""
        if self.lora is None:
            return self.held * self.model.num_parameters
        return DTYPE_BYTES["float32"] * self.lora.num_parameters(self.model)

    def trained(self):
        """Trained weights beyond `weights`, gradients, moments, accumulators."""
        beyond = self.lora is not None
        copies = 1 + MOMENTS[self.run.optimizer] + (self.run.accumulation > 1)
        return (beyond + copies) * self._learned()

    def snapshot(self):
        """What is trained and its moments, once more."""
        copies = self.program.snapshots * (1 + MOMENTS[self.run.optimizer])
        return copies * self._learned()

    def kept(self):
        """What all blocks keep for the backward pass, and the embeddings."""
        width = self.model.hidden_dim
        residual = self.compute * width
        layer = self._of_block()
        if self.run.remat:
            layer = residual
        return self.tokens * (self.model.num_layers * layer + 2 * residual)

    def _of_block(self):
        """Bytes for each token."""
        return self.share * (self._counted() + self._of_terms())

    def _of_terms(self):
        """What sums take for each token whose terms are kept, beyond the sum."""
        if not self.program.xla or self.lora is None:
            return 0
        model = self.model
        sizes = {
            "key": model.num_kv_heads * model.head_dim,
            "ffw_gating": model.ffn_dim,
            "ffw_gating_2": model.ffn_dim,
        }
        if model.use_post_norms:
            sizes |= dict.fromkeys(("attention_output", "ffw_linear"), model.hidden_dim)
        if model.use_qk_norm:
            # And turned by half, to be rotated.
            sizes["query"] = 2 * model.num_query_heads * model.head_dim
        adapted = sum(sizes.get(kind, 0) for kind in self._kinds_adapted())
        return self.compute * adapted

    def _counted(self):
        model, c = self.model, self.compute
        queries = model.num_query_heads * model.head_dim
        keys = model.num_kv_heads * model.head_dim
        width, ffn = model.hidden_dim, model.ffn_dim
        kept = c * (queries + 3 * keys + 2 * ffn)  # XLA keeps keys in two orders
        kept += 2 * 4 * model.num_query_heads  # the largest score and their sum
        kept += 2 * 4 * width  # what norms saw
        if model.use_post_norms:
            kept += 2 * 4 * width
        if model.use_qk_norm:
            kept += 4 * (queries + keys)
        return kept + self._of_inputs(queries)

    def _of_inputs(self, queries):
        """What the inputs of adapted, or of all, projections take for each token."""
        model = self.model
        groups = (
            (("query", "key", "value"), model.hidden_dim),
            (("attention_output",), queries),
            (("ffw_gating", "ffw_gating_2"), model.hidden_dim),
            (("ffw_linear",), model.ffn_dim),
        )
        if self.lora is None:
            return self.compute * sum(width for _, width in groups)
        kinds = self._kinds_adapted()
        return self.compute * sum(
            width for among, width in groups if kinds & set(among)
        )

    def work(self):
        """The most that a block holds beyond what it keeps."""
        model = self.model
        # Scores, weights and their slopes, in the backward pass; bent ones too.
        capped = model.attn_logit_soft_cap is not None
        attention = (4 + capped) * 4 * self.scores
        ffn = 4 * self.compute * model.ffn_dim
        work = max(attention, ffn)
        if self.run.remat:
            work += self._of_block()
        return self.tokens * work

    def loss(self):
        """A tile of logits, its slopes, and the gradient of all positions."""
        vocabulary, width = self.model.vocab_size, self.model.hidden_dim
        rows, tile = map(min, chunk_sizes(), (self.tokens, vocabulary))
        logits = 4 * rows * tile
        capped = self.model.final_logit_soft_cap is not None
        head = 0 if self.lora is not None else self.program.heads * vocabulary * width
        positions = 4 * self.tokens * width
        return (3 + capped) * logits + 4 * (tile * width + positions + head)
