"""What makes one low-rank adapter differ from another: which layers, how large.

A layer is named by the path of its weight: `decoder_block_3/attention/query` holds
`decoder_block_3/attention/query/kernel`.
"""

import dataclasses
import math
import re

DEFAULT_TARGETS = ("query", "value")
EMBEDDING = "token_embedding"
ALL_LINEAR = "all-linear"
INITS = ("default", "gaussian", "he_uniform")
# How PEFT's users call the layers.
ALIASES = {
    "q_proj": "query",
    "k_proj": "key",
    "v_proj": "value",
    "o_proj": "attention_output",
    "gate_proj": "ffw_gating",
    "up_proj": "ffw_gating_2",
    "down_proj": "ffw_linear",
    "embed_tokens": EMBEDDING,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """One adapter: y = x W + s (x A) B on the layers that `targets` match.

    A pattern is a layer's name (`query`, or PEFT's `q_proj`), its path, or a regular
    expression that matches its path or that of its weight as a whole; `all-linear` is
    every layer but the embedding. Raises `ValueError`, naming the field, if a value
    makes no adapter.
    """

    # Columns of A and rows of B.
    rank: int
    # s = alpha / rank. None is the rank of each layer, so that s = 1.
    alpha: float | None = None
    # Share of the inputs of A that training sets to zero.
    dropout: float = 0.0
    # A pattern, or several.
    targets: tuple[str, ...] = DEFAULT_TARGETS
    # s = alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732).
    rslora: bool = False
    # A learned magnitude of each column (Liu et al. 2024, arXiv:2402.09353).
    dora: bool = False
    # How A begins: "default" as in PEFT, "gaussian" as its option of this name,
    # "he_uniform" as in KerasHub. B begins as zeros; of the embedding, A does.
    init: str = "default"
    # Pattern to the rank or alpha of the layers it matches; the first match counts.
    rank_pattern: dict[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: dict[str, float] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        targets = self.targets
        if targets is None:
            targets = DEFAULT_TARGETS
        targets = (targets,) if isinstance(targets, str) else tuple(targets)
        object.__setattr__(self, "targets", targets)
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        _check_rank("rank", self.rank)
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(
                f"dropout must be a number from 0 to below 1, got {self.dropout!r}."
            )
        for name in ("rslora", "dora"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"{name} must be true or false, got {getattr(self, name)!r}."
                )
        if self.init not in INITS:
            raise ValueError(
                f"init must be one of {', '.join(INITS)}, got {self.init!r}."
            )
        self._check_patterns()

    def _check_patterns(self):
        if not self.targets:
            raise ValueError("targets must name at least one layer.")
        for pattern in (*self.targets, *self.rank_pattern, *self.alpha_pattern):
            if not isinstance(pattern, str) or not pattern:
                raise ValueError(f"A target must be a name or a pattern: {pattern!r}.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"The target {pattern!r} is no regular expression ({error})."
                ) from error
        for pattern, rank in self.rank_pattern.items():
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)

    def adapts(self, path):
        """Whether the layer at `path` gets an update."""
        return any(matches(pattern, path) for pattern in self.targets)

    def rank_of(self, path):
        """Rank of the update of the layer at `path`."""
        return _first_match(self.rank_pattern, path, self.rank)

    def alpha_of(self, path):
        """Alpha of the update of the layer at `path`."""
        default = self.rank_of(path) if self.alpha is None else self.alpha
        return _first_match(self.alpha_pattern, path, default)

    def scale_of(self, path):
        """The factor s of the update of the layer at `path`."""
        rank = self.rank_of(path)
        return self.alpha_of(path) / (math.sqrt(rank) if self.rslora else rank)

    def check_layers(self, paths):
        """Raises `ValueError` if a target matches none of the layers at `paths`."""
        unknown = [
            target
            for target in self.targets
            if not any(matches(target, path) for path in paths)
        ]
        if unknown:
            known = sorted({path.rsplit("/", 1)[-1] for path in paths})
            raise ValueError(
                f"No projection is called {', '.join(unknown)}, nor does its path "
                f"match. Targets may be {', '.join(known)}, all-linear, or a regular "
                "expression on paths such as decoder_block_0/attention/query."
            )

    def num_parameters(self, config):
        """How many numbers it trains in the model of a `GemmaConfig`."""
        total = 0
        for path, (rows, columns) in layer_shapes(config).items():
            if self.adapts(path):
                total += self.rank_of(path) * (rows + columns) + self.dora * columns
        return total


def layer_shapes(config):
    """Path to the [in, out] of each layer of a `GemmaConfig` that can be adapted."""
    return {
        path.rsplit("/", 1)[0]: shape
        for path, shape in config.weight_shapes().items()
        if len(shape) == 2
    }


def matches(pattern, path):
    """Whether a pattern means the layer at `path`."""
    name = path.rsplit("/", 1)[-1]
    if pattern == ALL_LINEAR:
        return name != EMBEDDING
    if ALIASES.get(pattern, pattern) in (name, path):
        return True
    weight = "embeddings" if name == EMBEDDING else "kernel"
    return any(re.fullmatch(pattern, full) for full in (path, f"{path}/{weight}"))


def for_layers(ranks, alphas, config, **fields):
    """The `LoraConfig` of updates that are already there.

    Args:
        ranks: path of each adapted layer to its rank.
        alphas: path of each adapted layer to its alpha.
        config: the `GemmaConfig` of the model.
        **fields: further fields of the `LoraConfig`.
    """
    rank, alpha = (_commonest(values.values()) for values in (ranks, alphas))
    everywhere = {}
    for path in layer_shapes(config):
        everywhere.setdefault(path.rsplit("/", 1)[-1], set()).add(path)
    targets = [
        target
        for name, paths in everywhere.items()
        for target in (
            [name] if paths <= ranks.keys() else sorted(paths & ranks.keys())
        )
    ]
    return LoraConfig(
        rank=rank,
        alpha=alpha,
        targets=sorted(targets),
        rank_pattern=exceptions(ranks, rank),
        alpha_pattern=exceptions(alphas, alpha),
        **fields,
    )


def exceptions(values, usual, separator="/"):
    """Patterns for the layers whose value is not the usual one, as few as possible.

    Args:
        values: path of each layer, its parts joined by `separator`, to its value.
        usual: the value that needs no pattern.
        separator: what joins the parts of a path.
    """
    by_name = {}
    for path, value in values.items():
        by_name.setdefault(path.rsplit(separator, 1)[-1], {})[path] = value
    patterns = {}
    for name, found in by_name.items():
        if len(set(found.values())) == 1:
            found = {name: next(iter(found.values()))}
        patterns |= {path: value for path, value in found.items() if value != usual}
    return patterns


def _commonest(values):
    values = list(values)
    return max(dict.fromkeys(values), key=values.count)


def _first_match(patterns, path, default):
    found = (value for pattern, value in patterns.items() if matches(pattern, path))
    return next(found, default)


def _is_number(value):
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _check_rank(name, value):
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")


def _check_alpha(name, value):
    if not _is_number(value) or value <= 0:
        raise ValueError(f"{name} must be a positive number, got {value!r}.")
