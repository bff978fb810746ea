"""The demo's sentences and their tokens."""

import random

import pytest

from mamtra_ray.errors import InputError
from mamtra_ray.teachers.demo_grammar import (
    WORDS,
    detokenize_text,
    draw_sentence,
    draw_splits,
    spoken_form,
    tokenize_text,
)


def test_sentences_are_distinct_over_all_splits_and_drawn_by_the_seed():
    counts = {"validation": 50, "test": 60, "train": 500}
    splits = draw_splits(counts, seed=1)
    everything = [sentence for sentences in splits.values() for sentence in sentences]
    assert {split: len(sentences) for split, sentences in splits.items()} == counts
    assert len(set(everything)) == len(everything)
    assert splits == draw_splits(counts, seed=1)
    assert splits != draw_splits(counts, seed=2)


def test_small_vocabulary_is_used_in_full_and_round_trips():
    state = random.Random(0)
    sentences = [draw_sentence(state) for _ in range(1000)]
    assert len(WORDS) <= 60
    assert {word for sentence in sentences for word in sentence.split()} == set(WORDS)
    for sentence in sentences:
        assert detokenize_text(tokenize_text(sentence)) == sentence
    lengths = {len(sentence.split()) for sentence in sentences}
    assert min(lengths) <= 4
    assert max(lengths) >= 25


def test_written_text_is_read_as_words():
    assert tokenize_text("Please open the window, then find the letter.") == tokenize_text(
        "please open the window then find the letter"
    )


def test_unknown_word_names_the_nearest():
    with pytest.raises(InputError, match=r"'windo'.*did you mean 'window'"):
        tokenize_text("open the windo")
    with pytest.raises(InputError, match="at least one word"):
        tokenize_text(" . ")


def test_the_voice_pauses_between_clauses():
    spoken = spoken_form("open the window and then find the letter then move the guitar to the bridge and watch it")
    assert spoken == "Open the window, and then find the letter, then move the guitar to the bridge, and watch it."
