"""A Gemma in the words of MaxText's configs, and the commands that train it there.

From MaxText 0.2.5. Its Gemmas differ in what `settings` says, and in nothing else: the
norm epsilon is fixed, for one. Those with a name of their own need not be described.
"""

import shlex

from gemma_keras import registry
from gemma_keras.checkpoints.checkpoint import CheckpointError, some
from gemma_keras.checkpoints.maxtext_layout import PATTERNS
from gemma_keras.checkpoints.orbax_checkpoint import stored_rows

# Names of MaxText, and of the same in the registry; of each family, the first lends
# what its models have in common to those without a name.
_MODELS = {
    "gemma-2b": "gemma_2b",
    "gemma-7b": "gemma_7b",
    "gemma2-2b": "gemma2_2b",
    "gemma2-9b": "gemma2_9b",
    "gemma2-27b": "gemma2_27b",
    "gemma3-4b": "gemma3_4b_text",
    "gemma3-12b": "gemma3_12b_text",
    "gemma3-27b": "gemma3_27b_text",
}
# Of Gemma 3, it tells the scale of queries by the name: here width / heads.
_BY_WIDTH = "gemma3-27b"


def check(config):
    """Raises `CheckpointError` for a Gemma that MaxText cannot compute."""
    wrong = list(_wrong(config))
    if wrong:
        raise CheckpointError(
            f"MaxText's model of type {config.family} cannot have {some(wrong)}."
        )


def _wrong(config):
    pattern, depth = PATTERNS[config.family], config.num_layers
    if config.layer_kinds != (pattern * depth)[:depth]:
        yield f"layers {config.layer_kinds}, but {pattern} again and again"
    if config.family == "gemma2" and depth % 2:
        yield f"an odd number of layers ({depth}), since it takes them by two"
    if config.norm_epsilon != 1e-6:
        yield f"norm_epsilon={config.norm_epsilon}"
    if config.family == "gemma3" and not config.use_post_norms:
        yield "use_post_norms=False"
    if config.family == "gemma" and config.attn_logit_soft_cap is not None:
        yield f"attn_logit_soft_cap={config.attn_logit_soft_cap}"
    if config.family == "gemma2" and config.rope_scaling_factor != 1:
        yield f"rope_scaling_factor={config.rope_scaling_factor}"
    scalars = (config.head_dim, config.hidden_dim // config.num_query_heads)
    if config.family == "gemma3" and config.query_pre_attn_scalar not in scalars:
        yield f"query_pre_attn_scalar={config.query_pre_attn_scalar}"


def settings(config):
    """The keys of a MaxText config that tell a Gemma from others of its family."""
    layers = config.num_layers
    found = {
        "decoder_block": config.family,
        "base_emb_dim": config.hidden_dim,
        "base_num_query_heads": config.num_query_heads,
        "base_num_kv_heads": config.num_kv_heads,
        "base_mlp_dim": config.ffn_dim,
        "base_num_decoder_layers": layers // 2 if config.family == "gemma2" else layers,
        "head_dim": config.head_dim,
        "vocab_size": stored_rows(config.vocab_size),
        "final_logits_soft_cap": config.final_logit_soft_cap or 0,
        "rope_max_timescale": config.rope_theta,
        "rope_linear_scaling_factor": config.rope_scaling_factor,
    }
    if config.family != "gemma":
        found["attn_logits_soft_cap"] = config.attn_logit_soft_cap or 0
        found["sliding_window_size"] = config.sliding_window
        found["local_rope_max_timescale"] = config.local_rope_theta or config.rope_theta
    return found


def described(config):
    """What to tell MaxText of the model, as words of a command line."""
    known, architectures = {}, registry.architectures()
    for name, ours in _MODELS.items():
        if architectures[ours].family == config.family:
            known[name] = settings(architectures[ours])
    wanted = settings(config)
    for name, found in known.items():
        if found == wanted:
            return [f"model_name={name}"]
    name = next(iter(known))
    if config.family == "gemma3" and config.query_pre_attn_scalar != config.head_dim:
        name = _BY_WIDTH
    others = {key: value for key, value in wanted.items() if value != known[name][key]}
    words = [f"{key}={_text(value)}" for key, value in others.items()]
    return [f"model_name={name}", "override_model_config=true", *words]


def _text(value):
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value)) if whole else str(value)


def commands(config, scanned, path):
    """What a person types to train from an export.

    Args:
        config: The `GemmaConfig`.
        scanned: Whether its layers are stacked.
        path: Where the export is.

    Returns:
        Words for a person to the command that they introduce.
    """
    words = [*described(config), f"load_parameters_path={path}/0/items"]
    if not scanned:
        words.append("scan_layers=false")
    run = ["base_output_directory=OUTPUT", "run_name=RUN", "per_device_batch_size=1"]
    data = ["hf_path=json", "hf_train_files=train.jsonl", "train_split=train"]
    trainer = "python3 -m maxtext.trainers"
    configs = "src/maxtext/configs"
    train = [f"{trainer}.pre_train.train {configs}/base.yml", *words]
    train += [f"tokenizer_path={path}", "tokenizer_type=huggingface", "dataset_type=hf"]
    tune = [f"{trainer}.post_train.sft.train_sft {configs}/post_train/sft.yml", *words]
    tune += [f"tokenizer_path={path}", "tokenizer_type=huggingface"]
    return {
        'Train in MaxText, on lines of `{"text": ...}`:': _lines(
            [*train, *data, "train_data_columns=['text']", *run, "steps=100"]
        ),
        'Fine-tune there, on chats in lines of `{"messages": [...]}`:': _lines(
            [*tune, *data, "train_data_columns=['messages']", *run, "steps=100"]
        ),
    }


def _lines(words):
    """A command over several lines, quoted where the shell would read it otherwise."""
    start, *rest = words
    quoted = [f'"{each}"' if "['" in each else shlex.quote(each) for each in rest]
    return " \\\n  ".join([start, *quoted])
