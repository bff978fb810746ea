"""Text to the text tokens of each kind of teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamtra_ray.errors import InputError
from mamtra_ray.teachers import LOADERS

# What CosyVoice 2's front end adds to Qwen's tokenizer, in its order (upstream cosyvoice/tokenizer/tokenizer.py).
_COSYVOICE2_SPECIAL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endofprompt|>", "[breath]", "<strong>", "</strong>", "[noise]", "[laughter]",
    "[cough]", "[clucking]", "[accent]", "[quick_breath]", "<laughter>", "</laughter>", "[hissing]", "[sigh]",
    "[vocalized-noise]", "[lipsmack]", "[mn]",
)  # fmt: skip

TextTokenizer = Callable[[str], list[int]]


def text_tokenizer(kind: str, path: Path | None) -> TextTokenizer:
    """The function from text to a teacher's text ids.

    Args:
        kind: ``teacher.kind``.
        path: the teacher's folder; not needed for the demo.

    Raises:
        InputError: unknown kind, or no tokenizer in the folder. The function itself raises it for text that the
            tokenizer cannot take (the demo knows a few dozen words).
    """
    if kind == "demo":
        from mamtra_ray.teachers.demo_grammar import tokenize_text

        return tokenize_text
    if kind not in LOADERS or path is None:
        raise InputError(f"teacher {kind!r} has no text tokenizer without teacher.path (kinds: {', '.join(LOADERS)})")
    if kind == "cosyvoice2":
        tokenizer = _auto_tokenizer(path / "CosyVoice-BlankEN")
        tokenizer.add_special_tokens(
            {
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "additional_special_tokens": list(_COSYVOICE2_SPECIAL_TOKENS),
            }
        )
    else:
        tokenizer = _auto_tokenizer(path)
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _auto_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} has no tokenizer: {reason}") from None
