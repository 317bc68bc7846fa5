"""A model in memory as what a checkpoint writer is given."""

from gemma_keras import loading
from gemma_keras.checkpoints.contents import Contents
from gemma_keras.checkpoints.merging import told


def model_contents(lm, progress=None):
    """The `Contents` of a `GemmaCausalLM`, the adapters in use merged in."""
    preprocessor, backbone = lm.preprocessor, lm.backbone
    settings = {} if preprocessor is None else preprocessor.get_config()
    settings.pop("tokenizer", None)
    # With an adapter merged in, the weights are floats.
    packings = {} if backbone.adapters.active else backbone.packings
    return Contents(
        config=backbone.config,
        tensors=loading.weight_reader(backbone),
        dtype=backbone.variable_dtype,
        tokenizer=preprocessor and preprocessor.tokenizer,
        preprocessor_config=settings,
        provenance=lm.provenance.adding(*_changes(lm)),
        packings=packings,
        codes=loading.codes_reader(backbone) if packings else None,
        progress=progress,
    )


def _changes(lm):
    """What is known to have happened to the weights, a sentence each."""
    adapters = lm.backbone.adapters
    for name in adapters.active:
        yield told(adapters.configs[name], next(iter(adapters.layers(name))))
    optimizer = getattr(lm, "optimizer", None)
    steps = 0 if optimizer is None else int(optimizer.iterations.numpy())
    if steps:
        yield f"The model was trained for {steps} steps with gemma_keras."
    else:
        yield "The model was written from memory; its weights may have been changed."
