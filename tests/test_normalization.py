"""Text normalisations against their upstream definitions, and the rates facts of the field rest on."""

import json
from pathlib import Path

import pytest

from mamtra_ray.errors import InputError
from mamtra_ray.speech.normalization import normalize_seed, normalize_whisper_basic, normalize_whisper_en
from mamtra_ray.speech.wer import NORMALIZATIONS, word_error_rate

SENTENCES = [
    "He's twenty-one, isn't he?",
    "He is 21, isn't he?",
    "“Mr. Smith’s” colour — a well-known  grey … costs $20 million!",
    "the ₤5 naïve café, 3rd of May 1999; 50% (uh) 'quoted' text",
    "今天。ABC，def！",
    "a - b",
]


def seed_tts_eval(text: str) -> str:
    """Seed-TTS-eval's steps, one character at a time as upstream does it, on upstream's own table."""
    import string

    from zhon.hanzi import punctuation

    for character in punctuation + string.punctuation:
        if character != "'":
            text = text.replace(character, "")
    return text.replace("  ", " ").lower()


@pytest.mark.parametrize("sentence", SENTENCES)
def test_seed_equals_upstream(sentence):
    pytest.importorskip("zhon")
    assert normalize_seed(sentence) == seed_tts_eval(sentence)


def test_seed_keeps_ascii_apostrophe_only_and_joins_hyphenated_words():
    assert normalize_seed("He's twenty-one, isn’t he?") == "he's twentyone isnt he"


@pytest.mark.parametrize("sentence", SENTENCES)
def test_whisper_normalizers_equal_transformers(sentence):
    """Two independent copies of OpenAI's normalisers (transformers', whisper-normalizer's) agree."""
    package = pytest.importorskip("whisper_normalizer")
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
    from whisper_normalizer.basic import BasicTextNormalizer

    table = json.loads((Path(package.__file__).parent / "normalizers" / "english.json").read_text())
    assert normalize_whisper_en(sentence) == EnglishTextNormalizer(table)(sentence).strip()
    assert normalize_whisper_basic(sentence) == BasicTextNormalizer()(sentence).strip()


@pytest.mark.parametrize(("name", "rate"), [("seed", 0.75), ("whisper_basic", 3 / 7), ("whisper_en", 0.0)])
def test_one_sentence_under_each_normalization(name, rate):
    result = word_error_rate(["He's twenty-one, isn't he?"], ["He is 21, isn't he?"], name)
    assert result.wer == pytest.approx(rate)


def test_mean_over_utterances_differs_from_corpus_rate():
    references = ["one two", "a b c d e f g h"]
    result = word_error_rate(references, ["one", "a b c d e f g h"], "seed")
    assert result.mean_utterance_wer == pytest.approx(0.25)
    assert result.wer == pytest.approx(0.1)


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(InputError, match=r"unknown text normalisation 'seeds': did you mean 'seed'\? .*whisper_en"):
        word_error_rate(["a"], ["a"], "seeds")
    assert set(NORMALIZATIONS) == {"demo", "seed", "whisper_basic", "whisper_en"}
