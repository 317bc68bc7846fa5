"""Text, prompt/response pairs and chats to the arrays that the model takes.

Works on numpy arrays alone, whichever backend runs. The meaning is KerasHub's
`CausalLMPreprocessor`, with these differences, each on purpose:

- Nothing is cut silently: a prompt that is too long is refused, or cut with a warning
  if `truncate="warn"`; training samples that are cut are counted in a warning.
- What is too long loses its end if it is a sample, a pair's response first, and its
  beginning if it is a prompt, since a model goes on from the end.
- The <eos> put at the end of a training sample that was cut has no weight in the loss:
  the text does not end there. (KerasHub teaches the model to stop.)
- Chats are an input, with the loss on the assistant's turns only.
"""

import warnings
from collections.abc import Iterable, Sequence

import keras
import numpy as np

from gemma_keras.chat import encode_chat
from gemma_keras.encoding import ExampleEncoder, Sample
from gemma_keras.examples import Example
from gemma_keras.tokenizer import GemmaTokenizer

# Here and not in tokenizer.py, which knows nothing of Keras.
keras.saving.register_keras_serializable(package="gemma_keras")(GemmaTokenizer)


@keras.saving.register_keras_serializable(package="gemma_keras")
class GemmaCausalLMPreprocessor:
    """Makes model inputs of text, and text of model outputs.

    Args:
        tokenizer: a `GemmaTokenizer`.
        sequence_length: length in tokens to which training samples are padded or cut,
            and the longest prompt of `generate_preprocess`. May be changed later.
        add_start_token: begin strings and pairs with <bos>. Chats always begin so.
        add_end_token: end training strings and responses with <eos>. Chats end with
            <end_of_turn> instead.
        truncate: what to do with a prompt that is too long: "error" refuses it, "warn"
            keeps <bos> and the prompt's last tokens, and warns.

    Raises:
        ValueError: a `sequence_length` below 1, or an unknown `truncate`.
    """

    def __init__(
        self,
        tokenizer: GemmaTokenizer,
        sequence_length: int = 1024,
        add_start_token: bool = True,
        add_end_token: bool = True,
        truncate: str = "error",
    ):
        if truncate not in ("error", "warn"):
            raise ValueError(f'truncate must be "error" or "warn", got {truncate!r}.')
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.add_start_token = add_start_token
        self.add_end_token = add_end_token
        self.truncate = truncate

    @classmethod
    def from_preset(cls, source, **settings) -> "GemmaCausalLMPreprocessor":
        """Loads the preprocessor of a model, without its weights.

        Args:
            source: whatever `GemmaCausalLM.from_preset` takes.
            **settings: arguments of the constructor, in place of the model's own.

        Raises:
            ValueError: there is no such model, or it comes without a tokenizer.
        """
        from gemma_keras import loading

        with loading.open_source(source) as checkpoint:
            preprocessor = loading.load_preprocessor(checkpoint, **settings)
        if preprocessor is None:
            raise ValueError(f"{source} holds no tokenizer.")
        return preprocessor

    @property
    def sequence_length(self) -> int:
        """Length in tokens of training samples, and of the longest prompt."""
        return self._sequence_length

    @sequence_length.setter
    def sequence_length(self, value: int):
        self._sequence_length = _checked_length(value)

    def __call__(self, x, y=None, sample_weight=None, sequence_length=None):
        """Makes training arrays: each position predicts the token after it.

        Args:
            x: one of
                a string, or several (all of the text is learned);
                `{"prompts": ..., "responses": ...}`, strings or lists of strings as
                long as each other (the responses are learned);
                a chat, or a list of chats (the assistant's turns are learned);
                a list of `Example`, as from `read_examples`.
            y: must be None; the labels are made here.
            sample_weight: must be None, likewise.
            sequence_length: T, in place of the preprocessor's own.

        Returns:
            `(x, y, sample_weight)`: x is `{"token_ids": int32 [B, T], "padding_mask":
            bool [B, T]}`, y int32 [B, T], sample_weight float32 [B, T], padded on the
            right. A single sample gives arrays without the B axis.

        Raises:
            TypeError, ValueError: `x` is none of these, or its text is invalid.
        """
        if y is not None or sample_weight is not None:
            raise ValueError(
                "The preprocessor makes y and sample_weight from the text: pass x only."
            )
        length = _checked_length(sequence_length or self.sequence_length)
        samples, batched = self._read_samples(x)
        kept, cut = [], 0
        for sample in samples:
            # One token more than T: the last is only predicted, never an input.
            kept.append(self._fit(sample, length + 1))
            cut += len(sample.ids) > length + 1
        if cut:
            empty = sum(not any(sample.learn[1:]) for sample in kept)
            warnings.warn(
                f"{cut} of {len(kept)} samples are longer than sequence_length="
                f"{length} tokens, and were cut at the end."
                + f" In {empty} samples nothing is left to learn."
                * bool(empty),
                stacklevel=2,
            )
        rows = [sample.ids for sample in kept]
        ids, filled = self._pad(rows, length + 1)
        weights, _ = self._pad([sample.learn for sample in kept], length + 1)
        # A weight belongs to the position that predicts, one before what is predicted.
        x = {"token_ids": ids[:, :-1], "padding_mask": filled[:, :-1]}
        y, sample_weight = ids[:, 1:], (weights * filled)[:, 1:].astype("float32")
        if batched:
            return x, y, sample_weight
        return {key: value[0] for key, value in x.items()}, y[0], sample_weight[0]

    def encoder(self, **settings) -> ExampleEncoder:
        """What encodes training examples as this preprocessor does.

        Args:
            **settings: further arguments of `ExampleEncoder`: `loss_on`,
                `chat_template`, `instruct`.
        """
        return ExampleEncoder(
            self.tokenizer, self.add_start_token, self.add_end_token, **settings
        )

    def token_ids(self, x) -> list[list[int]]:
        """The ids of everything in `x`, as `__call__` takes it, whole."""
        return [list(sample.ids) for sample in self._read_samples(x)[0]]

    def encode_prompt(self, prompt, max_tokens: int | None = None) -> list[int]:
        """Ids of one prompt for generation.

        Args:
            prompt: a string, which may hold turn markers; or a chat that ends with a
                user message, whose contents' markers stay text.
            max_tokens: the most ids that may come back; None sets no limit.

        Raises:
            TypeError, ValueError: neither; invalid text; or longer than `max_tokens`
                while `truncate` is "error".
        """
        if isinstance(prompt, str | bytes):
            ids = self.tokenizer.encode(prompt, add_bos=self.add_start_token)
        elif _is_chat(prompt):
            ids = encode_chat(self.tokenizer, prompt)
        else:
            raise TypeError(
                "A prompt is a string or a chat (a list of messages with role and "
                f"content), got {type(prompt).__name__}: {prompt!r:.80}."
            )
        if max_tokens is None or len(ids) <= max_tokens:
            return ids
        if self.truncate == "error":
            raise ValueError(
                f"The prompt has {len(ids)} tokens and at most {max_tokens} fit. "
                "Shorten it, allow more (max_length or sequence_length), or set the "
                'preprocessor\'s truncate to "warn" to have it cut.'
            )
        warnings.warn(
            f"The prompt has {len(ids)} tokens and at most {max_tokens} fit: "
            f"{len(ids) - max_tokens} were cut from its beginning.",
            stacklevel=2,
        )
        opening = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return opening + ids[len(ids) - max_tokens + len(opening) :]

    def generate_preprocess(self, x, sequence_length: int | None = None) -> dict:
        """Makes the arrays of one prompt or several, without <eos>.

        Args:
            x: a string, a chat, a list of either, or `{"prompts": ...}` with these.
            sequence_length: T, in place of the preprocessor's own.

        Returns:
            `{"token_ids": int32 [B, T], "padding_mask": bool [B, T]}`, padded on the
            right, without the B axis for a single prompt.

        Raises:
            TypeError, ValueError: as `encode_prompt`.
        """
        length = _checked_length(sequence_length or self.sequence_length)
        if isinstance(x, dict):
            x = _value(x, "prompts")
        x = _as_python(x)
        batched = not isinstance(x, str | bytes) and not _is_chat(x)
        rows = [self.encode_prompt(p, length) for p in (x if batched else [x])]
        ids, filled = self._pad(rows, length)
        if not batched:
            ids, filled = ids[0], filled[0]
        return {"token_ids": ids, "padding_mask": filled}

    def generate_postprocess(self, x: dict) -> str | list[str]:
        """Turns ids back to text, without padding, <bos> and <eos>.

        Turn markers stay, as text.

        Args:
            x: `{"token_ids": [B, T] or [T], "padding_mask": likewise}`, arrays or
                tensors of any backend.

        Returns:
            B strings, or one where there is no B axis.
        """
        ids = keras.ops.convert_to_numpy(x["token_ids"])
        keep = keras.ops.convert_to_numpy(x["padding_mask"]).astype(bool)
        tokenizer = self.tokenizer
        special = [tokenizer.pad_token_id, tokenizer.bos_token_id]
        keep = keep & ~np.isin(ids, [*special, tokenizer.eos_token_id])
        if ids.ndim == 1:
            return tokenizer.decode(ids[keep])
        return [
            tokenizer.decode(row[mask]) for row, mask in zip(ids, keep, strict=True)
        ]

    def get_config(self) -> dict:
        """Everything the constructor takes, for Keras's serialization."""
        return {
            "tokenizer": keras.saving.serialize_keras_object(self.tokenizer),
            "sequence_length": self.sequence_length,
            "add_start_token": self.add_start_token,
            "add_end_token": self.add_end_token,
            "truncate": self.truncate,
        }

    @classmethod
    def from_config(cls, config: dict) -> "GemmaCausalLMPreprocessor":
        """The inverse of `get_config`."""
        tokenizer = keras.saving.deserialize_keras_object(config["tokenizer"])
        return cls(**{**config, "tokenizer": tokenizer})

    def _read_samples(self, x) -> tuple[list[Sample], bool]:
        """Samples of any of the forms that `__call__` takes, and if they are many."""
        if isinstance(x, dict):
            prompts = _as_python(_value(x, "prompts"))
            responses = _as_python(_value(x, "responses"))
            if isinstance(prompts, str | bytes):
                return [self.encoder().pair(prompts, responses)], False
            if isinstance(responses, str | bytes) or len(prompts) != len(responses):
                count = 1 if isinstance(responses, str | bytes) else len(responses)
                raise ValueError(
                    f"Each prompt needs its response, got {len(prompts)} prompts and "
                    f"{count} responses."
                )
            pairs = zip(prompts, responses, strict=True)
            return [self.encoder().pair(*pair) for pair in pairs], True
        x = _as_python(x)
        if isinstance(x, str | bytes) or _is_chat(x):
            return [self._single(x)], False
        if not isinstance(x, list) or not x:
            raise TypeError(
                f"Expected text, pairs or chats to train on, got {x!r:.80}."
            )
        return [self._single(one) for one in x], True

    def _single(self, x) -> Sample:
        if isinstance(x, str | bytes):
            return self.encoder().text(x)
        if _is_chat(x):
            return self.encoder().chat(x)
        if isinstance(x, Example):
            return self.encoder()(x)
        raise TypeError(
            "A sample is a string or a chat (a list of messages with role and "
            f"content), got {type(x).__name__}: {x!r:.80}."
        )

    def _fit(self, sample: Sample, length: int) -> Sample:
        """Cuts a sample at the end, but for its <eos>."""
        if len(sample.ids) <= length:
            return sample
        if not sample.ends:
            return Sample(sample.ids[:length], sample.learn[:length], False)
        ids = [*sample.ids[: length - 1], self.tokenizer.eos_token_id]
        return Sample(ids, [*sample.learn[: length - 1], False], True)

    def _pad(self, rows: Sequence[Sequence], length: int) -> tuple[np.ndarray, ...]:
        """Rows as int32 [B, length], and where they are filled, bool [B, length]."""
        ids = np.full((len(rows), length), self.tokenizer.pad_token_id, "int32")
        filled = np.zeros((len(rows), length), bool)
        for row, values in enumerate(rows):
            ids[row, : len(values)] = values
            filled[row, : len(values)] = True
        return ids, filled


def _checked_length(value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"sequence_length must be a whole number from 1, got {value!r}."
        )
    return value


def _is_chat(x) -> bool:
    return isinstance(x, list | tuple) and len(x) > 0 and isinstance(x[0], dict)


def _value(x: dict, key: str):
    if key not in x:
        raise ValueError(
            'Pairs are given as {"prompts": ..., "responses": ...}, got the keys '
            f"{list(x)}: {key} is missing."
        )
    return x[key]


def _as_python(x: Iterable):
    """Strings as they are; arrays, tensors and other sequences as lists."""
    if isinstance(x, str | bytes | dict):
        return x
    if hasattr(x, "numpy"):
        x = x.numpy()
    if isinstance(x, np.ndarray):
        return x.tolist()
    return list(x) if isinstance(x, Iterable) else x
