"""Simple English, generated: sentences that agree, and stories that hold together.

A template holds `{slots}`, filled from a scene, and `[one|another]` choices, which may
be nested. The same names, pets and things run through a story, so that a model
trained on it learns who "she" is.
"""

import random
import re

from tiny_corpus_facts import (
    BOYS,
    FOODS,
    GIRLS,
    JOBS,
    PAST_TENSES,
    PET_NAMES,
    article,
    capital,
    plural,
    rows,
    words,
)

ADJECTIVES = words("""
big, small, old, new, red, blue, green, yellow, white, black, brown, pretty, nice,
beautiful, strange, heavy, little, tiny, round, long, clean, dirty, soft, golden,
wooden, bright, cheap, expensive, lovely
""")
MOODS = words("""
happy, sad, tired, angry, hungry, thirsty, afraid, proud, surprised, bored, excited,
lonely, calm, worried, cold, sleepy, glad, busy, nervous, curious
""")
TRAITS = words("""
kind, clever, brave, shy, quiet, funny, lazy, friendly, honest, careful, strong, young,
old, polite, gentle, stubborn, cheerful, wise, patient, noisy
""")
THINGS = words("""
ball, book, kite, doll, hat, coat, lamp, cup, basket, box, ring, key, coin, picture,
clock, mirror, bag, bottle, drum, bell, letter, map, blanket, umbrella, bicycle, boat,
stone, shell, flower, apple, candle, scarf, chair, pencil, camera, toy, button, rope,
violin, telescope
""")
ANIMALS = words("""
dog, cat, rabbit, duck, horse, cow, goat, sheep, mouse, fox, frog, bird, owl, bear,
pony, hen, turtle, squirrel, pig, puppy, kitten, parrot, donkey, hedgehog
""")
PLACES = words("""
the park, the garden, the forest, the beach, the river, the lake, the market, the farm,
the school, the library, the village, the old bridge, the playground, the hill,
the station, the museum, the harbor, the field, the big city, the castle
""")
ROOMS = words("""
the kitchen, the bedroom, the garden, the hall, the living room, the attic, the cellar,
the garage, the bathroom, the yard
""")
SPOTS = words("""
under the bed, behind the door, on the roof, in the kitchen, under the table,
in the garden, behind the sofa, in a drawer, on the shelf, under a tree, in the grass,
next to the well, in the attic, on the stairs, in an old box, beside the road
""")
PEOPLE = words("""
teacher, doctor, farmer, baker, king, queen, girl, boy, man, woman, neighbor, driver,
sailor, nurse, painter, policeman, cook, singer, child, student, shepherd, writer,
captain, gardener, soldier, princess, prince, hunter, fisherman
""")
FAMILY = words("""
mother, father, brother, sister, grandmother, grandfather, uncle, aunt, cousin
""")
WOMEN = words("queen, girl, woman, nurse, princess, grandmother, mother, sister, aunt")
MEN = words("king, boy, man, policeman, prince, fisherman, father, brother, uncle")
TIMES = words("""
one day, one morning, one evening, one afternoon, on Sunday, last week, yesterday,
last summer, last winter, on a warm spring day, in the autumn, last night, on Saturday,
this morning, a long time ago, on Monday
""")
WEATHER = words("sunny, rainy, cold, warm, windy, hot, foggy, snowy, cloudy, beautiful")
ADVERBS = words("""
slowly, quickly, quietly, carefully, happily, loudly, softly, suddenly, gently, proudly,
patiently, often, always, never, sometimes
""")
MATTERS = words("""
music, history, the weather, school, football, animals, the sea, old stories, the moon,
flowers, ships, money, trains, the war, their holidays, the news
""")
DISHES = [*FOODS, *words("an apple, a sandwich, an egg, some fruit, a piece of pie")]
DRINKS = words(
    "water, milk, tea, coffee, juice, lemonade, hot chocolate, a glass of milk"
)
WRITINGS = words(
    "a book, a letter, the newspaper, a story, a poem, a long report, a note"
)

# Verb, the slot of what may follow it ("-": nothing).
FRAMES = rows("""
eat, dish; eat, dish; drink, drink; read, writing; write, writing; see, thing;
see, creature; see, person; find, thing; buy, thing; sell, thing; take, thing;
make, thing; carry, thing; want, thing; like, creature; like, dish; love, family;
love, matter; talk, about matter; think, about matter; know, person; help, person;
meet, person; call, person; ask, person; visit, person; follow, creature;
feed, creature; watch, creature; hear, creature; catch, creature; walk, to place;
go, to place; run, to place; drive, to place; come, from place; live, near place;
work, in place; wait, in place; play, in place; sleep, spot; sit, spot; hide, spot;
hide, thing spot; put, thing spot; leave, thing spot; look, for thing; look, at thing;
listen, to person; bring, thing to place; give, thing to person; show, thing to person;
send, thing to person; clean, room; paint, room; open, thing; wash, thing;
lose, thing; draw, creature; tell, person a story; play, with creature;
speak, with person; dance, with person; cook, dish; smile, -; laugh, -; sing, -;
cry, -; wait, for person; need, thing; forget, thing; break, thing; hold, thing;
build, a house near place; study, matter; learn, about matter; fall, asleep;
wake, up early; get, up late; travel, to place; swim, in the lake; climb, a tree
""")
PARTICIPLES = dict(
    rows("""
eat, eaten; drink, drunk; write, written; see, seen; take, taken; know, known; go, gone;
run, run; drive, driven; come, come; hide, hidden; give, given; show, shown;
draw, drawn; speak, spoken; sing, sung; forget, forgotten; break, broken; fall, fallen;
wake, woken; get, gotten; swim, swum
""")
)
PASTS = {**PAST_TENSES, "feed": "fed", "get": "got", "study": "studied"}
PASTS |= {"travel": "traveled", "visit": "visited", "listen": "listened"}
DOUBLED = words("run, sit, put, get, swim, stop, cut, win, dig")
# Verbs that do not go into "is ...ing".
STATIVE = words("like, love, want, know, need, see, hear, forget, find, lose")

CHOICE = re.compile(r"\[([^\[\]]*)\]")


def fill(template: str, slots: dict, rng: random.Random) -> str:
    """Take one of each `[a|b]`, innermost first, then fill the `{slots}`."""
    while match := CHOICE.search(template):
        option = rng.choice(match.group(1).split("|"))
        template = template[: match.start()] + option + template[match.end() :]
    return template.format_map(slots)


def third_person(verb: str) -> str:
    """go -> goes."""
    if verb.endswith(("s", "x", "ch", "sh", "o")):
        return verb + "es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ies"
    return verb + "s"


def past(verb: str) -> str:
    """go -> went."""
    if verb in PASTS:
        return PASTS[verb]
    return verb + ("d" if verb.endswith("e") else "ed")


def participle(verb: str) -> str:
    """go -> gone."""
    return PARTICIPLES.get(verb, past(verb))


def progressive(verb: str) -> str:
    """run -> running."""
    if verb in DOUBLED:
        return verb + verb[-1] + "ing"
    if verb.endswith("e") and not verb.endswith("ee"):
        return verb[:-1] + "ing"
    return verb + "ing"


class Sentences:
    """Single sentences: one subject, one verb that agrees, objects that make sense."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def noun_phrase(self, noun: str) -> str:
        """a small dog, the dog, my dog, two dogs ..."""
        pick = self.rng.random()
        adjective = self.rng.choice(ADJECTIVES) + " " if pick < 0.35 else ""
        kind = self.rng.random()
        if kind < 0.35:
            return article(adjective + noun)
        if kind < 0.65:
            return f"the {adjective}{noun}"
        if kind < 0.88:
            owner = self.rng.choice(["my", "your", "his", "her", "our", "their"])
            return f"{owner} {adjective}{noun}"
        count = self.rng.choice(["two", "three", "some", "many", "four", "a lot of"])
        return f"{count} {adjective}{plural(noun)}"

    def person(self) -> str:
        pick = self.rng.random()
        if pick < 0.3:
            return self.rng.choice(GIRLS + BOYS)
        if pick < 0.5:
            owner = self.rng.choice(["my", "your", "his", "her", "our"])
            return f"{owner} {self.rng.choice(FAMILY)}"
        if pick < 0.65:
            return self.rng.choice(["me", "him", "her", "us", "them", "you"])
        trait = self.rng.choice(TRAITS) + " " if pick < 0.8 else ""
        return f"the {trait}{self.rng.choice(PEOPLE)}"

    def subject(self) -> tuple[str, str]:
        """The subject and its grammatical person: I, you, it or they."""
        pick = self.rng.random()
        if pick < 0.4:
            pronoun = self.rng.choice(
                ["I", "you", "he", "she", "he", "she", "we", "they"]
            )
            if pronoun in ("he", "she"):
                return pronoun, "it"
            return pronoun, {"we": "they", "I": "I"}.get(pronoun, pronoun)
        if pick < 0.6:
            return self.rng.choice(GIRLS + BOYS), "it"
        if pick < 0.65:
            one, two = self.rng.sample(GIRLS + BOYS, 2)
            return f"{one} and {two}", "they"
        if pick < 0.75:
            return f"my {self.rng.choice(FAMILY)}", "it"
        trait = self.rng.choice(TRAITS) + " " if pick < 0.87 else ""
        person = self.rng.choice(PEOPLE)
        if pick > 0.94:
            return f"the {trait}{plural(person)}", "they"
        return f"the {trait}{person}", "it"

    def complement(self, frame: str) -> str:
        rng = self.rng
        makers = {
            "dish": lambda: rng.choice(DISHES),
            "drink": lambda: rng.choice(DRINKS),
            "writing": lambda: rng.choice(WRITINGS),
            "thing": lambda: self.noun_phrase(rng.choice(THINGS)),
            "creature": lambda: self.noun_phrase(rng.choice(ANIMALS)),
            "person": self.person,
            "family": lambda: f"[his|her|my|our] {rng.choice(FAMILY)}",
            "matter": lambda: rng.choice(MATTERS),
            "place": lambda: rng.choice(PLACES),
            "spot": lambda: rng.choice(SPOTS),
            "room": lambda: rng.choice(ROOMS),
            "-": lambda: "",
        }
        parts = [makers[w]() if w in makers else w for w in frame.split()]
        return fill(" ".join(parts), {}, rng).strip()

    def predicate(self, verb: str, person: str) -> str:
        """The verb in a random tense, agreeing with the person."""
        single = person == "it"
        was = "was" if person in ("it", "I") else "were"
        present = {"it": "is", "I": "am"}.get(person, "are")
        forms = [
            past(verb),
            past(verb),
            past(verb),
            third_person(verb) if single else verb,
            f"will {verb}",
            f"{was} {progressive(verb)}",
            f"{present} {progressive(verb)}",
            f"{'has' if single else 'have'} {participle(verb)}",
            f"did not {verb}",
            f"{'does' if single else 'do'} not {verb}",
            f"[can|must|should|could|cannot|will not|may|would like to] {verb}",
            f"{'wants' if single else 'want'} to {verb}",
            f"wanted to {verb}",
            f"had to {verb}",
            f"{present} going to {verb}",
        ]
        if verb in STATIVE:
            forms = [form for form in forms if not form.endswith(progressive(verb))]
        return fill(self.rng.choice(forms), {}, self.rng)

    def clause(self) -> str:
        """A clause without its capital letter and full stop."""
        subject, person = self.subject()
        verb, frame = self.rng.choice(FRAMES)
        rest = self.complement(frame)
        return " ".join(f"{subject} {self.predicate(verb, person)} {rest}".split())

    def question(self) -> str:
        subject, person = self.subject()
        verb, frame = self.rng.choice(FRAMES)
        rest = self.complement(frame)
        does = "does" if person == "it" else "do"
        starts = [
            f"Did {subject} {verb} {rest}?",
            f"{capital(does)} {subject} {verb} {rest}?",
            f"Why did {subject} {verb} {rest}?",
            f"When will {subject} {verb} {rest}?",
            f"Can {subject} {verb} {rest}?",
        ]
        return " ".join(self.rng.choice(starts).split()).replace(" ?", "?")

    def sentence(self) -> str:
        """One finished sentence."""
        rng = self.rng
        pick = rng.random()
        if pick < 0.45:
            return capital(self.clause()) + "."
        if pick < 0.55:
            return f"{capital(rng.choice(TIMES))}, {self.past_clause()}."
        if pick < 0.63:
            link = rng.choice(["because", "when", "while", "before", "after"])
            return f"{capital(self.past_clause())} {link} {self.past_clause()}."
        if pick < 0.7:
            link = rng.choice([", but", " and", ", so"])
            return f"{capital(self.past_clause())}{link} {self.past_clause()}."
        if pick < 0.78:
            return self.question()
        return fill(rng.choice(self.PATTERNS), self.slots(), rng)

    def past_clause(self) -> str:
        subject, _ = self.subject()
        verb, frame = self.rng.choice(FRAMES)
        return " ".join(f"{subject} {past(verb)} {self.complement(frame)}".split())

    PATTERNS = (
        "There [is|was] {a_thing} {spot}.",
        "There [are|were] [two|three|many|some] {things} {spot}.",
        "{The_person} [is|was|looks|seems] [very|quite|so|a little] {mood}.",
        "{The_person} is [older|younger|taller|kinder|faster] than {name}.",
        "{Name} is the [oldest|youngest|tallest|kindest] child in the [class|family].",
        "{The_animal} [ran|walked|jumped|slept|hid] {spot}.",
        "It [is|was|will be] {weather} [today|in the morning|near the sea|there].",
        "If it is {weather}, we will [stay at home|go to {place}|play outside].",
        "The {adj} {thing} [is|was|stood|lay] {spot}.",
        "This is [my|your|his|her|our] {adj} {thing}.",
        "These are [my|your|his|her|our] {adj} {things}.",
        "[My|His|Her|Our] {family} is a [good|famous|young|old] {person}.",
        '"[Where is|Do you like|Have you seen] my {thing}?" asked {name}.',
        '"I am {mood}," said {name}.',
        '"[Please|Do not] [come here|sit down|open the door|wait]," said the {person}.',
        "Where [is|was] the {adj} {thing}?",
        "Who [took|found|bought|made|broke] the {adj} {thing}?",
        "How [old|big|heavy|expensive] is your {thing}?",
        "What did {name} [see|find|lose|hear] near {place}?",
        "The {thing} was [found|made|sold|lost|stolen] by {the_person}.",
        "{Name} has a {adj} {thing} and a {adj2} {thing2}.",
        "The {person} who lives near {place} has [two|three|many] {animals}.",
        "I think that {name} is [very|too|really] {mood}.",
        "{Name} said that {he} was {mood}.",
        "{The_animal} is [bigger|smaller|older|faster] than {the_animal2}.",
        "Nobody knows where the {adj} {thing} is.",
        "[Every|Each] {person} near {place} [has|wants|needs] {a_thing}.",
        "We have [never|often|already|just] been to {place}.",
        "Please [give|show|bring|send] {name} the {thing}.",
        "Let us [go to {place}|look for the {thing}|feed the {animal}|cook {dish}].",
        "The {animal} of the {person} is [very|quite] {adj}.",
        "How {adj} the {thing} is!",
        "What {a_adj} {thing}!",
    )

    def slots(self) -> dict:
        rng = self.rng
        girl = rng.random() < 0.5
        thing, thing2 = rng.sample(THINGS, 2)
        animal, animal2 = rng.sample(ANIMALS, 2)
        adj, adj2 = rng.sample(ADJECTIVES, 2)
        adj2 = adj2 if adj2[0] not in "aeiou" else "small"
        adj = adj if adj[0] not in "aeiou" else "red"
        name = rng.choice(GIRLS if girl else BOYS)
        person = rng.choice(PEOPLE)
        return {
            "thing": thing,
            "thing2": thing2,
            "a_thing": article(thing),
            "things": plural(thing),
            "animal": animal,
            "animals": plural(animal),
            "the_animal2": f"the {animal2}",
            "The_animal": f"The {animal}",
            "adj": adj,
            "adj2": adj2,
            "a_adj": article(adj),
            "name": name,
            "Name": name,
            "he": "she" if girl else "he",
            "person": person,
            "the_person": f"the {person}",
            "The_person": f"The {person}",
            "family": rng.choice(FAMILY),
            "spot": rng.choice(SPOTS),
            "place": rng.choice(PLACES),
            "mood": rng.choice(MOODS),
            "weather": rng.choice(WEATHER),
            "dish": rng.choice(DISHES),
        }


class Stories:
    """Stories of three to seven sentences about one hero, told in the past."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.sentences = Sentences(rng)

    def scene(self, topic: str | None = None) -> dict:
        """The slots of a story; `topic` fixes its animal or its thing."""
        rng = self.rng
        slots = self.sentences.slots()
        girl, friend_girl = rng.random() < 0.5, rng.random() < 0.5
        name = rng.choice(GIRLS if girl else BOYS)
        friends = [n for n in (GIRLS if friend_girl else BOYS) if n != name]
        pet_girl = rng.random() < 0.5
        if topic in ANIMALS:
            slots["animal"] = topic
        elif topic in THINGS:
            slots["thing"] = topic
        thing2 = rng.choice([t for t in THINGS if t != slots["thing"]])
        one, two = rng.sample(PLACES, 2)
        he, him, his = ("she", "her", "her") if girl else ("he", "him", "his")
        animal2 = rng.choice([a for a in ANIMALS if a != slots["animal"]])
        slots |= {
            "Name": name,
            "he": he,
            "He": capital(he),
            "him": him,
            "his": his,
            "His": capital(his),
            "child": "girl" if girl else "boy",
            "man": "woman" if girl else "man",
            "Friend": rng.choice(friends),
            "fhe": "she" if friend_girl else "he",
            "fhim": "her" if friend_girl else "him",
            "Fhe": "She" if friend_girl else "He",
            "fhis": "her" if friend_girl else "his",
            "Pet": rng.choice(PET_NAMES),
            "phe": "she" if pet_girl else "he",
            "Phe": "She" if pet_girl else "He",
            "a_animal": article(slots["animal"]),
            "animals": plural(slots["animal"]),
            "animal2": animal2,
            "a_animal2": article(animal2),
            "thing2": thing2,
            "a_thing2": article(thing2),
            "a_thing": article(slots["thing"]),
            "things": plural(slots["thing"]),
            "a_adj_thing": article(f"{slots['adj']} {slots['thing']}"),
            "place": one,
            "place2": two,
            "Time": capital(rng.choice(TIMES)),
            "trait": rng.choice(TRAITS),
            "trait2": rng.choice(TRAITS),
            "food": rng.choice(FOODS),
            "parent": rng.choice(FAMILY),
            "room": rng.choice(ROOMS),
        }
        slots |= {
            "a_trait": article(slots["trait"]),
            "a_person": article(rng.choice(JOBS)[0]),
            "A_animal_is": capital(article(slots["animal"])) + " is",
            "phe2": self.person_pronoun(slots["person"]),
            "mark": "!",
            "spot2": rng.choice([s for s in SPOTS if s != slots["spot"]]),
            "weather2": rng.choice(["bad", "good", "fine", slots["weather"]]),
            "place3": rng.choice(["the city", "a big town", "another country"]),
            "matter": rng.choice(MATTERS),
        }
        parent = slots["parent"]
        mother = parent in WOMEN or (parent == "cousin" and girl)
        slots |= {"phim": "her" if mother else "him", "she": "she" if mother else "he"}
        slots["She"] = capital(slots["she"])
        return slots

    def person_pronoun(self, person: str) -> str:
        if person in WOMEN:
            return "she"
        return "he" if person in MEN else self.rng.choice(["he", "she"])

    def story(self, topic: str | None = None) -> str:
        """One story as a paragraph."""
        slots = self.scene(topic)
        plots = self.PLOTS
        if topic in ANIMALS:
            plots = self.ANIMAL_PLOTS
        elif topic in THINGS:
            plots = self.THING_PLOTS
        plot = self.rng.choice(plots)
        steps = (fill(step, slots, self.rng) for step in plot)
        return " ".join(step for step in steps if step)

    OPEN = (
        "[Once upon a time, there was {a_trait} {child} named {Name}."
        "|There was once {a_trait} {child} named {Name}."
        "|{Name} was {a_trait} {child} who lived near {place2}."
        "|{Name} was a {child} who liked {food}."
        "|{Name} lived in a [small|big|little|white|quiet] house with {his} {parent}.]"
    )
    END = (
        "[{Name} was very [happy|proud|glad] that day."
        "|{He} never forgot that day.|In the evening, {he} told {his} {parent} "
        "about it."
        "|{Name} went home with a smile.|That night, {he} slept very well."
        "|It was the best day of the [week|year|summer].||]"
    )
    ANIMAL_PLOTS = (
        (
            OPEN,
            "{Name} had {a_animal} named {Pet}.",
            "[Every|Each] [morning|day|evening], {Name} and {Pet} "
            "[walked to {place}|went to {place} together|played in {room}].",
            "{Time}, {Pet} [ran away|did not come home|was gone].",
            "{Name} was [very sad|worried|afraid] and looked for {Pet} "
            "[all day|everywhere|in {place}|for a long time].",
            "[At last|In the end|After an hour], {he} found {Pet} {spot}.",
            "[{Pet} was [asleep|safe|cold and hungry|not hurt]."
            "|{Pet} was happy to see {him}.|{Name} gave {Pet} some food and water.]",
            END,
        ),
        (
            "{Time}, {Name} [saw|found|heard|met] a [small|little|young|thin] {animal} "
            "{spot}.",
            "[It was|The {animal} was|The {animal} looked] [hungry|cold|afraid|tired"
            "|alone|very thirsty].",
            '["Do not be afraid," said {Name}.|"I will help you," said {Name}.'
            '|{Name} sat down beside it and waited.|"Where is your mother?" '
            "asked {Name}.]",
            "{Name} [gave it some food|gave it water and a warm blanket|took it home|"
            "carried it to {his} {parent}].",
            "[After|In] a few days, the {animal} was [strong|well|happy] again.",
            "[It stayed with {Name} and {his} {parent}|They became good friends"
            "|It went back to {place}|Now it lives in {room}].",
        ),
        (
            "A {animal} and {a_animal2} lived near {place}.",
            "The {animal} was {trait}, but the {animal2} was [always|very|often] "
            "{mood}.",
            '{Time}, the {animal2} said, "[I am {mood}|I am lost|I have no food'
            '|I cannot find my home|The winter is coming]."',
            '"[I will help you|Come with me|Do not worry|You can live with me|'
            'We will find a way]," said the {animal}.',
            "[They went to {place2} together|They walked for a long time|They looked "
            "for food in {place2}|They worked all day] and [found some {food}|found "
            "{a_thing}|built a small house|met {the_person}].",
            "[From that day on, they were friends|Then they [ate|slept|laughed|played] "
            "together|The {animal2} thanked the {animal}|At night, they looked at the "
            "stars].",
        ),
        (
            "{Name} wanted {a_animal}.",
            "{He} asked {his} {parent} for one [many times|every day|again and again].",
            '"{A_animal_is} a lot of work," said {his} {parent}.',
            "{Name} [promised to feed it every day|said that {he} was old "
            "enough|read a "
            "book about {animals}|saved {his} money].",
            "On {his} birthday, there was a [big|little|brown|strange] box in {room}.",
            "[Something moved in the box.|The box was not quiet.|{Name} opened "
            "it slowly.]",
            "In the box [sat|was] a [small|tiny|young|white|black] {animal}!",
            "[{Name} named it {Pet}.|{Name} called it {Pet} and took it to {place}.]",
            END,
        ),
        (
            "The {animal} of the {person} was [very|quite|a little] {trait2}.",
            "{Time}, it [ran|walked|went] to {place} and [ate|found|took] the "
            "[{food}|{thing}] of {Name}.",
            '{Name} was angry and said, "[Whose {animal} is this|Who will pay for it'
            '|Go away|Give it back]{mark}"',
            "[The {person} came and said that {phe2} was sorry.|The {person} "
            "laughed, but "
            "{Name} did not.|The {animal} hid {spot}.]",
            "Then the {person} gave {Name} [a new {thing2}|some {food}|some money].",
            "[After that, they were friends.|{Name} was not angry anymore."
            "|The {animal} never did it again.]",
        ),
    )
    THING_PLOTS = (
        (
            OPEN,
            "{Time}, {he} lost {his} {adj} {thing}.",
            "[{He} looked {spot}, but it was not there.|{He} looked for it in {room}."
            "|{He} looked everywhere, but {he} could not find it.]",
            '["Have you seen my {thing}?" {he} asked {his} {parent}.|{He} asked '
            "{his} {parent} for help.|{Name} began to cry.]",
            '["Look {spot2}," said {his} {parent}.|"When did you see it last?" asked '
            '{his} {parent}.|"We will find it together," said {his} {parent}.]',
            "[The {thing} was {spot2}|They found the {thing} {spot2}|Then {he} saw the "
            "{thing} {spot2}].",
            END,
        ),
        (
            "{Time}, {Name} found {a_adj_thing} {spot}.",
            "[{He} had never seen such a {thing} before|It was [very old|broken|dirty|"
            "wet|full of sand]|The {thing} was not {his}].",
            '["Whose {thing} is this?" {he} asked {Friend}.|{He} showed it to '
            "{Friend}.]",
            '["I do not know," said {Friend}.|"It belongs to {the_person}," said '
            "{Friend}."
            '|"It is mine," said {Friend}.|"You must give it back," said {Friend}.]',
            "[So they took|Then they brought|The next day, they took] the {thing} to "
            "{the_person}.",
            "{The_person} [was very glad|thanked them|smiled] and gave them "
            "[some {food}|{a_thing2}|a coin|two tickets].",
            END,
        ),
        (
            "{Name} wanted to make {a_thing} for {Friend}.",
            "{He} [went to {place} and bought [wood|paper|some paint|what {he} needed]"
            "|asked {his} {parent} for help|worked in {room} for "
            "[two|three|five] days].",
            "[It was not easy.|At first, it broke.|{He} worked slowly and carefully."
            "|It took a long time.]",
            "[At last|In the end|On Sunday], the {thing} was [ready|finished].",
            "{Name} gave it to {Friend} [on Sunday|on {fhis} birthday|after school].",
            '["Thank you," said {Friend}.|{Friend} was [surprised|very happy].|"What a '
            'beautiful {thing}!" said {Friend}.|{Friend} liked it very much.]',
            "[They are still good friends.|{Fhe} put it on the shelf in {room}.|]",
        ),
        (
            "{Name} and {Friend} [both wanted|saw] the same {thing}.",
            '["It is mine," said {Name}.|{Name} took it first.|{Name} held it '
            "and did not "
            "let go.]",
            '["No, it is mine," said {Friend}.|{Friend} was [angry|sad].|"That is not '
            'fair," said {Friend}.|{Friend} began to cry.]',
            'Then {the_person} came and said, "[You can share it|Play together'
            '|First {Name}, then {Friend}|Do not fight about {a_thing}]."',
            "[So they played with it together|{Name} gave the {thing} to {Friend}|They "
            "took the {thing} to {place}|They said that they were sorry].",
            "[Now they share everything.|Nobody was sad anymore.|They laughed "
            "about it.]",
        ),
    )
    DAY_PLOTS = (
        (
            "{Time}, {Name} and {Friend} went to {place}.",
            "[It was a {weather} day|The weather was {weather2}|The sun was "
            "shining|It was "
            "still early].",
            "[They saw {a_animal} and {a_animal2}|They ate {food} and drank "
            "lemonade|They "
            "played with {a_thing}|They talked about {matter}].",
            "[Suddenly|Then|After a while], [it began to rain|the wind became "
            "strong|they "
            "heard a strange noise|they met {the_person}|a {animal} ran by].",
            "[{Name} was afraid, but {Friend} was not|{Friend} wanted to go home"
            "|They hid under a tree|They laughed and ran].",
            "[In the evening, they went home|They came home late|At home, "
            "{Name}'s {parent} "
            "made {food}|They were [tired|wet|hungry], but happy].",
        ),
        (
            "It was a {weather} [morning|day|evening], and {Name} was {mood}.",
            "{He} [did not want to go to school|had nothing to do|wanted to see "
            "{Friend}"
            "|sat in {room} and thought about {matter}].",
            '["What is wrong?" asked {his} {parent}.|{His} {parent} came into the room.'
            '|"Come with me," said {his} {parent}.]',
            "[They went to {place} together|They cooked {food}|They read a book about "
            "{matter}|They took the {animal} to {place}].",
            "[After that, {Name} felt better|Soon, {Name} was happy again|{Name} "
            "was not "
            "{mood} anymore].",
        ),
        (
            "{Friend} was ill and had to stay in bed.",
            "{Name} wanted to [help|visit] {fhim}.",
            "[{He} went to {place} and bought some {food}|{He} made {food} for "
            "{fhim}|{He} "
            "brought {fhim} {a_thing} and a book].",
            '["How are you?" asked {Name}.|"I hope you will be well soon," said '
            "{Name}.]",
            '["I feel better now," said {Friend}.|"You are a good friend," said '
            "{Friend}."
            '|"Thank you for coming," said {Friend}.]',
            "[The next week, {Friend} was well again|They talked about {matter} "
            "until it was "
            "dark|After a few days, {fhe} could play outside again].",
        ),
        (
            "{Name} wanted to be {a_person}.",
            "{He} [read many books|worked hard|learned every day|asked many questions]"
            "[| and never gave up| at school].",
            "[{His} friends laughed at {him}|It was not easy|{His} {parent} "
            "helped {him}"
            "|Sometimes {he} was tired].",
            "[But {Name} did not stop|But {he} was {trait}|Years went by].",
            "Today {he} is {a_person}[ in {place3}| and everybody knows {him}"
            "| and loves {his} work].",
        ),
        (
            "The old {person} lived alone in a [small|big|dark|wooden] house "
            "near {place}.",
            "[Nobody visited the old {person}|The children were afraid of the "
            "house|The "
            "{person} had [only|just] {a_animal}].",
            "{Time}, {Name} [knocked on the door|saw a light in the window|heard "
            "a noise "
            "in the house].",
            '["Come in," said the {person}.|"Who is there?" asked the {person}.'
            "|The {person} opened the door slowly.]",
            "[They drank tea and talked about {matter}|The {person} told {Name} "
            "a story "
            "about {a_animal2}|The {person} showed {Name} {a_adj_thing}].",
            "[After that, {Name} came every week|Now the {person} is not lonely anymore"
            "|{Name} was not afraid anymore].",
        ),
        (
            "{Name} [got up early|woke up late] and [washed {his} face|ate some {food}"
            "|looked out of the window].",
            "[Then|After breakfast], {he} went to {place} [with {Friend}|with {his} "
            "{parent}|by bus|by train].",
            "There {he} [saw|met] {the_person} with {a_adj_thing}.",
            '"[What are you doing|Where are you going|Can I help you|Is that your '
            '{thing}]?" asked {Name}.',
            '"[I am waiting for my {family}|I am looking for my {animal}|I am going to '
            '{place2}|I want to sell this {thing}]," said {the_person}.',
            "[{Name} helped {the_person}|{Name} went along|{Name} thought about "
            "it for a "
            "while] and [came home late|missed the bus|was {mood}|forgot the time].",
        ),
    )
    PLOTS = (*ANIMAL_PLOTS, *THING_PLOTS, *DAY_PLOTS, *DAY_PLOTS)
