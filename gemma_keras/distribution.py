"""Several devices: processes that train together, and weights laid out (JAX).

The layout is Megatron's plan (Shoeybi et al. 2019, arXiv:1909.08053): projections into
a block are divided by their outputs, those out of it by their inputs, so that a block
needs one sum over the devices after attention and one after the feed-forward. Along the
data axis every weight is divided too, as ZeRO does, and gathered where it is used.

Codes of quantised weights lie as rows of outputs, and are divided by them everywhere:
two columns share a byte of int4, so that a run of bytes is no run of columns.
"""

import keras

from gemma_keras import backend

INTO = "query|ffw_gating|ffw_gating_2"
KEYS = "key|value"
OUT_OF = "attention_output|ffw_linear"


def layout_map(
    device_mesh,
    model_parallel_dim_name="model",
    data_parallel_dim_name="batch",
    config=None,
):
    """A `keras.distribution.LayoutMap` for weights, codes and low-rank factors.

    Whole on each device, being small, are norms; the scales and offsets of codes, but
    for their rows; and those sides of low-rank factors that meet no divided one.

    The axes must divide the sizes of the model, as those of Gemma are by powers of two.

    Args:
        device_mesh: a `keras.distribution.DeviceMesh`.
        model_parallel_dim_name: the mesh's axis over which products are divided.
        data_parallel_dim_name: the axis over which a batch is divided.
        config: a `GemmaConfig`; with it, keys and values are divided by their heads,
            or whole on each device if these cannot be divided among them, as the one
            head of Gemma 2B. Without it nobody knows, and their weights are divided
            by inputs: no head is cut, for one more sum over the devices in a block.

    Raises:
        ValueError: the mesh has no such axis.
    """
    model_dim, data_dim = model_parallel_dim_name, data_parallel_dim_name
    axes = dict(zip(device_mesh.axis_names, device_mesh.shape, strict=True))
    for name in (model_dim, data_dim):
        if name not in axes:
            raise ValueError(
                f"The device mesh has no axis {name!r}; it has {sorted(axes)}. Name "
                "the axes of your mesh in the call."
            )
    heads = None if config is None else config.num_kv_heads
    plan = _plan(model_dim, data_dim, heads, axes[model_dim])
    layouts = keras.distribution.LayoutMap(device_mesh)
    for pattern, layout in plan.items():
        layouts[pattern] = layout
    return layouts


def _plan(model, data, heads, devices):
    """Pattern of a path to the axes of what it names; `heads` of keys, None unknown."""
    # Adapters but the default one have a part of the path to themselves.
    table, block, adapter = "token_embedding", r".*decoder_block_\d+", "([^/]+/)?"
    by_heads = heads is not None and heads % devices == 0
    into = f"{block}/(attention/)?({INTO}{'|' + KEYS if by_heads else ''})"
    out_of, keys = f"{block}/(attention/)?({OUT_OF})", f"{block}/attention/({KEYS})"
    plan = {
        f"{table}/embeddings": (model, data),
        f"{table}/embeddings_codes": (model, data),
        f"{table}/embeddings_(scales|offsets)": (model, None),
        f"{table}/{adapter}lora_a": (model, None),
        f"{into}/kernel": (data, model),
        f"{into}/kernel_codes": (model, data),
        f"{into}/kernel_(scales|offsets)": (model, None),
        f"{into}/{adapter}lora_b": (None, model),
        f"{into}/{adapter}lora_magnitude": (model,),
        f"{out_of}/kernel": (model, data),
        f"{out_of}/kernel_codes": (model, data),
        f"{out_of}/kernel_(scales|offsets)": (model, None),
        f"{out_of}/{adapter}lora_a": (model, None),
    }
    if heads is None:
        plan[f"{keys}/kernel"] = (model, data)
        plan[f"{keys}/kernel_codes"] = (data, model)
        plan[f"{keys}/{adapter}lora_a"] = (model, None)
    elif not by_heads:
        # A head cut in pieces would need a sum for every score.
        plan[f"{keys}/kernel"] = (data, None)
        plan[f"{keys}/kernel_codes"] = (None, data)
    return plan


def is_set():
    """Whether variables are laid out over devices: JAX, after `set_distribution`."""
    return backend.NAME == "jax" and keras.distribution.distribution() is not None


def fill(variable, array):
    """Let a variable that is laid out hold a numpy array.

    Each device gets its part alone. Keras puts the whole onto the first one before it
    divides it, or compiles the array into a program if it is large.
    """
    layout = keras.distribution.distribution().get_variable_layout(variable)
    variable.assign(backend.tensor_in_parts(array, variable.dtype, layout))


def parts_of_rows(variable):
    """Among how many devices the rows of a Keras variable are divided."""
    distribution = keras.distribution.distribution()
    layout = distribution and distribution.get_variable_layout(variable)
    if not layout or not layout.axes or layout.axes[0] is None:
        return 1
    mesh = layout.device_mesh or distribution.device_mesh
    return mesh.shape[mesh.axis_names.index(layout.axes[0])]


def initialize():
    """Joins the processes that train together; call it before anything else.

    On torch each was started by `torchrun`. On JAX this is
    `keras.distribution.initialize()`, which reads the `KERAS_DISTRIBUTION_*` variables,
    or asks the cluster.

    Raises:
        ValueError: nothing says that there are several, or the backend is TensorFlow.
    """
    backend.join_processes()


def is_first():
    """Whether this is the process that writes what all have."""
    return backend.process()[0] == 0


def shard():
    """`(index, count)`: the share of each batch that this process is to read.

    `(0, 1)`, all of it, where there is one process; or where the mesh that is set on
    JAX has no more than one place along its batches. Call it after `set_distribution`.
    """
    index, count = backend.process()
    layout = keras.distribution.distribution() if count > 1 else None
    if layout is not None:
        mesh = layout.device_mesh
        axes = dict(zip(mesh.axis_names, mesh.shape, strict=True))
        # Several processes may hold parts of one copy of the model.
        shares = min(count, axes[layout.batch_dim_name])
        index, count = index * shares // count, shares
    return index, count


def refuse_processes(what):
    """Raises `ValueError` if this is one of several processes started together."""
    started = backend.processes_started()
    if started > 1:
        raise ValueError(
            f"{what} is for one process, and {started} were started together: each "
            "would do the same, and write to the same place. Start one; or call "
            "fit() in a program of your own, as docs/distributed.md shows."
        )


def use_all_devices(batch_size):
    """Divides each batch of what is trained from now on among all devices (JAX).

    Args:
        batch_size: rows of a batch.

    Raises:
        ValueError: the batch cannot be divided; or the backend is another one.
    """
    if backend.NAME != "jax":
        raise ValueError(
            f"devices=all works on JAX, and this is {backend.NAME}: "
            "docs/distributed.md shows what there is for it."
        )
    devices = len(keras.distribution.list_devices())
    if batch_size % devices:
        raise ValueError(
            f"The {batch_size} rows of a batch cannot be divided among {devices} "
            f"devices: make batch_size a multiple of {devices}."
        )
    if devices > 1:
        keras.distribution.set_distribution(
            keras.distribution.DataParallel(auto_shard_dataset=False)
        )
