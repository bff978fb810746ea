"""A run folder with every file of :mod:`mamtra_ray.run.folder`, made in milliseconds, for tests of its readers."""

import random
import wave
from pathlib import Path
from typing import Any

import numpy as np

from mamtra_ray.artifacts import write_checked_json
from mamtra_ray.config import load_config, save_config
from mamtra_ray.efficiency import ARCHITECTURES, cache_bytes, decode_flops, parameters
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.run.folder import (
    AudioIndex,
    Clip,
    Reference,
    Score,
    write_architecture,
    write_audio_index,
    write_reference,
)
from mamtra_ray.run.names import AUDIO, BEST, CONFIG, COSTS, CURVES, EXPORTED_LAYOUT, FINALISTS, PROBE, TRIALS
from mamtra_ray.run.rows import FINISHED, CurvePoint, FinalistRow, ProbeRow, TrialRow, write_table
from mamtra_ray.speech.error_rate import ErrorRate

DEMO = ARCHITECTURES["demo"]
STRATEGIES = ("block_beginning", "back", "sandwich")
RATIOS = ("1:1", "1:3")
TEXTS = {"u1": 'seven green <cats> & "one" owl', "u2": "my brother found nine keys"}


def quality(layout: Layout) -> float:
    """A made-up cross-entropy that grows with the number of Mamba layers and with how early they are."""
    return 1.0 + sum(0.05 / (1 + layer) + 0.01 for layer in layout.mamba_layers)


def finalist_row(layout: str | Layout, **changes: Any) -> FinalistRow:
    """A finalist that was not heard, but for ``changes``."""
    numbers = {
        "ce": 1.0,
        "kl": 0.1,
        "ce_start": 3.1,
        "kl_start": 2.0,
        "cache_bytes": 5.0,
        "decode_flops": 1.0,
        "parameters": 1.0,
    }
    row = {"origin": "block_beginning", "tokens": 1, "steps": 1, "seconds": 10.0, **numbers, **changes}
    return FinalistRow(Layout(str(layout)), **row)


def made_run(folder: Path, overrides: tuple[str, ...] = (), penalty: float = 0.0, seed: int = 0) -> Path:
    """Write a finished run; ``penalty`` is added to every cross-entropy, so that two runs differ."""
    randomness = random.Random(seed)
    folder.mkdir(parents=True)
    save_config(load_config(None, ["search.ratios=1:1,1:3", *overrides]), folder / CONFIG)
    write_architecture(folder, DEMO)
    layouts = {from_strategy(strategy, 12, ratio): strategy for ratio in RATIOS for strategy in STRATEGIES} | {
        Layout("AAMAMAMMAMMA"): "optuna",
        Layout("AMMMMAMMMMAM"): "probe",
        Layout("AMAMMMMAMAAA"): "optuna",
    }
    trials, curves, finalists, probe = [], [], [], []
    for index, (layout, origin) in enumerate(layouts.items()):
        costs = {
            "cache_bytes": cache_bytes(DEMO, layout, 2048),
            "decode_flops": decode_flops(DEMO, layout, 2048),
            "parameters": parameters(DEMO, layout),
        }
        probe.append(ProbeRow(layout, ce=quality(layout) + 0.4, kl=0.5, tokens=4000, seconds=1.5))
        for rung in range(2 if index % 2 == 0 else 1):
            ce = quality(layout) + penalty + 0.2 / (rung + 1) + randomness.uniform(0, 0.01)
            trial = TrialRow(
                layout,
                trial_id=f"t{index}",
                origin=origin,
                rung=rung,
                tokens=20_000 * (rung + 1),
                seconds=30.0 * (rung + 1),
                tokens_per_second=20_000 / 30.0,
                data_wait_fraction=0.01,
                ce=ce,
                kl=ce - 0.9,
                ce_start=3.1,
                kl_start=2.0,
                **costs,
                status=FINISHED,
                settings_hash="made",
            )
            trials.append(trial)
            for step in range(20 * rung + 1, 20 * rung + 21):
                loss = ce + 2.0 * 0.8**step
                terms = {"total": 2 * loss, "ce": loss, "kl": 0.3, "hidden": 0.1}
                curves.append(CurvePoint(layout, f"t{index}", rung, step, 1000 * step, **terms))
        wer = 0.05 + 0.4 * (quality(layout) - 1.1) + penalty + randomness.uniform(0, 0.01)
        ce = quality(layout) + penalty
        finalist = finalist_row(
            layout,
            origin=origin,
            tokens=300_000,
            steps=150,
            ce=ce,
            kl=ce - 0.9,
            **costs,
            wer=ErrorRate(wer, wer - 0.03, wer + 0.03),
            cer=wer / 2,
            metrics={"utmos": 3.9},
        )
        finalists.append(finalist)
    write_table(folder / TRIALS, trials, TrialRow)
    write_table(folder / CURVES, curves, CurvePoint)
    write_table(folder / PROBE, probe, ProbeRow)
    write_table(folder / FINALISTS, finalists, FinalistRow)
    teacher, codec = ErrorRate(0.06, 0.04, 0.09), ErrorRate(0.05, 0.03, 0.08)
    write_reference(folder, Reference(1.02, 60, Score(teacher, 0.03, {"utmos": 4.1}), Score(codec, 0.02)))
    phases = {
        "cache": {"seconds": 81.2, "tokens": 90_000},
        "trials": {"seconds": 300.5, "tokens": 400_000, "trials": 9},
    }
    write_checked_json(folder / COSTS, {"kind": "costs", "schema_version": 1, "phases": phases})
    systems = ("codec", "teacher", str(finalists[0].layout))
    write_audio(folder, systems, seed)
    best = {"kind": "layout", "schema_version": 1, "layout": str(finalists[0].layout)}
    write_checked_json(folder / BEST / EXPORTED_LAYOUT, best)
    return folder


def write_audio(folder: Path, systems: tuple[str, ...], seed: int = 0) -> None:
    """A tenth of a second of noise per system and text, and the index."""
    clips = []
    randomness = np.random.default_rng(seed)
    for system in systems:
        for utterance_id in TEXTS:
            path = folder / AUDIO / system / f"{utterance_id}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            with wave.open(str(path), "wb") as file:
                file.setparams((1, 2, 16_000, 0, "NONE", ""))
                file.writeframes(randomness.integers(-3000, 3000, 1600, dtype=np.int16).tobytes())
            clips.append(Clip(system, utterance_id, f"{system}/{utterance_id}.wav", TEXTS[utterance_id]))
    write_audio_index(folder, AudioIndex(systems, TEXTS, tuple(clips)))
