"""Kaldi's log mel filter banks written out frame by frame, to compare with."""

import numpy as np


def fbank(waveform: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """(T, 80): DC removed, pre-emphasis, Povey window, power spectrum, triangles on the mel scale, log; 16 kHz."""
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)) ** 0.85
    rows = []
    for start in range(0, len(waveform) - 399, 160):
        frame = scale * waveform[start : start + 400].astype(np.float64)
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        rows.append(np.abs(np.fft.rfft(frame * window, 512)) ** 2)

    def mel(frequency):
        return 1127 * np.log(1 + np.asarray(frequency) / 700)

    edges = np.linspace(mel(20), mel(8000), 82)
    bins = mel(np.arange(257) * 16_000 / 512)
    filters = np.zeros((257, 80))
    for band in range(80):
        low, top, high = edges[band : band + 3]
        filters[:, band] = np.minimum((bins - low) / (top - low), (high - bins) / (high - top)).clip(0)
    filters[256] = 0  # Kaldi leaves out the last bin
    return np.log(np.maximum(np.stack(rows) @ filters, np.finfo(np.float32).eps))
