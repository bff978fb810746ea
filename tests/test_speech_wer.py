"""Error rates against jiwer on whole lists, and intervals against cases whose answer is known."""

import jiwer
import numpy as np
import pytest

from mamtra_ray.errors import InputError
from mamtra_ray.speech.language import language_of
from mamtra_ray.speech.normalization import normalize_seed
from mamtra_ray.speech.wer import (
    bootstrap_interval,
    normalize_demo,
    paired_difference,
    word_error_rate,
)

REFERENCES = ["open the window", "paint the guitar number seven green", "move the letter to the bridge on friday"]
HYPOTHESES = ["Open the widow.", "Paint the guitar #7 green green", "the letter to the bridge on Friday!"]


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("Guitar No. 7, please.", "guitar number seven please"),
        ("#11", "number eleven"),
        ("20 boxes", "twenty boxes"),
        ("room 42", "room forty two"),
        ("914", "nine one four"),
        ("number 07", "number zero seven"),
        ("on  Friday!", "on friday"),
        ("blue-green", "blue green"),
    ],
)
def test_demo_normalization_spells_what_whisper_writes(written, spoken):
    assert normalize_demo(written) == spoken


def test_rates_equal_jiwer_on_the_whole_list():
    result = word_error_rate(REFERENCES, HYPOTHESES)
    heard = [normalize_demo(text) for text in HYPOTHESES]
    assert result.wer == pytest.approx(jiwer.wer(REFERENCES, heard))
    assert result.cer == pytest.approx(jiwer.cer(REFERENCES, heard))
    each = [jiwer.wer(reference, hypothesis) for reference, hypothesis in zip(REFERENCES, heard, strict=True)]
    assert result.mean_utterance_wer == pytest.approx(np.mean(each))
    assert result.errors.tolist() == [1, 1, 1]
    assert result.words.tolist() == [3, 6, 8]


def test_nothing_heard_is_all_words_deleted():
    assert word_error_rate(["open the window"], [""]).wer == 1.0


def test_interval_is_a_point_when_all_utterances_are_alike_and_brackets_the_rate_otherwise():
    assert bootstrap_interval([1] * 50, [10] * 50) == (0.1, 0.1)
    errors = np.random.default_rng(0).binomial(10, 0.1, 400)
    low, high = bootstrap_interval(errors, np.full(400, 10))
    # The standard error of a binomial rate over 4,000 words.
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.1 * 0.9 / 4000), rel=0.15)
    assert low < errors.sum() / 4000 < high


def test_interval_of_the_corpus_rate_weights_long_utterances():
    low, high = bootstrap_interval([10, 0], [10, 90], num_draws=4000)
    assert (low, high) == (0.0, 1.0)


def test_paired_difference_removes_what_both_find_hard():
    generator = np.random.default_rng(0)
    references = ["open the window near the garden"] * 60
    hard = generator.random(60) < 0.5
    first = [
        "open the widow near the garden" if is_hard else reference
        for is_hard, reference in zip(hard, references, strict=True)
    ]
    second = [text.replace("garden", "harden") for text in first]
    a, b = word_error_rate(references, first), word_error_rate(references, second)
    result = paired_difference(b, a)
    # b makes exactly one error more in every utterance of six words: no resampling changes that.
    assert result.difference.value == pytest.approx(1 / 6)
    assert (result.difference.low, result.difference.high) == pytest.approx((1 / 6, 1 / 6))
    assert result.probability_a_not_worse == 0.0
    low, high = bootstrap_interval(b.errors, b.words)
    assert high - low > 0.03


def test_inputs_that_cannot_be_scored_are_refused():
    with pytest.raises(InputError, match="as many hypotheses"):
        word_error_rate(["a"], [])
    with pytest.raises(InputError, match="no words"):
        word_error_rate(["?!"], ["a"])
    with pytest.raises(InputError, match="did you mean 'demo'"):
        word_error_rate(["a"], ["a"], normalize="dem")
    short, long = word_error_rate(["a"], ["a"]), word_error_rate(["a b"], ["a b"])
    with pytest.raises(InputError, match="same utterances"):
        paired_difference(short, long)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "expected"),
    [
        # Seed-TTS-eval's Chinese list: its script puts a blank between all characters before it counts words.
        ("今天天气，真的很好。", "今天天气 真的很好", 0),
        ("今天天气真的很好", "今天天气真的很号", 1 / 8),
        ("今天 天气", "今天天气", 0),
        ("我用 Python 写", "我 用 python 写。", 0),
        ("我用 Python 写", "我用 java 写", 1 / 4),
        ("きょうはいい天気です", "きょうはいい天気でし", 1 / 10),
        ("อากาศดี", "อากาศดี", 0),
        # Korean has blanks between words.
        ("오늘 날씨가 좋다", "오늘 날씨가 나쁘다", 1 / 3),
    ],
)
@pytest.mark.parametrize("normalization", ["seed", "whisper_basic"])
def test_scripts_without_blanks_are_scored_by_characters(reference, hypothesis, expected, normalization):
    result = word_error_rate([reference], [hypothesis], normalization)
    if (normalization, reference) != ("whisper_basic", "อากาศดี"):  # which breaks Thai at its vowel signs
        assert result.wer == pytest.approx(expected)
    if not expected:
        assert result.cer == 0, "a blank is no character there"


def test_seed_scores_chinese_as_its_own_script_does():
    """``process_one`` of Seed-TTS-eval's run_wer.py, with lang == "zh"."""
    pairs = [
        ("今天天气，真的很好。", "今天天汽 真的好"),
        ("她说：“走吧！”", "他说走 吧"),
        ("第一、第二。", "第一第三啊"),
    ]

    def theirs(text):
        return " ".join(normalize_seed(text))

    for reference, hypothesis in pairs:
        expected = jiwer.process_words(theirs(reference), theirs(hypothesis)).wer
        assert word_error_rate([reference], [hypothesis], "seed").wer == pytest.approx(expected)


@pytest.mark.parametrize(
    ("texts", "language"),
    [
        (["今天天气真的很好"], "zh"),
        (["今日はいい天気です", "東京"], "ja"),
        (["hello there", "guten Tag"], "en"),
        (["오늘 날씨가 좋다"], "ko"),
        (["Добрый день"], "ru"),
        (["今天", "hello", "明天"], "zh"),
        (["今天", "hello"], "en"),
        ([], "en"),
    ],
)
def test_the_language_is_told_from_the_script(texts, language):
    assert language_of(texts) == language
