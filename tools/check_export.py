"""Compare an exported Hugging Face directory with what this package computes.

    python tools/check_export.py reference CHECKPOINT FILE.npz   # where gemma_keras is
    python tools/check_export.py compare DIRECTORY FILE.npz      # where transformers is

The second needs nothing of this package, so that it runs in an environment with another
version of transformers: it prints the largest difference of the logits in float32, and
if there is a tokenizer, how many of 3,000 texts have other ids and how many of 200
chats another text; it fails above 1e-5 of what the largest logit is, or of one, and for
any other id or text.
"""

import argparse
import json
import random
import sys

import numpy as np

TOLERANCE = 1e-5
TEXTS, CHATS = 3000, 200
CONTROL_NAMES = ("<pad>", "<eos>", "<bos>", "<unk>")
FRAGMENTS = [
    *("<start_of_turn>", "<end_of_turn>", "<mask>", "<unused1>", "</b>", "<0x41>"),
    *(" ", "   ", "\u2581", "\n", "\n\n\n", "\t", "\r\n", "\u00a0", "é", "e\u0301"),
    *("the", "boats", "keeper", "count", "Hello world", "0", "345,678", "!?!"),
    *("中文", "العربية", "🦊", "👩‍👩‍👧", "\x00", "\ufffd", "\U0010ffff", "<bos>", "<"),
]


def many_texts(count, seed=11):
    """Texts of all sorts, with runs of white space that are longer than any piece."""
    rng = random.Random(seed)
    for _ in range(count):
        parts = rng.choices(FRAGMENTS, k=rng.randint(1, 10))
        parts.append(rng.choice(" \n\t\u2581a") * rng.randint(0, 69))
        parts += (chr(rng.randrange(0xD800)) for _ in range(rng.randint(0, 4)))
        rng.shuffle(parts)
        yield "".join(parts)


def stands_for_a_piece(text):
    """Whether a text has ids of its own in tokenizer.json, by the documents.

    It takes the names of control pieces for these, which SentencePiece never does.
    """
    return any(name in text for name in CONTROL_NAMES)


def conversations(count, seed=5):
    """Chats with and without a system message, and whether they are to be answered."""
    rng = random.Random(seed)
    for _ in range(count):
        messages = []
        if rng.random() < 0.4:
            messages.append({"role": "system", "content": "".join(some_text(rng))})
        for number in range(rng.randint(1, 6)):
            role = ("user", rng.choice(["assistant", "model"]))[number % 2]
            messages.append({"role": role, "content": "".join(some_text(rng))})
        yield messages, number % 2 == 0 and rng.random() < 0.7


def some_text(rng):
    return rng.choices(FRAGMENTS, k=rng.randint(0, 6))


def agree(found, expected) -> tuple[bool, str]:
    """Whether logits in float32 are the same but for rounding, and words for it.

    Rounding grows with the numbers: with logits of 30, either program is as far from
    what float64 gives as they are from each other. So the bound is a share of the
    largest logit, and an absolute one where all are below one.
    """
    worst, largest = np.abs(found - expected).max(), np.abs(expected).max()
    return bool(worst <= TOLERANCE * max(1.0, largest)), f"{worst:.2e} of {largest:.3g}"


def write_reference(checkpoint: str, file: str):
    """Saves ids, logits, and what is made of texts and chats."""
    from keras import ops

    from gemma_keras import GemmaCausalLM, chat

    lm = GemmaCausalLM.from_preset(checkpoint, dtype="float32")
    ids = np.random.default_rng(0).integers(3, lm.config.vocab_size, (2, 40))
    arrays = {"ids": ids, "logits": ops.convert_to_numpy(lm({"token_ids": ids}))}
    if lm.preprocessor is not None:
        tokenizer = lm.preprocessor.tokenizer
        texts = [text for text in many_texts(TEXTS) if not stands_for_a_piece(text)]
        arrays["texts"] = json.dumps([(text, tokenizer.encode(text)) for text in texts])
        chats = [
            (messages, answer, "<bos>" + chat.format_chat(messages, answer))
            for messages, answer in conversations(CHATS)
        ]
        arrays["chats"] = json.dumps(chats)
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
    same, words = agree(logits, expected["logits"])
    name = type(model).__name__
    print(f"transformers {transformers.__version__}, {name}: {words}")
    if "texts" not in expected:
        return same
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    other_ids = [
        text
        for text, ids in json.loads(str(expected["texts"]))
        if tokenizer(text, add_special_tokens=False)["input_ids"] != ids
    ]
    other_texts = [
        messages
        for messages, answer, text in json.loads(str(expected["chats"]))
        if tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )
        != text
    ]
    print(
        f"{len(other_ids)} texts with other ids, {len(other_texts)} chats with another "
        "text",
        *map(ascii, [*other_ids[:3], *other_texts[:3]]),
        sep="\n",
    )
    return same and not other_ids and not other_texts


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
