"""What one process has compiled, the next one finds on disk."""

import os
import subprocess
import sys

import keras
import pytest

from gemma_keras import compilation_cache

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
