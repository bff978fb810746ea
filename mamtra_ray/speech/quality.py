"""Scores of sound beyond the words: likeness to the prompt's speaker, predicted opinion, and VERSA's collection.

All come from optional packages with their own or the user's weights; nothing is downloaded here.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.speech.recognizer import SAMPLE_RATE
from mamtra_ray.speech.resampling import read_audio, resampled


class Metric(Protocol):
    """A score of spoken utterances."""

    def score(
        self,
        waveforms: Sequence[np.ndarray],
        sample_rate: int,
        texts: Sequence[str],
        prompts: Sequence[Path | None],
    ) -> list[dict[str, float]]:
        """Named values of every utterance; none of those it cannot have (likeness without a prompt).

        Args:
            waveforms: float32 mono.
            sample_rate: of all waveforms, in Hz.
            texts: what was to be said.
            prompts: recording whose voice was to be continued, if any.
        """
        ...


def metric_from_name(name: str) -> Metric:
    """The score behind an entry of ``evaluate.metrics``: ``kind`` or ``kind:PATH``.

    Raises:
        InputError: unknown kind, or a package or file that is missing.
    """
    kind, _, path = name.partition(":")
    if kind not in METRICS:
        raise InputError(f"evaluate.metrics: unknown score {kind!r}: {nearest_name(kind, METRICS)}")
    if path and not Path(path).exists():
        raise InputError(f"evaluate.metrics={name}: {path} does not exist")
    return METRICS[kind](Path(path) if path else None)


def check_packages(name: str) -> None:
    """What a dry run asks: is the package behind an entry of ``evaluate.metrics`` installed? Imports none of them.

    Raises:
        InputError: one is not, and how to install it.
    """
    kind, _, path = name.partition(":")
    if kind == "speaker_similarity" and path:
        return  # transformers does it
    for package in _PACKAGES[kind]:
        if importlib.util.find_spec(package) is None:
            raise _missing(kind, package)


def _missing(kind: str, package: str | None) -> InputError:
    return InputError(f"evaluate.metrics={kind} needs the package {package}, which is not installed: {_INSTALL[kind]}")


@dataclass(frozen=True)
class SpeakerSimilarity:
    """Cosine between speaker embeddings of the utterance and of its prompt, -1 to 1.

    Values of different encoders cannot be compared. Seed-TTS-eval's SIM uses a WavLM-large fine-tuned by UniSpeech,
    which neither transformers nor a package provides; VERSA has a wrapper for it.
    """

    embed: Callable[[np.ndarray], np.ndarray]
    """Waveform at 16 kHz -> vector."""
    known: dict[Path, np.ndarray] = field(default_factory=dict)

    def score(
        self,
        waveforms: Sequence[np.ndarray],
        sample_rate: int,
        texts: Sequence[str],
        prompts: Sequence[Path | None],
    ) -> list[dict[str, float]]:
        """``speaker_similarity`` of each utterance that has a prompt."""
        scores: list[dict[str, float]] = []
        for waveform, prompt in zip(waveforms, prompts, strict=True):
            if prompt is None:
                scores.append({})
                continue
            if prompt not in self.known:
                self.known[prompt] = self.embed(read_audio(prompt, SAMPLE_RATE))
            own, other = self.embed(resampled(waveform, sample_rate, SAMPLE_RATE)), self.known[prompt]
            cosine = own @ other / (np.linalg.norm(own) * np.linalg.norm(other))
            scores.append({"speaker_similarity": float(cosine)})
        return scores


def load_speaker_similarity(path: Path | None) -> SpeakerSimilarity:
    """Resemblyzer, which carries its weights, or a folder of transformers' x-vector models (WavLM, UniSpeech-SAT)."""
    import torch

    if path is None:
        try:
            from resemblyzer import VoiceEncoder
        except ImportError as error:
            raise _missing("speaker_similarity", error.name) from None
        return SpeakerSimilarity(VoiceEncoder("cpu", verbose=False).embed_utterance)
    from transformers import AutoFeatureExtractor, AutoModelForAudioXVector

    try:
        model = AutoModelForAudioXVector.from_pretrained(path, local_files_only=True).eval()
        extractor = AutoFeatureExtractor.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path} is no folder of an x-vector model: {' '.join(str(error).split())[:200]}") from None

    def embed(waveform: np.ndarray) -> np.ndarray:
        inputs = extractor(waveform, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        with torch.inference_mode():
            return model(**inputs).embeddings[0].numpy()

    return SpeakerSimilarity(embed)


@dataclass(frozen=True)
class PredictedOpinion:
    """A network's guess of the mean opinion score, 1 to 5; one utterance at a time, as padding would shift it."""

    name: str
    predict: Callable[[np.ndarray], float]
    """Waveform at 16 kHz -> score."""

    def score(
        self,
        waveforms: Sequence[np.ndarray],
        sample_rate: int,
        texts: Sequence[str],
        prompts: Sequence[Path | None],
    ) -> list[dict[str, float]]:
        """``name`` of each utterance."""
        sounds = [resampled(waveform, sample_rate, SAMPLE_RATE) for waveform in waveforms]
        return [{self.name: float(self.predict(sound))} for sound in sounds]


def load_utmos(path: Path | None) -> PredictedOpinion:
    """UTMOS (strong learner) through the package utmos-pytorch, with its converted weights in a file of the user's.

    Raises:
        InputError: no file, no package, or a file without some of the network's weights (which the package would
            leave at their random start).
    """
    import torch

    if path is None:
        raise InputError("utmos needs its weights (Blinorot/UTMOS-PyTorch on Hugging Face): utmos:FILE")
    try:
        from utmos_pytorch.utmos_torch import UTMOSModel, UTMOSScoreTorch
    except ImportError as error:
        raise _missing("utmos", error.name) from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = sorted(set(UTMOSModel().state_dict()) - set(found))
    except Exception as error:  # pickle, zip and torch errors of many types
        raise InputError(f"{path} is damaged or no PyTorch file: {' '.join(str(error).split())[:200]}") from None
    if missing:
        raise InputError(f"{path} holds no UTMOS weights: {missing[0]} is missing")
    network = UTMOSScoreTorch(str(path))
    return PredictedOpinion("utmos", lambda sound: network.score(torch.from_numpy(sound)))


def load_dnsmos(path: Path | None) -> PredictedOpinion:
    """DNSMOS P.835, overall quality, through the package speechmos, which carries its weights."""
    try:
        from speechmos import dnsmos
    except ImportError as error:
        raise _missing("dnsmos", error.name) from None
    return PredictedOpinion("dnsmos", lambda sound: dnsmos.run(np.clip(sound, -1, 1), SAMPLE_RATE)["ovrl_mos"])


def load_distillmos(path: Path | None) -> PredictedOpinion:
    """Distill-MOS, a small network distilled from one on XLS-R, through the package distillmos, which carries its
    weights (Stahl and Gamper, 2025, arXiv:2502.05356).

    It hears 7.68 s at once: a shorter sound is padded with silence, of a longer one its windows' scores are averaged.

    Raises:
        InputError: a package is missing or does not load.
    """
    import torch

    try:
        # It needs torchaudio for its command line only, and cannot be imported without.
        from distillmos import ConvTransformerSQAModel
    except ImportError as error:
        raise _missing("distillmos", error.name) from None
    except OSError as error:  # torchaudio's library beside a torch of another build
        raise InputError(
            f"evaluate.metrics=distillmos: torchaudio does not load beside torch {torch.__version__}, install the one "
            f"of the same build (CPU or CUDA, https://pytorch.org): {' '.join(str(error).split())[:200]}"
        ) from None
    with contextlib.redirect_stdout(io.StringIO()):  # it says where its weights are
        network = ConvTransformerSQAModel().eval()

    @torch.inference_mode()
    def predict(sound: np.ndarray) -> float:
        if not sound.any():
            raise ValueError("there is no sound in it")
        return network(torch.from_numpy(sound)[None]).item()

    return PredictedOpinion("distillmos", predict)


def load_versa(path: Path | None) -> Any:
    """VERSA with a configuration file of its own, see :mod:`mamtra_ray.speech.versa`."""
    from mamtra_ray.speech.versa import load_versa_suite

    if path is None:
        raise InputError("versa needs its configuration: versa:FILE (a list of VERSA metrics in YAML)")
    return load_versa_suite(path)


METRICS: dict[str, Callable[[Path | None], Any]] = {
    "speaker_similarity": load_speaker_similarity,
    "utmos": load_utmos,
    "dnsmos": load_dnsmos,
    "distillmos": load_distillmos,
    "versa": load_versa,
}
"""Loader by kind; takes the path behind the colon."""

_PACKAGES = {
    "speaker_similarity": ("resemblyzer",),
    "utmos": ("utmos_pytorch",),
    "dnsmos": ("speechmos", "onnxruntime", "librosa"),
    "distillmos": ("distillmos", "xls_r_sqa", "torchaudio"),
    "versa": ("versa",),
}
"""Modules by kind, which a dry run looks for."""

_INSTALL = {
    "speaker_similarity": (
        "pip install resemblyzer; or give the folder of an x-vector model: speaker_similarity:FOLDER"
    ),
    "utmos": "pip install utmos-pytorch",
    "dnsmos": "pip install speechmos librosa",
    "distillmos": "pip install 'mamtra-ray[quality]'",
    "versa": "pip install git+https://github.com/wavlab-speech/versa (versa on PyPI is something else)",
}
