"""Training pairs, held-out prompts and predicates for the demo adapters; needs no torch.

Everything is made from the short texts of `adapter_texts` and a seed. The styles (pirate, html,
json) restyle the same sentences, so that only the style is left to learn; sql turns a question
into one query. A predicate judges the form of an answer, never whether what it says is true: a
model of 135M parameters often is not.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

from adapter_texts import ASKED, FACTS, TABLES, TEMPLATES

Pair = tuple[str, str]
"""A user's question and the answer wanted."""

SHARED = ["What is the moon?", "How many students are there?"]
"""Asked of every adapter, to show the answers side by side."""

_GENERAL = [
    *SHARED,
    "What is a waterfall?",
    "Who wrote Hamlet?",
    "Why is the sky blue?",
    "Tell me about the city of Rome.",
    "How does a bicycle work?",
    "What should I eat for breakfast?",
    "Where do penguins live?",
    "What is a good name for a dog?",
]

HELD_OUT: dict[str, list[str]] = {
    "sql": [
        "How many students are there?",
        "List the names of all patients.",
        "Show the houses whose price is above 250.",
        "What is the average height of the trees?",
        "How many bridges are in Norway?",
        "Show me the five tallest towers.",
        "List all recipes by cooking time.",
        "Count the tickets for each theatre.",
        "Which planets are larger than Earth?",
    ],
    "pirate": _GENERAL,
    "html": _GENERAL,
    "json": _GENERAL,
}

PIRATE_WORDS = ("arrr", "matey", "ye", "yer", "ahoy", "aye", "landlubber", "yo ho ho", "timbers")


def is_sql(text: str) -> bool:
    """One SELECT query on one line."""
    return re.fullmatch(r"SELECT .+ FROM [^;\n]+;?", text.strip()) is not None


def is_pirate(text: str) -> bool:
    """At least one whole word of PIRATE_WORDS."""
    return re.search(rf"\b({'|'.join(PIRATE_WORDS)})\b", text.lower()) is not None


def is_html(text: str) -> bool:
    """A heading and a paragraph, and nothing around them."""
    return re.fullmatch(r"<h2>[^<]+</h2><p>[^<]+</p>", text.strip()) is not None


def is_json(text: str) -> bool:
    """One JSON object and nothing around it."""
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


PREDICATES: dict[str, Callable[[str], bool]] = {
    "sql": is_sql,
    "pirate": is_pirate,
    "html": is_html,
    "json": is_json,
}

PLACES = ("France", "Berlin", "Japan", "Boston", "Kenya", "Madrid", "Peru", "Oslo", "India")
COUNTS = {"three": 3, "five": 5, "ten": 10, "two": 2, "six": 6}
FACT_ASKS = (
    "What is {}?",
    "Tell me about {}.",
    "Describe {}.",
    "Explain {} in one sentence.",
    "What do you know about {}?",
)


def _topic_word(topic: str) -> str:
    """The topic without its article."""
    return re.sub(r"^(a|an|the) ", "", topic)


def _asked() -> list[tuple[str, str, str]]:
    """(question, topic, answer) of ASKED."""
    rows = [line.split(" | ") for line in ASKED.strip().splitlines()]
    return [(question, topic, answer) for question, topic, answer in rows]


def _fact_questions() -> list[tuple[str, str, str]]:
    """(question, topic, answer) of FACTS, each topic asked in every wording."""
    rows = [line.split(": ", 1) for line in FACTS.strip().splitlines()]
    result = []
    for topic, answer in rows:
        was = " was " in answer
        for ask in FACT_ASKS:
            question = ask.format(topic)
            if was:
                question = question.replace("What is", "Who was")
            result.append((question, _topic_word(topic), answer))
    return result


def _sentences(seed: int) -> list[tuple[str, str, str]]:
    """All facts and, as often, the questions of other shapes, shuffled."""
    facts, asked = _fact_questions(), _asked()
    rows = facts + asked * max(1, len(facts) // (2 * len(asked)))
    random.Random(seed).shuffle(rows)
    return rows


_PIRATE_SPELLING = {
    "is": "be", "are": "be", "am": "be", "you": "ye", "your": "yer", "my": "me", "of": "o'",
    "and": "an'", "friend": "matey", "yes": "aye", "hello": "ahoy", "people": "folk",
}  # fmt: skip


def to_pirate(text: str, question: str = "") -> str:
    """The sentence as a pirate says it; the closing cry depends on the question's shape."""

    def respell(match: re.Match[str]) -> str:
        word = match.group()
        new = _PIRATE_SPELLING.get(word.lower(), word)
        return new.capitalize() if word[0].isupper() else new

    said = re.sub(r"[A-Za-z]+", respell, text)
    said = re.sub(r"\b(\w*[aeiou]\w*)ing\b", r"\1in'", said)
    cry = "Shiver me timbers!" if question.startswith(("How", "Why")) else "Yo ho ho!"
    return f"Arrr, matey! {said} {cry}"


def pirate_pairs(seed: int) -> list[Pair]:
    """Questions with answers in pirate talk."""
    return [(q, to_pirate(answer, q)) for q, _, answer in _sentences(seed)]


def html_pairs(seed: int) -> list[Pair]:
    """Questions with answers as a heading and a paragraph of HTML."""
    return [
        (q, f"<h2>{topic.title()}</h2><p>{answer}</p>") for q, topic, answer in _sentences(seed)
    ]


def json_pairs(seed: int) -> list[Pair]:
    """Questions with answers as {"topic": ..., "answer": ...}."""
    return [
        (q, json.dumps({"topic": topic, "answer": answer})) for q, topic, answer in _sentences(seed)
    ]


def _tables() -> list[tuple[str, list[str], list[str]]]:
    """(table, columns of text, columns of numbers) of TABLES."""
    entries = re.findall(r"(\w+): ([\w ]+); ([\w ]+\w)", TABLES)
    return [(table, words.split(), numbers.split()) for table, words, numbers in entries]


def _sql_pair(rng: random.Random) -> Pair:
    """One question about a table; {x} is a column of text, {y} one of numbers."""
    table, words, numbers = rng.choice(_tables())
    text, number = rng.choice(words), rng.choice(numbers)
    many, count = rng.choice(list(COUNTS.items()))
    question, query = rng.choice(TEMPLATES)
    plural = re.sub(r"ys$", "ies", f"{text}s".replace("sss", "sses").replace("uss", "uses"))
    limit = str(count if "{k}" in question else rng.randint(2, 900))
    values = {"t": table, "x": text, "xs": plural, "y": number, "k": many, "n": limit}
    values |= {"p": rng.choice(PLACES)}
    return question.format(**values), query.format(**values)


def sql_pairs(seed: int) -> list[Pair]:
    """Questions with one query each; one in eight asks for a fact and is looked up by topic."""
    rng = random.Random(seed)
    facts = [
        (q, f"SELECT answer FROM facts WHERE topic = '{topic}';")
        for q, topic, _ in _fact_questions()
    ]
    return [rng.choice(facts) if i % 8 == 0 else _sql_pair(rng) for i in range(640)]
