"""Text normalizations against their upstream definitions, and the rates facts of the field rest on."""

import json
import random
import string
from pathlib import Path

import jiwer
import numpy as np
import pytest
import whisper_normalizer

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
    """Seed-TTS-eval's steps (run_wer.py, `process_one`), one character at a time, on upstream's own table."""
    from zhon.hanzi import punctuation

    for character in punctuation + string.punctuation:
        if character != "'":
            text = text.replace(character, "")
    return text.replace("  ", " ").lower()


def random_sentences(count: int) -> list[str]:
    """Strings of letters, blanks, all kinds of punctuation, digits and characters of other scripts."""
    draw = random.Random(0)
    odd = "'’`´-–—_…·。，！？「」《》（）“”«»¿¡\u3000\u00a0\u2028\t\x0bäÉßİıﬁ½²€₤今日あ한ж"
    return ["".join(draw.choices("abCD  " + odd + string.punctuation + "0123", k=60)) for _ in range(count)]


def test_seed_equals_upstream():
    pytest.importorskip("zhon")
    for sentence in SENTENCES + random_sentences(500):
        assert normalize_seed(sentence) == seed_tts_eval(sentence)


def test_seed_rates_are_those_of_its_scripts():
    """run_wer.py writes an utterance's rate, average_wer.py takes their mean (jiwer 4 renamed `compute_measures`)."""
    pytest.importorskip("zhon")
    draw = random.Random(1)
    # In the list's English form; of Chinese sentences tests/test_speech_wer.py.
    sentences = [text.translate(dict.fromkeys(map(ord, "今日あ"))) for text in random_sentences(200)]
    truths = [text for text in sentences if seed_tts_eval(text).split()]
    heard = ["".join(c for c in text if draw.random() > 0.1) for text in truths]
    rates = [
        jiwer.process_words(seed_tts_eval(truth), seed_tts_eval(hypothesis)).wer
        for truth, hypothesis in zip(truths, heard, strict=True)
    ]
    result = word_error_rate(truths, heard, "seed")
    assert (result.errors / result.words).tolist() == rates
    assert result.mean_utterance_wer == np.mean(rates) and len(set(rates)) > 10
    for wordless in ("- -", "?", " "):
        with pytest.raises(InputError, match="no words"):
            word_error_rate([wordless], ["a"], "seed")


def test_seed_keeps_ascii_apostrophe_only_and_joins_hyphenated_words():
    assert normalize_seed("He's twenty-one, isn’t he?") == "he's twentyone isnt he"


def test_whisper_normalizers_equal_transformers():
    """Two independent copies of OpenAI's normalizers (transformers', and whisper-normalizer's, which is ours) agree."""
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    table = json.loads((Path(whisper_normalizer.__file__).parent / "normalizers" / "english.json").read_text())
    english, basic = EnglishTextNormalizer(table), BasicTextNormalizer()
    for sentence in SENTENCES + random_sentences(200):
        assert normalize_whisper_en(sentence) == english(sentence).strip()
        assert normalize_whisper_basic(sentence) == basic(sentence).strip()


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
    with pytest.raises(InputError, match=r"unknown text normalization 'seeds': did you mean 'seed'\? .*whisper_en"):
        word_error_rate(["a"], ["a"], "seeds")
    assert set(NORMALIZATIONS) == {"demo", "seed", "whisper_basic", "whisper_en"}
