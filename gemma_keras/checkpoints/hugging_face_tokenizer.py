"""The tokenizer files of a Hugging Face directory, made from a SentencePiece model.

`tokenizer.json` cuts text as SentencePiece does, but for three things that Hugging
Face's own file for Gemma does too: the names of control pieces in a text become those
pieces, a written U+2581 is a space, and runs of more than 31 spaces are halved.
"""

import json

from gemma_keras import vocabulary
from gemma_keras.chat import JINJA_TEMPLATE
from gemma_keras.tokenizer import END_OF_TURN, START_OF_TURN

# What transformers writes where there is no limit.
_NO_LIMIT = 1000000000000000019884624838656
_TURNS = (START_OF_TURN, END_OF_TURN)
_ROLES = {
    "bos_token": vocabulary.BOS_PIECE,
    "eos_token": vocabulary.EOS_PIECE,
    "pad_token": vocabulary.PAD_PIECE,
    "unk_token": vocabulary.UNK_PIECE,
}


def write(folder, tokenizer):
    """Writes tokenizer.model, tokenizer.json and two files that describe them."""
    (folder / "tokenizer.model").write_bytes(tokenizer.proto)
    added = _added_tokens(*tokenizer.pieces())
    _write_json(folder / "tokenizer.json", tokenizer_json(tokenizer))
    _write_json(folder / "tokenizer_config.json", _config(tokenizer, added), indent=2)
    special = {role: _described(piece) for role, piece in _ROLES.items()}
    turns = _turns(tokenizer)
    if turns:
        special["additional_special_tokens"] = turns
    _write_json(folder / "special_tokens_map.json", special, indent=2)


def tokenizer_json(tokenizer):
    """The document that the `tokenizers` library runs, as a dict."""
    pieces, scores, types = tokenizer.pieces()
    added = _added_tokens(pieces, scores, types)
    names = list(pieces)
    # As in Hugging Face's file for Gemma 1: then a tab needs no byte piece.
    if "\t" not in names and "<0x09>" in names:
        names[names.index("<0x09>")] = "\t"
    bos = vocabulary.BOS_PIECE
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, **token} for index, token in added.items()],
        "normalizer": {
            "type": "Replace",
            "pattern": {"String": " "},
            "content": vocabulary.SPACE,
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": _template(bos, "A"),
            "pair": _template(bos, "A") + _template(bos, "B"),
            "special_tokens": {
                bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {
                    "type": "Replace",
                    "pattern": {"String": vocabulary.SPACE},
                    "content": " ",
                },
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": vocabulary.UNK_PIECE,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": vocabulary.BYTE in types,
            "vocab": {name: index for index, name in enumerate(names)},
            "merges": _merges(pieces, scores),
        },
    }


def _template(bos, sequence):
    sides = {"A": 0, "B": 1}
    return [
        {"SpecialToken": {"id": bos, "type_id": sides[sequence]}},
        {"Sequence": {"id": sequence, "type_id": sides[sequence]}},
    ]


def _merges(pieces, scores):
    """Every way to make a piece of two others, the likeliest piece first.

    SentencePiece merges the pair whose piece has the best score, wherever it stands; so
    do the merges in this order. As strings, which every version of `tokenizers` reads:
    no piece holds a space.
    """
    known = set(pieces)
    found = []
    for piece, score in zip(pieces, scores, strict=True):
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                found.append((score, cut, len(piece) - cut, f"{left} {right}"))
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3] for merge in found]


def _added_tokens(pieces, _, types):
    """Id to description of the pieces that are found before anything is merged.

    Runs of spaces are looked for where spaces are U+2581 already, the longest first:
    Hugging Face's own file merges them instead, and halves what is longer than 31.
    """
    kinds = (vocabulary.CONTROL, vocabulary.UNKNOWN, vocabulary.USER_DEFINED)
    return {
        index: _described(
            piece,
            special=kind != vocabulary.USER_DEFINED or piece in _TURNS,
            normalized=vocabulary.SPACE in piece,
        )
        for index, (piece, kind) in enumerate(zip(pieces, types, strict=True))
        if kind in kinds
    }


def _described(piece, special=True, normalized=False):
    flags = {"lstrip": False, "normalized": normalized, "rstrip": False}
    return {"content": piece, **flags, "single_word": False, "special": special}


def _turns(tokenizer):
    found = (tokenizer.start_of_turn_id, tokenizer.end_of_turn_id)
    return [] if None in found else list(_TURNS)


def _config(tokenizer, added):
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(index): token for index, token in added.items()},
        **_ROLES,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
        "sp_model_kwargs": {},
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "use_default_system_prompt": False,
    }
    if _turns(tokenizer):
        config["additional_special_tokens"] = _turns(tokenizer)
        config["chat_template"] = JINJA_TEMPLATE
    return config


def _write_json(path, value, indent=None):
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    path.write_text(text + "\n", "utf-8")
