"""Sentences of 1 to 62 words, read clause by clause: the voice reads each clause once, its sound serves many sentences.

A sentence is one clause or phrase, or a first clause followed by clauses that begin with `and`, `then` or `and then`.
A clause is read for its place: a comma after it where another one follows, a full stop where it is the last. The sounds
of a sentence's clauses lie end to end; the pause between them is the voice's own at a comma.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from mamtra_ray.errors import InputError
from mamtra_ray.teachers.demo_grammar import (
    COLOURS,
    HANDLING_VERBS,
    MANNERS,
    MOVING_VERBS,
    NUMBERS,
    OBJECTS,
    PLACES,
    TIMES,
    draw_clause,
    draw_connector,
    draw_object,
)

BANDS = (range(1, 10), range(10, 20), range(20, 30), range(30, 45), range(45, 63))
"""Numbers of words whose sentences are measured together."""


class Place(StrEnum):
    """Where in a sentence a clause stands."""

    WHOLE = "whole"
    FIRST = "first"
    MIDDLE = "middle"
    LAST = "last"


_SHARES = {Place.WHOLE: 1, Place.FIRST: 1, Place.MIDDLE: 2, Place.LAST: 1}
"""Of the clauses of a split, in fifths."""
_MOST_CLAUSES = 5_000
_SINGLE_WORDS = (*MOVING_VERBS, *HANDLING_VERBS, *COLOURS, *OBJECTS, *PLACES, *NUMBERS, *TIMES, *MANNERS, "please")


@dataclass(frozen=True)
class Clause:
    """What the voice reads at once."""

    text: str
    place: Place

    @property
    def spoken(self) -> str:
        """The clause as the voice reads it: with a comma at its end where the sentence goes on."""
        return self.text[0].upper() + self.text[1:] + ("." if self.place in (Place.WHOLE, Place.LAST) else ",")

    @property
    def num_words(self) -> int:
        """Words of the clause."""
        return len(self.text.split())


@dataclass(frozen=True)
class JoinedSentence:
    """A sentence and the numbers of its clauses."""

    text: str
    clauses: tuple[int, ...]


def draw_clauses(counts: dict[str, int], seed: int) -> dict[str, list[Clause]]:
    """Distinct clauses of every split; none occurs twice, within or across splits, whatever its place or connector.

    The first clauses of the first split do not depend on how many follow them.

    Args:
        counts: number of clauses per split; each place gets its share.
        seed: seed of the drawing.
    """
    seen: set[str] = set()
    splits: dict[str, list[Clause]] = {}
    for number, (split, count) in enumerate(counts.items()):
        random_state = random.Random(seed + number)
        # Mixed, so that any prefix has clauses for every place.
        places = [place for place, share in _SHARES.items() for _ in range(share * _MOST_CLAUSES // 5)]
        random_state.shuffle(places)
        if count > _MOST_CLAUSES:
            raise InputError(f"a split has at most {_MOST_CLAUSES} clauses, not {count}")
        splits[split] = []
        for place in places[:count]:
            words = _draw_words(place, random_state)
            while " ".join(words) in seen:
                words = _draw_words(place, random_state)
            seen.add(" ".join(words))
            if place in (Place.MIDDLE, Place.LAST):
                words = [*draw_connector(random_state), *words]
            splits[split].append(Clause(" ".join(words), place))
    return splits


def _draw_words(place: Place, random_state: random.Random) -> list[str]:
    if place is Place.WHOLE and random_state.random() < 0.25:
        if random_state.random() < 0.1:
            return [random_state.choice(_SINGLE_WORDS)]
        return draw_object(random_state)
    words = draw_clause(random_state)
    return ["please", *words] if place in (Place.WHOLE, Place.FIRST) and random_state.random() < 0.25 else words


def join_clauses(clauses: Sequence[Clause], counts: dict[range, int], seed: int) -> list[JoinedSentence]:
    """Distinct sentences, so many of every band of lengths.

    Args:
        clauses: what the sentences are made of; no clause occurs twice in a sentence.
        counts: number of sentences per range of their words.
        seed: seed of the drawing.

    Raises:
        InputError: the clauses do not suffice for so many distinct sentences of a band.
    """
    random_state = random.Random(seed)
    numbers: dict[tuple[Place, int], list[int]] = defaultdict(list)
    of_place: dict[Place, list[int]] = defaultdict(list)
    for number, clause in enumerate(clauses):
        numbers[clause.place, clause.num_words].append(number)
        of_place[clause.place].append(number)
    seen: set[tuple[int, ...]] = set()
    sentences = []
    for band, count in counts.items():
        for _ in range(count):
            for _ in range(10_000):
                drawn = _draw_joined(clauses, of_place, numbers, random_state.choice(band), random_state)
                if drawn and drawn not in seen:
                    break
            else:
                raise InputError(
                    f"{len(clauses)} clauses do not make {count} sentences of {band.start} to {band.stop - 1} words"
                )
            seen.add(drawn)
            sentences.append(JoinedSentence(" ".join(clauses[number].text for number in drawn), drawn))
    return sentences


def _draw_joined(
    clauses: Sequence[Clause],
    of_place: dict[Place, list[int]],
    numbers: dict[tuple[Place, int], list[int]],
    length: int,
    random_state: random.Random,
) -> tuple[int, ...] | None:
    """One try: clauses at random until the last one, or a whole one, fits exactly; None if none does."""
    whole = numbers[Place.WHOLE, length]
    if whole and random_state.random() < 0.5:
        return (random_state.choice(whole),)
    drawn: list[int] = []
    rest = length
    while rest > 0:
        last = numbers[Place.LAST, rest] if drawn else []
        if last:
            drawn.append(random_state.choice(last))
            return tuple(drawn)
        number = random_state.choice(of_place[Place.MIDDLE if drawn else Place.FIRST])
        if number in drawn:
            return None
        drawn.append(number)
        rest -= clauses[number].num_words
    return None


def joined_sound(sounds: Sequence[np.ndarray]) -> np.ndarray:
    """The sound of a sentence from the sounds of its clauses."""
    return np.concatenate(sounds)


def joined_word_ends(word_ends: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """When each word of a sentence ends, from the word ends of its clauses and the seconds of their sounds."""
    starts = np.cumsum([0.0, *seconds[:-1]])
    return [start + end for start, ends in zip(starts.tolist(), word_ends, strict=True) for end in ends]
