"""Several devices: processes that train together, and weights laid out (JAX).

The layout is Megatron's plan (Shoeybi et al. 2019, arXiv:1909.08053): projections into
a block are divided by their outputs, those out of it by their inputs, so that a block
needs one sum over the devices after attention and one after the feed-forward. Along the
data axis every weight is divided too, as ZeRO does, and gathered where it is used.
"""

import keras

from gemma_keras import backend

INTO = "query|key|value|ffw_gating|ffw_gating_2"
OUT_OF = "attention_output|ffw_linear"


def layout_map(
    device_mesh,
    model_parallel_dim_name="model",
    data_parallel_dim_name="batch",
    config=None,
):
    """A `keras.distribution.LayoutMap` for every weight and low-rank factor.

    Args:
        device_mesh: a `keras.distribution.DeviceMesh`.
        model_parallel_dim_name: the mesh's axis over which products are divided.
        data_parallel_dim_name: the axis over which a batch is divided.
        config: a `GemmaConfig`; with it, keys and values are whole on each device if
            their heads cannot be divided among them, as the one head of Gemma 2B.

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
    layouts = keras.distribution.LayoutMap(device_mesh)
    layouts["token_embedding/embeddings"] = (model_dim, data_dim)
    if config is not None and config.num_kv_heads % axes[model_dim]:
        # A head cut in pieces would need a sum for every score.
        layouts[r".*/(query|ffw_gating|ffw_gating_2)/kernel"] = (data_dim, model_dim)
        layouts[r".*/(key|value)/kernel"] = (data_dim, None)
        layouts[r".*/(query|ffw_gating|ffw_gating_2)/lora_b"] = (None, model_dim)
    else:
        layouts[rf".*/({INTO})/kernel"] = (data_dim, model_dim)
        layouts[rf".*/({INTO})/lora_b"] = (None, model_dim)
    layouts[rf".*/({OUT_OF})/kernel"] = (model_dim, data_dim)
    layouts[rf".*/({OUT_OF})/lora_a"] = (model_dim, None)
    return layouts


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
