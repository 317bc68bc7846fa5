"""Who is compared: each loads the same checkpoint and continues the same prompts.

An engine imports its framework when it is made, so that the import can be timed too.
Its `generate` takes token ids [B, T] of rows of one length, continues them greedily by
exactly `new` tokens, without a stop, and returns when the new ids are on the host.
"""

import dataclasses
import functools
import importlib
import json
import os

import models

BACKENDS = ("jax", "tensorflow", "torch")

# Variants of ours: the name, `from_preset`'s arguments and `generate`'s. Each runs on
# all backends, on every model and in every dtype, beside the plain one.
VARIANTS = {
    "ours": ({}, {}),
    "ours-int8": ({"quantize": "int8"}, {}),
    "ours-int4": ({"quantize": "int4"}, {}),
    # Floats but for the keys and values of the tokens that were read.
    "ours-kv8": ({"kv_cache_dtype": "int8"}, {}),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        name: `"ours"`, `"kerashub"`, ...
        backend: of Keras; None for who has none.
        dtype: of the computation, `"float32"` or `"bfloat16"`; llama.cpp's is how the
            weights are stored.
    """

    name: str
    backend: str | None
    dtype: str

    @property
    def words(self):
        """What it is told by: name, backend and dtype."""
        return (self.name, *([self.backend] if self.backend else []), self.dtype)

    def __str__(self):
        return " ".join(self.words)


def contenders(model, dtypes):
    """All that can run a model, in the order of the table."""
    found = []
    for dtype in dtypes:
        for name in (*VARIANTS, "kerashub", "zeromodels"):
            found += [Contender(name, backend, dtype) for backend in BACKENDS]
        found.append(Contender("transformers", "torch", dtype))
        found += [Contender("limit", backend, dtype) for backend in BACKENDS]
    stored = [models.REAL_TYPE] if model == "real" else ["f32", "f16", "q8_0", "q4_0"]
    return found + [Contender("llama.cpp", None, each) for each in stored]


def source_of(contender, model):
    """The format, as `models.file_of` names it, that a contender reads; or None."""
    if contender.name == "limit":
        return None
    if model == "real" and contender.name in VARIANTS:
        return models.REAL_TYPE
    return contender.dtype


def make(contender, model):
    """The engine of a contender, its framework imported, nothing loaded."""
    if contender.name == "limit":
        from limits import Limit

        return Limit(contender, model)
    path = models.file_of(model, source_of(contender, model))
    if contender.name in VARIANTS:
        return Ours(path, contender.dtype, *VARIANTS[contender.name])
    return PEERS[contender.name](path, contender.dtype)


def without_pads(ids):
    """The ids as KerasHub takes them, every one of them a token."""
    import numpy as np

    return {"token_ids": ids, "padding_mask": np.ones_like(ids)}


class Ours:
    """`gemma_keras.GemmaCausalLM`."""

    def __init__(self, path, dtype, load_options, generate_options):
        from gemma_keras import GemmaCausalLM

        self.task, self.path, self.dtype = GemmaCausalLM, str(path), dtype
        self.load_options, self.options = load_options, generate_options

    def load(self):
        self.lm = self.task.from_preset(self.path, self.dtype, **self.load_options)
        self.vocab = self.lm.config.vocab_size

    def generate(self, ids, new):
        return self.lm.generate(
            without_pads(ids), max_new_tokens=new, stop_token_ids=(), **self.options
        )

    def stream(self, ids, new):
        """The same for one row, as text that is made piece by piece."""
        text = self.lm.preprocessor.tokenizer.decode(ids[0].tolist())
        options = {"max_new_tokens": new, "stop_token_ids": (), **self.options}
        for _ in self.lm.stream(text, **options):
            pass

    def negative_log_likelihood(self, ids):
        """Nats for all but the first token of a row [T], the sum."""
        from keras import ops

        if self.lm.kv_cache_dtype == "auto":
            losses = self.lm.score(ids[None], scoring_mode="loss")
        else:
            losses = self._losses_through_cache(ids[None])
        return float(ops.convert_to_numpy(losses).sum(dtype="float64"))

    def _losses_through_cache(self, ids):
        """Nats for each token but the first, which `score` finds without a cache.

        In one call: tokens see no other keys and values than those that are kept.
        """
        from keras import ops

        from gemma_keras.backend import no_gradient
        from gemma_keras.cache import make_cache

        lm, ids = self.lm, ops.convert_to_tensor(ids)
        with no_gradient():
            cache = make_cache(lm.config, *ids.shape, lm.kv_cache_dtype)
            hidden, _ = lm.backbone({"token_ids": ids}, cache=cache)
            logits = ops.cast(lm.backbone.logits(hidden[:, :-1]), "float32")
            chosen = ops.take_along_axis(logits, ids[:, 1:, None], axis=-1)[..., 0]
            return ops.logsumexp(logits, axis=-1) - chosen


class KerasHub:
    """`keras_hub.models.GemmaCausalLM`, or `Gemma3CausalLM`.

    Prompt and answer lie in one array of fixed length, all of which prefill reads:
    only of the same length is it the same program.
    """

    pads = True

    def __init__(self, path, dtype):
        import keras_hub

        config = json.loads((path / "config.json").read_text())
        gemma3 = config["model_type"].startswith("gemma3")
        names = keras_hub.models
        self.task = names.Gemma3CausalLM if gemma3 else names.GemmaCausalLM
        self.path, self.dtype, self.vocab = str(path), dtype, config["vocab_size"]

    def load(self):
        self.lm = self.task.from_preset(self.path, dtype=self.dtype, preprocessor=None)
        self.lm.compile(sampler="greedy")

    def generate(self, ids, new):
        import numpy as np

        room = np.zeros((len(ids), new), "int32")
        padded = {
            "token_ids": np.concatenate([ids, room], axis=1),
            "padding_mask": np.concatenate([np.ones_like(ids), room], axis=1),
        }
        return self.lm.generate(padded, stop_token_ids=None)


class ZeroModels:
    """`zeromodels.models.gemma.GemmaTextGenerate`, or that of Gemma 3."""

    def __init__(self, path, dtype):
        self.config = json.loads((path / "config.json").read_text())
        gemma3 = self.config["model_type"].startswith("gemma3")
        module = "gemma3" if gemma3 else "gemma"
        module = importlib.import_module(f"zeromodels.models.{module}")
        self.task = module.Gemma3TextGenerate if gemma3 else module.GemmaTextGenerate
        self.path, self.dtype, self.vocab = path, dtype, self.config["vocab_size"]

    def load(self):
        import keras
        from safetensors import numpy

        weights = {}
        for file in sorted(self.path.glob("*.safetensors")):
            weights |= numpy.load_file(file)
        policy = keras.config.dtype_policy()
        keras.config.set_dtype_policy(self.dtype)
        self.lm = self.task(**self.task.config_from_hf(self.config))
        keras.config.set_dtype_policy(policy)
        self.task.transfer_from_hf(self.lm, weights)

    def generate(self, ids, new):
        return self.lm.generate(ids, max_new_tokens=new, eos_token_id=())


class Transformers:
    """`transformers.AutoModelForCausalLM`, on torch."""

    def __init__(self, path, dtype):
        import torch
        import transformers

        self.torch, self.task = torch, transformers.AutoModelForCausalLM
        self.path, self.dtype = path, getattr(torch, dtype)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def load(self):
        self.model = self.task.from_pretrained(self.path, dtype=self.dtype)
        self.model = self.model.to(self.device).eval()
        self.vocab = self.model.config.vocab_size
        # No stop, then nothing has to keep it from stopping.
        self.model.generation_config.eos_token_id = None

    def generate(self, ids, new):
        ids = self.torch.from_numpy(ids).long().to(self.device)
        with self.torch.no_grad():
            answer = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        return answer.cpu().numpy()

    def negative_log_likelihood(self, ids):
        ids = self.torch.from_numpy(ids).long().to(self.device)
        with self.torch.no_grad():
            logits = self.model(ids[None]).logits[0, :-1].float()
        losses = self.torch.nn.functional.cross_entropy(
            logits, ids[1:], reduction="none"
        )
        return float(losses.double().sum())


class LlamaCpp:
    """llama.cpp's own library, called through llama-cpp-python's C interface.

    Its Python class takes one sequence at a time, and copies all logits.
    """

    SLOTS, ROWS = 4096, 8

    def __init__(self, path, stored):
        import llama_cpp

        self.lib, self.path = llama_cpp, path
        self.batches, self.context = {}, None

    def load(self):
        lib = self.lib
        # Without what it says about each tensor.
        self.silence = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.silence, None)
        lib.llama_backend_init()
        model = lib.llama_model_default_params()
        model.n_gpu_layers = 999 if lib.llama_supports_gpu_offload() else 0
        self.model = lib.llama_model_load_from_file(str(self.path).encode(), model)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {self.path}")
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self.model))

    def _open(self, rows, length):
        """A context for `rows` sequences of `length` tokens; the last one again."""
        if self.context is not None and self.size == (rows, length):
            self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
            return
        if self.context is not None:
            self.lib.llama_free(self.context)
        asked = self.lib.llama_context_default_params()
        asked.n_ctx, asked.n_seq_max = rows * length, rows
        asked.n_batch = rows * length
        asked.n_threads = asked.n_threads_batch = os.cpu_count()
        self.context = self.lib.llama_init_from_model(self.model, asked)
        if not self.context:
            raise RuntimeError("llama.cpp made no context")
        self.size = rows, length

    def _read(self, ids, start, wanted):
        """Feed ids [B, T] at positions from `start`; logits of the `wanted` columns."""
        import numpy as np

        lib, (rows, length) = self.lib, ids.shape
        if (rows, length) not in self.batches:
            self.batches[rows, length] = lib.llama_batch_init(rows * length, 0, 1)
        batch = self.batches[rows, length]
        batch.n_tokens = rows * length
        places = []
        for index in range(rows * length):
            row, column = divmod(index, length)
            batch.token[index] = int(ids[row, column])
            batch.pos[index] = start + column
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = row
            batch.logits[index] = wanted(column)
            if wanted(column):
                places.append(index)
        if lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        at = functools.partial(lib.llama_get_logits_ith, self.context)
        view = np.ctypeslib.as_array
        return [view(at(index), shape=(self.vocab,)) for index in places]

    def generate(self, ids, new):
        import numpy as np

        rows, length = ids.shape
        # What it reserves for a sequence is a multiple of 256.
        self._open(rows, -(-(length + new) // 256) * 256)
        logits = self._read(ids, 0, lambda column: column == length - 1)
        answer = []
        for step in range(new):
            answer.append([int(row.argmax()) for row in logits])
            if step < new - 1:
                newest = np.array(answer[-1], "int32")[:, None]
                logits = self._read(newest, length + step, lambda column: True)
        return np.array(answer).T

    def negative_log_likelihood(self, ids):
        import numpy as np

        self._open(1, -(-len(ids) // 256) * 256)
        logits = self._read(ids[None, :-1], 0, lambda column: True)
        total = 0.0
        for row, target in zip(logits, ids[1:], strict=True):
            row = row.astype("float64")
            top = row.max()
            total += top + np.log(np.exp(row - top).sum()) - row[target]
        return total


PEERS = {
    "kerashub": KerasHub,
    "zeromodels": ZeroModels,
    "transformers": Transformers,
    "llama.cpp": LlamaCpp,
}
