"""The n-grams that prompt lookup keeps, against a search through the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_keras.speculation import Lookup, PromptLookup

pytestmark = pytest.mark.any_backend

# So few different tokens that much repeats itself.
TOKENS = st.lists(st.integers(0, 2), max_size=40)
SIZES = st.lists(st.integers(1, 4), min_size=2, max_size=2).map(sorted)


def search(tokens, count, longest, shortest):
    for size in range(longest, shortest - 1, -1):
        tail = tokens[len(tokens) - size :]
        # From the newest place back, but for the tail itself.
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tail:
                text = list(tokens)
                for i in range(count):
                    text.append(text[start + size + i])
                return text[len(tokens) :]
    return None


@settings(max_examples=200, deadline=None)
@given(TOKENS, st.lists(TOKENS, max_size=3), SIZES, st.integers(1, 6))
def test_what_is_proposed_followed_the_longest_latest_match(prompt, more, sizes, count):
    shortest, longest = sizes
    lookup = PromptLookup(count, longest, shortest).begin(prompt, None)
    known = list(prompt)
    assert lookup.propose() == search(known, count, longest, shortest)
    for tokens in more:
        lookup.learn(tokens)
        known += tokens
        assert lookup.propose() == search(known, count, longest, shortest)


def test_a_text_of_its_own_alone_has_no_guess():
    lookup = Lookup(3, 2, 2)
    lookup.learn([5, 6])
    assert lookup.propose() is None
    lookup.learn([5, 6])
    assert lookup.propose() == [5, 6, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be a positive integer, got 0"),
        ({"max_ngram": 1.5}, "max_ngram must be a positive integer"),
        ({"min_ngram": True}, "min_ngram must be a positive integer"),
        ({"max_ngram": 2, "min_ngram": 3}, "min_ngram must be at most max_ngram, 2"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptLookup(**settings)
