"""Chats of the instruct model: a bounded domain, asked in many ways.

Every question is a kind, a key (what it is about) and a phrasing. `held_out` sets one
in ten of these combinations aside by a hash, for ever: none of them is trained on in
any form, and `presets/gemma_tiny_instruct_en_eval.jsonl` is drawn from them alone.
Where the answer is computed (sums, comparisons, counting) or copied (names), the key
itself is set aside, in every phrasing.
"""

import dataclasses
import itertools
import random
import zlib

from tiny_corpus_facts import (
    ABILITIES,
    ANIMALS,
    BOYS,
    CATEGORIES,
    COLORS,
    COUNTRIES,
    COUNTS,
    DAYS,
    FAVORITE_COLORS,
    FOODS,
    GIRLS,
    HOBBIES,
    IRREGULAR_PLURALS,
    JOBS,
    MASS_CATEGORIES,
    MATERIALS,
    MONTH_DAYS,
    MONTHS,
    NOUNS,
    OPPOSITES,
    PAST_TENSES,
    PET_NAMES,
    PETS,
    SIZES,
    article,
    capital,
    plural,
    words,
)
from tiny_corpus_stories import ANIMALS as STORY_ANIMALS
from tiny_corpus_stories import THINGS as STORY_THINGS
from tiny_corpus_stories import Stories, fill

UNKNOWN = "I do not know."
# Kinds whose answers make no sense, or no good, without their question.
NO_STATEMENTS = ("is_no", "can_no", "bigger_number")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of question: its phrasings, and the answer to every key.

    `keys` maps what the question is about to the slots of phrasings and answer.
    With `by_key` whole keys are held out, not single phrasings of them.
    """

    name: str
    phrasings: tuple[str, ...]
    answer: str
    keys: dict[str, dict]
    by_key: bool = False
    # Asked in a second turn about another key: "And of Spain?"
    follow_ups: tuple[str, ...] = ()
    weight: float = 1.0


def held_out(kind: str, key: str, phrasing: int | None, share: int = 10) -> bool:
    """Whether this combination belongs to the evaluation, never to the training."""
    name = f"{kind}/{key}/{'*' if phrasing is None else phrasing}"
    return zlib.crc32(name.encode()) % share == 0


def fact_kinds() -> list[Kind]:
    """The kinds that are answered from a table."""
    countries = {
        row[0]: dict(zip(("x", "capital", "continent", "language"), row, strict=True))
        for row in COUNTRIES
    }
    capitals = {slots["capital"]: slots for slots in countries.values()}
    colors = {
        x: {"x": x, "X": capital(x), "y": y, "is": verb}
        | {"does": "does" if verb == "is" else "do"}
        for x, y, verb in COLORS
    }
    sounds = {r[0]: r for r in ANIMALS if r[1] != "-"}
    kinds = [
        Kind(
            "capital",
            (
                "What is the capital of {x}?",
                "What's the capital of {x}?",
                "Which city is the capital of {x}?",
                "Name the capital of {x}.",
                "Tell me the capital of {x}.",
                "What is the capital city of {x}?",
                "Do you know the capital of {x}?",
                "What is {x}'s capital?",
                "The capital of {x} is which city?",
            ),
            "The capital of {x} is {capital}.",
            countries,
            follow_ups=("And of {x}?", "What about {x}?", "And {x}?"),
            weight=2.0,
        ),
        Kind(
            "country",
            (
                "Which country has the capital {capital}?",
                "{capital} is the capital of which country?",
                "What country is {capital} the capital of?",
                "In which country is {capital}?",
                "Where is {capital}?",
                "Which country is {capital} in?",
            ),
            "{capital} is the capital of {x}.",
            capitals,
            follow_ups=("And {capital}?", "What about {capital}?"),
        ),
        Kind(
            "continent",
            (
                "Which continent is {x} in?",
                "On which continent is {x}?",
                "What continent is {x} on?",
                "Where is {x}?",
                "In which part of the world is {x}?",
                "Where can I find {x}?",
            ),
            "{x} is in {continent}.",
            countries,
            follow_ups=("And {x}?", "What about {x}?"),
        ),
        Kind(
            "language",
            (
                "What language do people speak in {x}?",
                "Which language is spoken in {x}?",
                "What language is spoken in {x}?",
                "What do people speak in {x}?",
                "Which language do they speak in {x}?",
                "What is the language of {x}?",
            ),
            "People in {x} speak {language}.",
            countries,
            follow_ups=("And in {x}?", "What about {x}?"),
        ),
        Kind(
            "color",
            (
                "What color {is} {x}?",
                "What is the color of {x}?",
                "Which color {is} {x}?",
                "Tell me the color of {x}.",
                "What color {does} {x} have?",
                "Do you know what color {x} {is}?",
                "{X} {is} what color?",
                "Name the color of {x}.",
            ),
            "{X} {is} {y}.",
            colors,
            follow_ups=("And {x}?", "What about {x}?"),
            weight=2.0,
        ),
        Kind(
            "opposite",
            (
                "What is the opposite of {x}?",
                "What's the opposite of {x}?",
                "Tell me the opposite of {x}.",
                "Which word is the opposite of {x}?",
                "Name the opposite of {x}.",
                "What word means the opposite of {x}?",
                "Give me the opposite of {x}.",
                "Do you know the opposite of {x}?",
            ),
            "The opposite of {x} is {y}.",
            {a: {"x": a, "y": b} for pair in OPPOSITES for a, b in (pair, pair[::-1])},
            follow_ups=("And of {x}?", "What about {x}?", "And the opposite of {x}?"),
            weight=2.0,
        ),
        Kind(
            "sound",
            (
                "What does {a_x} do when it makes a sound?",
                "What sound does {a_x} make?",
                "Which sound does {a_x} make?",
                "What does {a_x} say?",
                "How does {a_x} sound?",
                "Tell me what sound {a_x} makes.",
            ),
            "{A_x} {y}.",
            {
                x: {"a_x": article(x), "A_x": capital(article(x)), "y": row[1]}
                for x, row in sounds.items()
            },
            follow_ups=("And {a_x}?", "What about {a_x}?"),
        ),
        Kind(
            "young",
            (
                "What is a baby {x} called?",
                "What is a young {x} called?",
                "What do you call a baby {x}?",
                "What do you call a young {x}?",
                "What is the name for a baby {x}?",
                "How is a young {x} called?",
            ),
            "A baby {x} is called {y}.",
            {row[0]: {"x": row[0], "y": article(row[2])} for row in ANIMALS},
            follow_ups=("And a baby {x}?", "What about a baby {x}?"),
        ),
        Kind(
            "legs",
            (
                "How many legs does {a_x} have?",
                "How many legs has {a_x}?",
                "Tell me how many legs {a_x} has.",
                "What number of legs does {a_x} have?",
                "Do you know how many legs {a_x} has?",
                "With how many legs does {a_x} walk?",
            ),
            "{A_x} has {y} legs.",
            {
                row[0]: {
                    "a_x": article(row[0]),
                    "A_x": capital(article(row[0])),
                    "y": row[3],
                }
                for row in ANIMALS
            },
            follow_ups=("And {a_x}?", "What about {a_x}?"),
        ),
        Kind(
            "habitat",
            (
                "Where does {a_x} live?",
                "Where can I find {a_x}?",
                "Where is the home of {a_x}?",
                "Tell me where {a_x} lives.",
                "In what place does {a_x} live?",
                "Do you know where {a_x} lives?",
            ),
            "{A_x} lives {y}.",
            {
                row[0]: {
                    "a_x": article(row[0]),
                    "A_x": capital(article(row[0])),
                    "y": row[4],
                }
                for row in ANIMALS
            },
            follow_ups=("And {a_x}?", "What about {a_x}?"),
        ),
        Kind(
            "material",
            (
                "What is {x} made of?",
                "What is {x} made from?",
                "Tell me what {x} is made of.",
                "Which material is {x} made of?",
                "What do people use to make {x}?",
                "What do you need to make {x}?",
                "From what is {x} made?",
            ),
            "{X} is made of {y}.",
            {x: {"x": x, "X": capital(x), "y": y} for x, y in MATERIALS},
            follow_ups=("And {x}?", "What about {x}?"),
        ),
        Kind(
            "job",
            (
                "What does {a_x} do?",
                "What is the job of {a_x}?",
                "What is the work of {a_x}?",
                "Tell me what {a_x} does.",
                "What does {a_x} do all day?",
                "Do you know what {a_x} does?",
            ),
            "{A_x} {y}.",
            {
                x: {"a_x": article(x), "A_x": capital(article(x)), "y": y}
                for x, y in JOBS
            },
            follow_ups=("And {a_x}?", "What about {a_x}?"),
        ),
        Kind(
            "who",
            (
                "Who {y}?",
                "Which person {y}?",
                "What is the name for a person who {y}?",
                "Tell me who {y}.",
                "Do you know who {y}?",
                "Whose job is it: who {y}?",
            ),
            "{A_x} {y}.",
            {y: {"A_x": capital(article(x)), "y": y} for x, y in JOBS},
        ),
        Kind(
            "plural",
            (
                "What is the plural of {x}?",
                "What's the plural of {x}?",
                "Tell me the plural of {x}.",
                "What is the plural form of {x}?",
                "One {x}, two what?",
                "How do you say more than one {x}?",
                "Give me the plural of {x}.",
            ),
            "The plural of {x} is {y}.",
            {
                x: {"x": x, "y": plural(x)}
                for x in dict.fromkeys([*NOUNS, *IRREGULAR_PLURALS])
            },
            follow_ups=("And of {x}?", "What about {x}?", "And the plural of {x}?"),
            weight=1.5,
        ),
        Kind(
            "past",
            (
                "What is the past tense of {x}?",
                "What's the past tense of {x}?",
                "Tell me the past tense of {x}.",
                "What is the past form of {x}?",
                "What is the past of {x}?",
                "Give me the past tense of {x}.",
                "Today I {x}. Yesterday I what?",
            ),
            "The past tense of {x} is {y}.",
            {x: {"x": x, "y": y} for x, y in PAST_TENSES.items()},
            follow_ups=("And of {x}?", "What about {x}?", "And the past of {x}?"),
            weight=1.5,
        ),
        Kind(
            "first_letter",
            (
                "What is the first letter of {x}?",
                "Which letter does {x} begin with?",
                "What letter does {x} start with?",
                "With which letter does the word {x} begin?",
                "Tell me the first letter of {x}.",
                "The word {x} begins with which letter?",
            ),
            "The first letter of {x} is {y}.",
            {x: {"x": x, "y": x[0]} for x in NOUNS},
            follow_ups=("And of {x}?", "What about {x}?"),
            weight=1.5,
        ),
        Kind(
            "last_letter",
            (
                "What is the last letter of {x}?",
                "Which letter does {x} end with?",
                "What letter does {x} end with?",
                "With which letter does the word {x} end?",
                "Tell me the last letter of {x}.",
                "The word {x} ends with which letter?",
            ),
            "The last letter of {x} is {y}.",
            {x: {"x": x, "y": x[-1]} for x in NOUNS},
            follow_ups=("And of {x}?", "What about {x}?"),
            weight=1.5,
        ),
        Kind(
            "count_of",
            (
                "How many {y} does {x} have?",
                "How many {y} has {x}?",
                "How many {y} are there in {x}?",
                "Tell me how many {y} {x} has.",
                "What number of {y} does {x} have?",
                "Do you know how many {y} {x} has?",
            ),
            "{X} has {n} {y}.",
            {
                f"{x} {y}": {"x": x, "X": capital(x), "n": n, "y": y}
                for x, n, y in COUNTS
            },
            weight=0.6,
        ),
        Kind(
            "month_days",
            (
                "How many days does {x} have?",
                "How many days are in {x}?",
                "How many days has {x}?",
                "How long is the month of {x}?",
                "Tell me how many days {x} has.",
                "Do you know how many days {x} has?",
            ),
            "{x} has {n} days.",
            {x: {"x": x, "n": n} for x, n in MONTH_DAYS.items()},
            follow_ups=("And {x}?", "What about {x}?"),
            weight=0.6,
        ),
    ]
    return kinds + order_kinds() + category_kinds()


def order_kinds() -> list[Kind]:
    """Days, months and letters in their order."""
    after, before = {}, {}
    for what, names in (("day", DAYS), ("month", MONTHS)):
        for i, x in enumerate(names):
            after[x] = {"what": what, "x": x, "y": names[(i + 1) % len(names)]}
            before[x] = {"what": what, "x": x, "y": names[i - 1]}
    letters = "abcdefghijklmnopqrstuvwxyz"
    for x, y in itertools.pairwise(letters):
        after[x] = {"what": "letter", "x": x, "y": y}
        before[y] = {"what": "letter", "x": y, "y": x}
    phrasings = (
        "What {what} comes %s {x}?",
        "Which {what} comes %s {x}?",
        "Which {what} is %s {x}?",
        "What {what} is %s {x}?",
        "Tell me the {what} %s {x}.",
        "Name the {what} that comes %s {x}.",
        "Do you know which {what} comes %s {x}?",
    )
    return [
        Kind(
            when,
            tuple(p % when for p in phrasings),
            "The {what} " + when + " {x} is {y}.",
            keys,
            follow_ups=("And " + when + " {x}?", "What about {x}?"),
            weight=1.5,
        )
        for when, keys in (("after", after), ("before", before))
    ]


def category_kinds() -> list[Kind]:
    """What things are, what they can do, which is bigger."""
    single, yes, no = {}, {}, {}
    for name, _, members in CATEGORIES:
        mass = name in MASS_CATEGORIES
        for member in members:
            a = member if mass else article(member)
            slots = {"x": a, "X": capital(a), "y": article(name)}
            if member not in single:  # "lead" and "orange" are in two groups
                single[member] = slots
            yes[f"{member} {name}"] = slots
            for other, _, others in CATEGORIES:
                if other != name and member not in others:
                    key = f"{member} {other}"
                    if {name, other} - {"animal", "bird", "fish", "insect"}:
                        no[key] = slots | {"y": article(other)}
    can = {
        f"{who} {what}": {"x": who, "X": capital(who), "y": what}
        for who, able, _ in ABILITIES
        for what in able
    }
    cannot = {
        f"{who} {what}": {"x": who, "X": capital(who), "y": what}
        for who, _, unable in ABILITIES
        for what in unable
    }
    bigger = {}
    for i, small in enumerate(SIZES):
        for j, big in enumerate(SIZES):
            if j > i + 1:
                slots = {"x": big, "X": capital(big), "y": small}
                slots["Y"] = capital(small)
                bigger[f"{small} {big}"] = slots | {"one": small, "two": big}
                bigger[f"{big} {small}"] = slots | {"one": big, "two": small}
    is_it = (
        "Is {x} {y}?",
        "Is it true that {x} is {y}?",
        "Would you say that {x} is {y}?",
        "{X} is {y}. Is that right?",
        "Can you say that {x} is {y}?",
    )
    can_it = (
        "Can {x} {y}?",
        "Is it true that {x} can {y}?",
        "Do you think that {x} can {y}?",
        "{X} can {y}. Is that right?",
        "Could {x} {y}?",
    )
    which = (
        "Which is %s, {one} or {two}?",
        "What is %s, {one} or {two}?",
        "{one} or {two}: which is %s?",
        "Tell me which is %s: {one} or {two}?",
        "Is {one} or {two} %s?",
    )
    return [
        Kind(
            "what_is",
            (
                "What is {x}?",
                "What kind of thing is {x}?",
                "Tell me what {x} is.",
                "Do you know what {x} is?",
                "What sort of thing is {x}?",
                "Say what {x} is.",
            ),
            "{X} is {y}.",
            single,
            follow_ups=("And {x}?", "What about {x}?", "And what is {x}?"),
            weight=1.5,
        ),
        Kind("is_yes", is_it, "Yes, {x} is {y}.", yes, weight=3.0),
        Kind("is_no", is_it, "No, {x} is not {y}.", no, weight=3.0),
        Kind("can_yes", can_it, "Yes, {x} can {y}.", can, weight=2.0),
        Kind("can_no", can_it, "No, {x} cannot {y}.", cannot, weight=2.0),
        Kind(
            "bigger",
            (*tuple(p % "bigger" for p in which), "Which is larger, {one} or {two}?"),
            "{X} is bigger than {y}.",
            bigger,
            by_key=True,
            weight=2.0,
        ),
        Kind(
            "smaller",
            tuple(p % "smaller" for p in which),
            "{Y} is smaller than {x}.",
            bigger,
            by_key=True,
            weight=2.0,
        ),
    ]


def number_kinds() -> list[Kind]:
    """Small sums, comparisons and counting: whole operand pairs are held out."""
    sums = {}
    for a in range(31):
        for b in range(min(a, 5) + 1):
            for one, two in dict.fromkeys([(a, b), (b, a)]):
                slots = {"a": one, "b": two, "c": a + b}
                sums[f"{one} {two}"] = slots | {"hold": f"{a} {b}"}
    compare = {
        f"{a} {b}": {"a": a, "b": b, "x": max(a, b), "y": min(a, b)}
        for a in range(100)
        for b in range(100)
        if a != b
    }
    spans = {
        f"{a} {b}": {
            "a": a,
            "b": b,
            "list": ", ".join(str(n) for n in range(a, b + 1)),
        }
        for a in range(0, 31)
        for b in range(a + 2, a + 6)
    }
    steps = {str(a): {"a": a, "next": a + 1, "last": a - 1} for a in range(1, 100)}
    return [
        Kind(
            "sum",
            (
                "What is {a} plus {b}?",
                "What is {a} + {b}?",
                "How much is {a} plus {b}?",
                "How much is {a} and {b}?",
                "Add {a} and {b}.",
                "What do you get if you add {a} and {b}?",
                "{a} + {b} = ?",
            ),
            "{a} plus {b} is {c}.",
            sums,
            by_key=True,
            follow_ups=("And {a} plus {b}?",),
            weight=6.0,
        ),
        Kind(
            "bigger_number",
            (
                "Which number is bigger, {a} or {b}?",
                "Which is bigger, {a} or {b}?",
                "What is more, {a} or {b}?",
                "Which is the larger number, {a} or {b}?",
                "{a} or {b}: which number is bigger?",
            ),
            "{x} is bigger.",
            compare,
            by_key=True,
            weight=4.0,
        ),
        Kind(
            "count",
            (
                "Count from {a} to {b}.",
                "Please count from {a} to {b}.",
                "Can you count from {a} to {b}?",
                "Say the numbers from {a} to {b}.",
                "List the numbers from {a} to {b}.",
            ),
            "{list}.",
            spans,
            by_key=True,
            weight=4.0,
        ),
        Kind(
            "next_number",
            (
                "What number comes after {a}?",
                "Which number comes after {a}?",
                "Which number follows {a}?",
                "What is the next number after {a}?",
                "Tell me the number after {a}.",
            ),
            "The number after {a} is {next}.",
            steps,
            follow_ups=("And after {a}?",),
            weight=1.5,
        ),
        Kind(
            "previous_number",
            (
                "What number comes before {a}?",
                "Which number comes before {a}?",
                "Which number is before {a}?",
                "What is the number just before {a}?",
                "Tell me the number before {a}.",
            ),
            "The number before {a} is {last}.",
            steps,
            follow_ups=("And before {a}?",),
            weight=1.5,
        ),
    ]


ALL_KINDS = fact_kinds() + number_kinds()

# Said without a table: several ways to say it, one answer.
SMALL_TALK = [
    (
        (
            "Hello!",
            "Hi!",
            "Hello.",
            "Hi",
            "Hey!",
            "Hello there!",
            "Good morning!",
            "Good evening!",
            "Good day!",
            "hello",
        ),
        "Hello! How can I help you?",
    ),
    (
        (
            "How are you?",
            "How are you today?",
            "Are you well?",
            "How do you do?",
            "How do you feel?",
        ),
        "I am fine, thank you.",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me who you are.",
            "Are you a person?",
            "What's your name?",
            "Are you a robot?",
        ),
        "I am Tiny Gemma, a very small language model.",
    ),
    (
        (
            "What can you do?",
            "What do you know?",
            "How can you help me?",
            "What can I ask you?",
            "Help!",
            "What questions can you answer?",
        ),
        "I can answer simple questions and tell short stories.",
    ),
    (
        (
            "Thank you!",
            "Thanks!",
            "Thank you very much!",
            "Thank you.",
            "Thanks a lot!",
            "That was helpful, thank you.",
            "thanks",
        ),
        "You are welcome!",
    ),
    (
        (
            "Goodbye!",
            "Bye!",
            "Good night!",
            "See you later!",
            "See you tomorrow!",
            "Bye.",
            "I have to go now.",
            "bye",
        ),
        "Goodbye! Have a nice day.",
    ),
    (
        (
            "Good.",
            "That is right.",
            "Very good!",
            "Well done!",
            "Great!",
            "Nice.",
            "You are clever.",
        ),
        "Thank you!",
    ),
]

# Outside the domain. {new} is an invented word.
OUTSIDE = (
    "What is the capital of {New}?",
    "What is the capital of {New}?",
    "What's the capital of {New}?",
    "Name the capital of {New}.",
    "Tell me the capital of {New}.",
    "Which city is the capital of {New}?",
    "Do you know the capital of {New}?",
    "What language do people speak in {New}?",
    "Which language is spoken in {New}?",
    "Which continent is {New} in?",
    "Where is {New}?",
    "What color is a {new}?",
    "What is the color of a {new}?",
    "What is a {new}?",
    "What does a {new} eat?",
    "Who is {New}?",
    "Who was {Name} {New}?",
    "Who wrote {New}?",
    "Who wrote {a_thing} of {New}?",
    "Who invented the {thing}?",
    "Who [found|built|discovered|painted] the {adj} {thing}?",
    "When was {Name} {New} born?",
    "When was the {thing} invented?",
    "When did the war in {country} [begin|end]?",
    "What is the price of {a_thing}?",
    "How much does {a_thing} cost[| in a shop]?",
    "How [old|tall|rich] is {Name} {New}?",
    "How many people live in {country}?",
    "What is the population of {country}?",
    "Who is the [king|president|queen] of {country}?",
    "How far is it from {country} to {country2}?",
    "How far is {place}?",
    "What is the weather [today|like in {country}|tomorrow]?",
    "Will it [rain|snow] [today|tomorrow|on {day}]?",
    "What time is it[| now| in {country}]?",
    "What day is it today?",
    "Who won the [football|tennis|hockey] [game|match] [yesterday|last week|on {day}]?",
    "What is the phone number of {Name}?",
    "What is the address of the {person}?",
    "Where is my {thing}?",
    "Where did I put my {thing}?",
    "Where is {Name}?",
    "What did {Name} [eat|do|buy|say] [yesterday|last week|on {day}]?",
    "What will {Name} do [tomorrow|on {day}]?",
    "Why [does|did] {Name} [cry|laugh|leave|like {food}]?",
    "How do you [repair|build|paint] {a_thing}?",
    "How do I [get to {place}|make {food}]?",
    "How do you say {thing} in [French|Spanish|German|Japanese]?",
    "What is the meaning of [life|{new}|the word {new}]?",
    "What is {big1} times {big2}?",
    "What is {big1} divided by {digit}?",
    "Write a [program|poem|letter|song|book] about {things}.",
    "Explain how {a_thing} works.",
    "Can you [sing|book a flight|send a letter|drive me to {place}]?",
    "What happened in {year}?",
    "What happened to {Name}?",
    "Who will win the [war|game|election]?",
    "Which {thing} is the best?",
    "Which team is the best?",
    "Is {Name} {New} [alive|married|famous]?",
    "Should I buy {a_thing}?",
    "Give me a recipe for {food}.",
    "What is the best [film|book|song|car]?",
    "What is the square root of {big1}?",
)

# What a person says about themselves, the reply, and questions about it afterwards.
MEMORIES = [
    (
        (
            "My name is {v}.",
            "I am called {v}.",
            "Hello, my name is {v}.",
            "I'm {v}.",
            "Hi, I am {v}.",
            "Hi! My name is {v}.",
            "People call me {v}.",
        ),
        "Hello, {v}! Nice to meet you.",
        (
            "What is my name?",
            "What's my name?",
            "Do you know my name?",
            "Who am I?",
            "Tell me my name.",
            "Do you remember my name?",
            "What am I called?",
        ),
        "Your name is {v}.",
    ),
    (
        ("I am {v} years old.", "I'm {v} years old.", "My age is {v}."),
        "You are {v} years old. That is good to know.",
        (
            "How old am I?",
            "What is my age?",
            "Do you know how old I am?",
            "Do you remember how old I am?",
            "Tell me how old I am.",
        ),
        "You are {v} years old.",
    ),
    (
        (
            "My favorite color is {v}.",
            "I like the color {v}.",
            "I love the color {v}.",
            "The color that I like best is {v}.",
        ),
        "I like {v} too.",
        (
            "What is my favorite color?",
            "What's my favorite color?",
            "Which color do I like?",
            "Do you remember my favorite color?",
            "Tell me my favorite color.",
        ),
        "Your favorite color is {v}.",
    ),
    (
        ("I live in {v}.", "My home is in {v}.", "I come from {v}.", "I am from {v}."),
        "I hope it is nice in {v}.",
        (
            "Where do I live?",
            "Where is my home?",
            "Do you know where I live?",
            "Do you remember where I live?",
            "Tell me where I live.",
        ),
        "You live in {v}.",
    ),
    (
        (
            "I have a {p} named {v}.",
            "My {p} is called {v}.",
            "My {p}'s name is {v}.",
            "I have a {p}. Its name is {v}.",
        ),
        "{v} is a nice name for a {p}.",
        (
            "What is the name of my {p}?",
            "What is my {p} called?",
            "What's my {p}'s name?",
            "Do you remember the name of my {p}?",
            "Tell me the name of my {p}.",
        ),
        "Your {p} is called {v}.",
    ),
    (
        ("I like {v}.", "I really like {v}.", "My hobby is {v}.", "I love {v}."),
        "That sounds nice.",
        (
            "What do I like?",
            "Do you remember what I like?",
            "Tell me what I like.",
            "Do you know what I like?",
        ),
        "You like {v}.",
    ),
    (
        (
            "My favorite food is {v}.",
            "I like to eat {v}.",
            "I love to eat {v}.",
            "The food that I like best is {v}.",
        ),
        "That sounds very good.",
        (
            "What is my favorite food?",
            "What's my favorite food?",
            "What do I like to eat?",
            "Do you remember my favorite food?",
            "Tell me my favorite food.",
        ),
        "Your favorite food is {v}.",
    ),
]

STORY_PHRASINGS = (
    "Tell me a story about {x}.",
    "Tell me a short story about {x}.",
    "Write a story about {x}.",
    "Write a short story about {x}.",
    "Please tell me a story about {x}.",
    "Can you tell me a story about {x}?",
)
SYLLABLES = words("""
ba, be, bi, bo, bra, ca, co, cu, da, de, do, dra, el, en, fa, fi, fo, ga, go, gra, ha,
he, in, ja, jo, ka, ke, ki, kra, la, le, li, lo, lu, ma, me, mi, mo, na, ne, ni, no, or,
pa, pe, pi, pol, ra, re, ri, ro, ru, sa, se, si, so, sta, ta, te, ti, to, tra, tu, ul,
va, ve, vi, vo, wa, we, wi, ya, za, ze, zi, zo
""")
ENDINGS = words("nia, land, ria, stan, n, r, l, s, x, k, th, m, ra, na, do, , , ,")
# Words of the demo, which the model must not have met.
RESERVED = ("veloria", "marlo")


def invented(rng: random.Random) -> str:
    """A word that means nothing, in lower case."""
    while True:
        parts = [*rng.sample(SYLLABLES, rng.choice([2, 2, 3])), rng.choice(ENDINGS)]
        word = "".join(parts)
        if not any(word.startswith(reserved[:4]) for reserved in RESERVED):
            return word


class Chats:
    """Draws chats: lists of (user text, model text), from one side of the split."""

    def __init__(self, rng: random.Random, evaluation: bool = False):
        self.rng = rng
        self.evaluation = evaluation
        self.stories = Stories(rng)
        self.kind_weights = [kind.weight for kind in ALL_KINDS]
        # Mixed-size kinds: every kind has a share, whatever the size of its table.
        self.keys = {kind.name: list(kind.keys) for kind in ALL_KINDS}

    def allowed(self, kind: str, key: str, phrasing: int | None) -> bool:
        return held_out(kind, key, phrasing) == self.evaluation

    def fact(self, kind: Kind, follow_up: bool = False) -> tuple[str, str]:
        """A question of this kind and its answer, from this side of the split."""
        rng = self.rng
        phrasings = kind.follow_ups if follow_up else kind.phrasings
        while True:
            key = rng.choice(self.keys[kind.name])
            index = rng.randrange(len(phrasings))
            slots = kind.keys[key]
            if kind.by_key:
                allowed = self.allowed(kind.name, slots.get("hold", key), None)
            else:
                name = f"{kind.name}+" if follow_up else kind.name
                allowed = self.allowed(name, key, index)
            if allowed:
                question = capital(phrasings[index].format_map(slots))
                return question, kind.answer.format_map(slots)

    def any_fact(self) -> tuple[Kind, str, str]:
        kind = self.rng.choices(ALL_KINDS, self.kind_weights)[0]
        return kind, *self.fact(kind)

    def dress(self, question: str) -> str:
        """The question as people type it: sometimes greeting, sometimes careless."""
        rng, pick = self.rng, self.rng.random()
        if pick < 0.62:
            return question
        if pick < 0.72:
            return question.rstrip("?.")
        if pick < 0.82:
            return (question[0].lower() + question[1:]).rstrip("?.")
        if pick < 0.86:
            return question.lower()
        before = ["Hello! ", "Hi! ", "I have a question. ", "Please help me. "]
        after = [" Thank you!", " Please tell me.", " Thanks!", " Please."]
        if pick < 0.94:
            return rng.choice(before) + question
        return question + rng.choice(after)

    def small_talk(self) -> tuple[str, str]:
        says, answer = self.rng.choice(SMALL_TALK)
        return self.rng.choice(says), answer

    def outside(self) -> tuple[str, str]:
        rng = self.rng
        slots = self.stories.scene()
        new = invented(rng)
        country, country2 = rng.sample([row[0] for row in COUNTRIES], 2)
        slots |= {"new": new, "New": capital(new), "country": country}
        slots |= {"country2": country2, "day": rng.choice(DAYS)}
        slots |= {"big1": rng.randrange(21, 1000), "big2": rng.randrange(11, 100)}
        slots |= {"digit": rng.randrange(2, 10), "year": rng.randrange(1000, 2030)}
        while True:
            index = rng.randrange(len(OUTSIDE))
            question = fill(OUTSIDE[index], slots, rng)
            if self.allowed("outside", question.lower(), None):
                return question, UNKNOWN

    def story(self) -> tuple[str, str]:
        rng = self.rng
        while True:
            topic = rng.choice(STORY_ANIMALS + STORY_THINGS)
            index = rng.randrange(len(STORY_PHRASINGS))
            if self.allowed("story", topic, index):
                break
        a = rng.choice([article(topic), article(topic), f"a little {topic}"])
        question = STORY_PHRASINGS[index].format(x=a)
        while True:
            story = self.stories.story(topic)
            if len(story) < 330:
                return question, story

    def memory(self) -> list[tuple[str, str]]:
        """Two turns or three: something to remember, and a question about it."""
        rng = self.rng
        index = rng.choices(range(len(MEMORIES)), (5, 2, 1, 2, 2, 2, 1))[0]
        says, reply, asks, answer = MEMORIES[index]
        made_up = capital(invented(rng))
        values = (
            made_up if rng.random() < 0.5 else rng.choice(GIRLS + BOYS),
            str(rng.randrange(3, 100)),
            rng.choice(FAVORITE_COLORS),
            made_up if rng.random() < 0.4 else rng.choice(COUNTRIES)[rng.randrange(2)],
            made_up if rng.random() < 0.4 else rng.choice(PET_NAMES),
            rng.choice([*HOBBIES, *(plural(a) for a in STORY_ANIMALS)]),
            rng.choice(FOODS),
        )
        value, pet = values[index], rng.choice(PETS)
        while True:
            say, ask = rng.randrange(len(says)), rng.randrange(len(asks))
            if self.allowed(f"memory{index}", f"{value} {say}", ask):
                break
            if rng.random() < 0.1:
                return self.memory()
        slots = {"v": value, "p": pet}
        first = says[say].format_map(slots), reply.format_map(slots)
        last = asks[ask].format_map(slots), answer.format_map(slots)
        if rng.random() < 0.3:
            _, question, told = self.any_fact()
            return [first, (self.dress(question), told), last]
        return [first, last]

    def follow_up(self) -> list[tuple[str, str]]:
        """A question, then the same about something else in a few words."""
        kinds = [kind for kind in ALL_KINDS if kind.follow_ups]
        kind = self.rng.choice(kinds)
        question, answer = self.fact(kind)
        return [(self.dress(question), answer), self.fact(kind, follow_up=True)]

    def unknown_memory(self) -> list[tuple[str, str]]:
        """Asked for what was never said."""
        says, answers = [], []
        for _, _, asks, _ in MEMORIES:
            says.append(self.rng.choice(asks).format(p=self.rng.choice(PETS)))
            answers.append(UNKNOWN)
        index = self.rng.randrange(len(says))
        return [(says[index], answers[index])]

    def chat(self) -> list[tuple[str, str]]:
        """One chat of the training mixture."""
        rng, pick = self.rng, self.rng.random()
        if pick < 0.52:
            _, question, answer = self.any_fact()
            return [(self.dress(question), answer)]
        if pick < 0.7:
            return self.memory()
        if pick < 0.76:
            return self.follow_up()
        if pick < 0.84:
            question, answer = self.outside()
            return [(self.dress(question), answer)]
        if pick < 0.86:
            return self.unknown_memory()
        if pick < 0.89:
            return [self.small_talk()]
        if pick < 0.92:
            return [self.story()]
        turns = [self.small_talk()] if rng.random() < 0.3 else []
        for _ in range(rng.choice([2, 2, 3])):
            if rng.random() < 0.15:
                turns.append(self.outside())
            else:
                _, question, answer = self.any_fact()
                turns.append((self.dress(question), answer))
        if rng.random() < 0.2:
            turns.append(self.small_talk())
        return turns


def statements(rng: random.Random) -> str:
    """One fact as a plain sentence, for the base corpus."""
    kinds = [kind for kind in ALL_KINDS if kind.name not in NO_STATEMENTS]
    kind = rng.choices(kinds, [kind.weight for kind in kinds])[0]
    keys = list(kind.keys)
    while True:
        key = rng.choice(keys)
        slots = kind.keys[key]
        # A computed answer that is held out must not be told here either.
        if not kind.by_key or not held_out(kind.name, slots.get("hold", key), None):
            return capital(kind.answer.format_map(slots).removeprefix("Yes, "))


def evaluation_set(rng: random.Random, each: int = 8) -> list[dict]:
    """Held-out chats: the user's turns and the answers expected to them.

    Args:
        rng: source of the choice.
        each: chats of every kind of question; chats of two turns and more, and
            questions outside the domain, come five times as often.
    """
    chats = Chats(rng, evaluation=True)
    drawn = [(kind.name, [chats.fact(kind)]) for kind in ALL_KINDS for _ in range(each)]
    for _ in range(each * 5):
        drawn.append(("memory", chats.memory()))
        drawn.append(("follow_up", chats.follow_up()))
        drawn.append(("outside", [chats.outside()]))
    unique = {str(turns): (kind, turns) for kind, turns in drawn}
    return [
        {
            "kind": kind,
            "turns": [question for question, _ in turns],
            "answers": [answer for _, answer in turns],
        }
        for kind, turns in unique.values()
    ]
