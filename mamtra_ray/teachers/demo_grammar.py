"""The demo task's language: spoken household commands of one to three clauses.

The vocabulary is small on purpose: every word in it was kept only after the demo recognizer
heard it reliably in the demo voice. Where a clause names an object, a place, a number or a time,
those are drawn independently, so nothing but the text can tell which word comes next and a model
must attend to the text over the whole sentence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mamtra_ray.errors import InputError, nearest_name

MOVING_VERBS = ("move", "bring", "carry", "push")
HANDLING_VERBS = ("open", "find", "watch")
COLOURS = ("yellow", "purple", "orange", "green", "golden", "black")
OBJECTS = ("window", "camera", "basket", "bottle", "guitar", "trumpet", "pencil", "blanket", "telephone", "letter")
PLACES = ("kitchen", "garden", "museum", "office", "station", "library", "hospital", "bridge")
NUMBERS = ("three", "five", "six", "seven", "nine", "eleven")
TIMES = ("today", "tomorrow", "tonight", "monday", "friday", "sunday")
MANNERS = ("slowly", "quickly", "quietly")
FUNCTION_WORDS = ("the", "and", "then", "to", "near", "behind", "from", "number", "please", "paint", "on")

WORDS = tuple(
    sorted(
        {
            *MOVING_VERBS,
            *HANDLING_VERBS,
            *COLOURS,
            *OBJECTS,
            *PLACES,
            *NUMBERS,
            *TIMES,
            *MANNERS,
            *FUNCTION_WORDS,
        }
    )
)
"""Every word of the language, sorted; a word's text id is its position here."""

_WORD_IDS = {word: index for index, word in enumerate(WORDS)}
_WEEKDAYS = frozenset({"monday", "friday", "sunday"})
_CLAUSE_COUNTS = (1, 2, 3)
_CLAUSE_WEIGHTS = (0.55, 0.33, 0.12)


def draw_sentence(random_state: random.Random) -> str:
    """Draw one sentence: lower-case words separated by single blanks."""
    (num_clauses,) = random_state.choices(_CLAUSE_COUNTS, _CLAUSE_WEIGHTS)
    words = ["please"] if random_state.random() < 0.25 else []
    for clause in range(num_clauses):
        if clause:
            words += draw_connector(random_state)
        words += draw_clause(random_state)
    return " ".join(words)


def draw_connector(random_state: random.Random) -> list[str]:
    """Draw the words that join two clauses."""
    return random_state.choice((["and"], ["then"], ["and", "then"]))


def draw_object(random_state: random.Random) -> list[str]:
    """Draw the words that name an object."""
    words = ["the"]
    if random_state.random() < 0.6:
        words.append(random_state.choice(COLOURS))
    words.append(random_state.choice(OBJECTS))
    if random_state.random() < 0.3:
        words += ["number", random_state.choice(NUMBERS)]
    return words


def _draw_place(random_state: random.Random) -> list[str]:
    return ["the", random_state.choice(PLACES)]


def draw_clause(random_state: random.Random) -> list[str]:
    """Draw the words of one clause, without what joins it to others."""
    kind = random_state.random()
    if kind < 0.5:
        words = [random_state.choice(MOVING_VERBS), *draw_object(random_state)]
        if random_state.random() < 0.3:
            words += ["from", *_draw_place(random_state)]
        words += ["to", *_draw_place(random_state)]
    elif kind < 0.85:
        words = [random_state.choice(HANDLING_VERBS), *draw_object(random_state)]
        if random_state.random() < 0.6:
            words += [random_state.choice(("near", "behind")), *_draw_place(random_state)]
    else:
        words = ["paint", *draw_object(random_state), random_state.choice(COLOURS)]
    ending = random_state.random()
    if ending < 0.2:
        words.append(random_state.choice(MANNERS))
    elif ending < 0.45:
        time = random_state.choice(TIMES)
        words += ["on", time] if time in _WEEKDAYS else [time]
    return words


def draw_splits(counts: dict[str, int], seed: int) -> dict[str, list[str]]:
    """Draw distinct sentences for every split.

    Args:
        counts: number of sentences per split name.
        seed: seed of the drawing; equal seeds give equal sentences.

    Returns:
        Sentences per split. No sentence occurs twice, within a split or across splits.
    """
    random_state = random.Random(seed)
    seen: set[str] = set()
    splits: dict[str, list[str]] = {}
    for split, count in counts.items():
        splits[split] = []
        while len(splits[split]) < count:
            sentence = draw_sentence(random_state)
            if sentence not in seen:
                seen.add(sentence)
                splits[split].append(sentence)
    return splits


def tokenize_text(text: str) -> list[int]:
    """Text ids of a sentence, one per word.

    Raises:
        InputError: the text is empty or holds a word outside the demo vocabulary.
    """
    words = text.lower().replace(",", " ").replace(".", " ").split()
    if not words:
        raise InputError("the text is empty; expected at least one word of the demo vocabulary")
    for word in words:
        if word not in _WORD_IDS:
            raise InputError(
                f"the demo teacher does not know the word {word!r}: {nearest_name(word, WORDS).partition('(')[0]}"
                f"its {len(WORDS)} words are WORDS in mamtra_ray/teachers/demo_grammar.py"
            )
    return [_WORD_IDS[word] for word in words]


def detokenize_text(text_tokens: Sequence[int]) -> str:
    """The sentence behind text ids; inverse of `tokenize_text` on a drawn sentence."""
    return " ".join(WORDS[token] for token in text_tokens)


def spoken_form(text: str) -> str:
    """What the voice reads: a comma before every further clause, a full stop at the end."""
    spoken = text.replace(" and then ", " , and_then ").replace(" then ", ", then ").replace(" and ", ", and ")
    spoken = spoken.replace(" , and_then ", ", and then ")
    return spoken[0].upper() + spoken[1:] + "."
