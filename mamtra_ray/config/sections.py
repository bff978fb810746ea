"""The sections of a search-space file and what each key means; section ``search`` has a file of its own.

Defaults are neutral: right, or at least harmless, for a real teacher. What suits the demo stands in ``demo.yaml``.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from mamtra_ray.assets import CORPUS, PACKAGED, packaged_folder
from mamtra_ray.config.search import SearchConfig
from mamtra_ray.config.types import (
    Count,
    CountOrZero,
    Layers,
    LearningRate,
    LocalPath,
    LocalPathOrUri,
    NameWithPath,
    NotNegative,
    Positive,
    Section,
    Seed,
    Several,
    Share,
)
from mamtra_ray.errors import nearest_name

Precision = Literal["float32", "bfloat16"]
RECOGNIZERS = ("demo", "whisper", "faster-whisper")
METRICS = ("speaker_similarity", "utmos", "dnsmos", "distillmos", "versa")
_FORMATS_WITH_HIDDEN_STATES = ("hidden", "hidden_quantized")


class ResourcesConfig(Section):
    cpus_per_worker: Positive = 1.0
    """CPUs that every worker asks Ray for: of a trial, a finalist, the alignment, the probe, the evaluation."""
    gpus_per_worker: NotNegative | None = None
    """GPUs that every worker asks Ray for; none: 1 where the cluster has GPUs, else 0."""


class TeacherConfig(Section):
    kind: str = "demo"
    """Which loader: demo, demo24, cosyvoice2, llasa, huggingface, causal_lm (of text), or your own MODULE:FUNCTION."""
    path: LocalPath | None = None
    """Folder of the checkpoint (causal_lm: or a GGUF file); none for a packaged teacher (demo, demo24)."""
    cpu_offload: bool = False
    """In cache, alignment and probe the teacher's layers stay in the machine's memory and come one at a time: for a
    teacher larger than a card."""

    @property
    def speaks(self) -> bool:
        """Whether what it predicts is speech, and not text."""
        return self.kind != "causal_lm"


class CorpusConfig(Section):
    path: LocalPath | None = None
    """Parquet file or folder made by `python -m mamtra_ray.corpus`; none for that of a packaged teacher."""
    train_tokens: Count | None = None
    """Use only utterances that together hold this many speech tokens, drawn evenly from the speakers; none for all."""
    validation_tokens: Count = 50_000
    """Speech tokens of the validation split on which CE and KL are measured, drawn in the same way."""
    seed: Seed = 0
    """Of these drawings, and of the sentences that are spoken. Not `seed`: runs that differ in it share a cache."""


class CacheConfig(Section):
    location: LocalPathOrUri | None = None
    """Folder or URI of the teacher cache; none: shared/cache-<identity> beside the run folders."""
    format: Literal["hidden", "hidden_quantized", "topk"] = "hidden"
    """What is kept of the teacher: final hidden states, quantized ones, or top-k log-probabilities."""
    top_k: Count = 16
    """Entries per row with format topk."""
    bits: Annotated[float, Field(gt=0, le=8)] = 3.3
    """Entropy of the codes, bits per dimension, with format hidden_quantized; stored they take about 0.3 more."""
    layers: Layers = ()
    """Decoder layers (0-based) whose outputs are kept too, for `distill.hidden_layers`; with format hidden."""
    utterances_per_shard: Count = 512
    """Rows of one Parquet shard: what a killed run recomputes at most, per actor."""
    actors: Count | None = None
    """Ray Data actors that hold the teacher; none: one for each GPU of the cluster, or one on the CPU."""

    @model_validator(mode="after")
    def _consistent(self) -> CacheConfig:
        if self.layers and self.format != "hidden":
            raise ValueError(f"cache.layers needs cache.format hidden, not {self.format}")
        if len(set(self.layers)) < len(self.layers):
            raise ValueError(f"cache.layers must be different layers, not {list(self.layers)}")
        return self


class StudentConfig(Section):
    initialization: Literal["transfer", "aligned", "xavier", "kaiming"] = "aligned"
    """Start of the Mamba mixers: the attention's weights (paper), those after alignment, or random (Fig. 6)."""
    state_sharing: Literal["per_query_head", "per_kv_head"] = "per_query_head"
    """One SSM state per query head (paper) or per key-value head (smaller by heads / kv heads)."""


class AlignConfig(Section):
    tokens: Count = 2_000_000
    """Training tokens (padding excluded) with which all layers' mixers learn their attention's output."""
    tokens_per_batch: Count = 16_000
    """Padded tokens of a batch, over all workers; on a CPU small batches learn more in the same time."""
    learning_rate: LearningRate = 1e-3
    """Peak learning rate of AdamW."""
    precision: Precision = "float32"
    """Autocast type of the mixers' forward pass."""
    workers: Count = 1
    """Processes that train together; one is a plain Ray task, several are a Ray Train run."""
    fully_shard: bool = False
    """Divide the teacher, the mixers and their optimizer state among the workers (FSDP2)."""

    @model_validator(mode="after")
    def _has_workers(self) -> AlignConfig:
        if self.fully_shard and self.workers == 1:
            raise ValueError("fully_shard=true divides teacher and mixers among workers, and workers is 1")
        return self


class ProbeConfig(Section):
    num_layouts: CountOrZero = 200
    """How many layouts are scored by a forward pass before the search; 0 skips probing."""
    validation_tokens: Count = 20_000
    """Speech tokens on which a layout is scored."""
    importance_sentences: Count = 20
    """Sentences spoken for each layer by the strategy importance_wer."""


class DistillConfig(Section):
    tokens: Count = 26_000_000
    """Training tokens of a finalist (and of `python -m mamtra_ray.distill`)."""
    tokens_per_batch: Count = 40_000
    """Padded tokens of a batch, over all workers together (paper: 40,000): the optimizer's step."""
    micro_batch_tokens: Count | Literal["auto"] | None = None
    """Padded tokens that a worker computes at once; the gradients of a batch's parts are added up, which gives its step
    up to rounding. none: all at once; auto: all, and after an out-of-memory error halves until they fit."""
    activation_checkpointing: bool = False
    """Keep the input of every layer only and compute the layer again in the backward pass: less memory, a third more
    time."""
    loss_chunk_tokens: Count = 256
    """Tokens whose logits exist at a time; more is faster up to the processor's cache, and larger."""
    compile: bool = False
    """Compile every decoder layer with torch.compile, all but the scan; the first steps take minutes longer."""
    learning_rate: LearningRate | Literal["auto"] = "auto"
    """Peak learning rate (paper: 1e-5, constant, for CosyVoice 2); auto tries a handful on one layout, each up to the
    first of `search.rung_tokens`, and keeps the best."""
    pretrained_learning_rate_factor: NotNegative = 1.0
    """Learning rate of what comes from the teacher unchanged (embeddings, attention, MLPs, norms), as a factor of that
    of the mixers; 1 in the paper, 0 keeps it as it is."""
    schedule: Literal["cosine", "constant"] = "constant"
    """After the warm-up: constant (paper), or down to a tenth by the last token."""
    warmup_fraction: Share = 0.05
    """Part of the tokens over which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.01
    """AdamW's weight decay, on matrices only."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    ce_weight: NotNegative = 1.0
    """Weight of the cross-entropy in Eq. 5; 0 switches it off (Table 4)."""
    kl_weight: NotNegative = 1.0
    """Weight of the skewed KL in Eq. 5."""
    hidden_weight: NotNegative = 1.0
    """Weight of the mean squared error of the hidden states in Eq. 5, the paper's embedding loss."""
    hidden_layers: Annotated[tuple[CountOrZero | Literal["final"], ...], Several] = Field(("final",), min_length=1)
    """Where these are compared: final (after the last norm), or a layer (0-based) of `cache.layers`; several: the mean.
    The paper does not say which of its "token embeddings" it means."""
    kl_skew: Share = 0.1
    """The a of KL(p || a p + (1 - a) q)."""
    workers: Count = 1
    """Ray Train workers of a finalist."""
    fully_shard: bool = False
    """Divide a student's weights, gradients and optimizer state among its workers (PyTorch's FSDP2), for one that a
    single card does not hold. Otherwise every worker holds all of it."""
    precision: Precision = "float32"
    """Autocast type of the forward pass; weights, gradients and the optimizer's state are float32."""
    checkpoint_every_tokens: Count = 2_000_000
    """A resumable checkpoint every so many tokens."""

    @model_validator(mode="after")
    def _consistent(self) -> DistillConfig:
        if not (self.ce_weight or self.kl_weight or self.hidden_weight):
            raise ValueError("ce_weight, kl_weight and hidden_weight are all 0: nothing would be learned")
        if self.fully_shard and self.compile:
            raise ValueError("fully_shard=true and compile=true are not supported together: set one of them to false")
        if self.fully_shard and self.micro_batch_tokens == "auto":
            raise ValueError(
                "fully_shard=true needs a number for micro_batch_tokens instead of auto: a worker that runs out of "
                "memory leaves the others waiting for its part of the weights"
            )
        if len(set(self.hidden_layers)) < len(self.hidden_layers):
            raise ValueError(f"hidden_layers must be different, not {list(self.hidden_layers)}")
        return self


def _known_recognizer(name: str) -> str:
    kind, separator, path = name.partition(":")
    if kind not in RECOGNIZERS:
        raise ValueError(f"unknown recognizer {kind!r}: {nearest_name(kind, RECOGNIZERS)}")
    if (kind == "demo") == bool(separator and path):
        raise ValueError(f"expected is demo, whisper:FOLDER or faster-whisper:FOLDER, not {name!r}")
    return name


def _known_metric(name: str) -> str:
    kind = name.partition(":")[0]
    if kind not in METRICS:
        raise ValueError(f"unknown score {kind!r}: {nearest_name(kind, METRICS)}")
    return name


class EvaluateConfig(Section):
    sentences: CountOrZero = 200
    """Sentences of the test split that are spoken and recognized; 0 skips the WER."""
    race_sentences: CountOrZero = 0
    """Sentences that a finalist speaks at most, as long as the WER does not tell those of a ratio apart; the number
    doubles from round to round. 0: no race, all finalists speak `evaluate.sentences`."""
    corpus: LocalPath | None = None
    """Corpus whose test split is spoken, such as Seed-TTS-eval; none: that of `corpus.path`."""
    recognizer: Annotated[NameWithPath, AfterValidator(_known_recognizer)] = "demo"
    """demo (offline Whisper tiny.en), or whisper:PATH, faster-whisper:PATH with the user's weights."""
    codec: LocalPath | None = None
    """Folder or file of the codec that makes sound of speech tokens; none: the teacher's own (demo, cosyvoice2)."""
    metrics: Annotated[tuple[Annotated[NameWithPath, AfterValidator(_known_metric)], ...], Several] = ()
    """Further scores: speaker_similarity, speaker_similarity:PATH, utmos:PATH, dnsmos, distillmos, versa:FILE."""
    language: Annotated[str, Field(pattern="^[a-z]{2,3}$")] | None = None
    """What is spoken, as Whisper abbreviates it (en, zh, de); none: told from the script, English for Latin letters."""
    normalization: Literal["demo", "seed", "whisper_basic", "whisper_en"] = "whisper_en"
    """Text normalization before the WER."""
    temperature: NotNegative | None = None
    """Sampling temperature, 0 is greedy; none, here and below: as the teacher's own system samples."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Nucleus of the sampling."""
    top_k: CountOrZero | None = None
    """Largest number of tokens sampled from; 0 for all."""
    repetition_aware: bool | None = None
    """Whether tokens that repeat are drawn again, as CosyVoice 2 does."""
    audio_examples: CountOrZero = 4
    """Utterances whose audio goes into the report, for every system."""


def _folder_name(name: str) -> str:
    if not name.strip() or "/" in name or "\0" in name or name.startswith(".") or len(name.encode()) > 200:
        raise ValueError("it becomes the name of a folder under runs/")
    return name


class Config(Section):
    """Everything a run depends on; saved in its folder."""

    name: Annotated[str, AfterValidator(_folder_name)] = "search"
    """Run folder under runs/ when --run is not given."""
    seed: Seed = 0
    """Seed of the sampler, the shuffling, the new weights and the sampled speech."""
    context_length: Count = 2_048
    """Tokens of context at which cache and decoding cost are counted."""
    resources: ResourcesConfig = ResourcesConfig()
    teacher: TeacherConfig = TeacherConfig()
    corpus: CorpusConfig = CorpusConfig()
    cache: CacheConfig = CacheConfig()
    student: StudentConfig = StudentConfig()
    align: AlignConfig = AlignConfig()
    probe: ProbeConfig = ProbeConfig()
    search: SearchConfig = SearchConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @property
    def corpus_path(self) -> str | None:
        """`corpus.path`, or where the corpus of a packaged teacher lies; none if it is neither."""
        is_packaged = self.corpus.path is None and self.teacher.kind in PACKAGED
        return str(packaged_folder(self.teacher.kind) / CORPUS) if is_packaged else self.corpus.path

    @property
    def distill_of_trials(self) -> DistillConfig:
        """How trials are trained: as finalists are, but for what section `search` has of its own."""
        own = {name: getattr(self.search, name) for name in ("learning_rate", "tokens_per_batch")}
        return self.distill.model_copy(update={name: value for name, value in own.items() if value is not None})

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        cache, distill, search = self.cache, self.distill, self.search
        if distill.hidden_weight and cache.format not in _FORMATS_WITH_HIDDEN_STATES:
            raise ValueError(
                f"cache.format {cache.format} keeps no hidden states for the embedding loss: distill.hidden_weight=0"
            )
        for layer in distill.hidden_layers:
            if layer != "final" and layer not in cache.layers:
                raise ValueError(f"distill.hidden_layers has layer {layer}, which cache.layers does not keep")
        of_trials = self.distill_of_trials.tokens_per_batch
        batch_of_trials = f"{'distill' if search.tokens_per_batch is None else 'search'}.tokens_per_batch={of_trials:,}"
        if distill.tokens_per_batch < distill.workers:
            raise ValueError(f"distill.tokens_per_batch={distill.tokens_per_batch} leaves a worker without a token")
        if distill.fully_shard and distill.workers == 1:
            raise ValueError("distill.fully_shard=true divides a student among workers, and distill.workers is 1")
        if distill.fully_shard and "auto" in (distill.learning_rate, search.learning_rate):
            raise ValueError(
                "distill.fully_shard=true needs a number for learning_rate: auto tries rates on one worker, which "
                "would hold the whole student"
            )
        if of_trials < search.workers_per_trial:
            raise ValueError(f"{batch_of_trials} leaves a worker of a trial without a token")
        if self.teacher.cpu_offload and self.align.fully_shard:
            raise ValueError(
                "teacher.cpu_offload=true and align.fully_shard=true are two ways to hold a large teacher: set one of "
                "them to false"
            )
        if self.align.tokens_per_batch < self.align.workers:
            raise ValueError(f"align.tokens_per_batch={self.align.tokens_per_batch} leaves a worker without a token")
        rungs = (0, *search.rung_tokens)
        closest = min(after - before for before, after in itertools.pairwise(rungs))
        if closest < of_trials:
            raise ValueError(
                f"search.rung_tokens has rungs {closest:,} tokens apart, closer than one batch "
                f"({batch_of_trials}): two rungs would be one"
            )
        asked = [strategy for strategy in search.strategies if strategy.startswith("importance_")]
        if asked and self.student.initialization != "aligned":
            raise ValueError(f"search.strategies={asked[0]} needs aligned mixers: set student.initialization=aligned")
        if self.teacher.path is None and self.teacher.kind not in PACKAGED:
            raise ValueError(f"teacher.kind={self.teacher.kind} needs teacher.path, the folder of its checkpoint")
        if self.corpus_path is None:
            raise ValueError(f"teacher.kind={self.teacher.kind} needs corpus.path: it has no packaged corpus")
        race, all_speak = self.evaluate.race_sentences, self.evaluate.sentences
        if race and not 0 < all_speak < race:
            raise ValueError(
                f"evaluate.race_sentences={race} is the most that a finalist speaks: it must be above "
                f"evaluate.sentences={all_speak}, which are not 0"
            )
        if "wer" in search.objectives and not self.evaluate.sentences:
            raise ValueError("search.objectives has wer, but evaluate.sentences=0 switches off all speech")
        if not self.teacher.speaks:
            if self.evaluate.sentences:
                raise ValueError("teacher.kind=causal_lm writes text, which is not spoken: set evaluate.sentences=0")
            if "importance_wer" in search.strategies:
                raise ValueError("search.strategies=importance_wer needs a teacher that speaks: take importance_kl")
        return self
