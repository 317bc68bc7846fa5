"""Compare Flax and MaxText exports with what this package computes, in other programs.

    python tools/check_orbax.py twins FOLDER                    # where gemma_keras is
    python tools/check_orbax.py reference CHECKPOINT FILE.npz   # likewise
    python tools/check_orbax.py gemma-llm DIRECTORY FILE.npz
    python tools/check_orbax.py gemma DIRECTORY FILE.npz
    python tools/check_orbax.py maxtext DIRECTORY FILE.npz

`reference` saves ids and the logits of any checkpoint; `twins` makes tiny random models
and exports them as Flax and MaxText checkpoints, each beside its FILE.npz. The others
need nothing of this package, so that each runs in an environment of its own:

- gemma-llm 1.0.0 (Google's first library, Gemma 1 with one key head or as many as query
  heads): pip install jax flax orbax-checkpoint; pip install --no-deps gemma-llm==1.0.0
- gemma 3.3.0 (Google's present one, Gemma 1, 2 and 3): pip install gemma==3.3.0
  jax==0.8.1 flax==0.12.1 kauldron==1.3.0 typeguard==4.4.4; newer ones do not fit it
- maxtext 0.2.5, Python 3.12: pip install --no-deps maxtext, and what it then asks for.

They print the largest difference of the logits in float32, and fail above 1e-5 of what
the largest logit is, or of one.
"""

import argparse
import json
import os
import pathlib
import sys

import numpy as np
from check_export import agree

# Sizes of which no two are equal, N H != D, and windows that bite.
SIZES = {
    "vocab_size": 97,
    "num_layers": 4,
    "hidden_dim": 42,
    "ffn_dim": 46,
    "num_query_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 10,
    "query_pre_attn_scalar": 10,
}
LATER = {"use_post_norms": True, "sliding_window": 5, "query_pre_attn_scalar": 7}
TWINS = {
    "gemma": {},
    "gemma-one": {"num_kv_heads": 1},
    "gemma-all": {"num_kv_heads": 6},
    "gemma2": LATER
    | {"layer_pattern": "LG", "attn_logit_soft_cap": 1.5, "final_logit_soft_cap": 2.5},
    "gemma3": LATER
    | {"num_layers": 14, "layer_pattern": "LLLLLG", "use_qk_norm": True}
    | {"rope_theta": 1e6, "local_rope_theta": 1e4, "rope_scaling_factor": 8.0},
}


def write_reference(checkpoint: str, file: str):
    """Saves ids and logits."""
    from gemma_keras import GemmaCausalLM

    save(GemmaCausalLM.from_preset(checkpoint, dtype="float32"), file)


def save(lm, file):
    """Saves what other programs are to compute, and how they are told of the model."""
    import dataclasses

    from keras import ops

    from gemma_keras.checkpoints import maxtext_model

    ids = np.random.default_rng(0).integers(3, lm.config.vocab_size, (2, 40))
    arrays = {"ids": ids, "logits": ops.convert_to_numpy(lm({"token_ids": ids}))}
    arrays["config"] = json.dumps(dataclasses.asdict(lm.config))
    arrays["maxtext"] = json.dumps(maxtext_model.described(lm.config))
    np.savez(file, **arrays)


def write_twins(folder: str):
    """Makes the tiny models, exported in each layout."""
    import keras

    from gemma_keras import GemmaBackbone, GemmaCausalLM, GemmaConfig

    def init(path):
        deviations = {"scale": 0.4, "kernel": 0.12, "embeddings": 0.12}
        return keras.initializers.RandomNormal(stddev=deviations[path.split("/")[-1]])

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, changes in TWINS.items():
        keras.utils.set_random_seed(7)
        lm = GemmaCausalLM(GemmaBackbone(GemmaConfig(**SIZES | changes), init=init))
        save(lm, folder / f"{name}.npz")
        for format, layout in (
            ("flax", "flat"),
            ("flax", "nested"),
            ("maxtext", "scanned"),
            ("maxtext", "unscanned"),
        ):
            place = folder / f"{name}-{format}-{layout}"
            lm.export(place, format=format, layout=layout, overwrite=True)
            print(place)


def run_gemma_llm(directory: str, expected):
    """The logits of a Flax checkpoint with flat keys, by gemma-llm 1.0.0."""
    import jax
    import jax.numpy as jnp
    from gemma import params as params_lib
    from gemma import transformer

    jax.config.update("jax_default_matmul_precision", "highest")
    # Orbax wants the whole path.
    path = str(pathlib.Path(directory).resolve() / "checkpoint")
    params = params_lib.load_and_format_params(path)
    config = transformer.TransformerConfig.from_params(params)
    ids = jnp.asarray(expected["ids"])
    mask = jnp.ones(ids.shape, bool)
    logits, _ = transformer.Transformer(config).apply(
        {"params": params["transformer"]},
        ids,
        transformer.build_positions_from_mask(mask),
        None,
        transformer.make_causal_attn_mask(mask),
    )
    return np.asarray(logits)


def run_gemma(directory: str, expected):
    """The logits of a Flax checkpoint in either layout, by gemma 3.3.0."""
    import jax
    import jax.numpy as jnp
    from gemma import gm
    from gemma.gm.nn import _config, _modules, _transformer

    jax.config.update("jax_default_matmul_precision", "highest")
    path = pathlib.Path(directory).resolve() / "checkpoint"
    params = gm.ckpts.load_params(str(path))
    ours = json.loads(str(expected["config"]))
    kinds = {
        "L": _modules.AttentionType.LOCAL_SLIDING,
        "G": _modules.AttentionType.GLOBAL,
    }
    depth, scales = ours["num_layers"], _config.QueryPreAttentionNormalisation
    pattern = (ours["layer_pattern"] * depth)[:depth]
    by_head = ours["query_pre_attn_scalar"] == ours["head_dim"]
    gating = params["layer_0"]["mlp"]["gating_einsum"].shape
    config = _config.TransformerConfig(
        num_embed=params["embedder"]["input_embedding"].shape[0],
        embed_dim=ours["hidden_dim"],
        hidden_dim=ours["ffn_dim"],
        num_heads=ours["num_query_heads"],
        head_dim=ours["head_dim"],
        num_kv_heads=ours["num_kv_heads"],
        final_logit_softcap=ours["final_logit_soft_cap"],
        use_post_attn_norm=ours["use_post_norms"],
        use_post_ffw_norm=ours["use_post_norms"],
        attention_types=[kinds[kind] for kind in pattern],
        query_pre_attn_norm=scales.BY_ONE_OVER_SQRT_HEAD_DIM
        if by_head
        else scales.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
        attn_logits_soft_cap=ours["attn_logit_soft_cap"],
        sliding_window_size=ours["sliding_window"],
        transpose_gating_einsum=gating[1] == ours["ffn_dim"],
        use_qk_norm=ours["use_qk_norm"],
        local_base_frequency=ours["local_rope_theta"] or ours["rope_theta"],
        global_base_frequency=ours["rope_theta"],
        global_scale_factor=ours["rope_scaling_factor"],
    )
    model = _transformer.Transformer(config=config, dtype=jnp.float32)
    ids = jnp.asarray(expected["ids"])
    length = ids.shape[1]
    # Whatever of it is padding to this library is a token to us.
    causal = jnp.tril(jnp.ones((length, length), bool))[None].repeat(len(ids), 0)
    positions = jnp.arange(length)[None].repeat(len(ids), 0)
    output = model.apply(
        {"params": params}, ids, positions=positions, attention_mask=causal
    )
    return np.asarray(output.logits)


def run_maxtext(directory: str, expected):
    """The logits of a MaxText checkpoint, by what its fine-tuning loads it with."""
    os.environ["DECOUPLE_GCLOUD"] = "TRUE"
    import jax
    import jax.numpy as jnp
    import orbax.checkpoint
    from orbax.checkpoint.experimental import v1

    # Its place in what MaxText 0.2.5 was made with.
    if not hasattr(orbax.checkpoint, "v1"):
        orbax.checkpoint.v1 = sys.modules["orbax.checkpoint.v1"] = v1
    import maxtext
    from maxtext.common.common_types import MODEL_MODE_TRAIN
    from maxtext.configs import pyconfig
    from maxtext.layers import nnx_decoders
    from maxtext.utils import model_creation_utils

    # MaxText rounds the table to bfloat16 in the head, whatever it was told, which is
    # more than all that is to be seen here.
    nnx_decoders.attend_on_embedding = lambda hidden, table, *_: hidden @ table.T
    jax.config.update("jax_default_matmul_precision", "highest")
    path = pathlib.Path(directory).resolve() / "0" / "items"
    tree = json.loads((path / "_METADATA").read_text())["tree_metadata"]
    scanned = "'layers'" in "".join(tree)
    ids = expected["ids"]
    config = pyconfig.initialize(
        [
            "check_orbax",
            str(pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"),
            *json.loads(str(expected["maxtext"])),
            f"load_parameters_path={path}",
            f"scan_layers={scanned}",
            f"per_device_batch_size={len(ids)}",
            f"max_target_length={ids.shape[1]}",
            "run_name=check",
            f"base_output_directory={path.parent.parent}",
            *("attention=dot_product", "dtype=float32", "matmul_precision=highest"),
            *("float32_qk_product=true", "float32_logits=true"),
            *("logits_dot_in_fp32=true", "enable_dropout=false"),
            "skip_jax_distributed_system=true",
        ]
    )
    model, mesh = model_creation_utils.from_pretrained(config)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    with jax.set_mesh(mesh):
        logits = model(
            jnp.asarray(ids, jnp.int32),
            positions,
            decoder_segment_ids=jnp.ones(ids.shape, jnp.int32),
            enable_dropout=False,
            model_mode=MODEL_MODE_TRAIN,
        )
    return np.asarray(logits)


READERS = {
    "gemma-llm": run_gemma_llm,
    "gemma": run_gemma,
    "maxtext": run_maxtext,
}


def compare(reader: str, directory: str, file: str) -> bool:
    """Loads `directory` with a program; says and returns whether it agrees."""
    expected = np.load(file)
    logits = READERS[reader](directory, expected)
    wanted = expected["logits"]
    same, words = agree(logits[..., : wanted.shape[-1]], wanted)
    print(f"{reader}, {directory}: {words}")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["twins", "reference", *READERS])
    parser.add_argument("checkpoint")
    parser.add_argument("file", nargs="?")
    options = parser.parse_args()
    if options.action == "twins":
        write_twins(options.checkpoint)
        return 0
    if options.file is None:
        parser.error("FILE.npz is missing")
    if options.action == "reference":
        write_reference(options.checkpoint, options.file)
        return 0
    return 0 if compare(options.action, options.checkpoint, options.file) else 1


if __name__ == "__main__":
    sys.exit(main())
