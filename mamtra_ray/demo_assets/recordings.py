"""First stage of the demo build: draw the sentences and let the voice read them.

Sound goes to the work folder in shards of int16 samples, so a stopped build goes on with the next
shard. The sound itself is not shipped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mamtra_ray.artifacts import content_hash, written_atomically
from mamtra_ray.demo_assets.voice import Voice

SHARD_SIZE = 100
"""Utterances in one shard, the most that a killed build says again."""


@dataclass(frozen=True)
class SpeechShards:
    """Sound of a list of sentences on disk."""

    paths: tuple[Path, ...]

    def waveforms(self, start: int = 0, stop: int | None = None) -> list[np.ndarray]:
        """Float32 waveforms (16 kHz) of the sentences `start` to `stop`, in their order."""
        stop = len(self.paths) * SHARD_SIZE if stop is None else stop
        sounds: list[np.ndarray] = []
        first_shard = start // SHARD_SIZE
        for path in self.paths[first_shard : (stop - 1) // SHARD_SIZE + 1]:
            sounds += _read_shard(path)
        offset = first_shard * SHARD_SIZE
        return sounds[start - offset : stop - offset]


def _read_shard(path: Path) -> list[np.ndarray]:
    with np.load(path, allow_pickle=False) as shard:
        samples = shard["samples"].astype(np.float32) / 32767
        return np.split(samples, np.cumsum(shard["lengths"])[:-1])


def speak_sentences(
    spoken: Sequence[str],
    folder: Path,
    voice_name: str,
    make_voice: Callable[[], Voice],
    jobs: int = 1,
) -> SpeechShards:
    """Sound of every text, from the folder where it is there already.

    Args:
        spoken: what to say, as the voice reads it.
        folder: where the shards go; a shard's name carries the hash of its texts and of the voice.
        voice_name: identifies the voice and its settings in that hash.
        make_voice: loads the voice; called once in every worker process (so it must be picklable).
        jobs: worker processes, each with one thread.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = [tuple(spoken[start : start + SHARD_SIZE]) for start in range(0, len(spoken), SHARD_SIZE)]
    paths = [folder / f"{index:05d}-{content_hash([voice_name, shard])}.npz" for index, shard in enumerate(shards)]
    missing = [(shard, path) for shard, path in zip(shards, paths, strict=True) if not path.exists()]
    started = time.monotonic()

    def report(done: int) -> None:
        rest = (time.monotonic() - started) / done * (len(missing) - done)
        print(f"voice: {done}/{len(missing)} shards, about {rest / 60:.1f} min left", flush=True)

    if jobs == 1 or len(missing) <= 1:
        voice = make_voice() if missing else None
        for done, (shard, path) in enumerate(missing, 1):
            assert voice is not None
            _speak_shard(voice, shard, path)
            report(done)
    else:
        # Spawned, not forked: ONNX Runtime's threads do not survive a fork.
        with ProcessPoolExecutor(jobs, get_context("spawn"), _start_worker, (make_voice,)) as pool:
            for done, _ in enumerate(pool.map(_speak_in_worker, missing), 1):
                report(done)
    return SpeechShards(tuple(paths))


def _speak_shard(voice: Voice, spoken: Sequence[str], path: Path) -> None:
    sounds = [voice(text) for text in spoken]
    samples = np.round(np.clip(np.concatenate(sounds), -1, 1) * 32767).astype(np.int16)
    with written_atomically(path) as temporary, temporary.open("wb") as file:
        np.savez(file, samples=samples, lengths=np.array([len(sound) for sound in sounds], np.int64))


_worker_voice: Voice | None = None


def _start_worker(make_voice: Callable[[], Voice]) -> None:
    global _worker_voice
    os.environ["OMP_NUM_THREADS"] = "1"
    _worker_voice = make_voice()


def _speak_in_worker(task: tuple[Sequence[str], Path]) -> None:
    assert _worker_voice is not None
    _speak_shard(_worker_voice, *task)
