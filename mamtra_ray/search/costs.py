"""What every rung of the ladder cost: the teacher pass, the alignment, probes, trials and finalists.

Computed from what the rungs left on disk, never added up along the way, so that a killed and resumed run counts every
score once. FLOPs are 2 per parameter and token of a forward pass and 6 of a training step (as in the plan), with the
head and without the scan; text positions are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mamtra_ray import efficiency
from mamtra_ray.align.mixer_library import MANIFEST, WEIGHTS, read_library_manifest
from mamtra_ray.efficiency.architectures import Architecture
from mamtra_ray.layouts import Layout
from mamtra_ray.run.names import PROBE
from mamtra_ray.run.rows import FinalistRow, ProbeRow, TrialRow, read_table
from mamtra_ray.teacher_cache.manifest import CacheManifest


def cost_by_rung(
    folder: Path,
    architecture: Architecture,
    cache: CacheManifest,
    cache_seconds: float,
    library: Path | None,
    trials: Sequence[TrialRow],
    finalists: Sequence[FinalistRow],
) -> list[dict[str, Any]]:
    """One row per rung, then their sum.

    Args:
        folder: run folder, for the probe's rows.
        architecture: of the teacher, for FLOPs.
        cache: manifest of the teacher cache; it and the library may be an earlier run's, and are counted in full.
        cache_seconds: of the phase that made or opened the cache in this run.
        library: folder of the mixer library, if one was used.
        trials, finalists: rows of their tables; tokens and seconds of a trial's row count from its first step.

    Returns:
        rows of ``rung, layouts, tokens, seconds, tflop, bytes, teacher_tokens_saved``: seconds are of one worker or
        actor each, added up (of a finalist: of its workers together, once); bytes are what the rung keeps on disk for
        others; tokens saved are those for which the cache stood in for a forward pass of the teacher.
    """
    teacher_tokens = sum(shard.speech_tokens + shard.utterances for shard in cache.shards.values())
    all_attention = Layout.all_attention(architecture.num_layers)
    rows = [_row("cache", 1, [(all_attention, teacher_tokens)], 2, architecture, cache_seconds, stored=cache.num_bytes)]
    if library is not None:
        manifest = read_library_manifest(library)
        stored = sum((library / name).stat().st_size for name in (WEIGHTS, MANIFEST))
        # The teacher's own forward pass, then every layer's mixer forward and backward.
        work = [(all_attention, manifest.tokens), (Layout.all_mamba(architecture.num_layers), 3 * manifest.tokens)]
        rows.append(
            _row("align", 1, work, 2, architecture, manifest.seconds, stored=stored) | {"tokens": manifest.tokens}
        )
    probed = read_table(folder / PROBE, ProbeRow)
    if probed:
        work = [(row.layout, row.tokens) for row in probed]
        rows.append(_row("probe", len(probed), work, 2, architecture, sum(row.seconds for row in probed), saved=1))
    for rung in sorted({row.rung for row in trials}):
        before = {row.layout: row for row in trials if row.rung == rung - 1}
        here = [(row, before.get(row.layout)) for row in trials if row.rung == rung]
        work = [(row.layout, row.tokens - (earlier.tokens if earlier else 0)) for row, earlier in here]
        seconds = sum(row.seconds - (earlier.seconds if earlier else 0.0) for row, earlier in here)
        rows.append(_row(f"trials, rung {rung}", len(here), work, 6, architecture, seconds, saved=1))
    if finalists:
        work = [(row.layout, row.tokens) for row in finalists]
        seconds = sum(row.seconds for row in finalists)
        rows.append(_row("finalists", len(finalists), work, 6, architecture, seconds, saved=1))
    amounts = ("tokens", "seconds", "tflop", "bytes", "teacher_tokens_saved")
    total = {name: round(sum(row[name] for row in rows), 3) for name in amounts}
    return [*rows, {"rung": "all", "layouts": len({row.layout for row in (*probed, *trials, *finalists)}), **total}]


def _row(
    rung: str,
    layouts: int,
    work: Sequence[tuple[Layout, int]],
    flops_per_parameter: int,
    architecture: Architecture,
    seconds: float,
    stored: int = 0,
    saved: int = 0,
) -> dict[str, Any]:
    """``work`` lists (layout, tokens); ``saved`` is 1 where the cache stood in for the teacher."""
    tokens = sum(amount for _, amount in work)
    head = architecture.hidden_size * architecture.head_outputs
    flops = sum(
        flops_per_parameter * amount * (efficiency.parameters(architecture, layout) + head) for layout, amount in work
    )
    return {
        "rung": rung,
        "layouts": layouts,
        "tokens": tokens,
        "seconds": round(seconds, 2),
        "tflop": round(flops / 1e12, 3),
        "bytes": stored,
        "teacher_tokens_saved": saved * tokens,
    }
