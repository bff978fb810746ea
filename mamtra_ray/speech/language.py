"""The language of sentences: told from their script, and whether its words stand between blanks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

ENGLISH = "en"
# Scripts that tell the language, in the order in which they do: Japanese has Han characters too.
_LANGUAGES = {
    "ja": "\u3040-\u30ff\u31f0-\u31ff",
    "zh": "\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "th": "\u0e00-\u0e7f",
    "lo": "\u0e80-\u0eff",
    "my": "\u1000-\u109f",
    "km": "\u1780-\u17ff",
    "ko": "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af",
    "ru": "\u0400-\u04ff",
    "ar": "\u0600-\u06ff",
    "hi": "\u0900-\u097f",
    "el": "\u0370-\u03ff",
    "he": "\u0590-\u05ff",
}
_SCRIPTS = {language: re.compile(f"[{letters}]") for language, letters in _LANGUAGES.items()}
_WITHOUT_BLANKS = re.compile("([" + "".join(_LANGUAGES[name] for name in ("ja", "zh", "th", "lo", "my", "km")) + "])")


def language_of(texts: Iterable[str]) -> str:
    """The language of most texts, as Whisper abbreviates it; those in Latin letters count as English."""
    counts = Counter(_language(text) for text in texts)
    return max(counts, key=lambda language: (counts[language], language == ENGLISH), default=ENGLISH)


def _language(text: str) -> str:
    return next((language for language, script in _SCRIPTS.items() if script.search(text)), ENGLISH)


def is_without_blanks(text: str) -> bool:
    """Whether there is a character of a script whose words do not stand between blanks: Chinese, Japanese, Thai.

    Error rates of such text are of characters, as its benchmarks count them: word boundaries are the recognizer's whim.
    """
    return _WITHOUT_BLANKS.search(text) is not None


def split_characters(text: str) -> str:
    """A blank around every character of these scripts; other words stay whole."""
    return " ".join(_WITHOUT_BLANKS.sub(r" \1 ", text).split())
