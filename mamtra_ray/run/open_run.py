"""Which settings a verb runs with and in which folder: the same rules for all verbs.

- ``--run DIR`` of a run that is there: its settings (``DIR/config.yaml``), overrides on top.
- ``--space`` or no ``--run``: a new run, or the same one again.
- What finished results contradict is refused, with the key, before anything is computed.
- Only a verb that creates or resumes a run writes its settings.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mamtra_ray.config import Config, load_config
from mamtra_ray.errors import InputError
from mamtra_ray.run.names import CONFIG, FINALIST_RESULTS, TRIALS

# Settings that a trial's score and a finalist's student depend on. Paths are left out: what they lead to has an
# identity of its own, which is compared when it is loaded (run/identity.py).
_OF_STUDENTS = (
    "seed",
    "teacher.kind",
    "corpus.seed",
    "corpus.train_tokens",
    "corpus.validation_tokens",
    "cache.format",
    "cache.top_k",
    "cache.bits",
    "cache.layers",
    *(f"student.{key}" for key in ("initialization", "state_sharing")),
    *(f"align.{key}" for key in ("tokens", "tokens_per_batch", "learning_rate", "precision")),
    *(f"distill.{key}" for key in ("schedule", "warmup_fraction")),
    "distill.pretrained_learning_rate_factor",
    *(f"distill.{key}" for key in ("weight_decay", "max_grad_norm", "ce_weight", "kl_weight", "hidden_weight")),
    *(f"distill.{key}" for key in ("hidden_layers", "kl_skew", "precision")),
)
_OWN_OF_TRIALS = ("learning_rate", "tokens_per_batch")
"""Keys of section search that replace those of section distill."""
_OF_TRIALS = (*_OF_STUDENTS, *(f"search.{key}" for key in _OWN_OF_TRIALS), "search.rung_tokens")
_OF_FINALISTS = (*_OF_STUDENTS, *(f"distill.{key}" for key in _OWN_OF_TRIALS), "distill.tokens")
_UNUSED = {
    "cache.top_k": ("cache.format", "topk"),
    "cache.bits": ("cache.format", "hidden_quantized"),
    **{f"align.{key}": ("student.initialization", "aligned") for key in ("tokens", "tokens_per_batch")},
    **{f"align.{key}": ("student.initialization", "aligned") for key in ("learning_rate", "precision")},
}
"""Keys that count only where another key has this value."""


@dataclass(frozen=True)
class OpenRun:
    """Settings and folder of a verb's call."""

    config: Config
    folder: Path
    """Absolute."""
    writes_config: bool
    """Whether this call creates the run, or changes its settings."""


def open_run(
    space: str | None,
    folder: Path | None,
    overrides: Sequence[str],
    *,
    creates: bool = True,
    resume: bool | None = None,
) -> OpenRun:
    """The settings and the folder of a verb; nothing is written yet.

    Args:
        space: ``--space``.
        folder: ``--run``; none: ``runs/<name>``.
        overrides: ``key=value``.
        creates: whether the verb may begin a run; one that may not needs a folder with a run, or a space to begin one.
        resume: of the verb that owns the run's settings (``search``): whether changed ones are wanted. None for others,
            which put their overrides on top and do not keep them.

    Raises:
        InputError: a bad file or key; a folder that is no run and not empty, or no folder but an address; another run's
            folder; a changed setting that finished results contradict.
    """
    _check_on_disk(folder)
    saved = (folder / CONFIG) if folder is not None else None
    if saved is not None and _exists(saved) and space is None:
        folder, config = saved.parent, load_config(saved, overrides)
        if resume is None:
            _check_results(folder, load_config(saved), config)
            return OpenRun(config, folder.absolute(), writes_config=False)
        return OpenRun(config, folder.absolute(), _check_new(config, folder, resume))
    if folder is not None and space is None and not creates:
        raise InputError(f"{folder} holds no run (it has no {CONFIG}); give --space to begin one there")
    config = load_config(space, overrides)
    folder = folder if folder is not None else Path("runs") / config.name
    return OpenRun(config, folder.absolute(), _check_new(config, folder, bool(resume)))


def _check_new(config: Config, folder: Path, resume: bool) -> bool:
    """Whether ``config`` must be written to ``folder``; refuses a folder with other contents."""
    saved = folder / CONFIG
    if not _exists(saved):
        if resume:
            raise InputError(f"{folder} holds no run to resume (it has no {CONFIG})")
        if _exists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder} is not empty and no run (it has no {CONFIG}); give another folder to --run")
        return True
    before = load_config(saved)
    _check_results(folder, before, config)
    old, new = _flat(before.model_dump()), _flat(config.model_dump())
    key = next((key for key in new if new[key] != old[key]), None)
    if key is None:
        return False
    # One that stopped before anything was computed may begin anew: its error may have asked for another setting.
    if not resume and (_has_trials(folder) or _has_finalists(folder)):
        raise InputError(
            f"{folder} holds a run with another configuration ({key}: {old[key]!r}, not {new[key]!r}); add --resume to "
            "go on with the new one, or give another folder to --run"
        )
    return True


def _check_results(folder: Path, before: Config, now: Config) -> None:
    """Refuse changes that make finished results wrong."""
    old, new = (
        # None stands for the finalists' own.
        _flat(config.model_dump()) | {f"search.{key}": getattr(config.distill_of_trials, key) for key in _OWN_OF_TRIALS}
        for config in (before, now)
    )
    for has_results, keys, what in (
        (_has_trials(folder), _OF_TRIALS, "trials"),
        (_has_finalists(folder), _OF_FINALISTS, "finalists"),
    ):
        for key in keys if has_results else ():
            if old[key] != new[key] and (_counts(old, key) or _counts(new, key)):
                # The key that was given, where trials are trained as the finalists are.
                section, _, last = key.partition(".")
                inherits = section == "search" and last in _OWN_OF_TRIALS and getattr(now.search, last) is None
                name = f"distill.{last}" if inherits else key
                raise InputError(
                    f"{name} is {new[key]!r}, but {folder} has {what} made with {old[key]!r}: leave it, or begin "
                    "another run with --run and --space"
                )


def _counts(settings: dict[str, Any], key: str) -> bool:
    other, value = _UNUSED.get(key, (None, None))
    return other is None or settings[other] == value


def _has_trials(folder: Path) -> bool:
    return (folder / TRIALS).exists()


def _has_finalists(folder: Path) -> bool:
    return any(folder.glob(FINALIST_RESULTS))


def _check_on_disk(folder: Path | None) -> None:
    """``Path`` makes ``s3:/bucket`` of ``s3://bucket``, which would become a folder of that name here."""
    if folder is not None and (scheme := re.match(r"[a-z][a-z0-9+.-]+(?=:/)", str(folder))):
        raise InputError(
            f"--run {str(folder)[:80]!r}: a run folder must be on a disk; only cache.location may be an address "
            f"({scheme[0]}://...)"
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        raise InputError(f"--run {str(path)[:80]!r} cannot be a folder: {str(error)[:80]}") from None


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
