"""Writes the directory of a Flax checkpoint as Google publishes them.

The Orbax directory is `checkpoint`; the tokenizer and the papers lie around it.
"""

from gemma_keras.checkpoints import (
    flax_layout,
    orbax_checkpoint,
    orbax_place,
    orbax_writer,
)
from gemma_keras.checkpoints.flax_layout import FlaxLayout
from gemma_keras.checkpoints.mapped_file import FLOAT_DTYPES
from gemma_keras.checkpoints.orbax_directory import tensorstore

FORMAT = "Flax (Orbax)"
DTYPES = tuple(FLOAT_DTYPES)
LAYOUTS = ("flat", "nested")
SUFFIX = None
FOLDER = "checkpoint"
USE = f"""\
```python
from gemma import gm  # Google's library; its models are gm.nn.Gemma3_1B() and so on

params = gm.ckpts.load_params("PATH/{FOLDER}")
tokenizer = gm.text.Gemma3Tokenizer("PATH/tokenizer.model")
```

`orbax.checkpoint.PyTreeCheckpointer().restore("PATH/{FOLDER}")` gives the arrays alone.
"""


def check(contents):
    """Raises `CheckpointError` for a Gemma that Google's library cannot compute."""
    tensorstore()
    flax_layout.check(contents.config)


def stored_bytes(contents, dtype):
    """Bytes of the weights."""
    return contents.stored_bytes(dtype)


def write(folder, contents, settings):
    """Writes the files to the empty directory `folder`; see `exporting`."""
    config, nested = contents.config, settings.layout == "nested"
    layout = FlaxLayout.of(config)
    places = orbax_checkpoint.with_rows(orbax_place.places(layout, config), config)
    target = folder / FOLDER
    writer = orbax_writer.OrbaxWriter(
        target,
        places,
        lambda name: flax_layout.tree_keys(name, nested),
        settings.dtype,
        zarr3=False,
    )
    for path, place in places.items():
        array = contents.array(path, settings.dtype)
        writer.put(place, layout.to_stored(path, array, config))
    writer.finish()
    orbax_writer.describe(target)
    if contents.tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(contents.tokenizer.proto)
    orbax_checkpoint.write_config(folder, orbax_checkpoint.stored_config(config))
    return orbax_checkpoint.told_of_rows(config)
