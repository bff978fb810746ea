"""Memory of one process in every phase of a run, from shapes and settings alone; and whether this machine has it.

No torch, no Ray: a dry run answers at once. What is counted, and how well, says :mod:`mamtra_ray.efficiency.memory`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from mamtra_ray.config import Config
from mamtra_ray.corpus.table import first_rows_within, token_counts
from mamtra_ray.efficiency.architectures import Architecture
from mamtra_ray.efficiency.memory import StepMemory, alignment_memory, distillation_memory, forward_memory
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace
from mamtra_ray.runtime.compiler import check_compiler
from mamtra_ray.runtime.progress import table

PLANNED_PHASES = ("cache", "align", "probe", "trials", "finalists")
"""Of a search, whose memory is planned; see :func:`memory_of_phases`."""
CACHE_BATCH_TOKENS = 8_192
"""Padded tokens of a forward pass of the teacher: enough to fill a GPU, little enough for its memory."""
PROBE_BATCH_TOKENS = 4_096
"""Padded tokens of a pass of the probe."""
PROBE_LOGITS_TOKENS = 1_024
"""Of these, with logits at a time."""
_CERTAIN_ON_HOST, _CERTAIN_ON_CARD = 0.9, 0.5
"""Part of what passes that is needed for certain: a card's kernels may keep less than PyTorch's operations do."""


@dataclass(frozen=True)
class Lengths:
    """What a batch of a corpus can hold."""

    longest: int
    """Tokens of the longest utterance, everything included."""
    total: int
    """Of all utterances."""

    @classmethod
    def of(cls, rows: pa.Table, overhead: int, most_speech_tokens: int | None) -> Lengths:
        """Of the first rows of a split that a limit on their speech tokens lets in."""
        if most_speech_tokens is not None:
            rows = rows.slice(0, first_rows_within(token_counts(rows, "speech_tokens"), most_speech_tokens))
        tokens = overhead + token_counts(rows, "text_tokens") + token_counts(rows, "speech_tokens")
        return cls(int(tokens.max()), int(tokens.sum()))

    def at_once(self, tokens: int) -> int:
        """Padded tokens of a batch for which ``tokens`` are asked; a longer utterance is a batch of its own."""
        return max(self.longest, min(tokens, self.total))


@dataclass(frozen=True)
class PhaseMemory:
    """One process of a phase."""

    phase: str
    tokens: int
    """Padded, at once."""
    memory: StepMemory
    smallest: StepMemory
    """With micro batches as small as ``auto`` makes them; else the same."""
    lower: str
    """The settings that make it smaller."""

    def least_bytes(self, share: float) -> int:
        """What is needed for certain, if at least this share of what a step passes through is."""
        memory = self.smallest
        passing = int(share * (memory.activations + max(memory.logits, memory.working)))
        return memory.parameters + memory.optimizer + max(memory.gradients, passing)


def memory_of_phases(
    config: Config, architecture: Architecture, lengths: Lengths, layouts: Iterable[Layout]
) -> list[PhaseMemory]:
    """All phases of a search, in their order.

    Args:
        config: of the run.
        architecture: of the teacher.
        lengths: of the training split.
        layouts: one of every number of attention layers that is trained; the one that needs most counts.
    """
    layouts = list(layouts)
    cached, probed = lengths.at_once(CACHE_BATCH_TOKENS), lengths.at_once(PROBE_BATCH_TOKENS)
    layers = architecture.num_layers
    kept = layers if config.cache.layers else 0
    offload = config.teacher.cpu_offload
    larger = "" if offload else " or teacher.cpu_offload=true"
    cache = forward_memory(architecture, tokens=cached, logits_tokens=0, kept_layers=kept, cpu_offload=offload)
    phases = [PhaseMemory("cache", cached, cache, cache, f"cache.layers{larger}")]
    if config.student.initialization == "aligned":
        aligned = lengths.at_once(-(-config.align.tokens_per_batch // config.align.workers))
        align = alignment_memory(
            architecture,
            tokens=aligned,
            length=lengths.longest,
            precision=config.align.precision,
            workers=config.align.workers,
            fully_shard=config.align.fully_shard,
            cpu_offload=offload,
        )
        more = "more align.workers" if config.align.fully_shard else "align.fully_shard=true with several align.workers"
        phases.append(PhaseMemory("align", aligned, align, align, f"align.tokens_per_batch or {more}"))
        if config.probe.num_layouts:
            probe = forward_memory(
                architecture,
                tokens=probed,
                logits_tokens=PROBE_LOGITS_TOKENS,
                kept_layers=layers,
                mixers=True,
                cpu_offload=offload,
            )
            phases.append(PhaseMemory("probe", probed, probe, probe, f"probe.num_layouts (0: no probe){larger}"))
    for phase, workers in (("trials", config.search.workers_per_trial), ("finalists", config.distill.workers)):
        phases.append(training_memory(config, architecture, lengths, layouts, phase, workers))
    return phases


def training_memory(
    config: Config, architecture: Architecture, lengths: Lengths, layouts: Iterable[Layout], phase: str, workers: int
) -> PhaseMemory:
    """A distillation of the layout that needs most, as one of ``workers`` processes."""
    distill, layouts = config.distill_of_trials if phase == "trials" else config.distill, list(layouts)
    whole = lengths.at_once(-(-distill.tokens_per_batch // workers))
    micro = distill.micro_batch_tokens

    def largest(tokens: int) -> StepMemory:
        steps = [
            distillation_memory(
                architecture,
                layout,
                tokens=tokens,
                length=min(lengths.longest, tokens),
                batch_tokens=whole,
                workers=workers,
                fully_shard=distill.fully_shard,
                precision=distill.precision,
                activation_checkpointing=distill.activation_checkpointing,
                loss_chunk_tokens=distill.loss_chunk_tokens,
                hidden_loss=bool(distill.hidden_weight),
            )
            for layout in layouts
        ]
        return max(steps, key=lambda step: step.total)

    tokens = min(whole, lengths.at_once(micro)) if isinstance(micro, int) else whole
    memory = largest(tokens)
    ways = [] if micro == "auto" else ["distill.micro_batch_tokens (auto finds what fits)"]
    ways += [] if distill.activation_checkpointing else ["distill.activation_checkpointing=true"]
    # What is left is weights, of which a card more takes its part.
    key = "search.workers_per_trial" if phase == "trials" else "distill.workers"
    ways.append(f"more {key}" if distill.fully_shard else f"distill.fully_shard=true with several {key}")
    smallest = largest(min(tokens, lengths.longest)) if micro == "auto" else memory
    return PhaseMemory(phase, tokens, memory, smallest, " or ".join([*ways, "distill.loss_chunk_tokens"]))


def one_of_every_ratio(space: SearchSpace) -> list[Layout]:
    """A layout of every number of attention layers; where they stand does not matter to memory."""
    layers = space.num_layers
    counts = {space.num_attention(ratio) for ratio in space.ratios}
    return [Layout("A" * count + "M" * (layers - count)) for count in sorted(counts)]


def memory_table(phases: Iterable[PhaseMemory]) -> str:
    """For the plan: GB of one process, by what holds them."""
    rows = []
    for phase in phases:
        memory = phase.memory
        parts = (
            *(memory.parameters, memory.gradients, memory.optimizer, memory.activations),
            max(memory.working, memory.logits),
            *(memory.teacher_rows, memory.total),
        )
        rows.append([phase.phase, f"{phase.tokens:,}", *(f"{part / 1e9:.2f}" for part in parts)])
    names = ["weights", "gradients", "optimizer", "activations", "one layer or logits", "rows", "peak GB"]
    return table(["one process", "tokens at once", *names], rows)


@dataclass(frozen=True)
class Machine:
    """Where a run's processes compute."""

    name: str
    memory_bytes: int
    is_card: bool = False


def is_local(address: str | None) -> bool:
    """Whether a run with this ``--address`` computes on this machine alone."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def machine_of(config: Config, address: str | None) -> Machine | None:
    """This machine's card if workers use one, else its memory; None where that cannot be told: on a cluster, or where a
    card is asked for that does not answer."""
    if not is_local(address):
        return None
    gpus = config.resources.gpus_per_worker
    if gpus != 0 and shutil.which("nvidia-smi"):
        return _card()
    return None if gpus else Machine("this machine", _host_bytes())


def check_memory(phases: Iterable[PhaseMemory], machine: Machine | None) -> None:
    """Refuse what is certain not to fit.

    Raises:
        InputError: a phase of which one process alone needs more than there is.
    """
    if machine is None:
        return
    for phase in phases:
        share = _CERTAIN_ON_CARD if machine.is_card else _CERTAIN_ON_HOST
        if phase.least_bytes(share) > machine.memory_bytes:
            raise InputError(
                f"{phase.phase}: one process needs {phase.memory.total / 1e9:.1f} GB for {phase.tokens:,} tokens at "
                f"once, {machine.name} has {machine.memory_bytes / 1e9:.1f} GB: lower {phase.lower}"
            )


def check_compiles(config: Config, address: str | None) -> None:
    """Refuse ``distill.compile`` where this machine, if it computes alone, has no compiler.

    Raises:
        InputError: names what is missing.
    """
    if config.distill.compile and is_local(address):
        machine = machine_of(config, address)
        check_compiler(is_cuda=machine is None or machine.is_card)


def _card() -> Machine | None:
    command = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError, subprocess.SubprocessError):
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        cards = [line.rpartition(",") for line in answer.stdout.splitlines() if line.strip()]
        return max(
            (Machine(f"the {name.strip()}", int(mebibytes) * 2**20, is_card=True) for name, _, mebibytes in cards),
            key=lambda machine: machine.memory_bytes,
        )
    return None


def _host_bytes() -> int:
    """Memory and swap, or what the container may use."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        physical = min(physical, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        physical += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("SwapTotal:"))
    return physical
