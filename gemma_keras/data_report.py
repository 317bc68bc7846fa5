"""What training data is like, and what commonly goes wrong with it.

No tensor library is involved: this runs before a model is loaded.
"""

import array
import collections
import hashlib
import itertools

import numpy as np

from gemma_keras import bins
from gemma_keras.encoding import EncodedExamples, ExampleEncoder, Sample
from gemma_keras.examples import Example
from gemma_keras.readers import Examples
from gemma_keras.tokenizer import END_OF_TURN, START_OF_TURN

# Places that a warning names.
_NAMED = 3

_WARNINGS = {
    "double BOS": "the text holds <bos>, which is put in front by itself: remove it",
    "no supervised token": "nothing in it is learned",
    "no stop token": "what is learned does not end in a stop token, so the model would "
    "not learn to stop",
    "duplicate": "the same tokens as an example before it",
    "turn markers in a content": f"{START_OF_TURN} or {END_OF_TURN} in it stays "
    "text; take them out if the data was formatted already",
    "end of turn missing": f"the prompt holds {START_OF_TURN}, but the response does "
    f"not end in {END_OF_TURN}, so the model would not learn to end its turn",
}


class DataReport:
    """Encodes examples and looks at each on the way.

    Args:
        sources: what `read_examples` gave of each file.
        encoder: says how they are encoded.
        sequence_length: T, the most tokens that an example may have as input.

    Attributes:
        sources: as given.
        examples: those of all sources, in order.
        encoded: the `EncodedExamples`; too long ones are cut.
        found: for each kind of trouble, the indices of examples that have it.
    """

    def __init__(
        self, sources: list[Examples], encoder: ExampleEncoder, sequence_length: int
    ):
        self.sources, self.encoder = sources, encoder
        self.examples = list(itertools.chain(*sources))
        self.found: dict[str, array.array] = collections.defaultdict(
            lambda: array.array("q")
        )
        self._seen: set[bytes] = set()
        self.num_chats = 0
        samples = (self._look(i, example) for i, example in enumerate(self.examples))
        self.encoded = EncodedExamples(samples, sequence_length, "cut")

    def place(self, index: int) -> str:
        """Where an example comes from, such as `train.jsonl:7`."""
        for source in self.sources:
            if index < len(source):
                return source.place(source[index])
            index -= len(source)
        raise IndexError(f"there are only {len(self.examples)} examples.")

    def _look(self, index: int, example: Example) -> Sample:
        sample = self.encoder(example)
        as_chat = self.encoder.as_chat(example)
        self.num_chats += as_chat
        for kind in self._troubles(example, sample, as_chat):
            self.found[kind].append(index)
        return sample

    def _troubles(self, example, sample, as_chat):
        tokenizer = self.encoder.tokenizer
        bos = tokenizer.id_to_token(tokenizer.bos_token_id)
        strings = list(example.strings)
        if not as_chat and self.encoder.add_start_token:
            # The encoder takes this one for its own.
            strings[0] = strings[0].removeprefix(bos)
        if any(bos in text for text in strings):
            yield "double BOS"
        learned = [i for i, learn in enumerate(sample.learn) if learn and i]
        if not learned:
            yield "no supervised token"
        elif not self._stops(sample, learned[-1]):
            yield "no stop token"
        digest = hashlib.blake2b(array.array("i", sample.ids), digest_size=16).digest()
        if digest in self._seen:
            yield "duplicate"
        self._seen.add(digest)
        marked = [START_OF_TURN in text or END_OF_TURN in text for text in strings]
        if as_chat and any(marked):
            yield "turn markers in a content"
        if not as_chat and example.prompt and START_OF_TURN in example.prompt:
            ended = example.response.rstrip().endswith(END_OF_TURN)
            if not ended:
                yield "end of turn missing"

    def _stops(self, sample, last):
        tokenizer = self.encoder.tokenizer
        if self.encoder.loss_on == "all":
            # The line end of the last turn is learned too.
            while last and not tokenizer.decode([sample.ids[last]]).strip("\n"):
                if sample.ids[last] in tokenizer.stop_token_ids:
                    break
                last -= 1
        return sample.ids[last] in tokenizer.stop_token_ids

    @property
    def warnings(self) -> list[str]:
        """What is wrong with how many examples, and where the first of them are."""
        lines = [
            f"{kind}: {self._places(self.found[kind])}: {meaning}."
            for kind, meaning in _WARNINGS.items()
            if self.found[kind]
        ]
        encoded = self.encoded
        if encoded.num_cut:
            lines.append(
                f"cut off: {encoded.num_cut:,} examples are longer than "
                f"{encoded.sequence_length} tokens, and {encoded.num_answers_cut:,} "
                "lose a part of an answer and its stop token. Raise the sequence "
                "length, or leave them out."
            )
        gone = encoded.num_dropped - len(self.found["no supervised token"])
        if gone > 0:
            lines.append(
                f"nothing left: in {gone:,} of the examples that were cut, nothing is "
                "left to learn."
            )
        return lines

    def _places(self, indices) -> str:
        named = [self.place(i) for i in indices[:_NAMED]]
        more = ", ..." if len(indices) > _NAMED else ""
        kind = "example" if len(indices) == 1 else "examples"
        return f"{len(indices):,} {kind} ({', '.join(named)}{more})"

    def facts(self, packing: bool) -> list[tuple[str, str]]:
        """Rows of a table: what is counted, and how much there is."""
        encoded, lengths = self.encoded, self.encoded.lengths
        total, size = encoded.num_tokens, encoded.sequence_length
        learned = encoded.num_supervised
        rows = [
            ("examples", f"{len(encoded):,}"),
            ("written as chats", f"{self.num_chats:,}"),
            ("tokens", f"{total:,}"),
            ("learned tokens", f"{learned:,} ({learned / total:.1%})"),
            (
                "tokens of an example",
                f"median {np.median(lengths):.0f}, mean {lengths.mean():.1f}, longest "
                f"{lengths.max()}",
            ),
        ]
        if packing:
            packed = bins.best_fit(lengths, size)
            used = bins.usage(packed, lengths, size)
            rows.append(
                (f"packed rows of {size}", f"{len(packed):,}, {used:.1%} of slots used")
            )
        padding = 1 - total / (len(encoded) * size)
        rows.append((f"padding to {size}", f"{padding:.1%} without packing"))
        return rows

    def histogram(self, width: int = 40) -> list[str]:
        """Lines of a bar chart of the lengths, in powers of two."""
        lengths = self.encoded.lengths
        # Bins 1, 2, 3-4, 5-8, ..., up to the longest.
        tops = 2 ** np.arange(int(lengths.max() - 1).bit_length() + 1)
        counts = np.bincount(np.searchsorted(tops, lengths), minlength=len(tops))
        start = int(np.flatnonzero(counts)[0])
        lines = []
        for i in range(start, len(tops)):
            bar = "#" * -(-int(counts[i]) * width // int(counts.max()))
            low = tops[i - 1] + 1 if i else 1
            lines.append(f"{low:>6} to {tops[i]:<6} {counts[i]:>9,} {bar}".rstrip())
        return lines


def runs(tokenizer, ids, learn) -> list[tuple[str, bool]]:
    """Text of stretches of tokens that are all learned or none; control pieces shown.

    Args:
        tokenizer: a `GemmaTokenizer`.
        ids: token ids [n].
        learn: whether each is learned [n].
    """
    control = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}

    def kind(token):
        return token[1], token[0] in control

    pairs = zip(map(int, ids), map(bool, learn), strict=True)
    found: list[tuple[str, bool]] = []
    for (on, special), group in itertools.groupby(pairs, kind):
        tokens = [index for index, _ in group]
        text = tokenizer.decode(tokens)
        if special:
            text = "".join(map(tokenizer.id_to_token, tokens))
        if found and found[-1][1] == on:
            text = found.pop()[0] + text
        found.append((text, on))
    return found
