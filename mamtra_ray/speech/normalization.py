"""The text normalizations that published word error rates were computed with.

Rates under different normalizations cannot be compared: "He's twenty-one, isn't he?" heard as
"He is 21, isn't he?" costs 75 % under ``seed``, 43 % under ``whisper_basic`` and nothing under ``whisper_en``.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from functools import cache

# The Chinese punctuation that Seed-TTS-eval strips beside ASCII's: `zhon.hanzi.punctuation`, which the tests
# compare with. zhon itself is no dependency because this one string is all of it that is needed.
_CHINESE_PUNCTUATION = (
    "＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､\u3000、〃〈〉《》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿"
    "–—‘’‛“”„‟…‧﹏﹑﹔·．！？｡。"
)
_SEED_REMOVED = str.maketrans("", "", (_CHINESE_PUNCTUATION + string.punctuation).replace("'", ""))


def normalize_seed(text: str) -> str:
    """Seed-TTS-eval's English normalization (`run_wer.py`, `process_one`).

    Punctuation but the ASCII apostrophe is removed without leaving a blank, so "twenty-one" becomes one word and
    the typographic apostrophe of "he’s" goes too; one pass turns double blanks into single ones; lower case.
    Numbers and spelling stay as written. Its benchmark reports the unweighted mean of the utterances' rates.
    """
    return text.translate(_SEED_REMOVED).replace("  ", " ").lower()


@cache
def _whisper_basic() -> Callable[[str], str]:
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer()


@cache
def _whisper_english() -> Callable[[str], str]:
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer()


def normalize_whisper_basic(text: str) -> str:
    """Whisper's language-independent normalization: lower case, symbols and punctuation to blanks."""
    return _whisper_basic()(text).strip()


def normalize_whisper_en(text: str) -> str:
    """Whisper's English normalization: contractions, spelling variants, numbers and fillers too."""
    return _whisper_english()(text).strip()


PUBLISHED: dict[str, Callable[[str], str]] = {
    "seed": normalize_seed,
    "whisper_basic": normalize_whisper_basic,
    "whisper_en": normalize_whisper_en,
}
"""Normalization by name; each is applied to reference and hypothesis alike."""

MEAN_OVER_UTTERANCES = frozenset({"seed"})
"""Normalizations whose benchmark reports the mean over utterances, not the corpus rate, as its headline."""
