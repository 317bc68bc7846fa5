"""Gemma's tokenizer: text to ids and back, exactly as SentencePiece does it.

No tensor library is involved. What is added to SentencePiece:

- `encode(text, add_bos=True)` never gives two <bos>: a text that begins with the
  literal "<bos>" (as prompts copied from notebooks do) gets the one it asks for.
- `encode_plain(text)` is for text that comes from outside, such as the content of a
  chat message: "<start_of_turn>" in it stays text and never becomes a control token.
- `decode_stream()` gives text id by id and never half a character.
"""

import base64
import codecs
import functools
import json
import operator
import os
import pathlib
from collections.abc import Iterable, Sequence

import sentencepiece

from gemma_keras import vocabulary

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"

# User-defined pieces that are plain markup: web text is full of them, and they steer
# nothing. Every other one that is not whitespace is a marker (see `encode_plain`).
_HTML = (
    "a b bbox blockquote body caption code div em footer h1 h2 h3 h4 h5 h6 html i "
    "iframe img li s span strong sub sup table tbody td tfoot th thead tr u ul"
)
_HTML_TAGS = frozenset(f"<{end}{tag}>" for tag in _HTML.split() for end in ("", "/"))


class GemmaTokenizer:
    """Text to token ids and back.

    Two tokenizers are equal if their vocabularies are.

    Args:
        proto: a serialized SentencePiece model, or the path of a file that holds one
            (`tokenizer.model`, `vocabulary.spm`).

    Raises:
        ValueError: `proto` is no SentencePiece model with <pad>, <eos>, <bos>, <unk>.
    """

    def __init__(self, proto: bytes | str | os.PathLike):
        where = "The given proto"
        if not isinstance(proto, bytes | bytearray):
            where = str(proto)
            proto = pathlib.Path(proto).read_bytes()
        self.proto = bytes(proto)
        self._processor = _load(self.proto, where)
        self.vocab_size: int = self._processor.vocab_size()
        self.pad_token_id: int = self._processor.pad_id()
        self.bos_token_id: int = self._processor.bos_id()
        self.eos_token_id: int = self._processor.eos_id()
        self.unk_token_id: int = self._processor.unk_id()
        found = {
            "<pad>": self.pad_token_id,
            "<bos>": self.bos_token_id,
            "<eos>": self.eos_token_id,
            "<unk>": self.unk_token_id,
        }
        missing = [piece for piece, index in found.items() if index < 0]
        if missing:
            raise ValueError(
                f"{where} holds a SentencePiece model without {', '.join(missing)}: it "
                "is not Gemma's, or it was cut short."
            )
        self.start_of_turn_id = self._find(START_OF_TURN)
        self.end_of_turn_id = self._find(END_OF_TURN)

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "GemmaTokenizer":
        """Loads `tokenizer.model`, `*.spm` or `tokenizer.json`, told by the content.

        Raises:
            ValueError: the file is something else, or damaged; the message names it.
        """
        data = pathlib.Path(path).read_bytes()
        if data.startswith(b"GGUF"):
            raise ValueError(
                f"{path} is a GGUF file, which holds a model: load it, or its "
                "vocabulary alone, with from_preset."
            )
        if data.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
            return cls.from_tokenizer_json(path)
        return cls(path)

    @classmethod
    def from_preset(cls, source: str | os.PathLike) -> "GemmaTokenizer":
        """Loads the tokenizer of a model, without its weights.

        Args:
            source: whatever `GemmaCausalLM.from_preset` takes: a preset's name, a
                directory, a `.gguf` file, a `hf://` or `kaggle://` handle.

        Raises:
            ValueError: there is no such model, or it comes without a tokenizer.
        """
        from gemma_keras import loading

        tokenizer = loading.load_tokenizer(source)
        if tokenizer is None:
            raise ValueError(f"{source} holds no tokenizer.")
        return tokenizer

    @classmethod
    def from_tokenizer_json(cls, source: str | os.PathLike | dict) -> "GemmaTokenizer":
        """Loads the `tokenizer.json` of a Hugging Face checkpoint, or its parsed form.

        Raises:
            ValueError: it is not JSON, or another family's tokenizer.
        """
        where = "The given tokenizer.json"
        try:
            if not isinstance(source, dict):
                where = str(source)
                source = json.loads(pathlib.Path(source).read_text("utf-8-sig"))
            proto = vocabulary.proto_from_tokenizer_json(source)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{where} is not a tokenizer.json: {error!r}.") from error
        except ValueError as error:
            raise ValueError(f"{where} cannot be used: {error}") from error
        return cls(proto)

    @classmethod
    def from_pieces(
        cls,
        pieces: Sequence[str | bytes],
        scores: Sequence[float],
        types: Sequence[int],
    ) -> "GemmaTokenizer":
        """Builds a tokenizer from the three vocabulary arrays of a GGUF file.

        The quirks of GGUF writers are undone: see `vocabulary.build_proto`.

        Raises:
            ValueError: the arrays make no Gemma vocabulary.
        """
        try:
            return cls(vocabulary.build_proto(pieces, scores, types))
        except ValueError as error:
            raise ValueError(f"The vocabulary cannot be used: {error}") from error

    def vocabulary_size(self) -> int:
        """Number of pieces; ids run from 0 to this less one."""
        return self.vocab_size

    def get_vocabulary(self) -> list[str]:
        """All pieces in the order of ids."""
        return self._processor.id_to_piece(list(range(self.vocab_size)))

    def pieces(self) -> tuple[list[str], list[float], list[int]]:
        """The pieces, scores and types that `from_pieces` takes."""
        return vocabulary.read_pieces(self.proto)

    @property
    def start_token_id(self) -> int:
        """KerasHub's name of `bos_token_id`."""
        return self.bos_token_id

    @property
    def end_token_id(self) -> int:
        """KerasHub's name of `eos_token_id`."""
        return self.eos_token_id

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: <eos>, and <end_of_turn> where there is one."""
        if self.end_of_turn_id is None:
            return (self.eos_token_id,)
        return (self.eos_token_id, self.end_of_turn_id)

    def encode(
        self, text: str | bytes, add_bos: bool = False, add_eos: bool = False
    ) -> list[int]:
        """Cuts text into ids.

        Without the two flags the ids are SentencePiece's: turn markers, newlines and
        runs of spaces are pieces of their own, and "<bos>", "<eos>" and "<pad>" are
        text. With `add_bos`, a "<bos>" that the text itself begins with is the one that
        is asked for, and is not doubled; likewise an "<eos>" at its end with `add_eos`.

        Args:
            text: a string, or its UTF-8 bytes.
            add_bos: put <bos> in front.
            add_eos: put <eos> at the end.

        Raises:
            TypeError: `text` is not text.
            ValueError: invalid UTF-8, or half of a surrogate pair.
        """
        text = _checked_text(text)
        if add_bos:
            text = text.removeprefix(self.id_to_token(self.bos_token_id))
        if add_eos:
            text = text.removesuffix(self.id_to_token(self.eos_token_id))
        ids = self._processor.encode(text)
        if add_bos:
            ids.insert(0, self.bos_token_id)
        if add_eos:
            ids.append(self.eos_token_id)
        return ids

    def encode_plain(self, text: str | bytes) -> list[int]:
        """Cuts text into ids, none of which is a marker.

        Turn markers and all other user-defined pieces that could steer a model (image
        and fill-in-the-middle markers, <mask>, <unusedN>) stay text, as "<bos>" does.
        Newlines, tabs, runs of spaces and HTML tags are cut as `encode` cuts them.

        Raises:
            TypeError, ValueError: as `encode`.
        """
        return self._plain_processor.encode(_checked_text(text))

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """Puts ids back into text, as SentencePiece does: control pieces have no text.

        Args:
            ids: a list or a one-dimensional array of ids.
            skip_special: leave out turn markers and the like as well.

        Raises:
            TypeError: `ids` are not whole numbers.
            ValueError: an id is outside the vocabulary.
        """
        ids = self._checked_ids(ids)
        if skip_special:
            ids = [index for index in ids if index not in self._marker_ids]
        return self._processor.decode(ids)

    def decode_stream(self, skip_special: bool = False) -> "TextStream":
        """Starts decoding id by id; see `TextStream`."""
        return TextStream(self, skip_special)

    def id_to_token(self, index: int) -> str:
        """The piece of an id, spaces shown as U+2581."""
        return self._processor.id_to_piece(self._checked_ids([index])[0])

    def token_to_id(self, piece: str) -> int:
        """The id of a piece, `unk_token_id` if there is none such."""
        return self._processor.piece_to_id(piece)

    def tokenize(self, text):
        """Ids of a string, or a list of ids for each of several; adds no <bos>."""
        if isinstance(text, str | bytes):
            return self.encode(text)
        return [self.encode(one) for one in text]

    __call__ = tokenize

    def detokenize(self, ids):
        """Text of a list of ids, or a list of texts for several lists."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if ids and not isinstance(ids[0], int):
            return [self.decode(row) for row in ids]
        return self.decode(ids)

    def get_config(self) -> dict:
        """The vocabulary as base64, for Keras's serialization."""
        return {"proto": base64.b64encode(self.proto).decode("ascii")}

    @classmethod
    def from_config(cls, config: dict) -> "GemmaTokenizer":
        """The inverse of `get_config`."""
        return cls(base64.b64decode(config["proto"]))

    def __eq__(self, other) -> bool:
        """Equal vocabularies."""
        if not isinstance(other, GemmaTokenizer):
            return NotImplemented
        return self.proto == other.proto

    def __hash__(self) -> int:
        """Hash of the vocabulary."""
        return hash(self.proto)

    def __reduce__(self):
        """Pickles the vocabulary alone."""
        return type(self), (self.proto,)

    def __repr__(self) -> str:
        """Short: the proto itself is megabytes."""
        return f"<GemmaTokenizer of {self.vocab_size} pieces>"

    def _find(self, piece: str) -> int | None:
        index = self._processor.piece_to_id(piece)
        return index if self._processor.id_to_piece(index) == piece else None

    @functools.cached_property
    def _markers(self) -> dict[str, tuple[int, int]]:
        return {
            piece: place
            for piece, place in vocabulary.user_defined_pieces(self.proto).items()
            if piece.strip(vocabulary.SPACE + " \t\n\r") and piece not in _HTML_TAGS
        }

    @functools.cached_property
    def _marker_ids(self) -> frozenset[int]:
        return frozenset(index for index, _ in self._markers.values())

    @functools.cached_property
    def _plain_processor(self) -> sentencepiece.SentencePieceProcessor:
        offsets = [offset for _, offset in self._markers.values()]
        proto = vocabulary.with_control_pieces(self.proto, offsets)
        return sentencepiece.SentencePieceProcessor(model_proto=proto)

    def _checked_ids(self, ids: Iterable[int]) -> list[int]:
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            ids = [operator.index(index) for index in ids]
        except TypeError:
            raise TypeError(
                f"Token ids must be a flat list of whole numbers, got {ids!r:.80}."
            ) from None
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            bad = next(index for index in ids if not 0 <= index < self.vocab_size)
            raise ValueError(
                f"Token id {bad} is outside the vocabulary: ids run from 0 to "
                f"{self.vocab_size - 1}."
            )
        return ids


class TextStream:
    """Decodes ids one at a time.

    What `push` returns, joined, and then `flush`, is what `decode` of all ids gives.
    Bytes of a character that is not complete yet are held back.
    """

    def __init__(self, tokenizer: GemmaTokenizer, skip_special: bool = False):
        self._tokenizer = tokenizer
        self._skipped = tokenizer._marker_ids if skip_special else frozenset()
        self._bytes = b""
        # Ids up to the first text: a vocabulary may drop the space that text starts
        # with (Gemma's keeps it), so that the first piece depends on its place.
        self._opening: list[int] | None = []

    def push(self, index: int) -> str:
        """Takes the next id; returns the text that is certain by now, perhaps empty."""
        processor = self._tokenizer._processor
        index = self._tokenizer._checked_ids([index])[0]
        if index in self._skipped:
            return ""
        if processor.is_byte(index):
            self._opening = None
            self._bytes += bytes([int(processor.id_to_piece(index)[3:5], 16)])
            return self._drain(final=False)
        before = self._drain(final=True)
        return before + self._piece_text(index)

    def flush(self) -> str:
        """Ends the text: returns what was held back, with U+FFFD for broken bytes."""
        return self._drain(final=True)

    def _piece_text(self, index: int) -> str:
        processor = self._tokenizer._processor
        if self._opening is not None:
            self._opening.append(index)
            text = processor.decode(self._opening)
            if text:
                self._opening = None
            return text
        if processor.is_control(index):
            return ""
        if processor.is_unknown(index):
            return processor.decode([index])
        return processor.id_to_piece(index).replace(vocabulary.SPACE, " ")

    def _drain(self, final: bool) -> str:
        """Takes whole characters out of the bytes; each broken byte becomes U+FFFD."""
        text = ""
        while self._bytes:
            try:
                text += self._bytes.decode("utf-8")
                self._bytes = b""
            except UnicodeDecodeError as error:
                text += self._bytes[: error.start].decode("utf-8")
                self._bytes = self._bytes[error.start :]
                if error.reason == "unexpected end of data" and not final:
                    break
                text += "\ufffd"
                self._bytes = self._bytes[1:]
        return text


def _load(proto: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        vocabulary.check_proto(proto)
        processor.LoadFromSerializedProto(proto)
        # Raises for a piece that is not UTF-8, which would else fail in mid-sentence.
        processor.id_to_piece(list(range(processor.vocab_size())))
    except (ValueError, RuntimeError) as error:
        raise ValueError(_bad_proto(proto, where)) from error
    return processor


def _bad_proto(proto: bytes, where: str) -> str:
    if not proto:
        return f"{where} is empty; a SentencePiece model was expected."
    if proto.startswith(b"version https://git-lfs"):
        return (
            f"{where} is a Git LFS pointer, not the file: fetch it with `git lfs pull`."
        )
    return (
        f"{where} ({len(proto)} bytes) is not a SentencePiece model, or it is damaged "
        "or was cut short."
    )


def _checked_text(text: str | bytes) -> str:
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"The text is not UTF-8: byte {error.start} is "
                f"0x{text[error.start]:02x} ({error.reason}). Decode it first."
            ) from None
    if not isinstance(text, str):
        raise TypeError(f"Text must be a str, got {type(text).__name__}: {text!r:.80}.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The text holds half of a surrogate pair at position {error.start} "
            f"(U+{ord(text[error.start]):04X}), which is no character. Read it with "
            'the right encoding, or drop it: text.encode("utf-8", "ignore").decode().'
        ) from None
    return str(text)
