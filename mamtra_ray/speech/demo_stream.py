"""The demo codec's sound while its tokens still come: about half a second at a time.

The frames are those of the whole utterance: the decoder sees 13 tokens to either side of one (four convolutions of 7
tokens, two of 5 frames), so a frame is final once 13 more tokens are there. The phases are not. Griffin-Lim as
:func:`~mamtra_ray.speech.demo_codec.griffin_lim` runs it looks at the whole utterance; here each block's phases are
searched beside those of the frames before it, which stay as they are, and a little way ahead. What is handed out is the
overlap-add of fixed frames, so blocks join without a step, but the samples are others than
:meth:`~mamtra_ray.speech.demo_codec.Codec.decode`'s.

Dimension letters: T mel frames, F frequency bins, M mel bands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from mamtra_ray.speech import tokenizer as tk
from mamtra_ray.speech.demo_codec import Codec, mel_inverse

BLOCK_TOKENS = 12
"""Tokens that become sound together: 0.48 s."""
_LOOK_AHEAD = 8
"""Frames whose phases are searched with a block's but are not kept: the next block knows more of what follows."""
_REACH = tk.WINDOW_SIZE // 2 // tk.HOP_SIZE
"""Frames to either side of one whose windows reach its center."""
_PAST = 3 * _REACH
"""Fixed frames that are kept: the first ones of what is transformed see a mirror image in place of their past."""


def reach_of(codec: Codec) -> int:
    """Tokens to either side on which the frames of one token depend."""
    config = codec.decoder.config
    smoothing = sum(layer.kernel_size[0] // 2 for layer in (codec.decoder.smooth, codec.decoder.correct))
    return config.num_blocks * (config.kernel_size // 2) + -(-smoothing // tk.FRAMES_PER_TOKEN)


def decode_stream(codec: Codec, tokens: Iterable[int]) -> Iterator[np.ndarray]:
    """Float32 waveforms at 16 kHz that together are as long as what ``codec.decode`` gives.

    An utterance that ends before the first block is decoded whole.

    Raises:
        InputError: a token outside the codebook, or none at all.
    """
    reach, sound = reach_of(codec), _PhaseSearch()
    said: list[int] = []
    done = 0
    for token in tokens:
        said.append(token)
        if len(said) == done + BLOCK_TOKENS + reach:
            yield sound.after(_frames(codec, said, done, done + BLOCK_TOKENS, reach), is_last=False)
            done += BLOCK_TOKENS
    if not done:
        yield codec.decode(said)
        return
    yield sound.after(_frames(codec, said, done, len(said), reach), is_last=True)


def _frames(codec: Codec, tokens: list[int], first: int, last: int, reach: int) -> Tensor:
    """Log-mel frames (T, M) of tokens ``first`` to ``last``, from what they depend on."""
    begin = max(0, first - reach)
    mel_TM = codec.decode_mel(tokens[begin : last + reach])
    return mel_TM[tk.FRAMES_PER_TOKEN * (first - begin) : tk.FRAMES_PER_TOKEN * (last - begin)]


class _PhaseSearch:
    """Griffin-Lim, block after block; see :func:`~mamtra_ray.speech.demo_codec.griffin_lim`."""

    def __init__(self, iterations: int = 32, momentum: float = 0.99, seed: int = 0) -> None:
        self.iterations, self.momentum = iterations, momentum
        self.generator = torch.Generator().manual_seed(seed)
        bins = tk.FFT_SIZE // 2 + 1
        self.fixed_FT = torch.zeros(bins, 0, dtype=torch.complex64)
        """Spectra of the last frames whose phases are decided."""
        self.forgotten = 0
        """Frames before these."""
        self.waiting_FT = torch.zeros(bins, 0)
        """Magnitudes of the frames after them."""
        self.given = 0
        """Samples that were handed out."""

    @torch.inference_mode()
    def after(self, mel_TM: Tensor, is_last: bool) -> np.ndarray:
        """The samples that are final once these frames are there too."""
        magnitude_FT = (mel_TM.exp() @ mel_inverse()).clamp_min(0).T
        self.waiting_FT = torch.cat([self.waiting_FT, magnitude_FT], 1)
        kept = self.waiting_FT.shape[1] - (0 if is_last else _LOOK_AHEAD)
        spectrum_FT = self._search()
        self.fixed_FT = torch.cat([self.fixed_FT, spectrum_FT[:, :kept]], 1)
        self.waiting_FT = self.waiting_FT[:, kept:]
        # Samples up to here have every frame that reaches them.
        end = (self.fixed_FT.shape[1] - (1 if is_last else _REACH)) * tk.HOP_SIZE
        begin = self.given - self.forgotten * tk.HOP_SIZE
        samples = _synthesized(self.fixed_FT)[begin:end]
        self.given += len(samples)
        self.forgotten += max(0, self.fixed_FT.shape[1] - _PAST)
        self.fixed_FT = self.fixed_FT[:, -_PAST:]
        return samples.clamp(-1, 1).numpy()

    def _search(self) -> Tensor:
        """Spectra (F, T) of the frames that wait, fitting to each other and to the fixed ones before them."""
        num_past, waiting = self.fixed_FT.shape[1], self.waiting_FT.shape[1]
        angle_FT = torch.rand(self.waiting_FT.shape, generator=self.generator) * (2 * torch.pi)
        phase_FT = torch.polar(torch.ones(1), angle_FT)
        previous_FT = torch.zeros_like(phase_FT)
        for _ in range(self.iterations):
            spectrum_FT = torch.cat([self.fixed_FT, self.waiting_FT * phase_FT], 1)
            rebuilt_FT = tk.stft(_synthesized(spectrum_FT))[:, num_past : num_past + waiting]
            phase_FT = rebuilt_FT - previous_FT * (self.momentum / (1 + self.momentum))
            phase_FT = phase_FT / phase_FT.abs().clamp_min(1e-8)
            previous_FT = rebuilt_FT
        return self.waiting_FT * phase_FT


def _synthesized(spectrum_FT: Tensor) -> Tensor:
    length = (spectrum_FT.shape[1] - 1) * tk.HOP_SIZE
    window = tk.analysis_window()
    return torch.istft(spectrum_FT, tk.FFT_SIZE, tk.HOP_SIZE, tk.WINDOW_SIZE, window, length=length)
