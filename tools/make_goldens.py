#!/usr/bin/env python3
"""Writes tests/parity/goldens: what transformers computes, for every backend to match.

    python tools/make_goldens.py twins         # tiny random Gemma 1, 2 and 3
    python tools/make_goldens.py adapters      # of PEFT, for the twins
    python tools/make_goldens.py gemma3_270m   # the real one; needs fetch_assets

Needs transformers, torch, peft and gguf. The twins hide nothing: every size differs
from every other, N*H != D, 1 < K < N, the query scale is not the head size, windows
bite more than twice over, soft caps saturate and no norm weight is zero.
"""

import argparse
import json
import pathlib
import shutil

import numpy as np
import torch
import transformers
from fetch_assets import assets_dir

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "tests" / "parity" / "goldens"
TOKENS = 23  # more than twice the windows below

SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 44,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def gemma1():
    """Gemma 1, with a rotary base of its own."""
    config = transformers.GemmaConfig(
        **SIZES,
        num_hidden_layers=3,
        hidden_act="gelu_pytorch_tanh",
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    return transformers.GemmaForCausalLM(config)


def gemma2():
    """Gemma 2: local and global layers in turn, caps low enough to saturate."""
    config = transformers.Gemma2Config(
        **SIZES,
        num_hidden_layers=5,
        query_pre_attn_scalar=13,
        sliding_window=5,
        attn_logit_softcapping=1.5,
        final_logit_softcapping=2.5,
    )
    return transformers.Gemma2ForCausalLM(config)


def gemma3():
    """Gemma 3: LLG twice and one more, two rotary bases, linear scaling."""
    config = transformers.Gemma3TextConfig(
        **SIZES,
        num_hidden_layers=7,
        query_pre_attn_scalar=13,
        sliding_window=5,
        layer_types=[LOCAL, LOCAL, GLOBAL] * 2 + [LOCAL],
        rope_parameters={
            LOCAL: {"rope_type": "default", "rope_theta": 1e4},
            GLOBAL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    )
    return transformers.Gemma3ForCausalLM(config)


# And the standard deviation of the matrices: without norms after each branch, Gemma 1
# would grow past what 1e-5 can mean in float32.
TWINS = {"gemma": (gemma1, 0.18), "gemma2": (gemma2, 0.25), "gemma3": (gemma3, 0.25)}


def randomise(model, seed, scale):
    """Random weights whose logits stay of order one; norms are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(noise * (scale if weight.ndim > 1 else 0.4))
            if name == "model.norm.weight":
                weight.mul_(0.25)
    return model.eval()


def outputs(model, token_ids):
    """Logits and the hidden states after the embedding and after each block."""
    blocks = []
    hooks = [
        layer.register_forward_hook(
            lambda _, __, out: blocks.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(torch.from_numpy(token_ids)).logits
    for hook in hooks:
        hook.remove()
    return {
        "logits": logits.numpy(),
        **{f"block_{i}": block.numpy() for i, block in enumerate(blocks)},
    }


def make_twins():
    """One folder a family: a checkpoint as transformers saves it, and outputs.npz."""
    for seed, (name, (build, scale)) in enumerate(TWINS.items()):
        model = randomise(build(), seed, scale)
        model.config._attn_implementation = "eager"
        folder = GOLDENS / name
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        random = np.random.default_rng(seed)
        token_ids = random.integers(0, SIZES["vocab_size"], (2, TOKENS))
        values = outputs(model, token_ids)
        np.savez_compressed(folder / "outputs.npz", token_ids=token_ids, **values)
        print(f"{folder}: logits up to {abs(values['logits']).max():.2f}")


# One adapter for each twin; together they have what adapters can have.
ADAPTERS = {
    "gemma": {
        "target_modules": ["q_proj", "down_proj", "embed_tokens"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "embed_tokens": 2},
        "alpha_pattern": {r"layers\.[01]\.mlp\.down_proj": 9},
    },
    "gemma2": {"target_modules": "all-linear", "use_dora": True, "use_rslora": True},
    "gemma3": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
}


def make_adapters():
    """In the folder of each twin: adapter/ as PEFT saves it, and adapter_logits.npy."""
    import peft

    for seed, (name, settings) in enumerate(ADAPTERS.items()):
        folder = GOLDENS / name
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager"
        )
        model.name_or_path = model.config._name_or_path = ""
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=3,
            lora_alpha=4,
            task_type="CAUSAL_LM",
            init_lora_weights=False,
            **settings,
        )
        model = peft.get_peft_model(model, config).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path, weight in model.named_parameters():
                noise = torch.randn(weight.shape, generator=generator)
                if "magnitude" in path:
                    weight.mul_(1 + 0.3 * noise)
                elif "lora_" in path:
                    weight.copy_(0.1 * noise)
        shutil.rmtree(folder / "adapter", ignore_errors=True)
        model.save_pretrained(folder / "adapter")
        (folder / "adapter" / "README.md").unlink()
        token_ids = np.load(folder / "outputs.npz")["token_ids"]
        with torch.no_grad():
            logits = model(torch.from_numpy(token_ids)).logits.numpy()
        np.save(folder / "adapter_logits.npy", logits)
        print(f"{folder}: logits up to {abs(logits).max():.2f}")


PROMPTS = [
    "The capital of France is",
    "Once upon a time, there was a",
    "def fibonacci(n):\n    ",
    "The three primary colours are red,",
    "In 1969, the first people",
    "Q: What is the largest planet?\nA:",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Le chat est assis sur",
    "To bake bread, you first need",
]


def make_gemma3_270m():
    """Log-probabilities over the licence's text, and greedy continuations."""
    path = assets_dir() / "gemma3_270m" / "gemma-3-270m-q4_k_m.gguf"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype="float32", attn_implementation="eager"
    ).eval()
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(
        model_file=str(assets_dir() / "gemma3" / "tokenizer.model")
    )
    text = (ROOT / "LICENSE").read_text()
    token_ids = np.array([[2, *tokenizer.encode(text)]])[:, :2304]
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.from_numpy(token_ids)).logits, -1)
    targets = torch.from_numpy(token_ids[:, 1:, None])
    log_probs = log_probs[:, :-1].gather(-1, targets)[..., 0].numpy()
    continuations = {}
    for prompt in PROMPTS:
        ids = torch.tensor([[2, *tokenizer.encode(prompt)]])
        made = model.generate(
            ids, max_new_tokens=48, do_sample=False, eos_token_id=None
        )
        continuations[prompt] = made[0, ids.shape[1] :].tolist()
        print(repr(tokenizer.decode(continuations[prompt])))
    folder = GOLDENS / "gemma3_270m"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        folder / "log_probs.npz", token_ids=token_ids, log_probs=log_probs
    )
    with open(folder / "greedy.json", "w") as file:
        json.dump(continuations, file, indent=1, ensure_ascii=False)
        file.write("\n")
    print(f"{folder}: {token_ids.size} tokens, mean {log_probs.mean():.4f}")


MAKERS = {
    "twins": make_twins,
    "adapters": make_adapters,
    "gemma3_270m": make_gemma3_270m,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="+", choices=list(MAKERS))
    for which in parser.parse_args().which:
        MAKERS[which]()
