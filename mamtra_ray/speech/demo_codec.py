"""Speech tokens to sound: a convolutional decoder to log-mel frames, then Griffin-Lim.

One codebook vector describes 40 ms without its neighbors; the decoder sees a second of tokens around
each and restores what the quantization lost. Griffin-Lim is the fast variant of Perraudin, Balazs and
Sondergaard (WASPAA 2013), started from seeded phases so that equal tokens give equal sound.

Dimension letters: B batch, S speech tokens, T mel frames, C channels, M mel bands, F frequency bins.
"""

from __future__ import annotations

import json
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mamtra_ray.artifacts import written_atomically
from mamtra_ray.assets import demo_asset
from mamtra_ray.errors import InputError
from mamtra_ray.speech import tokenizer as tk

SCHEMA_VERSION = 1
_FEWEST_FRAMES = tk.FFT_SIZE // 2 // tk.HOP_SIZE + 2


class _Block(nn.Module):
    """A ConvNeXt block: depthwise convolution over time, norm and MLP over channels; keeps (B, S, C)."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.mix = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, 2 * channels)
        self.narrow = nn.Linear(2 * channels, channels)

    def forward(self, x_BSC: Tensor) -> Tensor:
        mixed_BSC = self.mix(x_BSC.transpose(1, 2)).transpose(1, 2)
        return x_BSC + self.narrow(functional.gelu(self.widen(self.norm(mixed_BSC))))


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the token decoder."""

    channels: int = 192
    num_blocks: int = 4
    kernel_size: int = 7
    """Tokens one block looks at; four blocks of 7 see half a second to either side."""


class TokenDecoder(nn.Module):
    """Codebook patches to log-mel frames.

    The output is the codebook's own patch plus a correction read from the neighboring patches, so the
    untrained network already decodes to the centroids.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        values = tk.FRAMES_PER_TOKEN * tk.NUM_MELS
        self.config = config
        self.read = nn.Linear(values, config.channels)
        self.blocks = nn.ModuleList(_Block(config.channels, config.kernel_size) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.channels)
        self.write = nn.Linear(config.channels, values)
        self.smooth = nn.Conv1d(tk.NUM_MELS, 2 * tk.NUM_MELS, 5, padding=2)
        self.correct = nn.Conv1d(2 * tk.NUM_MELS, tk.NUM_MELS, 5, padding=2)
        for layer in (self.write, self.correct):
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, patch_BSD: Tensor) -> Tensor:
        """Log-mel frames (B, 4 S, M) for quantized patches (B, S, D)."""
        x_BSC = self.read(patch_BSD)
        for block in self.blocks:
            x_BSC = block(x_BSC)
        mel_BTM = (patch_BSD + self.write(self.norm(x_BSC))).unflatten(2, (-1, tk.NUM_MELS)).flatten(1, 2)
        smoothed_BMT = self.correct(functional.gelu(self.smooth(mel_BTM.transpose(1, 2))))
        return mel_BTM + smoothed_BMT.transpose(1, 2)


@cache
def mel_inverse() -> Tensor:
    """Pseudo-inverse (M, F) of the mel filters."""
    return torch.linalg.pinv(tk.mel_filters())


def griffin_lim(mel_TM: Tensor, iterations: int = 32, momentum: float = 0.99, seed: int = 0) -> np.ndarray:
    """A waveform whose log-mel frames are about those given.

    Args:
        mel_TM: natural-log mel magnitudes (T, M).
        iterations: phase updates.
        momentum: acceleration of the fast variant; 0 is the classical algorithm.
        seed: seed of the starting phases.

    Returns:
        Float32 samples at 16 kHz, (T - 1) x 160 of them.
    """
    magnitude_FT = (mel_TM.exp() @ mel_inverse()).clamp_min(0).T
    length = (len(mel_TM) - 1) * tk.HOP_SIZE
    generator = torch.Generator().manual_seed(seed)
    angle_FT = torch.rand(magnitude_FT.shape, generator=generator) * (2 * torch.pi)
    phase_FT = torch.polar(torch.ones_like(magnitude_FT), angle_FT)
    previous_FT = torch.zeros_like(phase_FT)

    def synthesize(spectrum_FT: Tensor) -> Tensor:
        window = tk.analysis_window()
        return torch.istft(spectrum_FT, tk.FFT_SIZE, tk.HOP_SIZE, tk.WINDOW_SIZE, window, length=length)

    for _ in range(iterations):
        rebuilt_FT = tk.stft(synthesize(magnitude_FT * phase_FT))
        phase_FT = rebuilt_FT - previous_FT * (momentum / (1 + momentum))
        phase_FT = phase_FT / phase_FT.abs().clamp_min(1e-8)
        previous_FT = rebuilt_FT
    return synthesize(magnitude_FT * phase_FT).clamp(-1, 1).numpy()


@dataclass(frozen=True)
class Codec:
    """Tokens to sound and back: the tokenizer, the decoder and what they were made from."""

    tokenizer: tk.Tokenizer
    decoder: TokenDecoder
    made_by: dict[str, str]

    @property
    def num_tokens(self) -> int:
        """Size of the codebook; tokens run from 0 to this minus 1."""
        return len(self.tokenizer.codebook_KD)

    def encode(self, waveform: np.ndarray, phase: int = 0) -> np.ndarray:
        """Speech tokens int32 (S,) of a 16 kHz waveform; see `Tokenizer.encode`."""
        return self.tokenizer.encode(waveform, phase)

    @torch.inference_mode()
    def decode_mel(self, tokens: Sequence[int] | np.ndarray) -> Tensor:
        """Log-mel frames (4 S, M) of S tokens.

        Raises:
            InputError: no token, or one outside the codebook.
        """
        index_S = torch.as_tensor(np.asarray(tokens, np.int64))
        if not len(index_S) or index_S.min() < 0 or index_S.max() >= self.num_tokens:
            raise InputError(
                f"the codec decodes one or more tokens from 0 to {self.num_tokens - 1}; got "
                + (f"tokens from {int(index_S.min())} to {int(index_S.max())}" if len(index_S) else "none")
            )
        return self.decoder(self.tokenizer.codebook_KD[index_S][None])[0]

    def decode(self, tokens: Sequence[int] | np.ndarray, iterations: int = 32) -> np.ndarray:
        """Float32 waveform at 16 kHz, 40 ms per token (10 ms less at the end)."""
        mel_TM = self.decode_mel(tokens)
        frames = len(mel_TM)
        if frames < _FEWEST_FRAMES:  # a single token: too short for one window of the transform
            mel_TM = torch.cat([mel_TM, mel_TM[-1:].expand(_FEWEST_FRAMES - frames, -1)])
        return griffin_lim(mel_TM, iterations)[: (frames - 1) * tk.HOP_SIZE]

    def decode_batch(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
        """As `decode` for several utterances; one at a time, so no result depends on its batch.

        An empty sequence (a model that said nothing) becomes a tenth of a second of silence.
        """
        silence = np.zeros(tk.SAMPLE_RATE // 10, np.float32)
        return [self.decode(tokens) if len(tokens) else silence for tokens in sequences]

    def save(self, path: Path) -> None:
        """Write codebook and decoder in half precision as one safetensors file, atomically."""
        from safetensors.torch import save_file

        tensors = {f"decoder.{name}": tensor for name, tensor in self.decoder.state_dict().items()}
        tensors["codebook"] = self.tokenizer.codebook_KD
        description = {
            "kind": "demo_codec",
            "schema_version": SCHEMA_VERSION,
            "decoder": vars(self.decoder.config),
            "made_by": self.made_by,
        }
        with written_atomically(path) as temporary:
            halves = {name: tensor.detach().half().contiguous() for name, tensor in tensors.items()}
            save_file(halves, temporary, {"mamtra_ray": json.dumps(description, sort_keys=True)})


def load_codec(path: str | Path | None = None) -> Codec:
    """Read a codec; the packaged demo codec when no path is given.

    Raises:
        InputError: the file is missing, damaged, or no codec of this version.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path) if path is not None else demo_asset("codec/codec.safetensors")
    if not path.is_file():
        raise InputError(f"{path} does not exist; expected the demo codec (a safetensors file)")
    try:
        with safe_open(path, framework="pt") as file:
            description = json.loads((file.metadata() or {}).get("mamtra_ray", "{}"))
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}") from None
    if description.get("kind") != "demo_codec" or description.get("schema_version") != SCHEMA_VERSION:
        raise InputError(f"{path} is no demo codec of version {SCHEMA_VERSION}")
    codebook_KD = tensors.pop("codebook")
    decoder = TokenDecoder(DecoderConfig(**description["decoder"]))
    decoder.load_state_dict({name.removeprefix("decoder."): tensor for name, tensor in tensors.items()})
    return Codec(tk.Tokenizer(codebook_KD), decoder.eval().requires_grad_(False), description["made_by"])


def pcm(waveform: np.ndarray) -> bytes:
    """A float waveform in [-1, 1] as 16-bit samples, little-endian."""
    return np.round(np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes()


def write_wav(path: str | Path, waveform: np.ndarray, sample_rate: int = tk.SAMPLE_RATE) -> None:
    """Write a float waveform in [-1, 1] as a 16-bit mono WAV file, atomically."""
    with written_atomically(Path(path)) as temporary, wave.open(str(temporary), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes(pcm(waveform))
