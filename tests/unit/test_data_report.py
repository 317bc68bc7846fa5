"""What the preview says of data: its counts, and what is wrong with it."""

import re

import pytest

from gemma_keras import registry
from gemma_keras.data_report import DataReport, runs
from gemma_keras.encoding import ExampleEncoder
from gemma_keras.readers import read_examples

pytestmark = pytest.mark.any_backend


def chat(user, model="12 boats"):
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": model},
        ]
    }


def report_on(tokenizer, rows, length=200, **settings):
    return DataReport(
        [read_examples(rows)], ExampleEncoder(tokenizer, **settings), length
    )


def kinds(report):
    return [line.partition(":")[0] for line in report.warnings]


PAIR = {"prompt": "count", "response": "12 boats"}


@pytest.mark.parametrize(
    ("row", "settings", "kind"),
    [
        (chat("<bos>count"), {}, "double BOS"),
        (chat("count", "<bos>12"), {}, "double BOS"),
        ("<bos><bos>the boats", {}, "double BOS"),
        ({**PAIR, "response": "<bos>12"}, {}, "double BOS"),
        ("the boats", {"add_end_token": False}, "no stop token"),
        (PAIR, {"add_end_token": False}, "no stop token"),
        (chat("<start_of_turn>user\ncount"), {}, "turn markers in a content"),
        (chat("count", "12<end_of_turn>"), {}, "turn markers in a content"),
        (
            {**PAIR, "prompt": "<start_of_turn>user\ncount"},
            {"instruct": True},
            "end of turn missing",
        ),
    ],
)
def test_what_commonly_goes_wrong_is_told_with_its_place(small, row, settings, kind):
    other = chat("the keeper") if isinstance(row, dict) and "messages" in row else row
    if other is row:
        other = {"prompt": "a", "response": "b"} if isinstance(row, dict) else "boats"
    settings = {"add_end_token": True} | settings
    report = report_on(small, [other, row], **settings)
    (line,) = [line for line in report.warnings if line.startswith(f"{kind}: ")]
    found = list(report.found[kind])
    assert found == ([0, 1] if kind == "no stop token" else [1])
    assert "the list, row 1" in line


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([chat("count"), chat("the keeper")], {}),
        ([chat("count"), chat("the keeper")], {"loss_on": "all"}),
        ([chat("count"), chat("the keeper")], {"loss_on": "last"}),
        (["the boats", "<bos>the stars"], {}),
        ([PAIR, {"prompt": "<bos>the", "response": "stars"}], {}),
        (
            [{"prompt": "<start_of_turn>user\na", "response": "b<end_of_turn>\n"}],
            {"instruct": True},
        ),
        ([{"instruction": "count", "output": "12"}], {}),
    ],
)
def test_nothing_is_said_where_nothing_is_wrong(small, rows, settings):
    assert report_on(small, rows, **settings).warnings == []


def test_duplicates_are_counted_and_the_first_named(small):
    report = report_on(small, [PAIR] * 6)
    assert kinds(report) == ["duplicate"]
    assert list(report.found["duplicate"]) == [1, 2, 3, 4, 5]
    assert (
        "5 examples (the list, row 1, the list, row 2, the list, row 3, ...)"
        in (report.warnings[0])
    )


def test_what_is_cut_off_and_what_is_lost_is_told(small):
    long = chat("the lighthouse keeper counted " * 9)
    report = report_on(small, [chat("count", "12 " * 40), chat("count"), long], 30)
    assert kinds(report) == ["cut off", "nothing left"]
    assert "2 examples are longer than 30 tokens, and 2 lose" in report.warnings[0]
    assert "in 1 of the examples" in report.warnings[1]
    assert len(report.encoded) == 2


def test_a_response_of_no_token_of_its_own_is_told(small):
    """As a response that is "<eos>" alone is, if no <eos> is to be added."""
    encoder = ExampleEncoder(small, add_end_token=False)
    examples = read_examples([PAIR])
    report = DataReport([examples], encoder, 100)
    assert "no supervised token" not in kinds(report)
    empty = [type(examples[0])("pairs", prompt="count", response="", number=0)]
    examples[:] = empty
    assert "no supervised token" in kinds(DataReport([examples], encoder, 100))


def test_several_sources_are_one_set_with_places_of_their_own(small, tmp_path):
    (tmp_path / "a.txt").write_text("the boats\n\n12 boats")
    (tmp_path / "b.txt").write_text("\nthe boats")
    sources = [read_examples(tmp_path / name) for name in ("a.txt", "b.txt")]
    report = DataReport(sources, ExampleEncoder(small), 100)
    assert [report.place(i) for i in range(3)] == ["a.txt:1", "a.txt:3", "b.txt:2"]
    assert "duplicate: 1 example (b.txt:2)" in report.warnings[0]
    with pytest.raises(IndexError, match="only 3"):
        report.place(3)


def test_the_counts_are_those_of_the_batches(small):
    rows = [chat("count " * n, "12 boats " * n) for n in (1, 2, 4)]
    report = report_on(small, rows)
    samples = [report.encoder(example) for example in report.examples]
    # The line end of the last turn takes no place, nor does the last input.
    tokens = sum(len(sample.ids) - 2 for sample in samples)
    learned = sum(sum(sample.learn) for sample in samples)
    facts = dict(report.facts(packing=True))
    assert facts["tokens"] == f"{tokens:,}"
    assert facts["learned tokens"].startswith(f"{learned:,} ({learned / tokens:.1%}")
    assert facts["packed rows of 200"] == f"1, {tokens / 200:.1%} of slots used"
    assert facts["padding to 200"].startswith(f"{1 - tokens / 600:.1%}")
    assert "packed rows of 200" not in dict(report.facts(packing=False))


def test_the_histogram_counts_each_example_once(small):
    rows = [{"prompt": "a", "response": "b" * n} for n in range(1, 70)]
    report = report_on(small, rows)
    found = 0
    for line in report.histogram():
        low, high, count = map(int, re.findall(r"\d+", line)[:3])
        lengths = report.encoded.lengths
        assert count == ((lengths >= low) & (lengths <= high)).sum()
        found += count
    assert found == len(rows)


def test_stretches_of_text_show_control_tokens_and_keep_characters_whole(small):
    ids = small.encode("the ", add_bos=True)
    learned = [*small.encode("日本"), small.end_of_turn_id, 1]
    found = runs(small, ids + learned, [False] * len(ids) + [True] * len(learned))
    assert found == [("<bos>the ", False), ("日本<end_of_turn><eos>", True)]


@pytest.mark.parametrize(
    ("source", "answers"),
    [
        ("gemma_2b_en", False),
        ("gemma_instruct_2b_en", True),
        ("gemma_1.1_instruct_2b_en", True),
        ("gemma_tiny_instruct_en", True),
        ("./gemma-2-2b-it", True),
        ("hf://google/gemma-2-2b-it@main", True),
        ("hf://google/gemma-2-2b", False),
        ("./kitchen", False),
        ("runs/it/model", True),
        ("gemma2it", True),
        ("instruction-tuned", True),
        ("chatty", False),
        ("./my_gemma", False),
    ],
)
def test_whether_a_model_answers_is_told_by_its_name(source, answers):
    assert registry.is_instruct(source) == answers
