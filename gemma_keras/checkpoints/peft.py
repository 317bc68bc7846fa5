"""Directories of one adapter as PEFT writes them, read and written.

`adapter_config.json` says what it is; `adapter_model.safetensors` holds A as [r, in]
and B as [out, r], under the names that the layers have in transformers' classes.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gemma_keras.checkpoints import staging
from gemma_keras.checkpoints.checkpoint import (
    FLAG,
    INTEGER,
    NUMBER,
    CheckpointError,
    check_types,
    read_json,
    some,
)
from gemma_keras.checkpoints.hugging_face import PREFIXES, weight_name
from gemma_keras.checkpoints.provenance import (
    CARD,
    NOTICE,
    PROVENANCE,
    licence_section,
    write_papers,
)
from gemma_keras.checkpoints.safetensors_file import SafetensorsFile
from gemma_keras.lora_config import (
    ALL_LINEAR,
    EMBEDDING,
    LoraConfig,
    exceptions,
    for_layers,
    layer_shapes,
)
from gemma_keras.registry import ADAPTER_FILES

CONFIG, WEIGHTS = ADAPTER_FILES
_NAMES = {CONFIG, WEIGHTS, CARD, NOTICE, PROVENANCE}
_PICKLE = "adapter_model.bin"
_ROOT = "base_model.model."
_PATTERNS = {"alpha_pattern": NUMBER, "rank_pattern": INTEGER}
_TYPES = {
    "r": INTEGER,
    "lora_alpha": NUMBER,
    "lora_dropout": NUMBER,
    "use_rslora": (*FLAG, type(None)),
    "use_dora": (*FLAG, type(None)),
}
# Where one of these is set, PEFT computes something else.
_UNSUPPORTED = (
    "alora_invocation_tokens arrow_config corda_config eva_config fan_in_fan_out "
    "kasa_config layer_replication lora_bias megatron_config modules_to_save "
    "monteclora_config target_parameters trainable_token_indices use_bdlora use_qalora "
    "velora_config"
).split()
# Starts that leave the model's own weights as they are.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_CARD = """\
---
library_name: peft
{head}tags:
- lora
---

# A low-rank adapter

Rank {rank} on {targets}, for a Gemma of {layers} layers and width {width}. Written by
[gemma_keras](https://pypi.org/project/gemma_keras) {version}, in PEFT's format.

With gemma_keras, on JAX, PyTorch or TensorFlow:

```python
lm = gemma_keras.models.GemmaCausalLM.from_preset("the model it belongs to")
lm.load_adapter("PATH")
```

With PEFT:

```python
model = transformers.AutoModelForCausalLM.from_pretrained("the model it belongs to")
model = peft.PeftModel.from_pretrained(model, "PATH")
```
"""
_TOLD = "Low-rank updates were written, without the model that they belong to."


class Adapter(NamedTuple):
    """One adapter: its config and its numbers."""

    lora: LoraConfig
    # Path of each layer to `lora_a` [in, r], `lora_b` [r, out] and, of DoRA,
    # `lora_magnitude` [out].
    weights: dict


def module_names(config):
    """Path of each layer that can be adapted to its name in transformers."""
    return {
        path: "model."
        + weight_name(_weight(path), config.use_post_norms).removesuffix(".weight")
        for path in layer_shapes(config)
    }


def _weight(path):
    return f"{path}/{'embeddings' if path == EMBEDDING else 'kernel'}"


def write(
    directory, adapter, config, *, base_model=None, provenance=None, overwrite=False
):
    """Writes an adapter, beside its place, and renames it when it is complete.

    Args:
        directory: Where to.
        adapter: An `Adapter`.
        config: The `GemmaConfig` of the model that it belongs to.
        base_model: The name of that model, or None.
        provenance: The `Provenance` of that model, for the papers that go along; None
            for no papers but the card.
        overwrite: Whether an adapter that is there may be replaced. A directory that
            holds anything else is never touched.

    Raises:
        CheckpointError: the place is taken, or the disk refuses.
    """
    from safetensors.numpy import save_file

    directory = Path(directory).expanduser().absolute()
    _check_place(directory, overwrite)
    names = module_names(config)
    tensors = {}
    for path, arrays in adapter.weights.items():
        for key, array in arrays.items():
            name = f"{_ROOT}{names[path]}.{_tensor_name(path, key)}"
            array = array.T if array.ndim == 2 else array
            tensors[name] = np.ascontiguousarray(array, "float32")
    described = _describe(adapter, names, base_model)
    with staging.replacing(directory) as partial:
        partial.mkdir()
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(described, indent=2, sort_keys=True)
        (partial / CONFIG).write_text(text + "\n", "utf-8")
        licence = provenance and provenance.licence
        card = _card(adapter, config, base_model, licence)
        if provenance is None:
            (partial / CARD).write_text(card, "utf-8")
        else:
            # The model itself is not read again for its sha256.
            facts = provenance.adding(_TOLD).describe("PEFT adapter", "float32", [])
            write_papers(partial, facts, card)


def _tensor_name(path, key):
    if key == "lora_magnitude":
        return "lora_magnitude_vector"
    letter = key[-1].upper()
    if path == EMBEDDING:
        return f"lora_embedding_{letter}"
    return f"lora_{letter}.weight"


def _check_place(directory, overwrite):
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: is a file; name a directory.")
    present = {child.name for child in directory.iterdir()}
    foreign = present - _NAMES
    if foreign:
        raise CheckpointError(
            f"{directory}: holds files that are no adapter's ({some(foreign)}) and is "
            "left alone; name another directory."
        )
    if present and not overwrite:
        raise CheckpointError(
            f"{directory}: exists already; pass overwrite=True to replace the adapter."
        )


def _describe(adapter, names, base_model):
    """The contents of adapter_config.json."""
    lora, weights = adapter
    ranks = {names[path]: lora.rank_of(path) for path in weights}
    alphas = {names[path]: _whole(lora.alpha_of(path)) for path in weights}
    alpha = _whole(lora.rank if lora.alpha is None else lora.alpha)
    everywhere = {}
    for path, name in names.items():
        everywhere.setdefault(name.rsplit(".", 1)[-1], set()).add((path, name))
    targets = []
    for last, layers in everywhere.items():
        chosen = sorted(name for path, name in layers if path in weights)
        targets += [last] if len(chosen) == len(layers) else chosen
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": lora.dropout,
        "target_modules": targets,
        "rank_pattern": _escaped(exceptions(ranks, lora.rank, ".")),
        "alpha_pattern": _escaped(exceptions(alphas, alpha, ".")),
        "use_rslora": lora.rslora,
        "use_dora": lora.dora,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "layers_to_transform": None,
    }


def _escaped(patterns):
    return {name.replace(".", r"\."): value for name, value in patterns.items()}


def _whole(number):
    return int(number) if number == int(number) else number


def _card(adapter, config, base_model, licence):
    from gemma_keras import __version__

    head = f"license: {licence}\n" if licence else ""
    head += f"base_model: {json.dumps(base_model)}\n" if base_model else ""
    card = _CARD.format(
        head=head,
        rank=adapter.lora.rank,
        targets=", ".join(f"`{target}`" for target in adapter.lora.targets),
        layers=config.num_layers,
        width=config.hidden_dim,
        version=__version__,
    )
    return card + (f"\n{licence_section(licence)}\n" if licence else "")


def read(directory, config, embeddings=None):
    """Reads an adapter for the model of a `GemmaConfig`.

    Args:
        directory: The directory.
        config: The `GemmaConfig`.
        embeddings: A function that gives the model's own table [V, D], as an array. A
            table that PEFT stored along has to be equal to it.

    Returns:
        An `Adapter`.

    Raises:
        CheckpointError: the files are damaged, or mean something else.
    """
    file, described, where = _open(directory)
    try:
        return _Reader(file, described, where, config).read(embeddings)
    finally:
        file.close()


def check(directory):
    """Checks all that can be told of an adapter without its model.

    Raises:
        CheckpointError: the files are damaged, or no adapter of a kind that is read
            here.
    """
    file, _, _ = _open(directory)
    try:
        names = set(file.shapes)
    finally:
        file.close()
    swap = {"lora_A.": "lora_B.", "lora_B.": "lora_A."}
    swap |= {"lora_embedding_A": "lora_embedding_B"}
    swap |= {"lora_embedding_B": "lora_embedding_A"}
    halves = [(name, key) for name in names for key in swap if key in name]
    lonely = [n for n, key in halves if n.replace(key, swap[key]) not in names]
    if lonely:
        raise CheckpointError(
            f"{file.path}: half of an update is missing, beside {some(lonely)}."
        )
    if not halves:
        raise CheckpointError(f"{file.path}: holds no low-rank factors.")


def _open(directory):
    """The open file of an adapter's weights, its checked config and where that is."""
    directory = Path(directory).expanduser()
    where = directory / CONFIG
    if not directory.is_dir() or not where.is_file():
        raise CheckpointError(f"{where}: is missing, so this is no PEFT adapter.")
    described = read_json(where)
    _check_described(where, described)
    weights = directory / WEIGHTS
    if not weights.is_file():
        raise CheckpointError(_without_weights(directory))
    return SafetensorsFile(weights), described, where


def _without_weights(directory):
    if (directory / _PICKLE).is_file():
        return (
            f"{directory / _PICKLE}: is a pickle, which may run anything and is not "
            f"opened. Load it with peft where you trust it, and save it as {WEIGHTS} "
            "(PeftModel.save_pretrained)."
        )
    return f"{directory / WEIGHTS}: is missing."


def _check_described(where, described):
    kind = described.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{where}: peft_type {kind!r} is not supported; LORA is, also with DoRA "
            "and rsLoRA."
        )
    check_types(where, described, _TYPES)
    for key, kinds in _PATTERNS.items():
        patterns = described.get(key) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{where}: {key} must be an object.")
        check_types(f"{where} ({key})", patterns, dict.fromkeys(patterns, kinds))
        for pattern in patterns:
            _check_pattern(f"{where}: {key}", pattern)
    if described.get("bias", "none") != "none":
        raise CheckpointError(
            f"{where}: bias {described['bias']!r} is not supported; Gemma has none."
        )
    for key in _UNSUPPORTED:
        if described.get(key):
            raise CheckpointError(f"{where}: {key} is not supported.")
    init = described.get("init_lora_weights", True)
    if init not in _INITS:
        raise CheckpointError(
            f"{where}: with init_lora_weights {str(init)[:80]!r} the model's own "
            "weights were changed before training. Save it with peft's "
            "path_initial_model_for_weight_conversion, which makes a plain adapter."
        )


def _check_pattern(where, pattern):
    """Refuses a regular expression that could take forever, or is none."""
    repeats = re.findall(r"[*+{]|\)\?", pattern)
    nested = re.search(r"\)[*+{]", pattern)
    if len(pattern) > 256 or len(repeats) > 4 or nested:
        raise CheckpointError(
            f"{where}: the pattern {pattern[:80]!r} is too involved to be safe; write "
            "out the names."
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise CheckpointError(
            f"{where}: {pattern!r} is no regular expression ({error})."
        ) from error


class _Reader:
    """Matches the tensors of a file with the layers of a model."""

    def __init__(self, file, described, where, config):
        self.file, self.described, self.where = file, described, where
        self.shapes = layer_shapes(config)
        self.names = module_names(config)
        self.modules = {name: path for path, name in self.names.items()}
        self.config = config
        self.dora = bool(described.get("use_dora"))

    def read(self, embeddings):
        """The `Adapter`; `embeddings` as in the function `read`."""
        found, table = self._match()
        self._check_targets(found)
        weights = {
            path: {key: self._array(path, key, name) for key, name in names.items()}
            for path, names in found.items()
        }
        for path, arrays in weights.items():
            self._check_shapes(path, arrays, found[path])
        if table is not None and embeddings is not None:
            self._check_table(table, embeddings())
        ranks = {path: arrays["lora_a"].shape[1] for path, arrays in weights.items()}
        alphas = {path: self._alpha(path) for path in weights}
        try:
            lora = for_layers(
                ranks,
                alphas,
                self.config,
                dropout=self.described.get("lora_dropout", 0.0),
                rslora=bool(self.described.get("use_rslora")),
                dora=self.dora,
            )
        except ValueError as error:
            raise CheckpointError(f"{self.where}: {error}") from error
        return Adapter(lora, weights)

    def _match(self):
        """Path of each layer to its tensors by our keys; and the stored table."""
        found, table, rest = {}, None, []
        for name in self.file.shapes:
            path, suffix = self._locate(name)
            keys = {
                _tensor_name(path, key): key
                for key in ("lora_a", "lora_b", "lora_magnitude")
            }
            keys["lora_magnitude_vector.weight"] = "lora_magnitude"
            if path == EMBEDDING and suffix in ("base_layer.weight", "weight"):
                table = name
            elif path is not None and suffix in keys:
                found.setdefault(path, {})[keys[suffix]] = name
            else:
                rest.append(name)
        if rest:
            raise CheckpointError(
                f"{self.file.path}: holds tensors that are no update of a projection "
                f"or of the embedding of this model: {some(rest)}."
            )
        if not found:
            raise CheckpointError(f"{self.file.path}: holds no low-rank factors.")
        if EMBEDDING in found and self.described.get("ensure_weight_tying"):
            raise CheckpointError(
                f"{self.where}: ensure_weight_tying gives the output head an update, "
                "which is not supported."
            )
        return found, table

    def _locate(self, name):
        """(path, rest of the name) of the layer that a tensor belongs to."""
        if not name.startswith(_ROOT):
            return None, name
        name = name.removeprefix(_ROOT)
        for prefix in PREFIXES:
            if not name.startswith(prefix):
                continue
            parts = name.removeprefix(prefix).split(".")
            length = 4 if parts[0] == "layers" else 1
            path = self.modules.get("model." + ".".join(parts[:length]))
            if path is not None:
                return path, ".".join(parts[length:])
        return None, name

    def _check_targets(self, found):
        """Raises for a layer that PEFT would adapt, and for half of an update."""
        needed = {"lora_a", "lora_b"} | ({"lora_magnitude"} if self.dora else set())
        targets = self.described.get("target_modules")
        chosen = self.described.get("layers_to_transform")
        listed = isinstance(targets, list) or targets == ALL_LINEAR
        if listed and not self.described.get("exclude_modules") and chosen is None:
            for module, path in self.modules.items():
                if self._is_target(module, path, targets):
                    found.setdefault(path, {})
        for path, there in found.items():
            for key in sorted(needed - there.keys()):
                raise CheckpointError(
                    f"{self.file.path}: the tensor "
                    f"{_ROOT}{self.names[path]}.{_tensor_name(path, key)} is missing."
                )
            for key in there.keys() - needed:
                raise CheckpointError(
                    f"{self.file.path}: {there[key]} is DoRA's, but {self.where.name} "
                    "says nothing of use_dora."
                )

    def _is_target(self, module, path, targets):
        if targets == ALL_LINEAR:
            return path != EMBEDDING
        return any(module == t or module.endswith(f".{t}") for t in targets)

    def _array(self, path, key, name):
        self.file.float_dtype(name)
        array = np.asarray(self.file.tensor(name), "float32")
        if not np.isfinite(array).all():
            raise CheckpointError(f"{self.file.path}: {name} holds NaN or infinity.")
        return np.ascontiguousarray(array.T) if array.ndim == 2 else array

    def _check_shapes(self, path, arrays, names):
        rows, columns = self.shapes[path]
        rank = self._matched("rank_pattern", path, self.described.get("r", 8))
        expected = {"lora_a": (rows, rank), "lora_b": (rank, columns)}
        expected["lora_magnitude"] = (columns,)
        for key, array in arrays.items():
            if array.shape != expected[key]:
                stored, wanted = array.shape[::-1], expected[key][::-1]
                raise CheckpointError(
                    f"{self.file.path}: {names[key]} has the shape {list(stored)}, but "
                    f"this model and {self.where.name} ask for {list(wanted)}."
                )

    def _check_table(self, name, own):
        self.file.float_dtype(name)
        stored = self.file.tensor(name)
        if stored.shape != own.shape or (stored.astype(own.dtype) != own).any():
            raise CheckpointError(
                f"{self.file.path}: {name} is another embedding table than this "
                "model's: it belongs to another model, or trained the table itself, "
                "which is not supported."
            )

    def _alpha(self, path):
        return self._matched("alpha_pattern", path, self.described.get("lora_alpha", 8))

    def _matched(self, key, path, default):
        """The value of the first pattern that fits the layer's name, as in PEFT."""
        for pattern, value in (self.described.get(key) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", self.names[path]):
                return value
        return default
