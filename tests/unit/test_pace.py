"""How many tokens of a stream are decoded at once, at several speeds."""

import pytest

from gemma_keras import text_generation


@pytest.mark.parametrize(
    ("seconds_each", "expected"),
    [
        # Slow ones come one by one, faster ones in pieces of up to 0.15 s.
        (1.0, [1, 1, 1, 1, 1]),
        (0.06, [1, 2, 2, 2, 2]),
        (0.02, [1, 2, 4, 7, 7]),
        (0.0, [1, 2, 4, 8, 16]),
    ],
)
def test_pieces_grow_to_what_nobody_waits_for(monkeypatch, seconds_each, expected):
    now = [0.0]
    monkeypatch.setattr(text_generation.time, "perf_counter", lambda: now[0])
    pace, found = text_generation.Pace(), []
    pace.stop(1)
    for _ in expected:
        tokens = pace.start()
        found.append(tokens)
        now[0] += tokens * seconds_each
        pace.stop(tokens)
    assert found == expected


def test_a_call_that_compiles_first_does_not_slow_the_rest(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(text_generation.time, "perf_counter", lambda: now[0])
    pace, found = text_generation.Pace(), []
    for seconds in (9.0, 0.01, 0.02, 0.04):
        tokens = pace.start()
        found.append(tokens)
        now[0] += seconds
        pace.stop(tokens)
    assert found == [1, 1, 2, 4]
