"""
A synthetic sentiment corpus, written by a grammar: the offline sample of the text tasks.

Each sentence is made of clauses (`the acting was dull`) whose polarity may be negated (`was never dull`), and two
clauses may be joined in a way that decides which of them counts: the second after `but`, the one without `although`,
the stronger one after `and`. Every opinion word occurs about as often in positive as in negative sentences that are
made of more than a plain clause, so counting words cannot solve it; order and scope can. It is no natural language,
and says nothing about real reviews: reports that use it call it synthetic.
"""

from __future__ import annotations

import random


SUBJECTS = [
    "plot",
    "story",
    "acting",
    "cast",
    "music",
    "score",
    "ending",
    "dialogue",
    "pacing",
    "humour",
    "camera",
    "script",
    "hero",
    "villain",
    "opening",
    "finale",
]
POSITIVE = ["good", "great", "lovely", "clever", "funny", "moving", "fresh", "charming", "gripping", "brilliant"]
NEGATIVE = ["bad", "awful", "dull", "clumsy", "boring", "flat", "stale", "tedious", "silly", "dreadful"]
VERBS = ["is", "was", "seemed", "felt"]
NEGATIONS = ("not", "never", "hardly", "far from", "anything but")
STRONG = ["very", "utterly", "truly", "extremely"]
WEAK = ["slightly", "somewhat", "mildly", "fairly"]
FILLERS = (
    "",
    "",
    "",
    "honestly ,",
    "in my view ,",
    "to be fair ,",
    "after an hour ,",
    "on second viewing ,",
)
LABEL_NAMES = ["negative", "positive"]
# Often enough that scope matters, rarely enough that a model finds the polarity of single words first.
NEGATED_SHARE = 0.3


def _clause(generator: random.Random, polarity: int, intensity: str = "", negated: bool | None = None) -> str:
    """One clause of the given polarity (1 or 0); negated or not at random unless told."""
    if negated is None:
        negated = generator.random() < NEGATED_SHARE
    word_polarity = 1 - polarity if negated else polarity
    adjective = generator.choice(POSITIVE if word_polarity else NEGATIVE)
    words = ["the", generator.choice(SUBJECTS), generator.choice(VERBS)]
    if negated:
        words.append(generator.choice(NEGATIONS))
    if intensity:
        words.append(generator.choice(STRONG if intensity == "strong" else WEAK))
    words.append(adjective)
    return " ".join(words)


def sentence(generator: random.Random, label: int) -> str:
    """
    Writes one sentence.

    Args:
        generator (`random.Random`): Source of every choice.
        label (`int`): 1 for a positive sentence, 0 for a negative one.
    """
    draw = generator.random()
    if draw < 0.35:
        text = _clause(generator, label, generator.choice(("", "strong", "weak")))
    elif draw < 0.60:
        text = f"{_clause(generator, 1 - label)} , but {_clause(generator, label)}"
    elif draw < 0.72:
        text = f"although {_clause(generator, 1 - label)} , {_clause(generator, label)}"
    elif draw < 0.85:
        text = f"{_clause(generator, label)} , although {_clause(generator, 1 - label)}"
    else:
        # The stronger of two opinions counts, whichever comes first.
        clauses = [
            _clause(generator, label, "strong", negated=False),
            _clause(generator, 1 - label, "weak", negated=False),
        ]
        generator.shuffle(clauses)
        text = f"{clauses[0]} and {clauses[1]}"
    return " ".join(f"{generator.choice(FILLERS)} {text} .".split())


def sentiment_sentences(size: int, seed: int = 0) -> tuple[list[str], list[int]]:
    """
    Writes distinct sentences, half of them positive.

    Args:
        size (`int`): How many.
        seed (`int`): Seed of the corpus.

    Returns:
        `tuple[list[str], list[int]]`: The sentences, in random order, and their labels.
    """
    generator = random.Random(seed)
    seen: dict[str, int] = {}
    while len(seen) < size:
        label = len(seen) % 2
        seen.setdefault(sentence(generator, label), label)
    return list(seen), list(seen.values())
