r"""SentencePiece model files as bytes: written from a list of pieces, and read.

A vocabulary reaches us as SentencePiece's own file, as Hugging Face's `tokenizer.json`
or as the arrays of a GGUF file. All end as one thing, a serialized `ModelProto`, which
the `sentencepiece` library then runs. Its wheel brings no protobuf, so the few fields
that decide how text is cut are written and read here by hand.

The other two forms lose something that SentencePiece knows. `build_proto` restores it:

- GGUF writers list many user-defined pieces as control, give them the score -1000, and
  show their spaces as " " instead of U+2581; old ones list them as normal.
- Hugging Face's early files name the byte piece <0x09> as "\t", and declare only a few
  of the user-defined pieces.
"""

import math
import re
import struct
from collections.abc import Iterator, Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

SPACE = "\u2581"
PAD_PIECE, EOS_PIECE, BOS_PIECE, UNK_PIECE = "<pad>", "<eos>", "<bos>", "<unk>"

_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
_BPE = 2  # TrainerSpec.ModelType
# Protobuf tags (field number and wire type) of ModelProto and of its pieces.
_PIECE, _TRAINER_SPEC, _NORMALIZER_SPEC = 0x0A, 0x12, 0x1A
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 0x0A, 0x15, 0x18
# The soft image token that Hugging Face adds past the end of Gemma 3's vocabulary. Text
# models have no embedding for it, and Google's tokenizer.model does not know it.
_IMAGE_SOFT_TOKEN = "<image_soft_token>"


def build_proto(
    pieces: Sequence[str | bytes], scores: Sequence[float], types: Sequence[int]
) -> bytes:
    """Writes a vocabulary as a SentencePiece BPE model with Gemma's normaliser.

    Args:
        pieces: text of each piece, in the order of ids.
        scores: merge priority of each piece; higher merges first.
        types: kind of each piece, numbered as SentencePiece and GGUF do: 1 normal,
            2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.

    Returns:
        A serialized `ModelProto`.

    Raises:
        ValueError: the lists differ in length, or hold what makes no vocabulary.
    """
    if not len(pieces) == len(scores) == len(types):
        raise ValueError(
            f"A vocabulary needs one score and one type for each piece, got "
            f"{len(pieces)} pieces, {len(scores)} scores and {len(types)} types."
        )
    texts = [_piece_text(index, piece) for index, piece in enumerate(pieces)]
    kinds = _repair_types(texts, scores, types)
    _name_tab_byte(texts, kinds)
    ids = _check_vocabulary(texts, scores, kinds)
    out = []
    for text, score, kind in zip(texts, scores, kinds, strict=True):
        body = _field(1, text)
        body += _field(2, float(score) if kind == NORMAL else 0.0)
        if kind != NORMAL:  # SentencePiece leaves the default out as well
            body += _field(3, kind)
        out.append(_field(1, body))
    out.append(_field(2, _trainer_spec(len(texts), BYTE in kinds, ids)))
    # identity, no dummy prefix, extra whitespace kept; spaces are escaped by default
    out.append(_field(3, _field(1, "identity") + _field(3, 0) + _field(4, 0)))
    return b"".join(out)


def proto_from_tokenizer_json(document: dict) -> bytes:
    """Writes the vocabulary of a Hugging Face `tokenizer.json` as `build_proto` does.

    Args:
        document: the parsed file. Its model must be what the converter makes of a
            SentencePiece BPE model: byte fallback, no prefix added, merges grouped by
            the piece they make.

    Returns:
        A serialized `ModelProto` that cuts text as the original model does.

    Raises:
        ValueError: the file is another kind of tokenizer.
    """
    model = _checked_model(document)
    vocab = dict(model["vocab"])
    added = {token["content"] for token in document.get("added_tokens", [])}
    for token in document.get("added_tokens", []):
        if token["content"] != _IMAGE_SOFT_TOKEN:
            vocab.setdefault(token["content"], token["id"])
    by_id = {index: piece for piece, index in vocab.items()}
    if sorted(by_id) != list(range(len(vocab))):
        raise ValueError(
            f"its {len(vocab)} pieces do not have the ids 0 to {len(vocab) - 1}, each "
            "once."
        )
    pieces = [by_id[index] for index in range(len(vocab))]
    first_byte, last_char = _normal_range(pieces)
    types = []
    for index, piece in enumerate(pieces):
        if _BYTE_PIECE.fullmatch(piece):
            types.append(BYTE)
        else:
            normal = first_byte <= index <= last_char and piece not in added
            types.append(NORMAL if normal else USER_DEFINED)
    normals = {
        piece for piece, kind in zip(pieces, types, strict=True) if kind == NORMAL
    }
    ranks = _merge_ranks(model["merges"], normals)
    # Single characters are never merged: their scores decide nothing.
    scores = [
        -float(ranks.get(piece, len(ranks) + i)) for i, piece in enumerate(pieces)
    ]
    return build_proto(pieces, scores, types)


def check_proto(proto: bytes) -> None:
    """Refuses a serialized model that lacks one of its three parts.

    The library does not: cut between two parts, a file loads, and cuts text by the
    library's defaults instead of Gemma's rules.

    Raises:
        ValueError: a part is missing, or the bytes are no protobuf message.
    """
    found = {tag for tag, _, _ in _top_fields(proto)}
    if not {_PIECE, _TRAINER_SPEC, _NORMALIZER_SPEC} <= found:
        raise ValueError("it holds no pieces, no trainer_spec or no normalizer_spec.")


def read_pieces(proto: bytes) -> tuple[list[str], list[float], list[int]]:
    """The inverse of `build_proto`: pieces, scores and types of a serialized model."""
    pieces, scores, types = [], [], []
    for top, start, end in _top_fields(proto):
        if top != _PIECE:
            continue
        text, score, kind = "", 0.0, NORMAL
        for tag, left, right in _fields(proto, start, end):
            if tag == _PIECE_TEXT:
                text = proto[left:right].decode("utf-8")
            elif tag == _PIECE_SCORE:
                score = struct.unpack_from("<f", proto, left)[0]
            elif tag == _PIECE_TYPE:
                kind = proto[left]
        pieces.append(text)
        scores.append(score)
        types.append(kind)
    return pieces, scores, types


def user_defined_pieces(proto: bytes) -> dict[str, tuple[int, int]]:
    """Finds the user-defined pieces of a serialized model.

    Returns:
        For each piece its id, and where in `proto` the byte lies that holds its type.
    """
    found = {}
    places = [(start, end) for tag, start, end in _top_fields(proto) if tag == _PIECE]
    for number, (start, end) in enumerate(places):
        # Cheap first: few of the 256,000 pieces hold the type field's bytes at all.
        if proto.find(b"\x18\x04", start, end) < 0:
            continue
        text, kind, where = "", NORMAL, -1
        for tag, left, right in _fields(proto, start, end):
            if tag == _PIECE_TEXT:
                text = proto[left:right].decode("utf-8")
            elif tag == _PIECE_TYPE:
                kind, where = proto[left], left
        if kind == USER_DEFINED:
            found[text] = (number, where)
    return found


def with_control_pieces(proto: bytes, offsets: Sequence[int]) -> bytes:
    """Copies a model with the pieces whose type bytes lie at `offsets` made control.

    SentencePiece never makes a control piece out of text.
    """
    copy = bytearray(proto)
    for offset in offsets:
        copy[offset] = CONTROL
    return bytes(copy)


def _piece_text(index: int, piece: str | bytes) -> str:
    if isinstance(piece, bytes | bytearray):
        try:
            piece = bytes(piece).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"piece {index} is not UTF-8: {piece!r}.") from None
    if not isinstance(piece, str) or not piece:
        raise ValueError(f"piece {index} must be text that is not empty: {piece!r}.")
    return piece.replace(" ", SPACE)


def _normal_range(pieces: Sequence[str]) -> tuple[int, int]:
    """First id of a byte piece, and last id of a piece of one character."""
    bytes_at = [i for i, piece in enumerate(pieces) if _BYTE_PIECE.fullmatch(piece)]
    chars_at = [i for i, piece in enumerate(pieces) if len(piece) == 1]
    last = len(pieces) - 1
    return (bytes_at[0] if bytes_at else 0), (chars_at[-1] if chars_at else last)


def _repair_types(
    texts: Sequence[str], scores: Sequence[float], types: Sequence[int]
) -> list[int]:
    """Gives each piece the type that SentencePiece's own file has for it."""
    roles = {piece: CONTROL for piece in (PAD_PIECE, EOS_PIECE, BOS_PIECE)}
    roles[UNK_PIECE] = UNKNOWN
    first_byte, last_char = _normal_range(texts)
    kinds = []
    for index, (text, score, kind) in enumerate(zip(texts, scores, types, strict=True)):
        kind = int(kind)
        if kind not in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE):
            raise ValueError(f"piece {index} ({text!r}) has the unknown type {kind}.")
        if text in roles:
            kind = roles[text]
        elif kind in (CONTROL, UNKNOWN):
            kind = USER_DEFINED
        elif kind == NORMAL and score == 0 and not first_byte <= index <= last_char:
            # Old GGUF writers: normal pieces lie after the bytes, ranked below zero.
            kind = USER_DEFINED
        kinds.append(kind)
    return kinds


def _name_tab_byte(texts: list[str], kinds: list[int]) -> None:
    """Calls the tab <0x09> again where it stands in for that byte's missing piece."""
    if BYTE in kinds and "<0x09>" not in texts and "\t" in texts:
        index = texts.index("\t")
        texts[index], kinds[index] = "<0x09>", BYTE


def _check_vocabulary(
    texts: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> dict[str, int]:
    """Returns the ids of the four pieces that every Gemma has."""
    position = {text: index for index, text in enumerate(texts)}
    if len(position) != len(texts):
        again = next(text for i, text in enumerate(texts) if position[text] != i)
        raise ValueError(f"the piece {again!r} is there more than once.")
    ids = {}
    for piece in (UNK_PIECE, BOS_PIECE, EOS_PIECE, PAD_PIECE):
        if piece not in position:
            raise ValueError(f"there is no {piece}: this is not a Gemma vocabulary.")
        ids[piece] = position[piece]
    if kinds.count(BYTE) not in (0, 256):
        raise ValueError(
            f"byte pieces must be all 256 or none, got {kinds.count(BYTE)}."
        )
    if bad := [i for i, score in enumerate(scores) if not math.isfinite(score)]:
        raise ValueError(f"piece {bad[0]} has the score {scores[bad[0]]}.")
    return ids


def _trainer_spec(size: int, byte_fallback: bool, ids: dict[str, int]) -> bytes:
    """The part of TrainerSpec that the library reads when it runs a model."""
    spec = _field(3, _BPE) + _field(4, size) + _field(35, int(byte_fallback))
    numbers = (40, UNK_PIECE), (41, BOS_PIECE), (42, EOS_PIECE), (43, PAD_PIECE)
    for number, piece in numbers:
        spec += _field(number, ids[piece])
    for number, (_, piece) in enumerate(numbers, start=45):
        spec += _field(number, piece)
    return spec


def _checked_model(document: dict) -> dict:
    model = document.get("model") if isinstance(document, dict) else None
    if not isinstance(model, dict) or "vocab" not in model:
        raise ValueError(
            "it holds no tokenizer model. (KerasHub's presets keep the vocabulary in "
            "assets/tokenizer/vocabulary.spm.)"
        )
    kind = model.get("type", "BPE")
    if kind != "BPE" or not model.get("byte_fallback") or "merges" not in model:
        raise ValueError(
            f"it holds a {kind} model with byte_fallback "
            f"{model.get('byte_fallback', False)}; Gemma's is BPE with byte fallback."
        )
    normalizers = document.get("normalizer") or {}
    normalizers = normalizers.get("normalizers", [normalizers])
    found = [step.get("type") for step in normalizers]
    if found != ["Replace"] or normalizers[0].get("content") != SPACE:
        raise ValueError(
            f"it normalises text by {found}; Gemma's only replaces a space by U+2581."
        )
    return model


def _merge_ranks(
    merges: Sequence[str | Sequence[str]], normals: set[str]
) -> dict[str, int]:
    """Numbers normal pieces by the first merge that makes them: SentencePiece's order.

    Merges that make user-defined pieces are passed over. SentencePiece finds those
    pieces before it merges anything.
    """
    ranks: dict[str, int] = {}
    last = None
    for merge in merges:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        piece = left + right
        if piece == last or piece not in normals:
            continue
        if piece in ranks:
            raise ValueError(
                f"its merges make {piece!r} at different ranks: it was not made from a "
                "SentencePiece model and cannot be run as one."
            )
        ranks[piece] = len(ranks)
        last = piece
    return ranks


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int | float | str | bytes) -> bytes:
    """Encodes one protobuf field: int as varint, float as fixed32, else by length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    if isinstance(value, float):
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    data = value.encode("utf-8") if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _fields(data: bytes, pos: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yields (tag, start, end) of each field's value in a protobuf message."""
    while pos < end:
        tag, pos = _read_varint(data, pos)
        kind = tag & 7
        start = pos
        if kind == 2:
            size, start = _read_varint(data, pos)
            pos = start + size
        elif kind == 0:
            pos = _read_varint(data, pos)[1]
        elif kind in (1, 5):
            pos += 8 if kind == 1 else 4
        else:
            raise ValueError(f"byte {start - 1} starts no protobuf field.")
        if pos > end:
            raise ValueError(f"the field at byte {start} runs past the end.")
        yield tag, start, pos


def _top_fields(proto: bytes) -> Iterator[tuple[int, int, int]]:
    """As `_fields` of the whole, but quick where pieces follow each other."""
    pos, end = 0, len(proto)
    while pos < end:
        size = proto[pos + 1] if pos + 1 < end else 0x80
        if proto[pos] == _PIECE and size < 0x80 and pos + 2 + size <= end:
            pos += 2 + size
            yield _PIECE, pos - size, pos
        else:
            field = next(_fields(proto, pos, end))
            pos = field[2]
            yield field


def _read_varint(data: bytes, pos: int) -> tuple[int, int]:
    value = shift = 0
    while pos < len(data):
        byte = data[pos]
        pos += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, pos
        shift += 7
    raise ValueError(f"the data ends inside a number, at byte {pos}.")
