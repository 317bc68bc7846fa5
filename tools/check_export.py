"""Compare an exported Hugging Face directory with what this package computes.

    python tools/check_export.py reference CHECKPOINT FILE.npz   # where gemma_keras is
    python tools/check_export.py compare DIRECTORY FILE.npz      # where transformers is

The second needs nothing of this package, so that it runs in an environment with another
version of transformers: it prints the largest difference of the logits in float32, and
of the tokenizer's ids if there is a tokenizer, and fails above 1e-5.
"""

import argparse
import json
import sys

import numpy as np

TOLERANCE = 1e-5
TEXTS = [
    "The capital of France is",
    "Hello world\n\n  x\t1234",
    " " * 40 + "é🦊中文",
    "<start_of_turn>user\nHi<end_of_turn>\n",
]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " Hello! "},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "Who are you?"},
]


def write_reference(checkpoint: str, file: str):
    """Saves ids, logits, and what the tokenizer makes of a few texts."""
    from keras import ops

    from gemma_keras import GemmaCausalLM, chat

    lm = GemmaCausalLM.from_preset(checkpoint, dtype="float32")
    ids = np.random.default_rng(0).integers(3, lm.config.vocab_size, (2, 40))
    arrays = {"ids": ids, "logits": ops.convert_to_numpy(lm({"token_ids": ids}))}
    if lm.preprocessor is not None:
        tokenizer = lm.preprocessor.tokenizer
        arrays["texts"] = json.dumps([tokenizer.encode(text) for text in TEXTS])
        arrays["chat"] = "<bos>" + chat.format_chat(CHAT)
    np.savez(file, **arrays)


def compare(directory: str, file: str) -> bool:
    """Loads `directory` with transformers; says and returns whether all is the same."""
    import torch
    import transformers

    expected = np.load(file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, torch_dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(expected["ids"])).logits.numpy()
    worst = np.abs(logits - expected["logits"]).max()
    print(
        f"transformers {transformers.__version__}, {type(model).__name__}: {worst:.2e}"
    )
    same = worst <= TOLERANCE
    if "texts" in expected:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        for text, ids in zip(TEXTS, json.loads(str(expected["texts"])), strict=True):
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            same &= found == ids
            print(
                "ids equal" if found == ids else f"ids of {text!r}: {found}, not {ids}"
            )
        text = tokenizer.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=True
        )
        same &= text == str(expected["chat"])
        print("chat equal" if text == str(expected["chat"]) else f"chat: {text!r}")
    return bool(same)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=["reference", "compare"])
    parser.add_argument("checkpoint")
    parser.add_argument("file")
    options = parser.parse_args()
    if options.action == "reference":
        write_reference(options.checkpoint, options.file)
        return 0
    return 0 if compare(options.checkpoint, options.file) else 1


if __name__ == "__main__":
    sys.exit(main())
