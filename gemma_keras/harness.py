"""Gemma for EleutherAI's lm-evaluation-harness.

import lm_eval
from gemma_keras.harness import GemmaLM

lm_eval.simple_evaluate(model=GemmaLM(gemma_lm), tasks=["arc_easy"])
"""

try:
    from lm_eval.api.model import LM
except ImportError:
    raise ImportError(
        "gemma_keras.harness needs lm-eval: pip install 'gemma_keras[eval]'."
    ) from None

import numpy as np

from gemma_keras.chat import format_chat
from gemma_keras.evaluation import Scorer


class GemmaLM(LM):
    """What the harness asks of a model, answered by a `GemmaCausalLM`.

    Args:
        lm: the model, with a preprocessor.
        batch_size: requests at a time.
        max_length: most tokens of context and answer together; what the model was
            trained for, but at most 2,048, by default.
        max_gen_toks: longest answer where a task does not say.
    """

    def __init__(self, lm, batch_size=8, max_length=None, max_gen_toks=256):
        super().__init__()
        self.lm, self.batch_size, self.max_gen_toks = lm, batch_size, max_gen_toks
        self._tokenizer = lm.preprocessor.tokenizer
        scorer = Scorer(lm, window=max_length, batch_size=batch_size)
        self.max_length = scorer.window
        # One token goes along as context, as the harness has it.
        self._scorer = Scorer(
            lm,
            window=scorer.window,
            stride=scorer.window - 1,
            batch_size=batch_size,
        )

    @property
    def tokenizer_name(self):
        """Tells caches of requests apart."""
        return f"gemma_keras_{self._tokenizer.vocab_size}"

    def apply_chat_template(self, chat_history, add_generation_prompt=True):
        """A chat as the text that Gemma reads."""
        return format_chat(chat_history, add_generation_prompt)

    def _encode(self, text):
        return self._tokenizer.encode(text.removeprefix("<bos>"))

    def _pair(self, context, continuation):
        """Ids, and which of them are the continuation, cut from the left to fit."""
        # A space belongs to the piece after it.
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = self._encode(stripped)
        ids = self._encode(stripped + continuation)
        if ids[: len(before)] != before:
            # Both sides join in one piece: have them apart.
            ids = before + self._encode(continuation)
        new = len(ids) - len(before)
        kept = ids[-self.max_length :]
        wanted = np.zeros(len(kept) + 1, bool)
        wanted[-min(new, len(kept)) :] = new > 0
        return [self._tokenizer.bos_token_id, *kept], wanted

    def loglikelihood(self, requests, disable_tqdm=False):
        """For each `(context, continuation)`: its log-probability; if it is greedy."""
        pairs = [self._pair(*request.args) for request in requests]
        scores, _ = self._scorer.score(pairs)
        return [
            (float(score.log_probs.sum(dtype="float64")), bool(score.right.all()))
            for score in scores
        ]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """The log-probability of each whole text."""
        bos = self._tokenizer.bos_token_id
        texts = [[bos, *self._encode(request.args[0])] for request in requests]
        wanted = [(ids, np.ones(len(ids), bool)) for ids in texts]
        scores, _ = self._scorer.score(wanted)
        return [float(score.log_probs.sum(dtype="float64")) for score in scores]

    def generate_until(self, requests, disable_tqdm=False):
        """The answer to each `(context, settings)`, without what it stopped before."""
        answers = [None] * len(requests)
        groups = {}
        for number, request in enumerate(requests):
            context, settings = request.args
            groups.setdefault(self._settings(settings), []).append((number, context))
        for (stop, limit, sampler), members in groups.items():
            for start in range(0, len(members), self.batch_size):
                part = members[start : start + self.batch_size]
                texts = self.lm.generate(
                    [self._fitting(context, limit) for _, context in part],
                    max_new_tokens=limit,
                    stop=list(stop) or None,
                    sampler=sampler,
                    strip_prompt=True,
                )
                for (number, _), text in zip(part, texts, strict=True):
                    answers[number] = text
        return answers

    def _settings(self, asked):
        """`(stop, max_new_tokens, sampler)` of a request's settings."""
        stop = asked.get("until") or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        limit = asked.get("max_gen_toks", self.max_gen_toks)
        temperature = float(asked.get("temperature") or 0.0)
        if not asked.get("do_sample", temperature > 0) or not temperature:
            return stop, limit, "greedy"
        from gemma_keras.samplers import Sampler

        known = {name: asked.get(name) for name in ("top_k", "top_p")}
        return stop, limit, Sampler(temperature=temperature, **known)

    def _fitting(self, context, limit):
        """A context without what, at its beginning, leaves no room for the answer."""
        ids = self._encode(context)
        room = max(1, self.max_length - limit - 1)
        return context if len(ids) <= room else self._tokenizer.decode(ids[-room:])
