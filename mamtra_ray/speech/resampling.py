"""Sample rates: reading recordings and bringing them to the rate a model takes."""

from __future__ import annotations

from math import gcd
from pathlib import Path

import numpy as np

from mamtra_ray.errors import InputError


def resampled(waveform: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Float32 waveform (samples,) at ``target_rate`` Hz, by polyphase filtering."""
    if rate == target_rate:
        return np.asarray(waveform, np.float32)
    from scipy.signal import resample_poly

    divisor = gcd(rate, target_rate)
    return resample_poly(waveform, target_rate // divisor, rate // divisor).astype(np.float32)


def read_audio(source: Path | str | bytes, target_rate: int) -> np.ndarray:
    """Float32 mono waveform (samples,) at ``target_rate`` of a file or of a file's bytes (WAV, FLAC, OGG, ...).

    Raises:
        InputError: missing, damaged or empty, or the package soundfile is not installed.
    """
    import io

    try:
        import soundfile
    except ImportError:
        raise InputError(
            "reading recordings needs the package soundfile (not installed): pip install 'mamtra-ray[evaluation]'"
        ) from None
    name = "audio in the row" if isinstance(source, bytes) else str(source)
    try:
        sound, rate = soundfile.read(
            io.BytesIO(source) if isinstance(source, bytes) else str(source), dtype="float32", always_2d=True
        )
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{name} is missing, damaged or no audio: {error}") from None
    if not len(sound) or not np.isfinite(sound).all():
        raise InputError(f"{name} is empty or holds samples that are no numbers")
    return resampled(sound.mean(1), rate, target_rate)
