"""What tests of one module share: a small vocabulary, and stand-ins of the hubs."""

import io
import pathlib
import sys

import hypothesis
import pytest
import sentencepiece

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from stand_in_hubs import serve

from gemma_keras.tokenizer import GemmaTokenizer

# A busy machine is no reason for a property to fail.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

# Gemma's user-defined pieces in its order, fewer of each kind.
USER_DEFINED = [
    *("<mask>", "<2mass>", "[@BOS@]", "<unused0>", "<unused1>"),
    *("<start_of_turn>", "<end_of_turn>"),
    *("\n" * n for n in range(1, 5)),
    *("\u2581" * n for n in range(2, 6)),
    *("<table>", "</table>", "<b>", "</b>", "<h1>", "</h1>"),
]

CORPUS = """The lighthouse keeper counted seven boats before the storm came in.
Every evening she wrote the number of boats into a large blue book.
"Where have you been?" asked the keeper. "I have been counting stars," he said.
There were 1234 stars, 56 clouds and 7890 waves; the total was 9180.
What is the capital of the island? The capital of the island is a small harbour.
Numbers such as 3.14159 or 2,718,281 are cut into single digits by the tokenizer.
Straßen, cafés, señores, größer: letters with accents belong to the text as well.
def count(boats): return sum(1 for boat in boats if boat.sails > 0)  # a comment
He sang low, she sang high; they sang together until the morning came again.
"""


def train_proto(control: tuple[str, ...] = (), prefix: bool = False) -> bytes:
    """Trains a SentencePiece model with Gemma's settings.

    Pieces in `control` are made control pieces instead of user-defined. With `prefix`,
    text gets a space in front and loses extra ones, as SentencePiece does by default.
    """
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        user_defined_symbols=[p for p in USER_DEFINED if p not in control],
        control_symbols=list(control),
        normalization_rule_name="identity",
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=prefix,
        allow_whitespace_only_pieces=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture(scope="session")
def small_proto() -> bytes:
    """A serialized SentencePiece model of 500 pieces."""
    return train_proto()


@pytest.fixture(scope="session")
def train_small():
    """The function that makes such models."""
    return train_proto


@pytest.fixture(scope="session")
def small(small_proto) -> GemmaTokenizer:
    """The tokenizer of `small_proto`."""
    return GemmaTokenizer(small_proto)


@pytest.fixture
def hub():
    """A server that stands in for both hubs; see `stand_in_hubs`."""
    with serve() as server:
        yield server
