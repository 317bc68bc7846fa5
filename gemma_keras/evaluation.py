"""How well a model predicts given tokens: perplexity, and scores for evaluators.

Sequences longer than the window are read in windows that overlap. Each begins with
<bos>, without which Gemma predicts hardly anything.
"""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

from gemma_keras import backend
from gemma_keras.data import pad_rows

# Logits of one chunk, in bytes.
_CHUNK_BYTES = 2**27


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model thinks of a sequence.

    Attributes:
        log_probs: natural logarithms of the probability of each token that was
            scored, float32 [n].
        right: whether each was the likeliest, bool [n].
    """

    log_probs: np.ndarray
    right: np.ndarray


@dataclasses.dataclass(frozen=True)
class Result:
    """Means over the tokens of a whole data set.

    Attributes:
        examples: sequences.
        tokens: tokens that were scored.
        windows: rows that the model has read.
        loss: nats a token.
        accuracy: part of the tokens that were the likeliest.
        bits_per_byte: of the text in UTF-8; None where no whole text was scored.
    """

    examples: int
    tokens: int
    windows: int
    loss: float
    accuracy: float
    bits_per_byte: float | None

    @property
    def perplexity(self):
        """E to the loss."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def as_dict(self):
        """Everything, as JSON has it."""
        return {**dataclasses.asdict(self), "perplexity": self.perplexity}


class Scorer:
    """Scores sequences of token ids, several at a time, with few compilations.

    Args:
        lm: a `GemmaCausalLM`.
        window: most tokens that are read at once; what the model was trained for, but
            at most 2,048, by default.
        stride: tokens by which windows move on; half the window by default. Less is
            slower and gives each token more context.
        batch_size: windows at a time.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(self, lm, *, window=None, stride=None, batch_size=8):
        longest = lm.config.max_position
        self.window = min(longest, 2048) if window is None else window
        self.stride = max(1, self.window // 2) if stride is None else stride
        self.batch_size = batch_size
        if not 2 <= self.window <= longest:
            raise ValueError(
                f"window must be from 2 to {longest:,}, which the model was trained "
                f"for, got {window}."
            )
        if not 1 <= self.stride < self.window:
            raise ValueError(
                f"stride must be from 1 to {self.window - 1:,}, below the window, got "
                f"{stride}."
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be from 1, got {batch_size}.")
        self._backbone = lm.backbone
        self._bos = lm.preprocessor.tokenizer.bos_token_id
        self._program = backend.Program(self._compute, lm.variables)

    def score(self, sequences, progress=None):
        """Scores sequences.

        Args:
            sequences: pairs of `ids`, integers [n], and `wanted`, booleans [n]: which
                of them are scored, given all before. The first has nothing before it
                and is never scored.
            progress: called as `progress(done, total)`, in windows.

        Returns:
            A `Score` for each sequence, and the number of windows.
        """
        windows = [
            window
            for number, (ids, wanted) in enumerate(sequences)
            for window in self._windows(number, ids, wanted)
        ]
        # The long ones first: what does not fit into memory, does not at once.
        windows.sort(key=lambda window: -len(window.ids))
        found = {}
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            for window, score in zip(batch, self._read(batch), strict=True):
                found.setdefault(window.number, []).append((window.start, score))
            if progress is not None:
                progress(start + len(batch), len(windows))
        return [_joined(found.get(i, ())) for i in range(len(sequences))], len(windows)

    def _windows(self, number, ids, wanted):
        ids, wanted = np.asarray(ids, "int32"), np.asarray(wanted, bool)
        begun = len(ids) and ids[0] == self._bos
        end = 1
        while end < len(ids):
            start, end = end, min(end + self.stride, len(ids))
            if start == 1:
                end = min(1 + self.window, len(ids))
            first = max(0, end - 1 - self.window)
            inputs = ids[first : end - 1].copy()
            if first and begun:
                inputs[0] = self._bos
            places = np.flatnonzero(wanted[start:end]) + start
            if len(places):
                yield _Window(number, start, inputs, places - 1 - first, ids[places])

    def _read(self, batch):
        longest = max(len(window.ids) for window in batch)
        length = min(_rounded(longest, 32), self.window)
        ids = np.zeros((self.batch_size, length), "int32")
        mask = np.zeros((self.batch_size, length), bool)
        for row, window in enumerate(batch):
            ids[row, : len(window.ids)] = window.ids
            mask[row, : len(window.ids)] = True
        # An empty row would attend to nothing.
        mask[len(batch) :, 0] = True
        places = [row * length + window.places for row, window in enumerate(batch)]
        counts = [len(each) for each in places]
        labels = np.concatenate([window.labels for window in batch])
        room = _rounded(len(labels), 16)
        padded = np.zeros((2, room), "int32")
        padded[0, : len(labels)] = np.concatenate(places)
        padded[1, : len(labels)] = labels
        log_probs, right = self._program(ids, mask, padded[0], padded[1])
        log_probs = keras.ops.convert_to_numpy(log_probs)
        right = keras.ops.convert_to_numpy(right)
        ends = np.cumsum(counts)
        return [
            Score(log_probs[end - count : end], right[end - count : end])
            for end, count in zip(ends, counts, strict=True)
        ]

    def _compute(self, ids, mask, places, labels):
        hidden = self._backbone({"token_ids": ids, "padding_mask": mask})
        rows = ops.reshape(hidden, (-1, hidden.shape[-1]))
        rows = ops.take(rows, places, axis=0)
        count = places.shape[0]
        chunk = max(16, _CHUNK_BYTES // (4 * self._backbone.config.vocab_size))
        if count <= chunk:
            return self._against_head(rows, labels)
        # A power of two divides `count`, which is one or 1.5 times one.
        chunk = 2 ** int(math.log2(chunk))
        while count % chunk:
            chunk //= 2

        def step(state):
            start = state["start"]
            part = ops.slice(rows, (start, 0), (chunk, rows.shape[1]))
            wanted = ops.slice(labels, (start,), (chunk,))
            new = self._against_head(part, wanted)
            kept = zip(("log_probs", "right"), new, strict=True)
            state = dict(state)
            for name, value in kept:
                state[name] = backend.write_slots(state[name], value, start, 0)
            state["start"] = start + chunk
            return state

        state = {
            "start": backend.counter(0),
            "log_probs": ops.zeros(count, dtype="float32"),
            "right": ops.zeros(count, dtype="bool"),
        }
        state = backend.loop(lambda s: s["start"] < count, step, state)
        return state["log_probs"], state["right"]

    def _against_head(self, rows, labels):
        logits = ops.cast(self._backbone.logits(rows), "float32")
        chosen = ops.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        right = backend.argmax(logits) == labels
        return chosen - ops.logsumexp(logits, axis=-1), right


@dataclasses.dataclass(frozen=True)
class _Window:
    number: int  # of the sequence
    start: int  # of the first token that it may score
    ids: np.ndarray
    places: np.ndarray  # inputs whose next token is scored
    labels: np.ndarray


def _rounded(count, least):
    """`count` up to a power of two or 1.5 times one: few sizes, little padding."""
    size = least
    while size < count:
        if size + size // 2 >= count:
            return size + size // 2
        size *= 2
    return size


def _joined(parts):
    parts = [score for _, score in sorted(parts, key=lambda part: part[0])]
    if not parts:
        return Score(np.zeros(0, "float32"), np.zeros(0, bool))
    return Score(
        np.concatenate([score.log_probs for score in parts]),
        np.concatenate([score.right for score in parts]),
    )


def perplexity(scorer, samples, texts=None, progress=None):
    """The `Result` of a `Scorer` on encoded samples.

    Args:
        scorer: a `Scorer`.
        samples: pairs of `ids` and `learn`, as an `ExampleEncoder` gives: what is
            learned in training is scored.
        texts: the texts that the samples are, if they are scored whole.
        progress: as in `Scorer.score`.

    Raises:
        ValueError: there is no token to score.
    """
    scores, windows = scorer.score([(s[0], s[1]) for s in samples], progress)
    tokens = sum(len(score.log_probs) for score in scores)
    if not tokens:
        raise ValueError("There is no token to score.")
    total = -sum(float(score.log_probs.sum(dtype="float64")) for score in scores)
    count = sum(len(text.encode()) for text in texts or ())
    return Result(
        examples=len(scores),
        tokens=tokens,
        windows=windows,
        loss=total / tokens,
        accuracy=sum(int(score.right.sum()) for score in scores) / tokens,
        bits_per_byte=total / math.log(2) / count if count else None,
    )


def exact_match(lm, examples, batch_size=16):
    """How often the model answers as an example does, to the letter.

    An example is cut before what is learned last of it, and the model goes on from
    there, greedily. Spaces around an answer, and what ends it, do not count.

    Args:
        lm: a `GemmaCausalLM` with a preprocessor.
        examples: pairs of `ids` and `learn`, as `encode_examples` gives.
        batch_size: answered at a time.

    Returns:
        A dict of `right` and `asked`, counts, and `answers`: for each example a dict
        of the `prompt`, the `reference` and the model's `text`.
    """
    tokenizer = lm.preprocessor.tokenizer
    answers = []
    for start in range(0, len(examples), batch_size):
        stop = min(start + batch_size, len(examples))
        pairs = [_question(*examples[i]) for i in range(start, stop)]
        # Where programs are compiled for a number of rows, the last batch has as many.
        spare = batch_size - len(pairs) if start and backend.few_shapes() else 0
        found = _answer(lm, pairs + pairs[-1:] * spare)[: len(pairs)]
        for (prompt, reference), text in zip(pairs, found, strict=True):
            answers.append(
                {
                    "prompt": tokenizer.decode(prompt),
                    "reference": _spoken(tokenizer, reference),
                    "text": _spoken(tokenizer, text),
                }
            )
    right = sum(x["text"] == x["reference"] for x in answers)
    return {"right": right, "asked": len(answers), "answers": answers}


def _question(ids, learn):
    """Ids before what is learned last of an example, and the ids of that."""
    learn = np.array(learn, bool)
    learn[0] = False  # nothing comes before it
    end = len(learn) - int(np.argmax(learn[::-1]))
    start = end - int(np.argmin(learn[:end][::-1]))
    ids = [int(i) for i in ids]
    return ids[:start], ids[start:end]


def _answer(lm, pairs):
    """The ids that the model puts after each prompt."""
    prompts = [prompt for prompt, _ in pairs]
    found = lm.generate(
        pad_rows(prompts),
        max_new_tokens=max(len(reference) for _, reference in pairs) + 1,
        sampler="greedy",
        strip_prompt=True,
    )
    ids, mask = (np.asarray(found[k]) for k in ("token_ids", "padding_mask"))
    return [row[keep.astype(bool)] for row, keep in zip(ids, mask, strict=True)]


def _spoken(tokenizer, ids):
    kept = [int(i) for i in ids if int(i) not in tokenizer.stop_token_ids]
    return tokenizer.decode(kept).strip()
