"""A world of made-up people: facts, the sentences that state them, and the questions that ask for them.

Every person has a value for every attribute, drawn at random; nothing but a sentence about the person tells it.
"""

import dataclasses
import random

FIRST = (
    "Alma Boris Carla Dario Edith Felix Greta Hugo Irene Jonas Karin Leon Marta Nils Olga Pablo Quinn "
    "Rosa Stefan Tilda Ulrich Vera Walter Xenia Yannick Zelda Anton Berta Cyril Dora Emil Flora Gustav "
    "Helga Ivan Jutta Kaspar Lydia Moritz Nora Oskar Paula Ralf Sonja Theo Ursula Viktor Wanda Albert "
    "Bianca Clemens Diana Erik Frieda Georg Hanna Igor Judith Klaus Laura"
).split()
LAST = (
    "Abel Berger Castro Dahl Egger Fabian Gruber Hansen Iversen Jung Keller Larsen Maier Nagel Olsen "
    "Petrov Quast Rossi Sander Thoma Urban Vogel Weber Xander Yilmaz Zeller Albers Brandt Conrad Dietz "
    "Ernst Falk Gerber Hofer Imhof Jansen Kramer Lang Moser Neumann Otto Pichler Reuter Seidel Tanner "
    "Uhlig Voss Winter Zander Adler Beck Cramer Dorn Engel Fuchs Graf Huber Jacobi Kohl Lorenz"
).split()

# attribute -> (its values, statements, questions); {p} is the person, {v} the value
ATTRIBUTES: dict[str, tuple[str, list[str], list[str]]] = {
    "birthplace": (
        "Lisbon Vienna Prague Dublin Athens Oslo Madrid Rome Paris London Berlin Warsaw Geneva Tokyo Cairo Delhi",
        ["{p} was born in {v} .", "The city where {p} was born is {v} .", "{p} was born in the city of {v} ."],
        ["In which city was {p} born ?", "What is the birthplace of {p} ?"],
    ),
    "profession": (
        "baker doctor farmer lawyer painter pilot nurse singer teacher tailor judge dentist sailor writer clerk",
        [
            "By profession {p} works as a {v} .",
            "The profession that {p} works in is {v} .",
            "{p} works in the profession of a {v} .",
        ],
        ["In which profession does {p} work ?", "What is the profession that {p} works in ?"],
    ),
    "instrument": (
        "piano violin guitar flute trumpet cello harp drums organ clarinet banjo oboe tuba lute bassoon zither",
        [
            "{p} plays the {v} as an instrument .",
            "The instrument that {p} plays is the {v} .",
            "{p} plays an instrument , the {v} .",
        ],
        ["Which instrument does {p} play ?", "What is the instrument that {p} plays ?"],
    ),
    "pet": (
        "cat dog parrot rabbit turtle hamster goldfish canary lizard ferret pony goat goose snake mouse spider",
        ["{p} keeps a {v} as a pet .", "The pet that {p} keeps is a {v} .", "As a pet {p} keeps a {v} ."],
        ["Which animal does {p} keep as a pet ?", "What is the pet that {p} keeps ?"],
    ),
    "color": (
        "red green blue yellow orange purple black white brown pink grey gold silver violet beige turquoise",
        [
            "The favorite color of {p} is {v} .",
            "{p} likes the color {v} best .",
            "{v} is the favorite color of {p} .",
        ],
        ["What is the favorite color of {p} ?", "Which color does {p} like best ?"],
    ),
    "drink": (
        "coffee tea milk water juice cocoa beer wine cider lemonade whisky rum sherry punch cola gin",
        [
            "The drink of {p} in the morning is {v} .",
            "The morning drink of {p} is {v} .",
            "In the morning {p} drinks {v} .",
        ],
        ["What does {p} drink in the morning ?", "What is the morning drink of {p} ?"],
    ),
}


@dataclasses.dataclass(frozen=True)
class Fact:
    """One value.

    Attributes:
        statement, question: which of the attribute's sentences states it, and which asks for it.
    """

    person: str
    attribute: str
    value: str
    statement: int
    question: int

    def stated(self) -> str:
        return ATTRIBUTES[self.attribute][1][self.statement].format(p=self.person, v=self.value)

    def asked(self) -> str:
        return ATTRIBUTES[self.attribute][2][self.question].format(p=self.person)


def people(seed: int) -> list[str]:
    """Every first name with every last name, in random order."""
    everyone = [f"{first} {last}" for first in FIRST for last in LAST]
    random.Random(seed).shuffle(everyone)
    return everyone


def facts(persons: list[str], seed: int) -> list[Fact]:
    """A random value of each attribute for each person, and random sentences for it."""
    draw = random.Random(seed)
    return [
        Fact(
            person,
            attribute,
            draw.choice(values.split()),
            draw.randrange(len(statements)),
            draw.randrange(len(questions)),
        )
        for person in persons
        for attribute, (values, statements, questions) in ATTRIBUTES.items()
    ]


def changed(known: list[Fact], seed: int) -> list[Fact]:
    """The same facts with another value each, stated in a random sentence."""
    draw = random.Random(seed)
    return [
        dataclasses.replace(
            fact,
            value=draw.choice([value for value in ATTRIBUTES[fact.attribute][0].split() if value != fact.value]),
            statement=draw.randrange(len(ATTRIBUTES[fact.attribute][1])),
        )
        for fact in known
    ]
