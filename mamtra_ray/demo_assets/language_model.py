"""Fourth stage of the demo build: train the teacher, a small Qwen2 over words and speech tokens.

Trained with transformers' own `Qwen2ForCausalLM`; nothing of this project's models is involved, so the
teacher is an independent check of them.

Tensor letters: B utterances, L positions, N labeled positions.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from mamtra_ray.artifacts import written_atomically
from mamtra_ray.demo_assets.tracking import Tracker, TrackingSettings, tracked_words
from mamtra_ray.losses import IGNORE
from mamtra_ray.speech_lm.sequences import SequenceFormat, Vocabulary
from mamtra_ray.teachers.demo_grammar import WORDS
from mamtra_ray.teachers.huggingface import read_format


@dataclass(frozen=True)
class TeacherSettings:
    """Shape and training of the teacher."""

    num_layers: int = 12
    hidden_size: int = 128
    mlp_size: int = 336
    num_heads: int = 4
    num_kv_heads: int = 2
    max_length: int = 512
    cycles: tuple[int, ...] = (2_600, 1_800)
    """Steps of each cosine cycle of the learning rate. The first ends where the words are clear and their choice
    is not yet reliable: attention to the text is learned last."""
    constant_steps: int = 0
    """Steps at the peak learning rate between the first cycle's warm-up and its fall, on top of `cycles`."""
    restart_factor: float = 0.6
    """Every further cycle's peak learning rate, relative to the one before."""
    tracking_from_step: int = 2_600
    """After this step the model is also taught which word it is at; see `demo_tracking`."""
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
    tokens_per_batch: int = 2_000
    """Padded positions of one batch."""
    learning_rate: float = 3e-3
    corruption: float = 0.12
    """Share of the speech tokens that the model reads replaced by random ones. A model that only ever read
    correct tokens would not recover from its own first mistake."""
    seed: int = 0
    steps_per_checkpoint: int = 200

    @property
    def steps(self) -> int:
        """Steps of all cycles."""
        return self.constant_steps + sum(self.cycles)


@dataclass(frozen=True)
class Example:
    """A sentence: text ids, speech tokens in every phase of the token grid, and when each word ends."""

    text_tokens: list[int]
    phases: list[list[int]]
    word_ends: list[float]
    """Seconds, one per word."""


@dataclass(frozen=True)
class _Row:
    """A training sequence: input ids, labels and tracked words (L, 2), aligned."""

    input_ids: Tensor
    labels: Tensor
    words: Tensor


def sequence_format(codebook_size: int) -> SequenceFormat:
    """Ids of the demo: words, speech tokens and their end, then start-of-sequence and task."""
    vocabulary = Vocabulary(len(WORDS), codebook_size + 1, 2, codebook_size, (codebook_size,))
    start, task = vocabulary.control_offset, vocabulary.control_offset + 1
    return SequenceFormat((start,), (task,), vocabulary)


def new_teacher(sequence: SequenceFormat, settings: TeacherSettings) -> Qwen2ForCausalLM:
    """An untrained teacher whose `generate` only ever says speech ids."""
    vocabulary = sequence.vocabulary
    torch.manual_seed(settings.seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary.size,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.mlp_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_key_value_heads=settings.num_kv_heads,
            max_position_embeddings=settings.max_length,
            tie_word_embeddings=False,
            bos_token_id=sequence.prefix[0],
            eos_token_id=vocabulary.speech_offset + vocabulary.eos_id,
            pad_token_id=vocabulary.speech_offset + vocabulary.eos_id,
        )
    )
    speech = range(vocabulary.speech_offset, vocabulary.control_offset)
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        suppress_tokens=[index for index in range(vocabulary.size) if index not in speech],
        max_length=settings.max_length,
        do_sample=False,
    )
    with torch.no_grad():
        # Rows outside the speech ids are never trained; zeros make the file smaller and say so.
        model.lm_head.weight[: vocabulary.speech_offset] = 0
        model.lm_head.weight[vocabulary.control_offset :] = 0
    return model


def train_teacher(
    train: Sequence[Example],
    validation: Sequence[Example],
    sequence: SequenceFormat,
    settings: TeacherSettings,
    checkpoint: Path,
    start: Qwen2ForCausalLM | None = None,
) -> Qwen2ForCausalLM:
    """Train for `settings.steps` steps, going on from `checkpoint` if it exists.

    Args:
        train: text and token sequences; every visit of a sentence draws one of its phases.
        validation: their first phases are scored at every checkpoint.
        sequence: ids and order of a training sequence.
        settings: shape and training.
        checkpoint: torch file with model, optimizer and step, written every `steps_per_checkpoint` steps.
        start: a model of this shape to begin with, changed in place; a new one if None.
    """
    model = new_teacher(sequence, settings) if start is None else start
    tracker = Tracker(settings.hidden_size, settings.tracking, settings.seed)
    optimizers = {
        "model": torch.optim.AdamW(model.parameters(), settings.learning_rate, (0.9, 0.98), weight_decay=0.1),
        "tracker": torch.optim.AdamW(tracker.parameters(), settings.learning_rate, (0.9, 0.98)),
    }
    first_step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        tracker.load_state_dict(state["tracker"])
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        first_step = state["step"]
        print(f"teacher: going on from step {first_step}", flush=True)
    started, running, running_tracking = time.monotonic(), math.nan, math.nan
    for step, batch in enumerate(_batches(train, sequence, settings), 1):
        if step > settings.steps:
            break
        if step <= first_step:
            continue
        input_ids_BL, labels_BL, words_BL2 = _pad(batch)
        input_ids_BL = _corrupt(input_ids_BL, sequence.vocabulary, settings, step)
        is_tracking = step > settings.tracking_from_step
        output = model.model(input_ids=input_ids_BL, use_cache=False, output_hidden_states=is_tracking)
        loss = speech_loss(model, output.last_hidden_state, labels_BL, sequence.vocabulary)
        total = loss
        if is_tracking:
            tracking = tracker(output.hidden_states[settings.tracking.layer], words_BL2)
            total = loss + settings.tracking.weight * tracking
            running_tracking = _running(running_tracking, tracking)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(step, settings)
            # Parameters without a gradient (the tracker's, at first) stay as they are.
            optimizer.step()
        running = _running(running, loss)
        if step % settings.steps_per_checkpoint == 0 or step == settings.steps:
            with written_atomically(checkpoint) as temporary:
                state = {"model": model.state_dict(), "tracker": tracker.state_dict(), "step": step}
                state["optimizers"] = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
                torch.save(state, temporary)
            rest = (time.monotonic() - started) / (step - first_step) * (settings.steps - step)
            held_out = validation_loss(model, validation, sequence, settings)
            print(
                f"teacher: step {step}/{settings.steps}, loss {running:.3f} (corrupted input), "
                f"tracking {running_tracking:.3f}, validation {held_out:.3f} nats per token, "
                f"about {rest / 60:.1f} min left",
                flush=True,
            )
    return model.eval()


def _running(average: float, value: Tensor) -> float:
    return value.item() if math.isnan(average) else average + 0.02 * (value.item() - average)


def speech_loss(model: Qwen2ForCausalLM, hidden_BLD: Tensor, labels_BL: Tensor, vocabulary: Vocabulary) -> Tensor:
    """Mean cross-entropy in nats over the labeled positions, among the speech ids only.

    Padding is on the right, where causal attention never looks: `hidden_BLD` needs no attention mask.
    """
    hidden_ND = hidden_BLD[labels_BL != IGNORE]
    head = model.lm_head.weight[vocabulary.speech_offset : vocabulary.control_offset]
    return functional.cross_entropy(hidden_ND @ head.T, labels_BL[labels_BL != IGNORE])


@torch.no_grad()
def validation_loss(
    model: Qwen2ForCausalLM, examples: Sequence[Example], sequence: SequenceFormat, settings: TeacherSettings
) -> float:
    """Mean cross-entropy of the first phases, in nats per token (the end counts as one)."""
    rows = [_row(example, 0, sequence) for example in sorted(examples, key=lambda example: len(example.phases[0]))]
    total, count = 0.0, 0
    for batch in _split(rows, settings.tokens_per_batch):
        input_ids_BL, labels_BL, _ = _pad(batch)
        labeled = int((labels_BL != IGNORE).sum())
        hidden_BLD = model.model(input_ids=input_ids_BL, use_cache=False).last_hidden_state
        total += speech_loss(model, hidden_BLD, labels_BL, sequence.vocabulary).item() * labeled
        count += labeled
    return total / count


def _schedule(step: int, settings: TeacherSettings) -> float:
    """Factor of the learning rate; a cycle is a linear warm-up over 4 %, then a cosine to a hundredth."""
    warmup = _warmup_steps(settings.cycles[0])
    step = min(step, warmup) if step <= warmup + settings.constant_steps else step - settings.constant_steps
    for cycle, steps in enumerate(settings.cycles):
        if step <= steps or cycle == len(settings.cycles) - 1:
            return settings.restart_factor**cycle * _cosine(step, steps)
        step -= steps
    raise AssertionError("a schedule has at least one cycle")


def _cosine(step: int, steps: int) -> float:
    warmup = _warmup_steps(steps)
    if step <= warmup:
        return step / warmup
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _warmup_steps(cycle_steps: int) -> int:
    return max(1, cycle_steps // 25)


def _batches(train: Sequence[Example], sequence: SequenceFormat, settings: TeacherSettings) -> Iterator[list[_Row]]:
    """Endless batches of about equally long sequences; every epoch has its own seeded order and phases."""
    epoch = 0
    while True:
        random_state = random.Random(f"{settings.seed} {epoch}")
        rows = [_row(example, random_state.choice(range(len(example.phases))), sequence) for example in train]
        random_state.shuffle(rows)
        # Sorting pools of a few batches keeps most of the randomness and wastes little on padding.
        starts = range(0, len(rows), 300)
        pools = [sorted(rows[start : start + 300], key=lambda row: len(row.labels)) for start in starts]
        batches = [batch for pool in pools for batch in _split(pool, settings.tokens_per_batch)]
        random_state.shuffle(batches)
        yield from batches
        epoch += 1


def _row(example: Example, phase: int, sequence: SequenceFormat) -> _Row:
    speech_tokens = example.phases[phase]
    input_ids, labels = sequence.training_example(example.text_tokens, speech_tokens)
    words = tracked_words(example.text_tokens, example.word_ends, len(speech_tokens), phase, len(labels))
    return _Row(input_ids, labels, words)


def _split(rows: Sequence[_Row], tokens_per_batch: int) -> Iterator[list[_Row]]:
    """Consecutive batches whose padded size stays within `tokens_per_batch` (one row at least)."""
    batch: list[_Row] = []
    longest = 0
    for row in rows:
        longest = max(longest, len(row.labels))
        if batch and longest * (len(batch) + 1) > tokens_per_batch:
            yield batch
            batch, longest = [], len(row.labels)
        batch.append(row)
    if batch:
        yield batch


def _pad(batch: Sequence[_Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded input ids and labels (B, L) and tracked words (B, L, 2)."""
    pad = nn.utils.rnn.pad_sequence
    return (
        pad([row.input_ids for row in batch], batch_first=True),
        pad([row.labels for row in batch], batch_first=True, padding_value=IGNORE),
        pad([row.words for row in batch], batch_first=True, padding_value=IGNORE),
    )


def _corrupt(input_ids_BL: Tensor, vocabulary: Vocabulary, settings: TeacherSettings, step: int) -> Tensor:
    """Replace some of the speech tokens that are read; labels stay correct."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    is_speech_BL = (input_ids_BL >= vocabulary.speech_offset) & (input_ids_BL < vocabulary.control_offset)
    chosen_BL = torch.rand(input_ids_BL.shape, generator=generator) < settings.corruption
    random_BL = torch.randint(vocabulary.eos_id, input_ids_BL.shape, generator=generator) + vocabulary.speech_offset
    return torch.where(is_speech_BL & chosen_BL, random_BL, input_ids_BL)


def load_with_transformers(folder: Path) -> tuple[Qwen2ForCausalLM, SequenceFormat]:
    """The finished teacher as transformers reads it (float32), and its sequence format."""
    content = read_format(folder)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), SequenceFormat(**content["sequence"], vocabulary=Vocabulary(**content["vocabulary"]))
