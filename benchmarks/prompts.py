"""A stream of prompts like those of the demo pool's ten domains, no two alike, the same in every run."""

import random
from collections.abc import Iterator

TEMPLATES = (
    "{name} has {n} {things} and buys {m} more. Each costs {m} dollars. How much does {name} spend in total?",
    "A train travels {n} miles in {m} hours. How many miles does it travel in {k} hours?",
    "{name} and {other} share {n} {things}. {other} gets {m} more. How many {things} does {name} get?",
    "Write a function in {language} that takes a list of {n} numbers and returns the {operation}.",
    "Write a {language} program that reads {things} from a file and prints the {operation} of line {n}.",
    "Find all {suffix} files under {folder} larger than {n} MB and {verb} them",
    "{verb} the files in {folder} that were changed in the last {n} days and end in {suffix}",
    "What is the {column} when the {field} is {n} and the {column} of the other team is {m}?",
    "How many {field} values are there in the table for {name} with a {column} below {n}?",
    "What are the symptoms of {disease} in people over {n}?",
    "How is {disease} diagnosed, and what treatments are there after {m} weeks?",
    "What is the punishment under section {n} for {offence} committed with {m} others?",
    "Can the court under article {n} hear an appeal about {offence} after {k} years?",
    "Which {role} became famous in 19{k} with the film about {things} and {other}?",
    "What was the name of the {role} whose song about {things} was a hit in 19{k}?",
    "Which of these is a property of {matter} at {n} degrees? Answer1: it melts Answer2: it freezes "
    "Answer3: it is a {matter} Answer4: none",
    "My card was declined {m} times when I tried to pay {n} dollars, what should I do?",
    "I made a transfer of {n} euros {m} days ago and it has still not arrived, my name is {name}",
    "Use the {tool} tool to answer: what is the {operation} of {n}, {m} and {k} for {name}?",
)
WORDS = {
    "name": ("Anna", "Bilal", "Chen", "Dora", "Emeka", "Fatima", "Goran", "Hana", "Ivan", "Julia"),
    "other": ("Karim", "Lena", "Mateo", "Nora", "Omar", "Petra", "Quinn", "Rosa", "Sven", "Tariq"),
    "things": ("apples", "books", "tickets", "marbles", "stamps", "horses", "bottles", "letters"),
    "language": ("Python", "JavaScript", "Java", "Rust", "Ruby", "Go"),
    "operation": ("sum", "average", "largest value", "median", "product", "reverse"),
    "suffix": (".txt", ".log", ".py", ".jpg", ".tar.gz", ".conf"),
    "folder": ("/var/log", "the current directory", "/home/user", "/opt", "/etc"),
    "verb": ("delete", "compress", "list", "copy", "count the lines of"),
    "column": ("score", "year", "position", "attendance", "record", "date"),
    "field": ("team", "player", "venue", "season", "opponent", "district"),
    "disease": ("asthma", "Crohn's disease", "cystic fibrosis", "gout", "lupus", "anemia", "shingles"),
    "offence": ("theft", "forgery", "criminal breach of trust", "robbery", "extortion", "bribery"),
    "role": ("actor", "singer", "director", "band", "writer"),
    "matter": ("water", "iron", "a gas", "salt", "a mineral"),
    "tool": ("calculator", "search", "calendar", "translation"),
}


def stream(count: int, seed: int = 0) -> list[str]:
    """`count` prompts in random order of domains."""
    chance = random.Random(seed)
    found: dict[str, None] = {}
    for prompt in _endless(chance):
        found[prompt] = None
        if len(found) == count:
            return list(found)
    raise AssertionError("the stream has no end")


def _endless(chance: random.Random) -> Iterator[str]:
    while True:
        numbers = {"n": chance.randint(2, 999), "m": chance.randint(2, 60), "k": chance.randint(20, 99)}
        words = {slot: chance.choice(choices) for slot, choices in WORDS.items()}
        yield chance.choice(TEMPLATES).format(**numbers, **words)
