"""A run folder with every file of :mod:`mamtra_ray.run.folder`, made in milliseconds, for tests of its readers."""

import random
import wave
from pathlib import Path

import numpy as np

from mamtra_ray.artifacts import write_json
from mamtra_ray.config import load_config, save_config
from mamtra_ray.efficiency import ARCHITECTURES, cache_bytes, decode_flops, parameters
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.run.folder import (
    CURVE_COLUMNS,
    FINALIST_COLUMNS,
    LEDGER,
    PROBE_COLUMNS,
    TRIAL_COLUMNS,
    AudioIndex,
    Clip,
    Reference,
    Score,
    write_architecture,
    write_audio_index,
    write_reference,
    write_rows,
)
from mamtra_ray.run.names import AUDIO, BEST_LAYOUT, CONFIG, CURVES, FINALISTS, PROBE, TRIALS

DEMO = ARCHITECTURES["demo"]
STRATEGIES = ("block_beginning", "back", "sandwich")
RATIOS = ("1:1", "1:3")
TEXTS = {"u1": 'seven green <cats> & "one" owl', "u2": "my brother found nine keys"}


def quality(layout: Layout) -> float:
    """A made-up cross-entropy that grows with the number of Mamba layers and with how early they are."""
    return 1.0 + sum(0.05 / (1 + layer) + 0.01 for layer in layout.mamba_layers)


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
        named = {"layout": str(layout), "ratio": layout.ratio, "origin": origin}
        costs = {
            "cache_bytes": cache_bytes(DEMO, layout, 2048),
            "decode_flops": decode_flops(DEMO, layout, 2048),
            "parameters": parameters(DEMO, layout),
        }
        probe.append({**named, "ce": quality(layout) + 0.4, "kl": 0.5, "tokens": 4000, "seconds": 1.5})
        for rung in range(2 if index % 2 == 0 else 1):
            ce = quality(layout) + penalty + 0.2 / (rung + 1) + randomness.uniform(0, 0.01)
            trial = {"trial_id": f"t{index}", "rung": rung, "tokens": 20_000 * (rung + 1), "seconds": 30.0 * (rung + 1)}
            trials.append({**named, **trial, **costs, "ce": ce, "kl": ce - 0.9, "ce_start": 3.1, "status": "finished"})
            for step in range(1, 21):
                tokens = 20_000 * rung + 1000 * step
                loss = ce + 2.0 * 0.8 ** (step + 20 * rung)
                point = {"step": step + 20 * rung, "tokens": tokens, "total": 2 * loss, "ce": loss, "logits": 0.3}
                curves.append({**point, "trial_id": f"t{index}", "layout": str(layout), "rung": rung, "emb": 0.1})
        wer = 0.05 + 0.4 * (quality(layout) - 1.1) + penalty + randomness.uniform(0, 0.01)
        scores = {
            "ce": quality(layout) + penalty,
            "wer": wer,
            "wer_low": wer - 0.03,
            "wer_high": wer + 0.03,
            "utmos": 3.9,
        }
        finalists.append({**named, **costs, **scores, "cer": wer / 2, "tokens": 300_000, "steps": 150})
    write_rows(folder / TRIALS, trials, TRIAL_COLUMNS)
    write_rows(folder / CURVES, curves, CURVE_COLUMNS)
    write_rows(folder / PROBE, probe, PROBE_COLUMNS)
    write_rows(folder / FINALISTS, finalists, FINALIST_COLUMNS)
    write_reference(
        folder, Reference(1.02, 60, Score(0.06, 0.04, 0.09, 0.03, {"utmos": 4.1}), Score(0.05, 0.03, 0.08, 0.02))
    )
    phases = {
        "cache": {"seconds": 81.2, "tokens": 90_000},
        "trials": {"seconds": 300.5, "tokens": 400_000, "trials": 9},
    }
    write_json(folder / LEDGER, {"kind": "ledger", "schema_version": 1, "phases": phases})
    systems = ("codec", "teacher", finalists[0]["layout"])
    write_audio(folder, systems, seed)
    write_json(folder / BEST_LAYOUT, {"kind": "layout", "schema_version": 1, "layout": finalists[0]["layout"]})
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
