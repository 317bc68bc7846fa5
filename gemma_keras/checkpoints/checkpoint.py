"""What every checkpoint format offers, and the checks that all of them share.

A checkpoint is untrusted input. Opening one reads headers only, and checks all that
headers can tell; tensors are read later, one at a time.
"""

import abc
import dataclasses
import json
from pathlib import Path

from gemma_keras.config import GemmaConfig

# Far above any Gemma, and low enough that a hostile config costs nothing.
MAX_LAYERS = 1024
MAX_JSON_BYTES = 16 * 2**20


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; names the file and the tensor."""


class Checkpoint(abc.ABC):
    """The weights, config and tokenizer of one Gemma on disk.

    Usable as a context manager. Attributes:
        path: the file or directory that was opened.
        format: a short name of the format, for people.
        config: the `GemmaConfig` that the weights fit.
        dtype: the float type of most weights: `"bfloat16"`, `"float16"` or
            `"float32"`.
        packings: path of each layer whose matrix is stored as this package quantises,
            to its `Packing`; empty for every other format.
    """

    packings: dict = {}  # noqa: RUF012

    format: str
    path: Path
    config: GemmaConfig
    dtype: str

    @abc.abstractmethod
    def tensor(self, path):
        """Reads one weight.

        Args:
            path: A key of `config.weight_shapes()`.

        Returns:
            A NumPy array of the shape `config.weight_shapes()[path]` in the
            checkpoint's own dtype; where the format allows it a view of the mapped
            file, which may be strided and which nobody else sees written to.

        Raises:
            CheckpointError: the bytes cannot be read.
        """

    def packed(self, path):
        """What `quantization.pack` made of a matrix whose layer is in `packings`."""
        raise KeyError(path)

    @abc.abstractmethod
    def sources(self, path):
        """File and tensor name behind a weight, for messages to people."""

    @abc.abstractmethod
    def files(self):
        """Paths of the files that hold the weights, in the order of their names."""

    def tokenizer(self):
        """The `GemmaTokenizer` that lies beside the weights, or None."""
        return None

    def preprocessor_config(self):
        """The stored settings of the preprocessor, or an empty dict."""
        return {}

    def homes(self):
        """Folders in which papers of the weights may lie, the nearest first."""
        return [self.path if self.path.is_dir() else self.path.parent]

    def told(self):
        """The bytes of the provenance.json that an export put inside of a file.

        None where the format has no place for it, or nothing is there.
        """
        return None

    @abc.abstractmethod
    def close(self):
        """Lets go of the files. Arrays that were handed out stay valid."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def read_json(path):
    """Parses a JSON object from a file of bounded size."""
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: {size:,} bytes are too many for JSON.")
        return parse_json(path.read_bytes(), path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error}).") from error


def parse_json(data, where):
    """Parses bytes that must be one JSON object, without repeated keys."""
    try:
        value = json.loads(data, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not valid JSON ({error}).") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: must hold a JSON object, not a {type(value).__name__}."
        )
    return value


def _unique_keys(pairs):
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key is given twice")
    return result


def file_inside(directory, name, where):
    """Path of a file that a checkpoint names, refusing names that lead elsewhere."""
    plain = isinstance(name, str) and name not in ("", ".", "..")
    if not plain or any(character in name for character in "/\\:\0"):
        raise CheckpointError(
            f"{where}: names the file {name!r}; only plain names of files in the "
            "same directory are allowed."
        )
    path = Path(directory) / name
    if not path.is_file():
        raise CheckpointError(f"{where}: names the file {name!r}, which is missing.")
    return path


def read_weight_map(index):
    """The parsed index of a checkpoint in several files, and the names of these.

    Args:
        index: The JSON file, whose `weight_map` names a file, or a list of files, for
            each tensor.

    Returns:
        The whole dict, and the files' names in order.
    """
    raw = read_json(index)
    weight_map = raw.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map.")
    listed = [
        name
        for names in weight_map.values()
        for name in (names if isinstance(names, list) else [names])
    ]
    if not all(isinstance(name, str) for name in listed):
        raise CheckpointError(f"{index}: its weight_map must name files.")
    return raw, sorted(set(listed))


def open_shards(index, names, add):
    """Opens the files of an index, and refuses a tensor that is in two of them.

    Args:
        index: The JSON file; the others lie beside it.
        names: The files' names.
        add: A function that opens a path, and gives tensor name to open file.

    Returns:
        Tensor name to the open file that holds it.
    """
    owners = {}
    for name in names:
        added = add(file_inside(index.parent, name, index))
        twice = owners.keys() & added.keys()
        if twice:
            raise CheckpointError(
                f"{added[min(twice)].path}: {min(twice)} is also in "
                f"{owners[min(twice)].path.name}."
            )
        owners |= added
    return owners


def only_file(directory, suffix):
    """The only file in `directory` that ends so, or None.

    Raises:
        CheckpointError: there are several, and the user has to say which.
    """
    found = sorted(directory.glob(f"*{suffix}"))
    if len(found) > 1:
        raise CheckpointError(
            f"{directory}: holds {len(found)} {suffix} files; name the one to load: "
            f"{some(file.name for file in found)}."
        )
    return found[0] if found else None


def load_tokenizer(*paths):
    """The `GemmaTokenizer` of the first of these files that exists, or None."""
    from gemma_keras.tokenizer import GemmaTokenizer

    for path in paths:
        if path.is_file():
            try:
                return GemmaTokenizer.from_file(path)
            except (OSError, ValueError) as error:
                text = str(error)
                where = "" if str(path) in text else f"{path}: "
                raise CheckpointError(f"{where}{text}") from error
    return None


INTEGER, NUMBER, FLAG = (int,), (int, float), (bool,)


def check_types(where, values, kinds):
    """Raises `CheckpointError` for a value of the wrong JSON type.

    Args:
        where: The file, for the message.
        values: The dict to check; keys that it lacks are not missed.
        kinds: Key to `INTEGER`, `NUMBER` or `FLAG`, with `type(None)` added where null
            is allowed.
    """
    for key, kind in kinds.items():
        # In Python a bool is an int; in a config it is a mistake.
        if key in values and type(values[key]) not in kind:
            words = {int: "integer", float: "number", bool: "true or false"}
            expected = " or ".join(words.get(one, "null") for one in kind)
            raise CheckpointError(
                f"{where}: {key} must be {expected}, not {str(values[key])[:80]!r}."
            )


def build_config(where, /, **fields):
    """A `GemmaConfig`, its errors told as the file's."""
    layers = fields.get("num_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise CheckpointError(
            f"{where}: {layers} layers are more than the {MAX_LAYERS} supported."
        )
    try:
        return GemmaConfig(**fields)
    except (ValueError, TypeError, OverflowError) as error:
        raise CheckpointError(f"{where}: {error}") from error


def config_differences(config, other):
    """What two configs compute differently, as `field=value` of the first."""
    mine, theirs = _computed(config), _computed(other)
    return [f"{key}={mine[key]!r}" for key in mine if mine[key] != theirs[key]]


def _computed(config):
    """The fields of a config, without the ways of saying the same."""
    fields = dataclasses.asdict(config) | {"layer_pattern": config.layer_kinds}
    fields["local_rope_theta"] = config.local_rope_theta or config.rope_theta
    if "L" not in config.layer_kinds:
        fields |= {"sliding_window": None, "local_rope_theta": None}
    return fields


def check_shape(where, found, expected):
    """Raises `CheckpointError` if a stored shape is not what the config implies."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(
            f"{where}: has shape {list(found)}, but the config asks for "
            f"{list(expected)}."
        )


def shortest_pattern(kinds):
    """The shortest string which, tiled, begins with `kinds` (`"LGLG"` is `"LG"`)."""
    for length in range(1, len(kinds) + 1):
        repeats = -(-len(kinds) // length)
        if (kinds[:length] * repeats).startswith(kinds):
            return kinds[:length]
    return kinds


def dominant_dtype(sizes):
    """The dtype that holds the most numbers, given `(dtype, count)` pairs."""
    totals = {}
    for dtype, count in sizes:
        totals[dtype] = totals.get(dtype, 0) + count
    return max(totals, key=totals.get)


def some(names, limit=5):
    """A short listing of names for a message."""
    names = sorted(names)
    text = ", ".join(str(name) for name in names[:limit])
    return text if len(names) <= limit else f"{text} and {len(names) - limit} more"
