"""What one process has compiled, the next one finds on disk."""

import os
import pathlib
import subprocess
import sys

import keras
import pytest

from gemma_keras import compilation_cache, xla_entries

ANSWER = """
import jax
found = []
jax.monitoring.register_event_listener(lambda name, **_: found.append(name))
import gemma_keras
lm = gemma_keras.models.GemmaCausalLM.from_preset("gemma_tiny_en")
print(repr(lm.generate("The cat", max_new_tokens=4)))
print(*(found.count(f"/jax/compilation_cache/cache_{x}") for x in ("hits", "misses")))
"""


def answer(folder):
    """What a new process says; how many programs it found, and how many it did not."""
    # The tests keep theirs elsewhere.
    keeps = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(keeps)}
    environment[compilation_cache.SWITCH] = str(folder)
    # All of them, not those alone that take a second on this machine at this moment.
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", ANSWER],
        env={**environment, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=True,
    )
    text, counts = done.stdout.strip().splitlines()
    return text, *map(int, counts.split())


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX alone keeps programs")
def test_the_next_process_finds_what_was_compiled(tmp_path):
    text, hits, misses = answer(tmp_path)
    assert misses > 0
    assert list(tmp_path.glob("*/*"))
    assert answer(tmp_path) == (text, hits + misses, 0)
    assert answer("off") == (text, 0, 0)


PRODUCTS = """
import numpy as np
from gemma_keras import backend
product = backend.Program(lambda x, y: backend.matmul(x, y), [])
x = np.arange(6, dtype="float32")
for rows in (2, 3):
    made = product(x.reshape(rows, -1), x.reshape(-1, rows))
    print(backend.to_numpy(made).ravel().tolist())
"""


def multiply(folder):
    """What a new process on TensorFlow computes; how many programs it found; stderr."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        compilation_cache.SWITCH: str(folder),
        "TF_CPP_MIN_LOG_LEVEL": "0",
        "TF_CPP_VMODULE": "device_executable_persistor=1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PRODUCTS],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr.count("Loading cached entry for"), done.stderr


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="for TensorFlow")
@pytest.mark.skipif(compilation_cache.has_gpu_driver(), reason="for a CPU alone")
def test_tensorflow_finds_what_is_whole_and_is_silent(tmp_path):
    products = "[10.0, 13.0, 28.0, 40.0]\n"
    products += "[3.0, 4.0, 5.0, 9.0, 14.0, 19.0, 15.0, 24.0, 33.0]\n"
    assert multiply(tmp_path)[:2] == (products, 0)
    entries = sorted(tmp_path.glob("*/tensorflow-*/*"))
    assert len(entries) == 2
    # TensorFlow itself would fail over this one.
    whole = entries[0].read_bytes()
    entries[0].write_bytes(whole[: len(whole) // 2])
    text, found, errors = multiply(tmp_path)
    assert (text, found) == (products, 1)
    assert "XlaSerializedCacheEntry" not in errors
    # Nor that the processor lacks what a compiler preferred.
    assert "cpu_aot_loader" not in errors
    assert len(entries[0].read_bytes()) == len(whole)
    assert sorted(tmp_path.glob("*/tensorflow-*/*")) == entries


def field(number, value):
    """A field of a protocol buffer: an integer or bytes, both below 128."""
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


def long_field(number, value):
    """A field of bytes, 128 to 16,383."""
    size = len(value)
    return bytes([number << 3 | 2, size & 127 | 128, size >> 7]) + value


KEY = field(1, 7) + field(2, 9) + field(3, b"CPU") + field(4, b"gemma_keras")
ENTRY = field(1, KEY) + field(2, b"graph") + field(3, b'a"b\\\x00\xff')
TEXT = (
    b'key { signature_fingerprint: 7 cluster_fingerprint: 9 device_type: "CPU" '
    b'prefix: "gemma_keras" }\nexecutable: "a\\042b\\134\\000\\377"\n'
)


@pytest.mark.any_backend
@pytest.mark.parametrize("torn", range(len(ENTRY)))
def test_an_entry_that_is_torn_is_told_from_a_whole_one(torn):
    assert xla_entries.as_text(ENTRY) == TEXT
    with pytest.raises(ValueError):
        xla_entries.as_text(ENTRY[:torn])


@pytest.mark.any_backend
def test_an_entry_asks_for_no_instructions_that_nobody_can_list():
    others = ",".join(f"+x{number}" for number in range(20))
    features = f"{others},+avx512f,-avx512fp16,+prefer-no-gather,-zu".encode()
    expected = f"{others},-avx512f,-avx512fp16,-prefer-no-gather,-zu".encode()
    code = b"\x01+avx512f,+prefer-no-gather\x02"
    text = xla_entries.as_text(
        field(1, KEY) + field(2, b"graph") + long_field(3, code + features + code)
    )
    spelled = code.replace(b"\x01", b"\\001").replace(b"\x02", b"\\002")
    assert text.endswith(b'executable: "%s"\n' % (spelled + expected + spelled))


@pytest.mark.any_backend
def test_entries_become_text_or_go(tmp_path):
    path = tmp_path / "entry.pb"
    for content in (ENTRY, TEXT):
        path.write_bytes(content)
        xla_entries.settle(path)
        assert path.read_bytes() == TEXT
    foreign = field(1, field(6, 1)) + field(2, b"graph") + field(3, b"executable")
    for content in (b"", b"key {", ENTRY[:-1], TEXT[:-1], b"not ours", foreign):
        path.write_bytes(content)
        xla_entries.settle(path)
        assert not path.exists()
    xla_entries.settle(path)
    assert not list(tmp_path.iterdir())


class TensorFlow:
    """Stands for the module, which reads its flags when it is asked about XLA."""

    def __init__(self, version):
        self.__version__ = version
        self.config = self.optimizer = self
        self.flags = None

    def get_jit(self):
        self.flags = os.environ["TF_XLA_FLAGS"]


@pytest.fixture
def flags(monkeypatch, tmp_path):
    """A function that says which flags TensorFlow reads in place of given ones."""
    monkeypatch.setenv(compilation_cache.SWITCH, str(tmp_path / "kept"))
    monkeypatch.setattr(compilation_cache.atexit, "register", lambda *_: None)
    monkeypatch.setattr(compilation_cache, "_DRIVERS", ())

    def read(given=None, version="2.21.0"):
        if given is None:
            monkeypatch.delenv("TF_XLA_FLAGS", raising=False)
        else:
            monkeypatch.setenv("TF_XLA_FLAGS", given)
        compilation_cache.keep_programs_of_tensorflow(module := TensorFlow(version))
        # Processes that this one starts know nothing of it.
        assert os.environ.get("TF_XLA_FLAGS") == given
        return module.flags

    return read


def folder_in(flags):
    (word,) = [x for x in flags.split() if "cache_directory=" in x]
    return pathlib.Path(word.partition("=")[2])


@pytest.mark.any_backend
def test_flags_of_tensorflow_are_added_to(flags, tmp_path):
    path = folder_in(flags())
    assert path.is_dir() and path.is_relative_to(tmp_path / "kept")
    assert flags("--others=1").startswith("--others=1 --tf_xla_persistent")
    # Other flags make other programs; so does another version.
    others = folder_in(flags("--others=1")), folder_in(flags(version="2.21.1"))
    assert len({path, *others}) == 3


@pytest.mark.any_backend
def test_tensorflow_is_told_nothing_where_it_cannot_keep_programs(
    flags, tmp_path, monkeypatch
):
    for theirs in ("--tf_xla_persistent_cache_directory=/x", "file_of_flags"):
        assert flags(theirs) is None
    # One that might end the process.
    assert flags(version="2.18.0") is None
    (tmp_path / "file").write_text("")
    for switch in ("off", tmp_path / "with space", tmp_path / "file"):
        monkeypatch.setenv(compilation_cache.SWITCH, str(switch))
        assert flags() is None
    monkeypatch.setenv(compilation_cache.SWITCH, str(tmp_path / "kept"))
    assert flags() is not None
    with monkeypatch.context() as patch:
        patch.setattr(compilation_cache, "_DRIVERS", (str(tmp_path / "file"),))
        assert flags() is None
    monkeypatch.setattr(compilation_cache, "_LEAST_BYTES_FREE", 2**80)
    assert flags() is None


@pytest.mark.any_backend
def test_the_oldest_programs_of_tensorflow_go(flags, monkeypatch):
    path = folder_in(flags())
    other = folder_in(flags("--others=1"))
    files = [path / "a.pb", other / "b.pb", path / "c.pb", path / "d.tmp"]
    for age, file in enumerate(files):
        file.write_bytes(TEXT)
        os.utime(file, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(compilation_cache, "_MOST_BYTES", 2 * len(TEXT))
    flags()
    assert [file for file in files if file.exists()] == files[:2]
    files[3].write_bytes(b"being written")
    files[2].write_bytes(TEXT)
    os.utime(files[2], (1e8, 1e8))
    monkeypatch.setattr(compilation_cache, "_MOST_BYTES", 2**20)
    flags()
    assert [file for file in files if file.exists()] == files
    os.utime(files[3], (1e9, 1e9))
    flags()
    assert [file for file in files if file.exists()] == files[:3]


class Config:
    """Stands for `jax.config`."""

    def __init__(self, folder=None):
        self.jax_compilation_cache_dir, self.changes = folder, {}

    def update(self, name, value):
        self.changes[name] = value


@pytest.mark.any_backend
def test_a_switch_names_the_folder_or_says_no(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(compilation_cache.SWITCH, raising=False)
    home = tmp_path / "gemma_keras" / "compiled"
    assert compilation_cache.folder().parent == home
    config = Config()
    compilation_cache.keep_programs_of_jax(config)
    assert config.changes["jax_compilation_cache_dir"] == str(next(home.iterdir()))
    # Somebody else has chosen.
    chosen = Config("elsewhere")
    compilation_cache.keep_programs_of_jax(chosen)
    assert not chosen.changes
    monkeypatch.setenv(compilation_cache.SWITCH, str(tmp_path / "named"))
    assert compilation_cache.folder().parent == tmp_path / "named"
    # A file is in the way.
    (tmp_path / "named").write_text("")
    compilation_cache.keep_programs_of_jax(unable := Config())
    assert not unable.changes
    # Nobody has a home.
    monkeypatch.setenv(compilation_cache.SWITCH, "~nobody-of-this-name/compiled")
    compilation_cache.keep_programs_of_jax(homeless := Config())
    assert not homeless.changes
    monkeypatch.setenv(compilation_cache.SWITCH, "off")
    assert compilation_cache.folder() is None
    compilation_cache.keep_programs_of_jax(refused := Config())
    assert not refused.changes
