"""Writes a checkpoint that MaxText starts training from: `0/items` in the directory.

Hugging Face's tokenizer files lie beside it, which MaxText fine-tunes with.
"""

from gemma_keras.checkpoints import (
    hugging_face_tokenizer,
    maxtext_model,
    orbax_checkpoint,
    orbax_place,
    orbax_writer,
)
from gemma_keras.checkpoints.maxtext_layout import MaxTextLayout, fold_factor
from gemma_keras.checkpoints.orbax_directory import tensorstore

FORMAT = "MaxText (Orbax)"
# Folded weights of bfloat16 would lose their last bits in bfloat16.
DTYPES = ("float32",)
LAYOUTS = ("scanned", "unscanned")
SUFFIX = None
STEP, ITEM = "0", "items"


def check(contents):
    """Raises `CheckpointError` for a Gemma that MaxText cannot compute."""
    tensorstore()
    maxtext_model.check(contents.config)


def stored_bytes(contents, dtype):
    """Bytes of the weights, and some for the tokenizer."""
    return contents.stored_bytes(dtype) + (2**26 if contents.tokenizer else 0)


def use(config, layout, path="PATH"):
    """The commands that train from it, as Markdown; see `exporting`."""
    commands = maxtext_model.commands(config, layout == "scanned", path)
    return "\n\n".join(
        f"{words}\n\n```bash\n{command}\n```" for words, command in commands.items()
    )


def write(folder, contents, settings):
    """Writes the files to the empty directory `folder`; see `exporting`."""
    config, layout = contents.config, MaxTextLayout(settings.layout)
    places = orbax_checkpoint.with_rows(orbax_place.places(layout, config), config)
    step = folder / STEP
    writer = orbax_writer.OrbaxWriter(
        step / ITEM,
        places,
        lambda name: ("params", "params", *name),
        settings.dtype,
        zarr3=True,
    )
    for path, place in places.items():
        # float32 has the numbers of all dtypes: the writer casts a few at a time.
        array = layout.to_stored(path, contents.array(path, None), config)
        writer.put(place, array, layout.folded(path, config))
    writer.number("step", 0)
    writer.empty("opt_state")
    writer.finish()
    orbax_writer.describe(step, ITEM)
    if contents.tokenizer is not None:
        hugging_face_tokenizer.write(folder, contents.tokenizer)
    orbax_checkpoint.write_config(folder, orbax_checkpoint.stored_config(config))
    told = [
        "One was added to the weights of norms, and the embedding was multiplied by "
        f"{fold_factor('token_embedding/embeddings', config):.6g}, as MaxText expects."
    ]
    factor = fold_factor("decoder_block_0/attention/query/kernel", config)
    if factor is not None:
        told.append(f"Query projections were multiplied by {factor:.6g}, likewise.")
    return told + orbax_checkpoint.told_of_rows(config)
