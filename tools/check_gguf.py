"""Compare GGUF files with what llama.cpp computes from them.

    python tools/check_gguf.py tiny               # Gemma 1, 2 and 3, in several types
    python tools/check_gguf.py file MODEL.gguf    # one file, and its copies in floats
    python tools/check_gguf.py converter convert_hf_to_gguf.py [MODEL.gguf]

Needs llama-cpp-python beside this package and its extra `gguf`; it compiles for some
minutes, so that this is no part of the tests. The last needs llama.cpp's own converter
instead, which lies in the source of llama-cpp-python
(`pip download --no-deps --no-binary :all: llama-cpp-python`) in vendor/llama.cpp, and
transformers. It converts Hugging Face directories of ours, of small Gemmas and of
MODEL.gguf, and compares with the files that we write of them: the tensors bit for bit,
and the keys that both have but for those that are told.

llama.cpp computes with keys and values in float32 and without flash attention, this
package in float32 on what the file holds. Printed are the largest difference of the
logits over the largest logit, at how many positions the likeliest token is the same,
and whether tokens of texts are. It fails above 1e-3 for a file in float32. (In other
files llama.cpp rounds the inputs of products too, to what the weights are stored in.)
"""

import argparse
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

TOLERANCE = 1e-3
TEXTS = [
    "The capital of France is",
    "Hello world\n\n  x\t1234",
    "é🦊中文 don't, 3.14159",
    "   leading and trailing   ",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
]
# No two sizes are equal, but for what blocks of 32 ask for.
SIZES = {
    "num_layers": 3,
    "hidden_dim": 96,
    "ffn_dim": 160,
    "num_query_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "max_position": 512,
}
LATER = {"use_post_norms": True, "sliding_window": 8}
FAMILIES = {
    "gemma": {},
    "gemma2": LATER
    | {"layer_pattern": "LG"}
    | {"attn_logit_soft_cap": 50.0, "final_logit_soft_cap": 30.0},
    "gemma3": LATER
    | {"layer_pattern": "LLLLLG", "use_qk_norm": True, "num_layers": 7}
    | {"rope_theta": 1e6, "local_rope_theta": 1e4},
}
TINY = ("float32", "bfloat16", "float16", "q8_0", "q4_0")
# Keys of which llama.cpp's converter makes something else, and rightly or not does not
# matter: names; how likely pieces are that no text is cut into; whether <unk>, unknown
# or control, and others are special. For Gemma 1 it takes Google's place for the end of
# a turn whatever the tokenizer says, so that one is looked at with Google's only.
FREE = {"general.name", "tokenizer.ggml.scores", "tokenizer.ggml.token_type"}
FREE_IN_TINY = {"tokenizer.ggml.eot_token_id"}


def make_tiny(family, folder):
    """Writes a random Gemma with a tokenizer as a preset; returns its path."""
    import gemma_keras
    from gemma_keras import registry
    from gemma_keras.checkpoints import exporting, open_checkpoint
    from gemma_keras.checkpoints.contents import Contents

    with open_checkpoint(registry.resolve("gemma_tiny_instruct_en")) as checkpoint:
        tokenizer = checkpoint.tokenizer()
    config = gemma_keras.GemmaConfig(
        vocab_size=tokenizer.vocab_size, **SIZES | FAMILIES[family]
    )
    random = np.random.default_rng(0)
    deviations = {"scale": 0.3, "kernel": 0.12, "embeddings": 0.3}

    def tensor(path):
        kind = path.rsplit("/", 1)[1]
        shape = config.weight_shapes()[path]
        return (deviations[kind] * random.normal(size=shape)).astype("float32")

    arrays = {path: tensor(path) for path in config.weight_shapes()}
    contents = Contents(
        config=config, tensors=arrays.__getitem__, dtype="float32", tokenizer=tokenizer
    )
    return exporting.export(contents, folder / family, "hf", licence="apache-2.0")


def convert(source, destination, dtype=None, to="gguf"):
    """The same in another format or type."""
    from gemma_keras.checkpoints import exporting, open_checkpoint

    with open_checkpoint(source) as checkpoint:
        contents = exporting.checkpoint_contents(checkpoint, source)
        return exporting.export(contents, destination, to, dtype=dtype)


def compare(path, ids, exact):
    """Says how far apart both are on a file; returns whether that is near enough."""
    theirs, tokens = run_llama(path, ids)
    ours, expected = run_ours(path, ids)
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    same = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    words = sum(a == b for a, b in zip(tokens, expected, strict=True))
    print(
        f"{path.name}: logits differ by {difference:.1e} of the largest, the likeliest "
        f"token is the same at {same:.1%} of {len(ids)} positions, and the tokens of "
        f"{words} of {len(TEXTS)} texts",
        flush=True,
    )
    return words == len(TEXTS) and (not exact or difference <= TOLERANCE)


def run_llama(path, ids):
    """llama.cpp's logits [T, V] of token ids, and its ids of the texts."""
    import llama_cpp

    model = llama_cpp.Llama(
        str(path),
        n_ctx=max(256, len(ids)),
        n_batch=max(256, len(ids)),
        n_ubatch=max(256, len(ids)),
        logits_all=True,
        flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        n_threads=2,
        verbose=False,
    )
    model.eval(list(ids))
    logits = np.array(model.scores[: len(ids)], "float32")
    tokens = [
        model.tokenize(text.encode(), add_bos=False, special=True) for text in TEXTS
    ]
    model.close()
    return logits, tokens


def run_ours(path, ids):
    """This package's logits [T, V] in float32, and its ids of the texts."""
    from keras import ops

    from gemma_keras import GemmaCausalLM

    lm = GemmaCausalLM.from_preset(path, dtype="float32")
    logits = ops.convert_to_numpy(lm({"token_ids": np.asarray([ids])}))[0]
    tokenizer = lm.preprocessor.tokenizer
    return logits, [tokenizer.encode(text) for text in TEXTS]


def check_tiny(folder):
    """Each family in each type; returns whether all is near enough."""
    good = True
    ids = np.random.default_rng(1).integers(8, 300, 40).tolist()
    for family in FAMILIES:
        source = make_tiny(family, folder)
        for dtype in TINY:
            path = convert(source, folder / f"{family}-{dtype}.gguf", dtype)
            good &= compare(path, [2, *ids], dtype == "float32")
    return good


def check_converter(converter, model, folder):
    """Whether llama.cpp's converter makes of Hugging Face's files what we make."""
    good = True
    for family in FAMILIES:
        source = make_tiny(family, folder)
        good &= same_files(converter, source, folder, FREE | FREE_IN_TINY)
    if model:
        source = convert(model, folder / "model", to="hf")
        good &= same_files(converter, source, folder, FREE)
    return good


def same_files(converter, source, folder, free):
    """Says what differs between both GGUF files of a Hugging Face directory."""
    import gguf

    theirs = folder / f"{source.name}-theirs.gguf"
    options = ["--outtype", "f32", "--outfile", theirs]
    command = [sys.executable, converter, source, *options]
    subprocess.run(command, check=True, capture_output=True)
    ours = convert(source, folder / f"{source.name}-ours.gguf", "float32")
    ours, theirs = gguf.GGUFReader(ours), gguf.GGUFReader(theirs)
    tensors = [{t.name: t.data for t in file.tensors} for file in (ours, theirs)]
    wrong = sorted(tensors[0].keys() ^ tensors[1].keys())
    common = sorted(tensors[0].keys() & tensors[1].keys())
    wrong += [n for n in common if not np.array_equal(*(t[n] for t in tensors))]
    fields = [
        {name: f.contents() for name, f in file.fields.items() if "." in name}
        for file in (ours, theirs)
    ]
    told = {n for n in fields[0].keys() & fields[1].keys() if n[:5] != "GGUF."} - free
    keys = sorted(name for name in told if fields[0][name] != fields[1][name])
    print(
        f"{source.name}: {len(common)} tensors, {len(told)} keys; tensors that differ: "
        f"{wrong or 'none'}, keys that differ: {keys or 'none'}",
        flush=True,
    )
    return not wrong and not keys


def check_file(source, folder):
    """A file as it is, and what is written of it in floats."""
    from gemma_keras import GemmaTokenizer

    tokenizer = GemmaTokenizer.from_preset(source)
    ids = tokenizer.encode(" ".join([__doc__, *TEXTS]), add_bos=True)
    good = compare(source, ids, exact=False)
    for dtype in ("float32", "bfloat16", "q8_0"):
        path = convert(source, folder / f"{source.stem}-{dtype}.gguf", dtype)
        good &= compare(path, ids, dtype == "float32")
        path.unlink()
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tiny", "file", "converter"])
    parser.add_argument("file", type=pathlib.Path, nargs="?")
    parser.add_argument("model", type=pathlib.Path, nargs="?")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        if options.what == "tiny":
            return 0 if check_tiny(folder) else 1
        if options.what == "converter":
            good = check_converter(options.file, options.model, folder)
            return 0 if good else 1
        return 0 if check_file(options.file, folder) else 1


if __name__ == "__main__":
    sys.exit(main())
