"""What the tiny models know: small tables, written for this project.

Everything the instruct model can be asked about its world is a row here. The base
corpus states the same facts as plain sentences, so that the base model knows them too.
"""


def rows(text: str) -> list[tuple[str, ...]]:
    """Split a table: `;` between rows, `,` between cells."""
    return [
        tuple(cell.strip() for cell in row.split(","))
        for row in text.replace("\n", " ").split(";")
        if row.strip()
    ]


def words(text: str) -> list[str]:
    """Split a list of words or phrases at commas."""
    return [word.strip() for word in text.replace("\n", " ").split(",")]


# Country, capital, continent, main language.
COUNTRIES = rows("""
France, Paris, Europe, French; Spain, Madrid, Europe, Spanish;
Italy, Rome, Europe, Italian; Germany, Berlin, Europe, German;
Portugal, Lisbon, Europe, Portuguese; Greece, Athens, Europe, Greek;
Poland, Warsaw, Europe, Polish; Sweden, Stockholm, Europe, Swedish;
Norway, Oslo, Europe, Norwegian; Denmark, Copenhagen, Europe, Danish;
Finland, Helsinki, Europe, Finnish; Austria, Vienna, Europe, German;
Hungary, Budapest, Europe, Hungarian; Ireland, Dublin, Europe, English;
England, London, Europe, English; Russia, Moscow, Europe, Russian;
Ukraine, Kyiv, Europe, Ukrainian; Romania, Bucharest, Europe, Romanian;
Iceland, Reykjavik, Europe, Icelandic; Japan, Tokyo, Asia, Japanese;
China, Beijing, Asia, Chinese; Thailand, Bangkok, Asia, Thai;
Vietnam, Hanoi, Asia, Vietnamese; Iran, Tehran, Asia, Persian;
Turkey, Ankara, Asia, Turkish; Nepal, Kathmandu, Asia, Nepali;
Mongolia, Ulaanbaatar, Asia, Mongolian; Iraq, Baghdad, Asia, Arabic;
Egypt, Cairo, Africa, Arabic; Kenya, Nairobi, Africa, Swahili;
Morocco, Rabat, Africa, Arabic; Ghana, Accra, Africa, English;
Senegal, Dakar, Africa, French; Ethiopia, Addis Ababa, Africa, Amharic;
Algeria, Algiers, Africa, Arabic; Angola, Luanda, Africa, Portuguese;
Canada, Ottawa, North America, English; Mexico, Mexico City, North America, Spanish;
Cuba, Havana, North America, Spanish; Jamaica, Kingston, North America, English;
Brazil, Brasilia, South America, Portuguese;
Argentina, Buenos Aires, South America, Spanish;
Chile, Santiago, South America, Spanish; Peru, Lima, South America, Spanish;
Colombia, Bogota, South America, Spanish; Ecuador, Quito, South America, Spanish;
Australia, Canberra, Oceania, English; New Zealand, Wellington, Oceania, English
""")

# Thing as it stands in a sentence, its colour, "is" or "are".
COLORS = rows("""
grass, green, is; the sky, blue, is; snow, white, is; coal, black, is;
blood, red, is; the sun, yellow, is; milk, white, is; a lemon, yellow, is;
a banana, yellow, is; a carrot, orange, is; a tomato, red, is; a frog, green, is;
a crow, black, is; a swan, white, is; chocolate, brown, is; an elephant, gray, is;
a strawberry, red, is; a cucumber, green, is; the sea, blue, is; cotton, white, is;
a pumpkin, orange, is; a flamingo, pink, is; a leaf, green, is; a cherry, red, is;
salt, white, is; sugar, white, is; gold, yellow, is; silver, gray, is;
a pig, pink, is; a polar bear, white, is; an orange, orange, is; broccoli, green, is;
spinach, green, is; a blueberry, blue, is; a plum, purple, is; an eggplant, purple, is;
ink, black, is; wood, brown, is; a fire truck, red, is; rice, white, is;
a raven, black, is; the night, black, is; a cloud, white, is; a mouse, gray, is;
corn, yellow, is; a pea, green, is; lettuce, green, is; chalk, white, is;
a sheep, white, is; honey, yellow, is; coffee, brown, is; a canary, yellow, is;
emeralds, green, are; rubies, red, are; bones, white, are; teeth, white, are;
sunflowers, yellow, are; violets, purple, are; bricks, red, are; ravens, black, are
""")

OPPOSITES = rows("""
hot, cold; big, small; up, down; in, out; day, night; black, white; good, bad;
happy, sad; fast, slow; old, young; tall, short; long, brief; high, low; left, right;
open, closed; full, empty; wet, dry; hard, soft; heavy, light; strong, weak;
rich, poor; clean, dirty; loud, quiet; early, late; easy, difficult; near, far;
first, last; always, never; love, hate; win, lose; buy, sell; give, take;
push, pull; begin, end; question, answer; friend, enemy; war, peace; true, false;
thick, thin; wide, narrow; deep, shallow; sweet, sour; sharp, blunt; brave, cowardly;
kind, cruel; safe, dangerous; rough, smooth; tight, loose; alive, dead; asleep, awake;
inside, outside; above, below; before, after; more, less; many, few; yes, no;
north, south; east, west; summer, winter; arrive, leave; remember, forget;
laugh, cry; float, sink; freeze, melt; build, destroy; find, hide; accept, refuse;
success, failure; beautiful, ugly; polite, rude; cheap, expensive; same, different;
noisy, silent; ancient, modern; simple, complex;
public, private; guilty, innocent; ripe, unripe; visible, invisible
""")

# Animal, the sound it makes as a verb ("-": none), its young, legs, where it lives.
ANIMALS = rows("""
dog, barks, puppy, four, in a house; cat, meows, kitten, four, in a house;
cow, moos, calf, four, on a farm; sheep, bleats, lamb, four, on a farm;
horse, neighs, foal, four, in a stable; pig, oinks, piglet, four, on a farm;
duck, quacks, duckling, two, on a pond; lion, roars, cub, four, on the savanna;
frog, croaks, tadpole, four, in a pond; bee, buzzes, larva, six, in a hive;
snake, hisses, snakelet, no, in the grass; wolf, howls, pup, four, in the forest;
owl, hoots, owlet, two, in a tree; mouse, squeaks, pinkie, four, in a hole;
goose, honks, gosling, two, on a farm; donkey, brays, foal, four, in a stable;
bear, growls, cub, four, in the forest; hen, clucks, chick, two, on a farm;
goat, bleats, kid, four, on a farm; swan, hisses, cygnet, two, on a lake;
elephant, trumpets, calf, four, on the savanna; fox, yelps, cub, four, in a den;
tiger, roars, cub, four, in the jungle; deer, -, fawn, four, in the forest;
eagle, screams, eaglet, two, on a mountain; pigeon, coos, squab, two, in the city;
monkey, chatters, infant, two, in the jungle; turkey, gobbles, poult, two, on a farm;
seal, barks, pup, no, by the sea; whale, sings, calf, no, in the sea;
rabbit, -, bunny, four, in a burrow; camel, -, calf, four, in the desert;
hyena, laughs, cub, four, on the savanna; zebra, -, foal, four, on the savanna;
crow, caws, chick, two, in a tree; spider, -, spiderling, eight, in a web;
ant, -, larva, six, in a nest; kangaroo, -, joey, two, in the bush
""")

# Category, plural category, members.
CATEGORIES = [
    (
        "animal",
        "animals",
        words("""dog, cat, horse, cow, lion, tiger, wolf, bear, fox, rabbit, sheep,
        goat, mouse, elephant, camel, zebra, monkey, frog, donkey, deer"""),
    ),
    (
        "bird",
        "birds",
        words("""sparrow, eagle, owl, robin, crow, swan, pigeon, parrot, penguin,
        seagull, goose, duck, stork, hawk"""),
    ),
    (
        "fish",
        "fish",
        words("shark, salmon, trout, tuna, herring, cod, carp, sardine"),
    ),
    (
        "insect",
        "insects",
        words("ant, bee, wasp, fly, butterfly, beetle, mosquito, ladybug, cricket"),
    ),
    (
        "flower",
        "flowers",
        words("rose, tulip, daisy, lily, violet, sunflower, orchid, poppy, daffodil"),
    ),
    (
        "tree",
        "trees",
        words("oak, pine, birch, maple, willow, palm, cedar, elm, fir"),
    ),
    (
        "fruit",
        "fruits",
        words("""apple, pear, banana, cherry, plum, peach, grape, lemon, orange, mango,
        strawberry, melon, apricot"""),
    ),
    (
        "vegetable",
        "vegetables",
        words("carrot, potato, onion, cabbage, pea, bean, cucumber, turnip, leek"),
    ),
    (
        "tool",
        "tools",
        words("hammer, saw, drill, wrench, screwdriver, shovel, rake, axe, chisel"),
    ),
    (
        "color",
        "colors",
        words("red, blue, green, yellow, purple, black, white, brown, pink, gray"),
    ),
    (
        "instrument",
        "instruments",
        words("piano, violin, guitar, drum, flute, trumpet, harp, cello, clarinet"),
    ),
    (
        "vehicle",
        "vehicles",
        words("car, bus, truck, train, bicycle, tractor, van, taxi, tram"),
    ),
    (
        "drink",
        "drinks",
        words("milk, tea, coffee, juice, lemonade, water, cocoa"),
    ),
    (
        "metal",
        "metals",
        words("iron, gold, silver, copper, tin, lead, zinc"),
    ),
    (
        "sport",
        "sports",
        words("football, tennis, hockey, golf, swimming, boxing, basketball"),
    ),
]
# Members that stand without an article.
MASS_CATEGORIES = ("color", "drink", "metal", "sport")

# Thing, what it is made of.
MATERIALS = rows("""
a window, glass; a book, paper; a table, wood; a nail, iron; a candle, wax;
a shoe, leather; a sweater, wool; a shirt, cotton; a tire, rubber; a bottle, glass;
a coin, metal; a ring, gold; a wall, brick; a statue, stone; a newspaper, paper;
a fence, wood; a key, metal; a brick, clay; a jar, glass; a barrel, wood;
a bridge, steel; a spoon, metal; bread, flour; cheese, milk; butter, milk; wine, grapes;
jam, fruit; an omelet, eggs; a snowman, snow; a pot, clay; a rope, fiber; ice, water;
a saddle, leather; a scarf, wool; a bucket, plastic; a chair, wood; a mirror, glass;
a hammer, iron and wood; a sail, cloth; a pillow, feathers; a balloon, rubber;
a letter, paper; a belt, leather; a crown, gold; chocolate, cocoa; a pencil, wood
""")

# Profession, what it does (third person).
JOBS = rows("""
baker, bakes bread; teacher, teaches children; doctor, treats sick people;
farmer, grows food; pilot, flies planes; cook, prepares meals; painter, paints pictures;
singer, sings songs; writer, writes books; sailor, sails ships; butcher, sells meat;
gardener, takes care of plants; tailor, makes clothes; carpenter, builds with wood;
plumber, repairs pipes; mechanic, repairs cars; dentist, takes care of teeth;
nurse, helps sick people; judge, decides in court; firefighter, puts out fires;
librarian, looks after books; fisherman, catches fish; shepherd, watches sheep;
miner, digs for coal; postman, brings letters; barber, cuts hair; florist, sells
flowers;
vet, treats sick animals; actor, plays in films; dancer, dances on a stage;
soldier, fights in a war; cleaner, cleans rooms; waiter, serves food;
astronaut, travels into space; photographer, takes pictures; shoemaker, makes shoes;
blacksmith, works with iron; driver, drives a bus; scientist, studies nature;
potter, makes pots
""")

# From small to large: any pair can be compared.
SIZES = words("""
an ant, a bee, a mouse, a frog, a rat, a rabbit, a cat, a fox, a dog, a goat, a pig,
a lion, a horse, a cow, a camel, an elephant, a bus, a whale, a house, a church, a hill,
a mountain, the moon, the earth, the sun
""")

# Animal, things it can do, things it cannot do.
ABILITIES = [
    ("a bird", words("fly, sing, lay eggs"), words("read, drive, talk")),
    ("a fish", words("swim, live in water"), words("walk, fly, sing, climb trees")),
    ("a dog", words("bark, run, swim, bite"), words("fly, read, lay eggs, write")),
    ("a cat", words("climb trees, jump, run"), words("fly, read, lay eggs, bark")),
    ("a snake", words("bite, swim, lay eggs"), words("walk, fly, sing, run")),
    ("a horse", words("run, jump, swim"), words("fly, climb trees, read, bark")),
    ("a stone", words("sink, roll"), words("talk, walk, swim, see, grow")),
    ("a tree", words("grow, burn"), words("walk, talk, swim, run, see")),
    ("a child", words("talk, walk, laugh, learn"), words("fly, lay eggs")),
    ("a plane", words("fly, land"), words("swim, sing, eat, climb trees")),
    ("a ship", words("float, sink"), words("fly, talk, walk, climb trees")),
    ("a frog", words("jump, swim, lay eggs"), words("fly, read, write")),
    ("a monkey", words("climb trees, jump, run"), words("fly, lay eggs, drive")),
    ("a teacher", words("read, write, talk, walk"), words("fly, lay eggs")),
    ("a penguin", words("swim, walk, lay eggs"), words("fly, talk, climb trees")),
    ("a hen", words("lay eggs, run, walk"), words("swim, read, bark")),
    ("a bee", words("fly, sting"), words("read, talk, bark, swim")),
    ("a robot", words("move, work"), words("eat, lay eggs, grow, sleep")),
    ("a fire", words("burn, spread"), words("swim, talk, see, walk")),
    ("a baby", words("cry, sleep, laugh"), words("drive, read, fly, write")),
]

NOUNS = words("""
cat, dog, house, tree, car, book, ball, bird, flower, garden, table, chair, window,
door, river, road, boat, ship, train, plane, horse, cow, pig, duck, hat, coat, shirt,
shoe, hand, finger, nose, ear, eye, arm, leg, head, boy, girl, friend, teacher, doctor,
farmer, king, queen, apple, egg, cake, spoon, cup, plate, bowl, bottle, bag, bed, lamp,
clock, pen, pencil, letter, picture, song, story, game, toy, doll, kite, drum, cloud,
star, stone, hill, mountain, lake, forest, field, farm, town, street, shop, school,
bridge, wall, roof, room, kitchen, basket, rope, key, ring, coin, candle, mirror,
rabbit,
frog, spider, snake, monkey, lion, bear, nest, wing, feather, leaf, seed, root, island
""")

IRREGULAR_PLURALS = dict(
    rows("""
mouse, mice; child, children; man, men; woman, women; foot, feet; tooth, teeth;
goose, geese; sheep, sheep; fish, fish; leaf, leaves; knife, knives; wolf, wolves;
baby, babies; city, cities; lady, ladies; story, stories; box, boxes; fox, foxes;
bus, buses; glass, glasses; dish, dishes; watch, watches; potato, potatoes;
tomato, tomatoes; hero, heroes; half, halves; shelf, shelves; wife, wives; life, lives;
thief, thieves; person, people; ox, oxen; deer, deer; fly, flies; cherry, cherries;
bench, benches; brush, brushes; class, classes; peach, peaches; berry, berries;
party, parties; country, countries; family, families; body, bodies; loaf, loaves
""")
)

PAST_TENSES = dict(
    rows("""
go, went; come, came; see, saw; eat, ate; drink, drank; run, ran; sing, sang;
swim, swam; write, wrote; read, read; give, gave; take, took; make, made; find, found;
think, thought; bring, brought; buy, bought; catch, caught; teach, taught; say, said;
tell, told; sell, sold; know, knew; grow, grew; fly, flew; throw, threw; draw, drew;
break, broke; speak, spoke; wake, woke; choose, chose; drive, drove; ride, rode;
rise, rose; fall, fell; feel, felt; keep, kept; sleep, slept; leave, left; meet, met;
lose, lost; win, won; sit, sat; stand, stood; hold, held; build, built; send, sent;
spend, spent; hear, heard; hide, hid; bite, bit; cut, cut; put, put; begin, began;
forget, forgot; wear, wore; steal, stole; shake, shook; pay, paid; dig, dug; walk,
walked;
talk, talked; play, played; jump, jumped; look, looked; help, helped; ask, asked;
call, called; cook, cooked; open, opened; close, closed; work, worked; wash, washed;
paint, painted; climb, climbed; laugh, laughed; smile, smiled; dance, danced; cry,
cried;
carry, carried; try, tried; stop, stopped; live, lived; love, loved; like, liked;
want, wanted; wait, waited; start, started; clean, cleaned; rain, rained; follow,
followed
""")
)

DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = words("""
January, February, March, April, May, June, July, August, September, October, November,
December
""")
MONTH_DAYS = dict(
    zip(MONTHS, (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), strict=True)
)

# Thing, count, unit: "A week has seven days."
COUNTS = rows("""
a week, seven, days; a year, twelve, months; a day, twenty-four, hours;
an hour, sixty, minutes; a minute, sixty, seconds; a hand, five, fingers;
a triangle, three, sides; a square, four, sides; a car, four, wheels;
a bicycle, two, wheels; a dozen, twelve, things; a century, one hundred, years;
a year, four, seasons; a face, two, eyes; a foot, five, toes; a hexagon, six, sides
""")

GIRLS = words("""
Anna, Mia, Lily, Emma, Sara, Rosa, Nina, Clara, Julia, Lucy, Amy, Kate, Ella, Maria,
Eva, Grace, Alice, Laura, Molly, Ruth, Zoe, Ivy, Nora, Jane, Helen, Sophie, Daisy, Leah,
Hanna, Olga, Tina, Vera, Paula, Wendy, Betty, Carol, Diana, Fiona, Gina, Irene
""")
BOYS = words("""
Tom, Ben, Max, Sam, Leo, Jack, Peter, Paul, Adam, David, Noah, Oscar, Hugo, Finn, Luke,
Mark, Henry, George, Simon, Daniel, Felix, Jacob, Owen, Theo, Victor, Will, Eric, Frank,
Alan, Bob, Carl, Dan, Fred, Gary, Ivan, John, Karl, Martin, Nick, Otto
""")
PETS = words("dog, cat, rabbit, parrot, hamster, turtle, pony, mouse, fish, bird")
PET_NAMES = words("""
Rex, Bella, Coco, Rocky, Luna, Milo, Buddy, Ginger, Shadow, Spot, Daisy, Pepper, Oscar,
Biscuit, Sunny, Lucky, Tiger, Smoky, Honey, Bruno
""")
FAVORITE_COLORS = words("red, blue, green, yellow, purple, orange, pink, brown, white")
FOODS = words("""
soup, bread, cake, rice, cheese, salad, pizza, pasta, fish, chicken, honey, porridge,
pancakes, apples, cherries, chocolate, noodles, potatoes
""")
HOBBIES = words("""
reading, singing, dancing, painting, swimming, cooking, running, fishing, drawing,
gardening, skating, hiking
""")


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    """The plural of a noun."""
    if noun in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[:1].upper() + text[1:]
