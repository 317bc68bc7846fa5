"""`RunConfig`: everything that a fine-tuning run can be told, in one table.

The command's flags, the keys of a YAML file, `config.yaml` in the run's folder and the
reference in docs/sft.md are all made of these fields.
"""

import dataclasses
import difflib
import math
import pathlib
import types
import typing

from gemma_keras.chat import LOSS_ON
from gemma_keras.encoding import TEMPLATES, TOO_LONG
from gemma_keras.examples import FORMATS, read_columns
from gemma_keras.lora_config import LoraConfig, layer_shapes
from gemma_keras.quantization import MODES

DTYPES = ("auto", "float32", "bfloat16", "float16", "mixed_bfloat16", "mixed_float16")
OPTIMIZERS = ("adamw", "adam", "adafactor", "lion", "muon", "sgd")
SCHEDULES = ("cosine", "linear", "constant")
MODEL, DATA, LORA = "Model", "Data", "LoRA"
TRAINING, RUN = "Training", "The run's folder"
# Optimizers whose memory of squares, 0.999 by default, is 1 in bfloat16.
STUCK = ("adamw", "adam", "muon")
# A run may go on with another value of these.
FREE = ("backend", "devices")


class ConfigError(ValueError):
    """A config that cannot be run; the message names every option that is wrong."""


def setting(default, help, *, low=None, high=None, above=None, choices=None, group):
    """A field of `RunConfig`: its default, its help text and what is allowed."""
    limits = {"low": low, "high": high, "above": above, "choices": choices}
    metadata = {"help": help, "group": group, **limits}
    if isinstance(default, list):
        return dataclasses.field(default_factory=list, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """What a run does; see docs/sft.md for each field.

    Raises:
        ConfigError: a value has the wrong type or is out of its range, options
            contradict each other, or `preset`, `train` or `out` is missing.
    """

    preset: str | None = setting(
        None, "Model to start from: preset name, directory, .gguf file.", group=MODEL
    )
    dtype: str = setting(
        "auto",
        "How to hold the weights; auto is as they are stored, and float32 with full.",
        choices=DTYPES,
        group=MODEL,
    )
    quantize: str | None = setting(
        None,
        "Keep the frozen weights in 8 or 4 bits (QLoRA).",
        choices=MODES,
        group=MODEL,
    )
    backend: str | None = setting(
        None,
        "Backend of Keras; KERAS_BACKEND or what is installed if not given.",
        choices=("jax", "torch", "tensorflow"),
        group=MODEL,
    )
    devices: str = setting(
        "one",
        "Train on one device, or divide each batch among all of them (JAX).",
        choices=("one", "all"),
        group=MODEL,
    )

    train: list[str] = setting(
        [], "File to learn from; may be given several times.", group=DATA
    )
    validation: list[str] = setting(
        [], "File to measure on; may be given several times.", group=DATA
    )
    validation_split: float = setting(
        0.0,
        "Part of the training examples to measure on instead.",
        low=0.0,
        high=0.9,
        group=DATA,
    )
    format: str = setting(
        "auto", "What the rows are.", choices=("auto", *FORMATS), group=DATA
    )
    column: list[str] = setting(
        [],
        "ROLE=COLUMN where the names do not tell, such as prompt=ask; may be given "
        "several times.",
        group=DATA,
    )
    template: str = setting(
        "auto",
        "Write pairs as turns of a chat or as plain text; auto goes by the model.",
        choices=tuple(TEMPLATES),
        group=DATA,
    )
    loss_on: str = setting(
        "response",
        "What is learned: all that the assistant says, its last turn, or all text.",
        choices=LOSS_ON,
        group=DATA,
    )
    sequence_length: int | None = setting(
        None,
        "Tokens in a row; 1,024 or what the model was trained for if not given.",
        low=2,
        group=DATA,
    )
    too_long: str = setting(
        "cut", "What becomes of longer examples.", choices=TOO_LONG, group=DATA
    )
    packing: bool = setting(
        True, "Put several examples in a row, none of which sees another.", group=DATA
    )
    skip_bad: bool = setting(
        False, "Leave bad rows out and count them; otherwise they end it.", group=DATA
    )

    full: bool = setting(False, "Train every weight, without LoRA.", group=LORA)
    lora_rank: int = setting(8, "Rank of the update.", low=1, group=LORA)
    lora_alpha: float | None = setting(
        None,
        "The update is multiplied by alpha / rank; the rank if not given.",
        above=0.0,
        group=LORA,
    )
    lora_dropout: float = setting(
        0.0,
        "Share of the update's inputs set to 0 in training.",
        low=0.0,
        high=0.95,
        group=LORA,
    )
    lora_targets: list[str] = setting(
        [],
        "Name of a projection, pattern, or all-linear; may be given several times. "
        "query and value if not given.",
        group=LORA,
    )
    rslora: bool = setting(False, "Divide alpha by the root of the rank.", group=LORA)
    dora: bool = setting(False, "Learn the size of each column too.", group=LORA)
    lora_plus_ratio: float | None = setting(
        None, "Learning rate of B over that of A; 16 in LoRA+.", above=0.0, group=LORA
    )

    epochs: int = setting(3, "Times to go through the data.", low=1, group=TRAINING)
    max_steps: int | None = setting(
        None, "Stop after this many steps.", low=1, group=TRAINING
    )
    batch_size: int = setting(8, "Rows at a time.", low=1, group=TRAINING)
    accumulation: int = setting(1, "Batches that make one step.", low=1, group=TRAINING)
    learning_rate: float = setting(
        2e-4, "Highest learning rate.", above=0.0, high=10.0, group=TRAINING
    )
    schedule: str = setting(
        "cosine",
        "How the learning rate falls over the run.",
        choices=SCHEDULES,
        group=TRAINING,
    )
    warmup: float = setting(
        0.03,
        "Part of the run in which the learning rate rises; from 1 on, steps.",
        low=0.0,
        group=TRAINING,
    )
    optimizer: str = setting(
        "adamw", "How gradients become steps.", choices=OPTIMIZERS, group=TRAINING
    )
    weight_decay: float = setting(
        0.0, "Pull of the weights to 0, norms excepted.", low=0.0, group=TRAINING
    )
    clip_norm: float = setting(
        1.0, "Longest gradient; 0 is no limit.", low=0.0, group=TRAINING
    )
    remat: bool = setting(
        False, "Compute blocks twice, to save memory.", group=TRAINING
    )
    seed: int = setting(
        0, "Makes a run repeatable.", low=0, high=2**31 - 1, group=TRAINING
    )

    out: str | None = setting(None, "Folder of the run.", group=RUN)
    save_every: int = setting(50, "Steps between checkpoints.", low=1, group=RUN)
    keep: int = setting(2, "Checkpoints to keep, besides the best.", low=1, group=RUN)
    validate_every: int | None = setting(
        None, "Steps between validations; an epoch if not given.", low=1, group=RUN
    )
    early_stopping: int = setting(
        0,
        "Stop after this many validations without a better loss; 0 is never.",
        low=0,
        group=RUN,
    )
    exact_match: int = setting(
        0,
        "Validation examples to answer, before and after, counting what is right to "
        "the letter; 0 is none.",
        low=0,
        group=RUN,
    )
    sample_prompts: list[str] = setting(
        [],
        "Prompt that the model answers along the way; may be given several times.",
        group=RUN,
    )
    sample_every: int | None = setting(
        None,
        "Steps between such answers; as validate_every if not given.",
        low=1,
        group=RUN,
    )
    sample_tokens: int = setting(
        64, "Longest of these answers, in tokens.", low=1, group=RUN
    )
    save_preset: str | None = setting(
        None, "Folder for the whole tuned model, besides the adapter.", group=RUN
    )
    tensorboard: bool = setting(False, "Write files for TensorBoard.", group=RUN)

    def __post_init__(self):
        wrong = []
        for field in dataclasses.fields(self):
            try:
                value = checked(field, getattr(self, field.name))
                object.__setattr__(self, field.name, value)
            except ConfigError as error:
                wrong.append(str(error))
        wrong = wrong or self._contradictions()
        if wrong:
            raise ConfigError("\n".join(wrong))

    def _contradictions(self):
        missing = [n for n in ("preset", "train", "out") if not getattr(self, n)]
        if missing:
            return [f"{name} must be given: {help_of(name)}" for name in missing]
        wrong = []
        measured = self.validation or self.validation_split
        try:
            read_columns(self.column)
        except ValueError as error:
            wrong.append(str(error))
        if self.validation and self.validation_split:
            wrong.append("validation and validation_split exclude each other.")
        if self.early_stopping and not measured:
            wrong.append("early_stopping needs validation or validation_split.")
        if self.exact_match and not measured:
            wrong.append("exact_match needs validation or validation_split.")
        if self.full and (self.lora_targets or self.dora or self.rslora):
            wrong.append("full trains every weight: LoRA's options have no meaning.")
        if self.full and self.quantize:
            wrong.append("quantize freezes the weights, and full trains them.")
        if self.full and self.dtype == "bfloat16" and self.optimizer in STUCK:
            wrong.append(
                f"full with {self.optimizer} cannot train weights in bfloat16, where "
                "each of its steps rounds to 0: leave dtype out, for float32, or give "
                "mixed_bfloat16; or take the optimizer adafactor, lion or sgd."
            )
        return wrong

    @classmethod
    def read(cls, path, changes=None, defaults=None):
        """The config of a YAML file.

        Args:
            path: the file, whose keys are the fields' names; None is an empty one.
            changes: values in place of the file's.
            defaults: values of what neither gives.

        Raises:
            ConfigError: it is no YAML, or as the constructor.
        """
        values = {} if path is None else _read_yaml(pathlib.Path(path))
        values |= changes or {}
        refuse_unknown(values, path)
        return cls(**{**(defaults or {}), **values})

    def resolved(self, model, stored, packings=()):
        """The config with the values that go by others and by the model filled in.

        Args:
            model: its `GemmaConfig`.
            stored: the dtype of its checkpoint.
            packings: paths of the layers that the checkpoint keeps in few bits.

        Raises:
            ConfigError: the options do not fit the model.
            ValueError: LoRA's do not.
        """
        max_position = model.max_position
        if self.full and packings:
            raise ConfigError(
                f"full trains every weight, and those of {self.preset} are in few "
                "bits, which cannot be trained: leave full out, or start from the "
                "model that it was made of."
            )
        length = self.sequence_length or min(1024, max_position)
        if length > max_position:
            raise ConfigError(
                f"sequence_length must be at most {max_position:,}, which {self.preset}"
                f" was trained for, got {length:,}."
            )
        targets, dtype = [], self.dtype
        if not self.full:
            targets = self.lora_targets or ["query", "value"]
            lora = LoraConfig(rank=self.lora_rank, targets=targets)
            lora.check_layers(layer_shapes(model))
        elif dtype == "auto" and stored != "float32":
            # In 16 bits most steps are smaller than what a weight is rounded to.
            dtype = "float32"
        return dataclasses.replace(
            self,
            dtype=dtype,
            sequence_length=length,
            lora_alpha=self.lora_alpha or float(self.lora_rank),
            lora_targets=targets,
        )

    def as_dict(self):
        """Name and value of each field, in their order."""
        return dataclasses.asdict(self)

    def as_yaml(self):
        """The text of a file that `read` gives the same config of."""
        import yaml

        return yaml.safe_dump(self.as_dict(), sort_keys=False, allow_unicode=True)

    def differences(self, other):
        """Why a run with this config cannot go on with `other`: a line an option."""
        mine, theirs = self.as_dict(), other.as_dict()
        return [
            f"{name}: {theirs[name]!r}, but the run has {mine[name]!r}"
            for name in mine
            if name not in FREE and mine[name] != theirs[name]
        ]


_FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}


def help_of(name):
    """The help text of a field."""
    return _FIELDS[name].metadata["help"]


def refuse_unknown(values, path=None):
    """Raises `ConfigError` if a key is no field, naming the nearest that is."""
    where = "" if path is None else f"{path}: "
    lines = []
    for name in values:
        if name in _FIELDS:
            continue
        near = difflib.get_close_matches(str(name), _FIELDS, n=1, cutoff=0.6)
        hint = f" Did you mean {near[0]}?" if near else ""
        lines.append(f"{where}there is no option {name!r}.{hint}")
    if lines:
        if len(lines) > 1 or "Did you mean" not in lines[0]:
            lines.append("The options are " + ", ".join(_FIELDS) + ".")
        raise ConfigError("\n".join(lines))


def kind(field):
    """`(type, is_list, may_be_none)` of a field, of str, int, float or bool."""
    annotation = field.type
    if typing.get_origin(annotation) is list:
        return typing.get_args(annotation)[0], True, False
    if isinstance(annotation, types.UnionType):
        return typing.get_args(annotation)[0], False, True
    return annotation, False, False


def checked(field, value):
    """`value` in the type of `field`; `ConfigError` if it is not allowed."""
    wanted, many, optional = kind(field)
    if many:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple):
            raise ConfigError(f"{field.name} must be a list, got {value!r}.")
        return [_checked_one(field, wanted, item) for item in items]
    if value is None and optional:
        return None
    return _checked_one(field, wanted, value)


def _checked_one(field, wanted, value):
    number = _as_type(wanted, value)
    if number is None:
        names = {str: "text", int: "a whole number", float: "a number"}
        name = names.get(wanted, "true or false")
        raise ConfigError(f"{field.name} must be {name}, got {value!r}.")
    limits = field.metadata
    if limits["choices"] and number not in limits["choices"]:
        allowed = ", ".join(limits["choices"])
        raise ConfigError(f"{field.name} must be one of {allowed}, got {value!r}.")
    low, high, above = (limits[name] for name in ("low", "high", "above"))
    if (
        (low is not None and number < low)
        or (high is not None and number > high)
        or (above is not None and number <= above)
    ):
        raise ConfigError(
            f"{field.name} must be {allowed_range(field)}, got {value!r}."
        )
    return number


def _as_type(wanted, value):
    """`value` as `wanted`, or None if it is something else."""
    if wanted is bool or isinstance(value, bool):
        return value if wanted is bool and isinstance(value, bool) else None
    if wanted is str:
        return value if isinstance(value, str) else None
    if wanted is float and isinstance(value, str):
        # YAML takes 2e-4, without a point, for text.
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if wanted is int:
        return int(value) if value == int(value) else None
    return float(value)


def allowed_range(field):
    """The range of a field in words, such as `from 1`, or its choices."""
    limits = field.metadata
    if limits["choices"]:
        return ", ".join(limits["choices"])
    words = []
    if limits["above"] is not None:
        words.append(f"above {limits['above']:g}")
    if limits["low"] is not None:
        words.append(f"from {_plain(limits['low'])}")
    if limits["high"] is not None:
        words.append(f"to {_plain(limits['high'])}")
    return " ".join(words)


def _plain(number):
    return f"{number:,}" if isinstance(number, int) else f"{number:g}"


def _read_yaml(path):
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that comes twice, of which YAML would keep the last."""

    def mapping(loader, node, deep=False):
        keys = [loader.construct_object(key) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise ConfigError(f"{path}: {', '.join(twice)} is given twice.")
        return yaml.SafeLoader.construct_mapping(loader, node, deep)

    Loader.construct_mapping = mapping
    try:
        values = yaml.load(path.read_text("utf-8"), Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8 text.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold lines of `option: value`.")
    # As the flags are spelt, too.
    return {str(name).replace("-", "_"): value for name, value in values.items()}
