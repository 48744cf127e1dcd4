"""Templates of calib_demo_grammar.

Every paradigm is a function that takes a random generator and returns one minimal pair, a
grammatical sentence and an ungrammatical one that differs from it as little as possible.
"""

import random

PAIRS_PER_PARADIGM = 18

# Singular and plural.
PEOPLE = [
    ("teacher", "teachers"),
    ("farmer", "farmers"),
    ("doctor", "doctors"),
    ("student", "students"),
    ("neighbor", "neighbors"),
    ("painter", "painters"),
    ("sailor", "sailors"),
    ("driver", "drivers"),
    ("singer", "singers"),
    ("lawyer", "lawyers"),
]
ACTIONS = [
    ("works in the garden", "work in the garden"),
    ("lives near the river", "live near the river"),
    ("speaks two languages", "speak two languages"),
    ("waits for the bus", "wait for the bus"),
    ("drinks tea every morning", "drink tea every morning"),
    ("needs a new coat", "need a new coat"),
    ("sings in a choir", "sing in a choir"),
    ("knows the old song", "know the old song"),
    ("walks to the station", "walk to the station"),
    ("likes warm weather", "like warm weather"),
]
NAMES = ["Anna", "Peter", "Maria", "David", "Laura", "Daniel", "Julia", "Martin", "Susan", "Paul"]

# Head noun, a phrase with a noun that may distract, and what is said of the head.
THINGS = [
    (("key", "keys"), "to the {}", ("cabinet", "cabinets"), "in the drawer"),
    (("picture", "pictures"), "of the {}", ("house", "houses"), "on the wall"),
    (("label", "labels"), "on the {}", ("bottle", "bottles"), "hard to read"),
    (("door", "doors"), "of the {}", ("room", "rooms"), "painted green"),
    (("box", "boxes"), "behind the {}", ("chair", "chairs"), "full of books"),
    (("letter", "letters"), "from the {}", ("lawyer", "lawyers"), "on the desk"),
    (("story", "stories"), "about the {}", ("ghost", "ghosts"), "very old"),
    (("bridge", "bridges"), "over the {}", ("river", "rivers"), "closed today"),
    (("road", "roads"), "to the {}", ("farm", "farms"), "covered with snow"),
    (("lamp", "lamps"), "beside the {}", ("bed", "beds"), "too bright"),
    (("wheel", "wheels"), "of the {}", ("wagon", "wagons"), "broken"),
    (("window", "windows"), "above the {}", ("shop", "shops"), "open again"),
]
# Places for a second noun that may distract.
NEAR = [
    "near the {}",
    "behind the {}",
    "next to the {}",
]
LANDMARKS = [("gate", "gates"), ("tower", "towers"), ("tree", "trees"), ("wall", "walls")]
# A thing, what somebody did to it, and what is said of it.
MADE = [
    (("letter", "letters"), "wrote", "very long"),
    (("picture", "pictures"), "painted", "beautiful"),
    (("song", "songs"), "sang", "too loud"),
    (("cake", "cakes"), "baked", "still warm"),
    (("book", "books"), "read", "on the table"),
    (("car", "cars"), "bought", "expensive"),
    (("fence", "fences"), "built", "not straight"),
    (("answer", "answers"), "gave", "correct"),
    (("coat", "coats"), "wore", "made of wool"),
]
OWNERS = [
    (("farmer", "farmers"), ("owns", "own"), ("horse", "horses"), "tired"),
    (("student", "students"), ("knows", "know"), ("teacher", "teachers"), "happy"),
    (("driver", "drivers"), ("hates", "hate"), ("truck", "trucks"), "angry"),
    (("girl", "girls"), ("feeds", "feed"), ("rabbit", "rabbits"), "proud"),
    (("guard", "guards"), ("watches", "watch"), ("prisoner", "prisoners"), "bored"),
    (("nurse", "nurses"), ("helps", "help"), ("patient", "patients"), "busy"),
    (("boy", "boys"), ("follows", "follow"), ("dog", "dogs"), "hungry"),
    (("woman", "women"), ("visits", "visit"), ("sister", "sisters"), "rich"),
    (("worker", "workers"), ("moves", "move"), ("crate", "crates"), "strong"),
]
IRREGULAR_NOUNS = [
    ("child", "children"),
    ("man", "men"),
    ("woman", "women"),
    ("mouse", "mice"),
    ("goose", "geese"),
    ("wolf", "wolves"),
    ("knife", "knives"),
    ("leaf", "leaves"),
    ("tooth", "teeth"),
]
GENDERED = [
    ("boy", "boys", "himself"),
    ("girl", "girls", "herself"),
    ("king", "kings", "himself"),
    ("queen", "queens", "herself"),
    ("prince", "princes", "himself"),
    ("princess", "princesses", "herself"),
    ("actress", "actresses", "herself"),
    ("waitress", "waitresses", "herself"),
    ("grandfather", "grandfathers", "himself"),
    ("policeman", "policemen", "himself"),
]
RELATIVES = [
    ("mother", "herself"),
    ("father", "himself"),
    ("sister", "herself"),
    ("brother", "himself"),
    ("aunt", "herself"),
    ("uncle", "himself"),
    ("daughter", "herself"),
    ("son", "himself"),
]
REFLEXIVE_ACTIONS = [
    "hurt {} in the kitchen",
    "saw {} in the mirror",
    "introduced {} to the guests",
    "prepared {} for the winter",
    "blamed {} for the mistake",
    "hid {} behind the curtain",
    "bought {} some candy",
]
# Subject, past tense, participle, rest.
PARTICIPLES = [
    ("The dog", "ate", "eaten", "the sausage"),
    ("The secretary", "wrote", "written", "a long letter"),
    ("The children", "broke", "broken", "the window"),
    ("The captain", "took", "taken", "the wrong map"),
    ("My uncle", "drove", "driven", "the old truck"),
    ("The thief", "stole", "stolen", "a silver watch"),
    ("The king", "gave", "given", "a short speech"),
    ("The hunter", "saw", "seen", "the white deer"),
    ("The boy", "threw", "thrown", "the ball"),
    ("The artist", "drew", "drawn", "a small bird"),
    ("The girl", "rode", "ridden", "the brown horse"),
    ("The woman", "wore", "worn", "a red dress"),
    ("The students", "forgot", "forgotten", "the answer"),
    ("Our neighbor", "grew", "grown", "huge tomatoes"),
    ("The choir", "sang", "sung", "the old song"),
    ("The guests", "drank", "drunk", "all of the juice"),
    ("The gardener", "did", "done", "the hard work"),
    ("The committee", "chose", "chosen", "a new leader"),
]
EVER = [
    "been to the moon",
    "seen a ghost",
    "read the whole book",
    "complained about the food",
    "won a prize",
    "asked for help",
    "found the hidden door",
]
PLACES = ["in this town", "in our family", "in the class", "at the office", "on the team"]
# Verbs that cannot stand without an object, with one.
TRANSITIVE = [
    ("bought", "the red car"),
    ("described", "the blue cup"),
    ("found", "the small key"),
    ("built", "a wooden boat"),
    ("made", "the soup"),
    ("wanted", "the heavy box"),
    ("needed", "a new phone"),
    ("brought", "the ticket"),
    ("fixed", "the radio"),
    ("used", "the ladder"),
]
MASS = [
    ("sugar", "in the tea"),
    ("water", "in the bucket"),
    ("salt", "in the soup"),
    ("snow", "on the roof"),
    ("sand", "in my shoes"),
    ("smoke", "in the kitchen"),
    ("noise", "in the street"),
    ("furniture", "in this room"),
    ("milk", "in the coffee"),
]
COUNT = [
    ("boats", "in the harbor"),
    ("cars", "on the road"),
    ("chairs", "in this room"),
    ("people", "on the bus"),
    ("apples", "in the basket"),
    ("mistakes", "in the letter"),
    ("birds", "on the roof"),
    ("books", "on the shelf"),
    ("dogs", "in the park"),
]
BE = [("is", "are"), ("was", "were")]


def subject_verb(rng):
    number = rng.randrange(2)
    noun, action = rng.choice(PEOPLE)[number], rng.choice(ACTIONS)
    return f"The {noun} {action[number]}.", f"The {noun} {action[1 - number]}."


def subject_verb_distractor(rng):
    number, be = rng.randrange(2), rng.choice(BE)
    head, phrase, other, rest = rng.choice(THINGS)
    subject = f"The {head[number]} {phrase.format(other[1 - number])}"
    return f"{subject} {be[number]} {rest}.", f"{subject} {be[1 - number]} {rest}."


def subject_verb_two_distractors(rng):
    number, be = rng.randrange(2), rng.choice(BE)
    head, phrase, other, rest = rng.choice(THINGS)
    second = rng.choice(NEAR).format(rng.choice(LANDMARKS)[1 - number])
    subject = f"The {head[number]} {phrase.format(other[1 - number])} {second}"
    return f"{subject} {be[number]} {rest}.", f"{subject} {be[1 - number]} {rest}."


def subject_verb_relative(rng):
    number, be = rng.randrange(2), rng.choice(BE)
    head, verb, other, rest = rng.choice(OWNERS)
    subject = f"The {head[number]} who {verb[number]} the {other[1 - number]}"
    return f"{subject} {be[number]} {rest}.", f"{subject} {be[1 - number]} {rest}."


def subject_verb_object_relative(rng):
    number, be = rng.randrange(2), rng.choice(BE)
    head, verb, rest = rng.choice(MADE)
    subject = f"The {head[number]} that the {rng.choice(PEOPLE)[1 - number]} {verb}"
    return f"{subject} {be[number]} {rest}.", f"{subject} {be[1 - number]} {rest}."


def quantifier_verb(rng):
    number, action = rng.randrange(2), rng.choice(ACTIONS)
    quantifier = rng.choice([("One", "Each", "Every one"), ("Two", "Most", "Several")][number])
    subject = f"{quantifier} of the {rng.choice(PEOPLE)[1]}"
    return f"{subject} {action[number]}.", f"{subject} {action[1 - number]}."


def determiner_irregular_noun(rng):
    number, noun = rng.randrange(2), rng.choice(IRREGULAR_NOUNS)
    determiner = rng.choice([("this", "these"), ("that", "those")])[number]
    verb, adjective = rng.choice(["saw", "noticed", "painted"]), rng.choice(["old", "small", "big"])
    start = f"{rng.choice(NAMES)} {verb} {determiner} {adjective}"
    return f"{start} {noun[number]}.", f"{start} {noun[1 - number]}."


def reflexive_number(rng):
    number = rng.randrange(2)
    noun = rng.choice(GENDERED)
    action = rng.choice(REFLEXIVE_ACTIONS)
    forms = (noun[2], "themselves")
    start = f"The {noun[number]} "
    return (
        start + action.format(forms[number]) + ".",
        start + action.format(forms[1 - number]) + ".",
    )


def reflexive_gender(rng):
    noun, good = rng.choice(RELATIVES)
    bad = {"himself": "herself", "herself": "himself"}[good]
    start = f"{rng.choice(['My', 'Our', 'Your'])} {noun} "
    action = rng.choice(REFLEXIVE_ACTIONS)
    return start + action.format(good) + ".", start + action.format(bad) + "."


def reflexive_distractor(rng):
    noun, singular = rng.choice(RELATIVES[2:])  # nobody has several mothers
    action = rng.choice(REFLEXIVE_ACTIONS)
    number = rng.randrange(2)
    head, owner = (noun, f"{noun}s")[number], rng.choice(PEOPLE)[1 - number]
    forms = (singular, "themselves")
    start = f"The {head} of the {owner} "
    return (
        start + action.format(forms[number]) + ".",
        start + action.format(forms[1 - number]) + ".",
    )


def participle(rng):
    subject, past, perfect, rest = rng.choice(PARTICIPLES)
    if rng.random() < 0.5:
        return f"{subject} {past} {rest}.", f"{subject} {perfect} {rest}."
    return f"{subject} had {perfect} {rest}.", f"{subject} had {past} {rest}."


def polarity(rng):
    place, rest = rng.choice(PLACES), rng.choice(EVER)
    good, bad = rng.choice(
        [("Nobody", "Somebody"), ("No one", "Everyone"), ("Nobody", "Everybody")]
    )
    return f"{good} {place} has ever {rest}.", f"{bad} {place} has ever {rest}."


def wh_gap(rng):
    name, noun = rng.choice(NAMES), rng.choice(PEOPLE)[0]
    verb, thing = rng.choice(TRANSITIVE)
    start = f"{name} {rng.choice(['knows', 'remembers', 'found out'])}"
    if rng.random() < 0.5:
        return f"{start} what the {noun} {verb}.", f"{start} that the {noun} {verb}."
    return (
        f"{start} that the {noun} {verb} {thing}.",
        f"{start} what the {noun} {verb} {thing}.",
    )


def count_mass(rng):
    if rng.random() < 0.5:
        (noun, place), good, bad, be = rng.choice(MASS), "much", "many", "is"
    else:
        (noun, place), good, bad, be = rng.choice(COUNT), "many", "much", "are"
    return f"There {be} too {good} {noun} {place}.", f"There {be} too {bad} {noun} {place}."


def there_is(rng):
    number, be = rng.randrange(2), rng.choice(BE)
    noun, place = rng.choice(COUNT)
    singular = {"people": "person", "boats": "boat", "boxes": "box"}.get(noun, noun[:-1])
    article = "an" if singular[0] in "aeiou" else "a"
    what = (f"{article} {singular}", f"some {noun}")[number]
    return f"There {be[number]} {what} {place}.", f"There {be[1 - number]} {what} {place}."


PARADIGMS = [
    subject_verb,
    subject_verb_distractor,
    subject_verb_two_distractors,
    subject_verb_relative,
    subject_verb_object_relative,
    quantifier_verb,
    determiner_irregular_noun,
    reflexive_number,
    reflexive_gender,
    reflexive_distractor,
    participle,
    polarity,
    wh_gap,
    count_mass,
    there_is,
]


def balanced_positions(count, choices, rng):
    """Positions of the right answer, each as often as the others, in random order."""
    positions = [i % choices for i in range(count)]
    rng.shuffle(positions)
    return positions


def items():
    """All pairs, the same on every run."""
    result = []
    for paradigm in PARADIGMS:
        rng = random.Random(f"calib_demo_grammar/{paradigm.__name__}")
        pairs, seen = [], set()
        while len(pairs) < PAIRS_PER_PARADIGM:
            good, bad = paradigm(rng)
            if good not in seen:
                seen.add(good)
                pairs.append((good, bad))
        for (good, bad), gold in zip(
            pairs, balanced_positions(PAIRS_PER_PARADIGM, 2, rng), strict=True
        ):
            choices = [good, bad] if gold == 0 else [bad, good]
            result.append({"paradigm": paradigm.__name__, "choices": choices, "gold": gold})
    return result
