"""The few things that Keras cannot ask of every backend in one way.

The only package that knows which backend runs, and the only one that imports it.
"""

from gemma_keras.backend.device import (
    description,
    device_memory,
    giving_back_memory,
    keep_memory,
    memory_left,
    on_cpu,
    peak_memory,
    torch_device,
)
from gemma_keras.backend.fused import (
    gated_gelu,
    masked_softmax,
    masked_softmax_serves,
    norm_and_rotate,
    rms_norm,
    rotate,
    softmax_of_tile,
)
from gemma_keras.backend.gradients import (
    HAS_GELU_GRADIENT,
    gelu_gradient,
    may_be_differentiated,
    no_gradient,
    not_before,
    remat,
    with_gradient,
    zeros_not_before,
)
from gemma_keras.backend.library import NAME
from gemma_keras.backend.loops import both, branch, counter, least, loop
from gemma_keras.backend.packed_products import (
    has_packed_kernels,
    packed_matrix,
    packed_product,
)
from gemma_keras.backend.products import (
    batch_matmul,
    makes_gelu,
    matmul,
    matmul_gelu,
    matmul_of_few,
    row_products,
)
from gemma_keras.backend.programs import (
    COMPILES,
    LayerProgram,
    Program,
    Step,
    few_shapes,
)
from gemma_keras.backend.randomness import (
    gumbel,
    keep_mask,
    noise_seed,
    random_state,
    set_random_state,
    set_seed,
)
from gemma_keras.backend.replicas import (
    first_batch,
    from_all_processes,
    join_processes,
    make_alike,
    outside_of_strategy,
    process,
    processes_started,
    replicas,
    sum_over_replicas,
    summed_gradients,
)
from gemma_keras.backend.tensors import (
    all_finite,
    argmax,
    as_bits,
    column_squares,
    from_bits,
    host_copy,
    identities,
    read_slots,
    reshape,
    slots_from,
    tensor_from_array,
    tensor_in_parts,
    to_numpy,
    write_slots,
)
from gemma_keras.backend.torch_products import torch_attention, torch_attention_serves
from gemma_keras.backend.training import (
    assign_living,
    build_optimizer,
    compiled_step,
    sync_training,
)
