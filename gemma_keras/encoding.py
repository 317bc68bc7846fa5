"""Training examples as token ids, each with whether it is learned.

No tensor library is involved. A sample ends with a stop token, which is learned as the
answer is: <end_of_turn> in a chat, <eos> after a text or a pair.
"""

import array
import dataclasses
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from gemma_keras import registry
from gemma_keras.chat import check_loss_on, encode_chat_with_mask
from gemma_keras.examples import Example
from gemma_keras.tokenizer import START_OF_TURN, GemmaTokenizer

TOO_LONG = ("cut", "drop", "error")
# What the commands call the choices of `chat_template`.
TEMPLATES = {"auto": "auto", "chat": True, "text": False}
# How an instruction is put to a model that is not to see turns.
_INSTRUCTION = "Instruction:\n{0}\n\nResponse:\n"


class Sample(NamedTuple):
    """Ids of one example, and whether each is to be predicted."""

    ids: list[int]
    learn: list[bool]
    ends: bool  # whether the last id is an <eos> that was added


@dataclasses.dataclass(frozen=True)
class ExampleEncoder:
    """Makes a `Sample` of an `Example`.

    Args:
        tokenizer: a `GemmaTokenizer`.
        add_start_token: begin texts and pairs with <bos>. Chats always begin so.
        add_end_token: end texts and responses with <eos>. Chats end with <end_of_turn>
            instead.
        loss_on: what is learned of pairs and chats: `"response"`, all that the
            assistant says; `"last"`, its last turn; `"all"`, every token. Texts are
            learned whole.
        chat_template: whether a pair is written as a chat of one turn. `"auto"` does so
            with Alpaca's instructions if the tokenizer has turn markers, and with other
            pairs if also `instruct` is set and the prompt holds no marker already.
        instruct: the model is one that answers.

    Raises:
        ValueError: an unknown `loss_on` or `chat_template`; or a chat template, and a
            tokenizer without turn markers.
    """

    tokenizer: GemmaTokenizer
    add_start_token: bool = True
    add_end_token: bool = True
    loss_on: str = "response"
    chat_template: bool | str = "auto"
    instruct: bool = False

    def __post_init__(self):
        check_loss_on(self.loss_on)
        if self.chat_template not in (True, False, "auto"):
            raise ValueError(
                'chat_template must be True, False or "auto", got '
                f"{self.chat_template!r}."
            )
        if self.chat_template is True and self.tokenizer.start_of_turn_id is None:
            raise ValueError(
                f"{self.tokenizer} has no {START_OF_TURN}: it cannot write chats. Pass "
                "chat_template=False (--template text)."
            )

    def __call__(self, example: Example) -> Sample:
        """The ids of an example, whole.

        Raises:
            TypeError, ValueError: a chat that is none, or text that is no Unicode.
        """
        if example.messages is not None:
            return self.chat(example.messages, example.given)
        if example.text is not None:
            return self.text(example.text)
        if self.as_chat(example):
            turns = {"user": example.prompt, "assistant": example.response}
            return self.chat([{"role": r, "content": c} for r, c in turns.items()])
        prompt = example.prompt
        if example.format == "alpaca":
            prompt = _INSTRUCTION.format(prompt)
        return self.pair(prompt, example.response)

    def as_chat(self, example: Example) -> bool:
        """Whether an example is written with turns."""
        if example.messages is not None:
            return True
        if example.text is not None or self.chat_template is False:
            return False
        if self.chat_template is True:
            return True
        if self.tokenizer.start_of_turn_id is None or START_OF_TURN in example.prompt:
            return False
        return self.instruct or example.format == "alpaca"

    def text(self, text: str) -> Sample:
        """A text, all of which is learned."""
        ids = self.tokenizer.encode(text, self.add_start_token, self.add_end_token)
        return Sample(ids, [True] * len(ids), self.add_end_token)

    def pair(self, prompt: str, response: str) -> Sample:
        """A prompt and the response that follows it without a gap."""
        ends = self.add_end_token
        first = self.tokenizer.encode(prompt, add_bos=self.add_start_token)
        second = self.tokenizer.encode(response, add_eos=ends)
        learn = [self.loss_on == "all"] * len(first) + [True] * len(second)
        return Sample(first + second, learn, ends)

    def chat(self, messages, given: int = 0) -> Sample:
        """A chat, of which the assistant's turns behind the `given` are learned."""
        ids, learn = encode_chat_with_mask(
            self.tokenizer, messages, self.loss_on, given
        )
        return Sample(ids, learn, ends=False)


def encoder_for(source, tokenizer, template="auto", **settings) -> ExampleEncoder:
    """An `ExampleEncoder` that writes pairs as the model behind `source` reads them.

    Args:
        source: preset name, path or handle, which tells whether the model answers.
        tokenizer: of the model.
        template: one of `TEMPLATES`; `"auto"` goes by what the source tells.
        **settings: the encoder's other arguments.
    """
    return ExampleEncoder(
        tokenizer,
        chat_template=TEMPLATES[template],
        instruct=registry.is_instruct(source),
        **settings,
    )


class EncodedExamples:
    """Many encoded examples in three flat arrays, about 5 bytes a token.

    `encoded[i]` is `(ids, learn)`, int32 and bool [n]: views, with 2 <= n <=
    `sequence_length` + 1, since the last id is only predicted and never an input.

    Attributes:
        sequence_length: T, the most inputs that an example has.
        lengths: int64 [N], the number of inputs of each example, n - 1.
        sources: int64 [N], which of the given examples each one is.
        num_cut: examples that were longer than T and lost their ends.
        num_answers_cut: those of them that lost tokens that were to be learned.
        num_dropped: examples left out: too long, if these were to be dropped, or with
            nothing to learn.
    """

    def __init__(self, samples: Iterable[Sample], sequence_length: int, too_long: str):
        self.sequence_length = sequence_length
        self.num_cut = self.num_answers_cut = self.num_dropped = 0
        ids, learn = array.array("i"), bytearray()
        offsets, sources = array.array("q", [0]), array.array("q")
        for source, sample in enumerate(samples):
            kept = self._fit(sample, source, too_long)
            if kept:
                ids.extend(sample.ids[:kept])
                learn.extend(sample.learn[:kept])
                offsets.append(len(ids))
                sources.append(source)
            else:
                self.num_dropped += 1
        self._ids = np.frombuffer(ids, "int32") if ids else np.empty(0, "int32")
        self._learn = np.frombuffer(learn, bool) if ids else np.empty(0, bool)
        self._offsets = np.frombuffer(offsets, "int64")
        self.sources = np.frombuffer(sources, "int64") if sources else np.empty(0, int)
        self.lengths = np.diff(self._offsets) - 1

    def _fit(self, sample, source, too_long) -> int:
        """How many ids of a sample are kept, 0 if it is left out."""
        limit, kept = self.sequence_length + 1, len(sample.ids)
        # What follows the last id that is learned has no effect.
        while kept and not sample.learn[kept - 1]:
            kept -= 1
        if kept > limit:
            if too_long == "error":
                raise ValueError(
                    f"Example {source} has {kept - 1} tokens to read and "
                    f"sequence_length is {self.sequence_length}: raise it, or have the "
                    'long ones cut or dropped (too_long="cut" or "drop").'
                )
            if too_long == "drop":
                return 0
            kept = limit
            self.num_cut += 1
            self.num_answers_cut += any(sample.learn[limit:])
            while kept and not sample.learn[kept - 1]:
                kept -= 1
        return kept if any(sample.learn[1:kept]) else 0

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """`(ids, learn)` of one example."""
        start, end = self._offsets[index], self._offsets[index + 1]
        return self._ids[start:end], self._learn[start:end]

    @property
    def num_tokens(self) -> int:
        """Inputs of all examples together."""
        return int(self.lengths.sum())

    @property
    def num_supervised(self) -> int:
        """Tokens that are learned; the first of an example is never predicted."""
        firsts = self._learn[self._offsets[:-1]]
        return int(self._learn.sum() - firsts.sum())

    @property
    def description(self) -> str:
        """The counts, in a line."""
        return (
            f"{len(self):,} examples, {self.num_tokens:,} tokens, "
            f"{self.num_supervised:,} of them learned"
        )


def encode_examples(
    examples: Iterable[Example],
    encoder: ExampleEncoder,
    sequence_length: int,
    too_long: str = "cut",
) -> EncodedExamples:
    """Encodes examples once, for `PackedDataset` and `BucketedDataset`.

    What is cut or left out is told in one warning.

    Args:
        examples: as from `read_examples`.
        encoder: says how.
        sequence_length: T, the most tokens that an example may have as input.
        too_long: what to do with longer ones: `"cut"` their ends, `"drop"` them, or
            raise an `"error"`.

    Raises:
        ValueError: an unknown `too_long`; an example that is too long, if that is an
            error; or nothing is left to learn.
    """
    if too_long not in TOO_LONG:
        raise ValueError(f"too_long must be {', '.join(TOO_LONG)}, got {too_long!r}.")
    encoded = EncodedExamples(map(encoder, examples), sequence_length, too_long)
    lost = []
    if encoded.num_cut:
        lost.append(
            f"{encoded.num_cut} were longer than sequence_length={sequence_length} and "
            f"cut, {encoded.num_answers_cut} of them in what is to be learned"
        )
    if encoded.num_dropped:
        lost.append(f"{encoded.num_dropped} were left out")
    if not len(encoded):
        raise ValueError(
            "No example has a token to learn within sequence_length="
            f"{sequence_length}. {'; '.join(lost)}"
        )
    if lost:
        total = len(encoded) + encoded.num_dropped
        warnings.warn(f"Of {total} examples {'; '.join(lost)}.", stacklevel=2)
    return encoded
