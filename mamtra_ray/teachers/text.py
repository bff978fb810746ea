"""The text tokenizer of each kind of teacher: as a function, and as files beside an exported model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mamtra_ray.assets import PACKAGED
from mamtra_ray.errors import InputError
from mamtra_ray.teachers import LOADERS

# What CosyVoice 2's front end adds to Qwen's tokenizer, in its order (upstream cosyvoice/tokenizer/tokenizer.py).
_COSYVOICE2_SPECIAL_TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|endofprompt|>", "[breath]", "<strong>", "</strong>", "[noise]", "[laughter]",
    "[cough]", "[clucking]", "[accent]", "[quick_breath]", "<laughter>", "</laughter>", "[hissing]", "[sigh]",
    "[vocalized-noise]", "[lipsmack]", "[mn]",
)  # fmt: skip

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")

TextTokenizer = Callable[[str], list[int]]


def text_tokenizer(kind: str, path: Path | None) -> TextTokenizer:
    """The function from text to a teacher's text ids.

    Args:
        kind: ``teacher.kind``.
        path: the teacher's folder or GGUF file; not needed for the demo.

    Raises:
        InputError: unknown kind, or no tokenizer in the folder. The function itself raises it for text that the
            tokenizer cannot take (the demo knows a few dozen words).
    """
    if kind in PACKAGED:
        from mamtra_ray.teachers.demo_grammar import tokenize_text

        return tokenize_text
    tokenizer = transformers_tokenizer(kind, path)
    return lambda text: list(tokenizer(text, add_special_tokens=False)["input_ids"])


def save_text_tokenizer(kind: str, path: Path | None, folder: Path) -> bool:
    """Put the teacher's text tokenizer beside an exported model, for ``AutoTokenizer``.

    Returns:
        Whether there was one: a folder of kind "huggingface" may hold a model alone.
    """
    try:
        tokenizer = _demo_tokenizer() if kind in PACKAGED else transformers_tokenizer(kind, path)
    except InputError:
        return False
    tokenizer.save_pretrained(folder)
    return True


def _demo_tokenizer() -> Any:
    """The demo's words as a tokenizer of the tokenizers library; like ours it fails on unknown words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mamtra_ray.teachers.demo_grammar import WORDS

    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(",", " "), normalizers.Replace(".", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def transformers_tokenizer(kind: str, path: Path | None) -> Any:
    """The tokenizer in a teacher's folder or GGUF file, as transformers reads it.

    Raises:
        InputError: unknown kind, or no tokenizer there.
    """
    if (kind not in LOADERS and ":" not in kind) or path is None:
        raise InputError(f"teacher {kind!r} has no text tokenizer without teacher.path (kinds: {', '.join(LOADERS)})")
    if kind != "cosyvoice2":
        return _auto_tokenizer(path)
    tokenizer = _auto_tokenizer(path / "CosyVoice-BlankEN")
    tokenizer.add_special_tokens(
        {
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(_COSYVOICE2_SPECIAL_TOKENS),
        }
    )
    return tokenizer


def _auto_tokenizer(folder: Path) -> Any:
    if folder.is_dir() and not any((folder / name).is_file() for name in _FILES):
        # transformers would make an empty one, which reads every text as nothing.
        raise InputError(f"{folder} has no tokenizer ({', '.join(_FILES)})")
    from transformers import AutoTokenizer

    try:
        if folder.is_file():
            return AutoTokenizer.from_pretrained(folder.parent, gguf_file=folder.name, local_files_only=True)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing more particular
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder} has no tokenizer: {reason}") from None
