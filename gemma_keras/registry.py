"""Names of models, and how a name, path or handle becomes files on this machine.

What is known of each model lies in `presets/registry.json`, its architecture in a JSON
file beside it. Nothing is downloaded but by `resolve`, and only through the hubs' own
libraries, which keep their caches and credentials.
"""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path

from gemma_keras.config import GemmaConfig

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}

_HF_HANDLE = re.compile(
    r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/\s]+))?(/(?P<file>\S+))?"
)
_KAGGLE_HANDLE = re.compile(r"kaggle://([\w.-]+/){3}[\w.-]+(/\d+)?")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors|model_\d+\.weights\.h5")


# Of a low-rank adapter, as PEFT calls them.
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What an export says of itself; the licence is in there.
_PAPERS = ("provenance.json",)
# What lies in an Orbax directory (Flax, MaxText), or beside the arrays of an old one;
# and in or around it what belongs to the model.
_ORBAX, _OLD_ORBAX = ("_METADATA", "manifest.ocdbt"), "checkpoint"
_BESIDE_ORBAX = ("gemma_config.json", "tokenizer.model", "tokenizer.json", *_PAPERS)


class SourceError(ValueError):
    """A model that cannot be found or fetched; the message says what to do."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """What the registry knows of one model."""

    name: str
    description: str
    # "base" continues text, "instruct" answers; "code" fills gaps in programs.
    variant: str
    # Where it comes from, in the order in which it is tried; none if embedded.
    sources: tuple[str, ...]
    licence: str
    # The same as Hugging Face writes it: "gemma" or "apache-2.0".
    licence_id: str
    licence_url: str
    aliases: tuple[str, ...] = ()
    # sha256 of files, as far as known.
    sha256: dict[str, str] = dataclasses.field(default_factory=dict)
    # The directory inside this package that holds an embedded model.
    directory: Path | None = None
    config_file: Path

    @property
    def config(self) -> GemmaConfig:
        """The architecture."""
        return _read_config(self.config_file)

    @property
    def available(self) -> bool:
        """Whether it needs no network."""
        return self.directory is not None and self.directory.is_dir()


def locate() -> Path:
    """The `presets` directory: inside an installed package, or in a checkout beside it.

    Raises:
        SourceError: there is none; the installation is broken.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "presets", package.parent / "presets"):
        if (folder / "registry.json").is_file():
            return folder
    raise SourceError(
        f"presets/registry.json is neither in {package} nor beside it; install "
        "gemma_keras again."
    )


@functools.cache
def presets() -> dict[str, Preset]:
    """All models of the registry, by name."""
    folder = locate()
    registry = json.loads((folder / "registry.json").read_text("utf-8"))
    licences = registry["licences"]
    found = {}
    for name, entry in registry["presets"].items():
        entry = dict(entry)
        licence_id = entry.pop("licence")
        licence = licences[licence_id]
        config = entry.pop("config", None)
        directory = entry.pop("directory", None)
        if directory is not None:
            entry["directory"] = folder / directory
            entry["config_file"] = folder / directory / "metadata.json"
        else:
            entry["config_file"] = folder / f"{config}.json"
        for key in ("sources", "aliases"):
            entry[key] = tuple(entry.get(key, ()))
        found[name] = Preset(
            name=name,
            licence=licence["name"],
            licence_id=licence_id,
            licence_url=licence["url"],
            **entry,
        )
    return found


@functools.cache
def architectures() -> dict[str, GemmaConfig]:
    """The distinct architectures of the registry, by the name of their file."""
    files = {preset.config_file for preset in presets().values()}
    return {file.stem: _read_config(file) for file in sorted(files) if file.is_file()}


@functools.cache
def _read_config(path):
    raw = json.loads(path.read_text("utf-8"))
    # An embedded preset keeps its config where `save_to_preset` writes it.
    if path.name == "metadata.json":
        raw = raw["gemma_keras"]["config"]
    return GemmaConfig(**raw)


def architecture_like(config: GemmaConfig) -> GemmaConfig | None:
    """The published architecture with the same weights, whatever its vocabulary."""
    shape = dataclasses.replace(config, vocab_size=1).weight_shapes()
    for known in architectures().values():
        if known.num_layers != config.num_layers:
            continue
        if dataclasses.replace(known, vocab_size=1).weight_shapes() == shape:
            return known
    return None


def find(name: str) -> Preset:
    """Looks a model up by its name or an alias.

    Raises:
        SourceError: there is no such name; similar ones are suggested.
    """
    names = _names()
    if name in names:
        return names[name]
    close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    raise SourceError(
        f"{name!r} is neither a file or directory nor a model that is known.{hint} "
        "`gemma-keras presets` lists the names; kaggle:// and hf:// handles work too."
    )


def known_as(source: str) -> Preset | None:
    """The model behind a name, an alias, a hub's handle or an embedded path."""
    if source in _names():
        return _names()[source]
    for preset in presets().values():
        if source in preset.sources or source == str(preset.directory):
            return preset
    return None


def is_instruct(source: str | os.PathLike) -> bool:
    """Whether a model answers, rather than continues, as far as its name tells.

    Args:
        source: as for `resolve`. A name or handle of the registry is looked up; of
            others, one with the word `it`, `instruct`, `instruction` or `chat` is taken
            for one that answers: `./gemma-2-2b-it`, `runs/chat/model`. What is no
            letter ends a word.
    """
    source = os.fspath(source)
    known = known_as(source)
    if known is not None:
        return known.variant == "instruct"
    parts = re.split(r"[^a-z]+", source.lower())
    return not {"it", "instruct", "instruction", "chat"}.isdisjoint(parts)


@functools.cache
def _names():
    found = {}
    for preset in presets().values():
        for name in (preset.name, *preset.aliases):
            if found.setdefault(name, preset) is not preset:
                raise SourceError(f"registry.json: {name} names two models.")
    return found


def memory_needed(config: GemmaConfig, dtype: str, tokens: int = 0) -> int:
    """Bytes that a model's weights take, and its cache for one sequence.

    Args:
        config: The architecture.
        dtype: `"float32"`, `"bfloat16"`, `"float16"` or `"int8"`. In int8 the matrices
            are one byte a number with a float32 scale for each output (each row of
            the embedding), the norms float32, and the cache bfloat16.
        tokens: Length of the sequence whose keys and values are kept; sliding-window
            layers keep no more than their window.
    """
    if dtype not in DTYPE_BYTES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}."
        )
    total = 0
    for path, shape in config.weight_shapes().items():
        if dtype != "int8":
            total += math.prod(shape) * DTYPE_BYTES[dtype]
        elif len(shape) == 1:
            total += shape[0] * 4
        else:
            scales = shape[0] if path.startswith("token_embedding") else shape[1]
            total += math.prod(shape) + scales * 4
    kept = sum(
        min(tokens, config.sliding_window) if kind == "L" else tokens
        for kind in config.layer_kinds
    )
    entry = 2 * config.num_kv_heads * config.head_dim
    return total + kept * entry * DTYPE_BYTES["bfloat16" if dtype == "int8" else dtype]


def resolve(source: str | os.PathLike) -> Path:
    """Turns what a user names into a file or directory on this machine.

    Args:
        source: A name of the registry; a path; `kaggle://owner/model/framework/
            variation[/version]`; `hf://org/name[@revision]`, which may go on with
            the path of one file, such as a GGUF, in the repository.

    Returns:
        The path of a checkpoint, downloaded to the hub's own cache if need be; or of
        an adapter's directory, where a handle leads to one.

    Raises:
        SourceError: it cannot be found or fetched; the message says what to do.
    """
    if not isinstance(source, str):
        source = os.fspath(source)
    elif source in _names() and not ("/" in source and Path(source).exists()):
        return _resolve_preset(_names()[source])
    elif "://" in source:
        return _fetch(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    if re.search(r"^[.~]|[/\\]", source) or path.suffix in (
        ".gguf",
        ".safetensors",
        ".h5",
        ".ckpt",
        ".nemo",
    ):
        raise SourceError(f"{source}: there is no such file or directory.")
    return _resolve_preset(find(source))


def resolve_adapter(source: str | os.PathLike) -> Path:
    """The directory of a low-rank adapter: a path, or what a hub's handle leads to.

    Raises:
        SourceError: it cannot be fetched; the message says what to do.
    """
    is_handle = isinstance(source, str) and "://" in source
    return _fetch(source) if is_handle else Path(source).expanduser()


def _resolve_preset(preset):
    if preset.directory is not None:
        if not preset.available:
            raise SourceError(
                f"{preset.name} is missing from {preset.directory.parent}; install "
                "gemma_keras again."
            )
        return preset.directory
    reasons = []
    for source in preset.sources:
        try:
            path = _fetch(source)
        except SourceError as error:
            reasons.append(str(error))
            continue
        _check_hashes(path, preset)
        return path
    if Path(preset.name).exists():
        reasons.append(
            f"The directory {preset.name} here was not looked at: write "
            f"./{preset.name} to load it."
        )
    listed = "".join(f"\n- {reason}" for reason in reasons)
    raise SourceError(f"{preset.name} could not be fetched.{listed}")


def _check_hashes(path, preset):
    for name, expected in preset.sha256.items():
        file = path / name
        if file.is_file():
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != expected:
                warnings.warn(
                    f"{file} is not the file that the registry knows (sha256 {found}, "
                    f"expected {expected}).",
                    stacklevel=4,
                )


def _fetch(handle):
    if match := _HF_HANDLE.fullmatch(handle):
        fetch, hub = functools.partial(_fetch_hf, **match.groupdict()), HuggingFace
    elif _KAGGLE_HANDLE.fullmatch(handle):
        fetch, hub = functools.partial(_fetch_kaggle, handle), Kaggle
    else:
        raise SourceError(
            f"{handle}: is not a handle that is understood. Write hf://org/name, "
            "hf://org/name@revision or kaggle://owner/model/framework/variation."
        )
    try:
        # Both hubs talk on stdout, which belongs to answers.
        with contextlib.redirect_stdout(sys.stderr):
            return Path(fetch())
    except SourceError as error:
        raise SourceError(f"{handle}: {error}") from error
    # The hubs raise what their HTTP libraries do, and change these.
    except Exception as error:
        raise SourceError(f"{handle}: {_explain(error, hub, handle)}") from error


def _fetch_kaggle(handle):
    kagglehub = library("kagglehub")
    return kagglehub.model_download(handle.removeprefix("kaggle://"))


def _fetch_hf(repo, revision, file):
    hub = library("huggingface_hub")
    if file is not None:
        return hub.hf_hub_download(repo, file, revision=revision)
    try:
        info = hub.HfApi().model_info(repo, revision=revision, timeout=10)
        names = [sibling.rfilename for sibling in info.siblings or ()]
    except Exception as error:
        if http_status(error) is not None:
            raise
        return _cached_snapshot(hub, repo, revision, error)
    needed = needed_files(names)
    folder = hub.snapshot_download(repo, revision=revision, allow_patterns=needed)
    return _checkpoint_in(Path(folder), needed)


def _cached_snapshot(hub, repo, revision, error):
    """What an earlier download left, when the hub cannot be reached."""
    try:
        cached = hub.scan_cache_dir().repos
    except hub.errors.CacheNotFound:
        raise error from None
    wanted = revision or "main"
    for known in (known for known in cached if known.repo_id == repo):
        for version in known.revisions:
            if wanted in version.refs or wanted == version.commit_hash:
                folder = version.snapshot_path
                names = [
                    file.file_path.relative_to(folder).as_posix()
                    for file in version.files
                ]
                return _checkpoint_in(folder, needed_files(names))
    raise error


def _checkpoint_in(folder, files):
    single = len(files) == 1 and files[0].endswith(".gguf")
    return folder / files[0] if single else folder


def needed_files(names: list[str]) -> list[str]:
    """Chooses the files of a repository that make one checkpoint, or an adapter.

    Args:
        names: Paths of all its files.

    Raises:
        SourceError: there is no checkpoint and no adapter among them that could be
            loaded.
    """
    available = set(names)
    shards = sorted(name for name in names if _SHARD.fullmatch(name))
    keras = [name for name in shards if name.endswith(".h5")]
    tensors = [name for name in shards if name.endswith(".safetensors")]
    if "model.weights.h5" in available:
        weights = ["model.weights.h5"]
    elif "model.weights.json" in available:
        weights = ["model.weights.json", *keras]
    elif "model.safetensors" in available:
        weights = ["model.safetensors"]
    elif "model.safetensors.index.json" in available:
        weights = ["model.safetensors.index.json", *tensors]
    elif available.issuperset(ADAPTER_FILES):
        return list(ADAPTER_FILES)
    else:
        ggufs = sorted(name for name in names if name.endswith(".gguf"))
        if len(ggufs) == 1:
            return ggufs
        others = [name for name in names if name.endswith((".ckpt", ".nemo"))]
        if not ggufs and len(others) == 1:
            beside = ("config.json", "tokenizer.model", *_PAPERS)
            return [name for name in beside if name in available] + others
        if not ggufs and (orbax := _orbax_directories(names)):
            return _in_orbax_directory(orbax, names)
        raise SourceError(
            "has several GGUF files; add the one to load to the handle: "
            f"{', '.join(ggufs)}."
            if ggufs
            else "has neither safetensors nor Keras weights, nor one GGUF, .ckpt or "
            ".nemo file, nor an Orbax directory (Flax, MaxText)."
        )
    if "config.json" not in available:
        raise SourceError("has weights but no config.json.")
    wanted = ["config.json", "metadata.json", "preprocessor.json", *_PAPERS]
    # tokenizer.json is a large file in a Hugging Face repository, and not needed
    # beside tokenizer.model.
    if "tokenizer.model" in available:
        wanted.append("tokenizer.model")
    else:
        wanted += ["tokenizer.json", "assets/tokenizer/vocabulary.spm"]
    return [name for name in wanted if name in available] + weights


def _orbax_directories(names):
    """The outermost of the Orbax directories among files, each ending in a slash."""
    marks = [name.rpartition("/") for name in names]
    roots = {folder + slash for folder, slash, file in marks if file in _ORBAX}
    arrays = [name for name in names if name.endswith("/.zarray")]
    for folder, slash, file in marks:
        inside = [name for name in arrays if name.startswith(folder + slash)]
        if file == _OLD_ORBAX and inside:
            roots.add(folder + slash)
    return sorted(
        root
        for root in roots
        if not any(root != other and root.startswith(other) for other in roots)
    )


def _in_orbax_directory(roots, names):
    """The files of the only one, and what is beside it and the folders around it."""
    if len(roots) > 1:
        raise SourceError(
            f"has several Orbax directories ({', '.join(roots)}). Download the one to "
            "load with its tokenizer, and name its directory."
        )
    (root,) = roots
    return [
        name
        for name in names
        if name.startswith(root)
        or (
            name.rpartition("/")[2] in _BESIDE_ORBAX
            and root.startswith(name[: name.rfind("/") + 1])
        )
    ]


def library(name):
    """Imports the library of a hub; `SourceError` says how to install it."""
    try:
        return __import__(name)
    except ImportError as error:
        raise SourceError(f"needs the package {name}: pip install {name}") from error


class HuggingFace:
    """What a message about this hub says."""

    name = "Hugging Face"
    login = (
        "Create a token at https://huggingface.co/settings/tokens and run "
        "`hf auth login`, or set HF_TOKEN."
    )

    @staticmethod
    def page(handle):
        """Address of the model's page."""
        match = _HF_HANDLE.fullmatch(handle)
        return f"https://huggingface.co/{match['repo']}"

    @staticmethod
    def has_credentials():
        """Whether the library finds a token."""
        return library("huggingface_hub").get_token() is not None


class Kaggle:
    """What a message about this hub says."""

    name = "Kaggle"
    login = (
        "Create a token at https://www.kaggle.com/settings and save it as "
        "~/.kaggle/kaggle.json, or set KAGGLE_USERNAME and KAGGLE_KEY."
    )

    @staticmethod
    def page(handle):
        """Address of the model's page."""
        owner, model = handle.removeprefix("kaggle://").split("/")[:2]
        return f"https://www.kaggle.com/models/{owner}/{model}"

    @staticmethod
    def has_credentials():
        """Whether the library finds a token."""
        import kagglehub.config

        return kagglehub.config.get_kaggle_credentials() is not None


def http_status(error):
    """The HTTP status behind an exception, or None if it never came to one."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__ or error.__context__
    return None


def _explain(error, hub, handle):
    """What happened and what to do, in a sentence or two."""
    status, page = http_status(error), hub.page(handle)
    accept = f"Accept the licence at {page} with the same account."
    unknown = type(error).__name__ in (
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
        "EntryNotFoundError",
        "RemoteEntryNotFoundError",
    )
    if status in (401, 403) and not hub.has_credentials():
        also = " Or the name is wrong." if unknown else ""
        return f"{hub.name} asks who you are ({status}). {hub.login} {accept}{also}"
    if status == 401 and not unknown:
        return f"{hub.name} does not accept your credentials (401). {hub.login}"
    if status == 403:
        return f"{hub.name} refuses (403): the licence is not accepted. {accept}"
    if status in (401, 404) or unknown:
        return f"{hub.name} has no such model, version or file; see {page}."
    if status is not None:
        return f"{hub.name} answered {status} ({error}). Try again later."
    if isinstance(error, OSError) and error.errno == 28:
        return f"the disk is full ({error})."
    return (
        f"{hub.name} could not be reached, or the download broke off "
        f"({type(error).__name__}: {error}). Check the network and try again: what is "
        "there already is kept. With the files on this machine, name their directory."
    )
