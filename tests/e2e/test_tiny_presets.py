"""The embedded tiny presets are real models: they answer, stop, remember and write.

The questions in presets/gemma_tiny_instruct_en_eval.jsonl were never trained on, in any
form: see tools/tiny_corpus_chat.py.
"""

import json
import pathlib
import re

import numpy as np
import pytest
from keras import ops

import gemma_keras

PRESETS = pathlib.Path(__file__).parents[2] / "presets"
LIMIT = 120  # tokens of an answer; the longest stories have about 110

# A right sentence, and the same with one mistake.
MINIMAL_PAIRS = [
    ("The dogs were hungry.", "The dogs was hungry."),
    ("The dog was hungry.", "The dog were hungry."),
    ("She has a red ball.", "She have a red ball."),
    ("They have a red ball.", "They has a red ball."),
    ("My brother lives near the lake.", "My brother live near the lake."),
    ("We live near the lake.", "We lives near the lake."),
    ("I am going to the park.", "I is going to the park."),
    ("The king is very old.", "The king are very old."),
    ("The boys are very tired.", "The boys is very tired."),
    ("He did not see the cat.", "He did not saw the cat."),
    ("She will go to the market.", "She will goes to the market."),
    ("He can sing.", "He can sings."),
    ("Anna wants to buy a hat.", "Anna wants to buys a hat."),
    ("The farmer has found the key.", "The farmer has find the key."),
    ("They have eaten the cake.", "They have ate the cake."),
    ("She had to clean the kitchen.", "She had to cleaned the kitchen."),
    ("Tom was reading a book.", "Tom was read a book."),
    ("An owl lived in the forest.", "A owl lived in the forest."),
    ("A bear lived in the forest.", "An bear lived in the forest."),
    ("He found an apple.", "He found a apple."),
    ("There are two birds on the roof.", "There are two bird on the roof."),
    ("There is a bird on the roof.", "There are a bird on the roof."),
    ("I saw many horses.", "I saw many horse."),
    ("The box was on the table.", "Box the was on the table."),
    ("She gave the book to him.", "She gave the book to he."),
    ("They visited us.", "They visited we."),
    ("Did you find the ring?", "Did you found the ring?"),
    ("Where does he live?", "Where does he lives?"),
    ("Mia lost her hat.", "Mia lost his hat."),
    ("Jack lost his hat.", "Jack lost her hat."),
    ("Yesterday, we went to the beach.", "Yesterday, we go to the beach."),
    ("The mouse is smaller than the cow.", "The mouse is small than the cow."),
    ("Nobody knows where the key is.", "Nobody know where the key is."),
    ("The story was told by my aunt.", "The story was tell by my aunt."),
    ("He put it under the bed.", "He put it the bed under."),
    ("Every child wants a kite.", "Every child want a kite."),
]


@pytest.fixture(scope="module")
def instruct():
    return gemma_keras.GemmaCausalLM.from_preset("gemma_tiny_instruct_en")


@pytest.fixture(scope="module")
def base():
    return gemma_keras.GemmaCausalLM.from_preset("gemma_tiny_en")


def answers_to(lm, conversations):
    """The model's own answers to the user turns of each, asked in batches."""
    histories = [[] for _ in conversations]
    for number in range(max(map(len, conversations))):
        asked = [i for i, turns in enumerate(conversations) if number < len(turns)]
        for i in asked:
            content = conversations[i][number]
            histories[i].append({"role": "user", "content": content})
        prompts = [histories[i] for i in asked]
        replies = lm.generate(prompts, max_new_tokens=LIMIT, strip_prompt=True)
        for i, reply in zip(asked, replies, strict=True):
            histories[i].append({"role": "assistant", "content": reply})
    return [[turn["content"] for turn in history[1::2]] for history in histories]


@pytest.fixture(scope="module")
def evaluation(instruct):
    """The held-out chats, and what the model answers to them."""
    lines = (PRESETS / "gemma_tiny_instruct_en_eval.jsonl").read_text().splitlines()
    chats = [json.loads(line) for line in lines]
    return chats, answers_to(instruct, [chat["turns"] for chat in chats])


def test_presets_are_gemma_1_and_small(base, instruct):
    assert base.config == instruct.config
    assert base.config.family == "gemma"
    assert 2e6 < base.config.num_parameters < 5e6
    sizes = [path.stat().st_size for path in PRESETS.glob("gemma_tiny*/*.h5")]
    assert len(sizes) == 2
    assert sum(sizes) < 16e6


def test_vocabulary_is_laid_out_as_gemma(base):
    tokenizer = base.preprocessor.tokenizer
    pieces = [tokenizer.id_to_token(i) for i in range(4)]
    assert pieces == ["<pad>", "<eos>", "<bos>", "<unk>"]
    turn_ends = tokenizer.token_to_id("<end_of_turn>")
    assert set(tokenizer.stop_token_ids) == {tokenizer.eos_token_id, turn_ends}
    for text in ("  two  spaces\n\n\nlines", "naïve 漢字 \U0001f600", "1234 + 5"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    digits = [tokenizer.id_to_token(i) for i in tokenizer.encode("1234")]
    assert digits == ["1", "2", "3", "4"]


def test_instruct_answers_held_out_questions(evaluation):
    chats, replies = evaluation
    assert len(chats) >= 300
    wrong = [
        (chat["turns"], answer)
        for chat, answer in zip(chats, replies, strict=True)
        if answer != chat["answers"]
    ]
    assert len(wrong) <= 0.05 * len(chats), wrong


def test_instruct_stops_by_itself(instruct, evaluation):
    tokenizer = instruct.preprocessor.tokenizer
    _, replies = evaluation
    stories = [f"Tell me a story about a {x}." for x in ("dog", "cat", "kite", "bear")]
    texts = [text for answers in replies for text in answers]
    told = answers_to(instruct, [[story] for story in stories])
    texts += [answers[0] for answers in told]
    for text in texts:
        assert text
        assert len(tokenizer.encode(text)) < LIMIT, text
        assert "<" not in text


def test_instruct_holds_a_two_turn_chat(instruct):
    chat = instruct.start_chat()
    assert "Clara" in chat.send("Hello, my name is Clara.")
    assert chat.send("What is my name?") == "Your name is Clara."
    chat = instruct.start_chat()
    assert chat.send("What is the capital of France?").endswith("is Paris.")
    assert chat.send("And of Spain?").endswith("is Madrid.")


def test_two_turn_chats_are_answered_right(evaluation):
    chats, replies = evaluation
    marks = [
        answer == chat["answers"]
        for chat, answer in zip(chats, replies, strict=True)
        if len(chat["turns"]) > 1
    ]
    assert len(marks) >= 60
    assert np.mean(marks) >= 0.95


def test_instruct_tells_a_story_about_what_was_asked(instruct):
    (dog,), (kite,) = answers_to(
        instruct, [["Tell me a story about a dog."], ["Write a story about a kite."]]
    )
    assert "dog" in dog
    assert "kite" in kite
    assert dog.count(".") >= 3


def log_likelihoods(lm, texts):
    """Sum of the log-probabilities of the tokens of each text."""
    tokenizer = lm.preprocessor.tokenizer
    rows = [tokenizer.encode(text, add_bos=True, add_eos=True) for text in texts]
    ids = np.zeros((len(rows), max(map(len, rows))), "int32")
    for row, values in enumerate(rows):
        ids[row, : len(values)] = values
    mask = ids != tokenizer.pad_token_id
    logits = ops.convert_to_numpy(lm({"token_ids": ids, "padding_mask": mask}))
    logits = logits[:, :-1].astype("float64")
    norm = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1))
    chosen = np.take_along_axis(logits, ids[:, 1:, None].astype("int64"), -1)[..., 0]
    log_probs = chosen - logits.max(-1) - norm
    return (log_probs * mask[:, 1:]).sum(-1)


def test_base_prefers_grammatical_sentences(base):
    right, wrong = zip(*MINIMAL_PAIRS, strict=True)
    better = log_likelihoods(base, right) > log_likelihoods(base, wrong)
    missed = [
        pair for pair, good in zip(MINIMAL_PAIRS, better, strict=True) if not good
    ]
    assert len(missed) <= 0.1 * len(MINIMAL_PAIRS), missed


def test_base_writes_sentences(base):
    starts = ["The old man", "One day,", "Once upon a time", "My sister", "She", ""]
    texts = base.generate(
        starts * 2, max_new_tokens=80, sampler="top_k", seed=7, stop_token_ids="auto"
    )
    for text in texts:
        assert re.match(r'["A-Z]', text), text
        # A sentence may be cut by the limit; all before it end properly.
        sentences = re.findall(r'[^.!?]+[.!?]"?', text)
        assert sentences, text
        assert all(re.fullmatch(r"[A-Za-z0-9 ,.!?'\"-]+", s) for s in sentences), text
    assert len(set(texts)) > 6
