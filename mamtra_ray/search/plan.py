"""What a search will do and about what it costs, before it starts (``--dry-run``). Needs neither torch nor Ray."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from mamtra_ray.config import Config
from mamtra_ray.corpus.table import token_counts
from mamtra_ray.layouts.candidates import given_candidates, importance_criteria
from mamtra_ray.run.checks import CheckedInputs
from mamtra_ray.run.memory import (
    Lengths,
    check_compiles,
    check_memory,
    machine_of,
    memory_of_phases,
    memory_table,
    one_of_every_ratio,
)
from mamtra_ray.runtime.progress import duration, table
from mamtra_ray.teacher_cache.plan import left_out_note

# Share of this machine's matmul rate that a whole forward or training step reaches on the demo.
_REACHED = 0.35


def print_plan(config: Config, folder: Path, inputs: CheckedInputs, address: str | None = None) -> None:
    """Print phases, tokens, FLOPs and the time on one process of this machine.

    FLOPs count 2 per parameter and token for a forward pass and 6 for training; the time divides them by this
    machine's measured matmul rate. On a cluster, divide by its rate and workers instead.

    Raises:
        InputError: a phase of which one process is certain not to fit in the memory of this machine, or of its card,
            and no cluster at ``address`` is asked for.
    """
    lengths = Lengths.of(inputs.train, inputs.teacher.sequence_overhead, config.corpus.train_tokens)
    memory = memory_of_phases(config, inputs.architecture, lengths, one_of_every_ratio(inputs.space))
    check_memory(memory, machine_of(config, address))
    check_compiles(config, address)
    layers, body = inputs.num_layers, inputs.body_parameters()
    train = int(token_counts(inputs.train, "speech_tokens").sum())
    train = min(train, config.corpus.train_tokens or train)
    validation = config.corpus.validation_tokens
    search, distill = config.search, config.distill
    given = given_candidates(inputs.space, search.strategies, search.layouts)
    ranked = importance_criteria(search.strategies)
    placements = len(given) + len(ranked) * len(search.ratios)
    trials = placements if search.sampler == "grid" else max(search.trials, placements)
    trials = min(trials, inputs.space.num_layouts)
    halving = _halving_tokens(trials, search.rung_tokens, search.reduction_factor)
    finalists = placements + search.finalists * len(search.ratios)
    # Every Mamba layer is trained beside the teacher's forward pass, which the alignment repeats.
    aligned = config.align.tokens if config.student.initialization == "aligned" else 0
    probed = config.probe.num_layouts * config.probe.validation_tokens if aligned else 0
    is_auto = "auto" in (distill.learning_rate, search.learning_rate)
    phases = [
        ("cache", "teacher forward", train + validation, 2),
        ("align", f"{layers} mixers at once", aligned, 8),
        ("probe", f"{config.probe.num_layouts if aligned else 0} layouts, forward", probed, 2),
        *([("learning rate", "3 to 9 rates, one layout", 5 * search.rung_tokens[0], 6)] if is_auto else []),
        ("trials", f"{trials} layouts, rungs {'/'.join(map(str, search.rung_tokens))}", halving, 6),
        ("finalists", f"{finalists} layouts x {distill.tokens:,} tokens", finalists * distill.tokens, 6),
    ]
    rate = _matmul_flops_per_second() * _REACHED
    rows = [
        [name, what, f"{tokens:,}", f"{tokens * body * factor / 1e12:.2f}", duration(tokens * body * factor / rate)]
        for name, what, tokens, factor in phases
    ]
    if config.evaluate.sentences:
        # What generation and recognition take depends on lengths, codec and recognizer.
        spoken = f"{finalists + 1} systems x {config.evaluate.sentences} sentences"
        if most := config.evaluate.race_sentences:
            spoken += f", then up to {most} by those that are not told apart"
        rows.append(["speech", spoken, "", "", "not estimated"])
        if search.sentences:
            of_trials = f"{search.sentences} sentences by the teacher and by each trial of the last rung"
            rows.insert(-2, ["trials' speech", of_trials, "", "", "not estimated"])
    total = sum(tokens * body * factor for _, _, tokens, factor in phases)
    name = inputs.teacher.name
    print(f"plan for {folder}: teacher {name}, {layers} layers, {body / 1e6:.1f} M parameters without the table")
    print(left_out_note(inputs).removeprefix("\n"), end="\n" * bool(inputs.left_out))
    print(f"ratios {', '.join(search.ratios)}; always among the candidates:")
    for candidate in given:
        print(f"  {candidate.layout}  {candidate.layout.ratio}  {candidate.origin}")
    for criterion in ranked:
        print(f"  {'measured first':{layers}}  {', '.join(search.ratios)}  importance_{criterion}")
    print()
    print(table(["phase", "what", "tokens", "TFLOP", "one process here"], rows))
    print(f"\n{total / 1e12:.2f} TFLOP in all, {duration(total / rate)} on one process of this machine at")
    print(f"{rate / 1e9:.0f} GFLOP/s; trials run side by side, and what an earlier run left is reused.")
    print(f"\n{memory_table(memory)}")
    print("Beside it PyTorch and Ray hold 0.5 to 1 GB in every process. distill.micro_batch_tokens and")
    print("distill.activation_checkpointing make a training smaller.")


def _halving_tokens(trials: int, rung_tokens: tuple[int, ...], factor: int) -> int:
    """Tokens of ``trials`` under successive halving, when one of ``factor`` passes each rung."""
    total, alive, before = 0.0, float(trials), 0
    for tokens in rung_tokens:
        total += alive * (tokens - before)
        alive, before = max(1.0, alive / factor), tokens
    return int(total)


def _matmul_flops_per_second(size: int = 512, seconds: float = 0.1) -> float:
    a = np.random.default_rng(0).random((size, size), dtype=np.float32)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        a @ a
        count += 1
    return count * 2 * size**3 / (time.perf_counter() - began)
