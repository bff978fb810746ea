"""The search-space file and the command line that every verb shares.

Defaults < file (``--space``) < ``key=value`` overrides. Unknown keys are refused with the nearest valid one.
Each field is documented under itself; ``python -m mamtra_ray.search --explain`` prints them.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from mamtra_ray.artifacts import content_hash, write_text
from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.layouts import PATTERNS, parse_ratio

# The demo's values are also the defaults below, so an installed wheel (without this folder) runs the same search.
DEFAULT_SPACE = Path(__file__).parent.parent / "search_spaces" / "demo.yaml"

IMPORTANCE_CRITERIA = ("wer", "cosine", "kl")
SEARCH_STRATEGIES = (*PATTERNS, *(f"importance_{criterion}" for criterion in IMPORTANCE_CRITERIA))
"""What ``search.strategies`` may name."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class _Loader(yaml.SafeLoader):
    """YAML as people write it here: ``1:3`` is a ratio, not YAML 1.1's base-60 number 63."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
# YAML 1.1 reads 1e-5 (no dot) as a string; everybody who writes a learning rate means a number.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _as_list(value: Any) -> Any:
    """On a command line ``search.ratios=1:1,1:3`` and ``search.keep_attention=0`` are lists too."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) else value


_Several = BeforeValidator(_as_list)


class TeacherConfig(_Section):
    kind: str = "demo"
    """Which loader: demo, cosyvoice2, llasa, huggingface."""
    path: str | None = None
    """Folder of the checkpoint; none for the packaged demo teacher."""


class CorpusConfig(_Section):
    path: str | None = None
    """Parquet file or folder made by `python -m mamtra_ray.corpus`; none for the packaged demo corpus."""
    train_tokens: int | None = Field(160_000, gt=0)
    """Use only the first utterances that together hold this many speech tokens; none for all."""
    validation_tokens: int = Field(4_000, gt=0)
    """Speech tokens of the validation split on which CE and KL are measured."""


class CacheConfig(_Section):
    format: Literal["hidden", "hidden_quantized", "topk"] = "hidden"
    """What is kept of the teacher: final hidden states, quantized ones, or top-k log-probabilities."""
    top_k: int = Field(16, gt=0)
    """Entries a row with format topk."""
    bits: float = Field(3.3, gt=0, le=8)
    """Entropy of the codes, bits a dimension, with format hidden_quantized; stored they take about 0.3 more."""
    layers: Annotated[tuple[int, ...], _Several] = ()
    """Decoder layers (0-based) whose outputs are kept too, for `distill.embedding_levels`; with format hidden."""
    utterances_per_shard: int = Field(512, gt=0)
    """Rows of one Parquet shard: what a killed run recomputes at most, per actor."""
    actors: int | None = Field(None, gt=0)
    """Ray Data actors that hold the teacher; none: one for each GPU of the cluster, or one on the CPU."""


class StudentConfig(_Section):
    initialisation: Literal["transfer", "aligned", "xavier", "kaiming"] = "aligned"
    """Start of the Mamba mixers: the attention's weights (paper), those after alignment, or random (Fig. 6)."""
    state_sharing: Literal["per_query_head", "per_kv_head"] = "per_query_head"
    """One SSM state per query head (paper) or per key-value head (smaller by heads / kv heads)."""


class AlignConfig(_Section):
    tokens: int = Field(80_000, gt=0)
    """Training tokens (padding excluded) with which all layers' mixers learn their attention's output."""
    batch_tokens: int = Field(500, gt=0)
    """Padded tokens of a batch, over all workers; on a CPU small batches learn more in the same time."""
    learning_rate: float = Field(6e-3, gt=0)
    """Peak learning rate of AdamW."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of the mixers' forward pass."""
    workers: int = Field(1, gt=0)
    """Processes that train together; one is a plain Ray task, several are a Ray Train run."""


class ProbeConfig(_Section):
    masks: int = Field(64, ge=0)
    """How many layouts are scored by a forward pass before the search; 0 skips probing."""
    validation_tokens: int = Field(3_000, gt=0)
    """Speech tokens a probe is scored on."""
    importance_sentences: int = Field(20, gt=0)
    """Sentences spoken for each layer by the strategy importance_wer."""


class SearchConfig(_Section):
    ratios: Annotated[tuple[str, ...], _Several] = ("1:1",)
    """Budgets, attention to Mamba: a layout of each is found, compared and exported."""
    strategies: Annotated[tuple[str, ...], _Several] = ("block_beginning",)
    """The paper's placements that are always among the candidates, at every budget: patterns, and importance_wer,
    importance_cosine, importance_kl, which keep the layers that lose most words when replaced, turn their input most,
    or have the highest KL divergence when replaced."""
    trials: int = Field(8, gt=0)
    """Layouts that Tune starts in all, the paper's placements among them."""
    sampler: Literal["tpe", "nsga2", "random", "grid"] = "tpe"
    """Optuna's sampler; grid tries exactly the strategies at the ratios."""
    rung_tokens: Annotated[tuple[int, ...], _Several] = (8_000, 16_000)
    """Training tokens at which successive halving compares trials, ascending; the last one ends a trial."""
    reduction_factor: int = Field(2, ge=2)
    """One of this many trials passes a rung."""
    keep_attention: Annotated[tuple[int, ...], _Several] = ()
    """Layers (0-based) that must keep attention."""
    always_mamba: Annotated[tuple[int, ...], _Several] = ()
    """Layers (0-based) that must be replaced."""
    finalists: int = Field(1, gt=0)
    """Found layouts of each budget that are distilled longer and heard, beside the paper's placements."""
    cost: Literal["cache_bytes", "decode_flops", "parameters"] = "cache_bytes"
    """Second objective beside CE."""
    context_length: int = Field(2_048, gt=0)
    """Tokens of context at which the cost is counted."""
    workers_per_trial: int = Field(1, gt=0)
    """1: a trial is one actor; more: every trial is a Ray Train run of that many workers."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs a trial or worker asks Ray for."""
    gpus_per_worker: float | None = Field(None, ge=0)
    """GPUs a trial or worker asks Ray for; none: 1 where the cluster has GPUs, else 0."""
    seed: int = 0
    """Seed of the sampler, the shuffling and the new weights."""


class DistillConfig(_Section):
    tokens: int = Field(45_000, gt=0)
    """Training tokens of a finalist (and of `python -m mamtra_ray.distill`)."""
    batch_tokens: int = Field(2_000, gt=0)
    """Padded tokens of a batch, over all workers together (paper: 40,000)."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate (paper: 1e-5, constant, for CosyVoice 2)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: down to a tenth by the last token, or constant (paper)."""
    warmup_fraction: float = Field(0.05, ge=0, lt=1)
    """Part of the tokens over which the learning rate rises from 0."""
    weight_decay: float = Field(0.01, ge=0)
    """AdamW's weight decay, on matrices only."""
    gradient_clip: float = Field(1.0, gt=0)
    """Largest gradient norm."""
    ce_weight: float = Field(1.0, ge=0)
    """Weight of the cross-entropy in Eq. 5; 0 switches it off (Table 4)."""
    logits_weight: float = Field(1.0, ge=0)
    """Weight of the skewed KL in Eq. 5."""
    embedding_weight: float = Field(1.0, ge=0)
    """Weight of the mean squared error of the hidden states in Eq. 5."""
    embedding_levels: Annotated[tuple[int | Literal["final"], ...], _Several] = Field(("final",), min_length=1)
    """Where these are compared: final (after the last norm), or a layer (0-based) of `cache.layers`; several: the mean.
    The paper does not say which of its "token embeddings" it means."""
    skew: float = Field(0.1, ge=0, lt=1)
    """The a of KL(p || a p + (1 - a) q)."""
    workers: int = Field(2, gt=0)
    """Ray Train workers of a finalist."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of the forward pass."""
    checkpoint_tokens: int = Field(45_000, gt=0)
    """A resumable checkpoint every so many tokens."""


class EvaluateConfig(_Section):
    sentences: int = Field(40, ge=0)
    """Sentences of the test split that are spoken and recognised; 0 skips the WER."""
    corpus: str | None = None
    """Corpus whose test split is spoken, such as Seed-TTS-eval; none: that of `corpus.path`."""
    recognizer: str = "demo"
    """demo (offline Whisper tiny.en), or whisper:PATH, faster-whisper:PATH with the user's weights."""
    codec: str | None = None
    """Folder or file of the codec that makes sound of speech tokens; none: the teacher's own (demo, cosyvoice2)."""
    metrics: Annotated[tuple[str, ...], _Several] = ()
    """Further scores: speaker_similarity, speaker_similarity:PATH, utmos:PATH, dnsmos, versa:FILE."""
    normalization: str = "demo"
    """Text normalisation before the WER: demo, seed, whisper_basic, whisper_en."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_p: float = Field(0.8, gt=0, le=1)
    """Nucleus of the sampling."""
    top_k: int = Field(25, ge=0)
    """Largest number of tokens sampled from; 0 for all."""
    repetition_aware: bool = False
    """CosyVoice 2's repetition-aware sampling."""
    audio_examples: int = Field(4, ge=0)
    """Utterances whose audio goes into the report, for every system."""


class Config(_Section):
    """Everything a run depends on; saved beside every output."""

    name: str = "demo"
    """Run folder under runs/ when --run is not given."""
    teacher: TeacherConfig = TeacherConfig()
    corpus: CorpusConfig = CorpusConfig()
    cache: CacheConfig = CacheConfig()
    student: StudentConfig = StudentConfig()
    align: AlignConfig = AlignConfig()
    probe: ProbeConfig = ProbeConfig()
    search: SearchConfig = SearchConfig()
    distill: DistillConfig = DistillConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    def hash_of(self, *sections: str) -> str:
        """Hash of the named sections, for the manifest of what they made."""
        return content_hash({section: getattr(self, section).model_dump() for section in sections})


def load_config(space: Path | None = None, overrides: list[str] | None = None) -> Config:
    """Read a search-space file and apply ``section.key=value`` overrides (values are YAML).

    Raises:
        InputError: missing or malformed file, unknown key (with the nearest valid one), value out of range.
    """
    path = Path(space) if space is not None else DEFAULT_SPACE
    packaged_defaults = space is None and not path.exists()
    try:
        content = {} if packaged_defaults else yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except FileNotFoundError:
        raise InputError(f"search space {path} does not exist") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"search space {path} cannot be read: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"search space {path} must hold sections such as teacher: and search:")
    for override in overrides or []:
        _apply_override(content, override)
    try:
        config = Config.model_validate(content)
    except ValidationError as error:
        raise InputError(_first_problem(error, path)) from None
    _check_search(config.search)
    _check_levels(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically; :func:`load_config` reads it back."""
    write_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments every verb takes; parse with ``parse_intermixed_args``, so that overrides may stand anywhere."""
    parser.add_argument("--space", type=Path, metavar="FILE", help="search-space file (default: the packaged demo)")
    parser.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/<name>)")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and its estimated cost, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. search.trials=40")


def config_from_arguments(arguments: argparse.Namespace) -> tuple[Config, Path]:
    """The configuration and the run folder of a verb's parsed command line."""
    config = load_config(arguments.space, arguments.overrides)
    return config, arguments.run or Path("runs") / config.name


def explain() -> str:
    """Every key with its default and meaning, as text."""
    lines = []
    for section, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines.append(f"{section}:")
            for key, inner in field.annotation.model_fields.items():
                lines.append(f"  {key} = {inner.default!r}: {inner.description}")
        else:
            lines.append(f"{section} = {field.default!r}: {field.description}")
    return "\n".join(lines)


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"an override is key=value, such as search.trials=40, not {override!r}")
    *parents, last = key.split(".")
    section = content
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise InputError(f"override {override!r}: {parent} is no section")
    try:
        section[last] = yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is no YAML") from None


def _first_problem(error: ValidationError, path: Path) -> str:
    problem = error.errors()[0]
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location)
    if problem["type"] == "extra_forbidden":
        model: type[BaseModel] = Config
        for part in location[:-1]:
            annotation = model.model_fields[part].annotation
            assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
            model = annotation
        return f"unknown key {where!r} (in {path} or the overrides): {nearest_name(location[-1], model.model_fields)}"
    return f"{where} = {problem['input']!r} (in {path} or the overrides): {problem['msg']}"


def _check_search(search: SearchConfig) -> None:
    for strategy in search.strategies:
        if strategy not in SEARCH_STRATEGIES:
            hint = nearest_name(strategy, SEARCH_STRATEGIES)
            raise InputError(f"search.strategies: unknown strategy {strategy!r}: {hint}")
    for ratio in search.ratios:
        parse_ratio(ratio)
    if list(search.rung_tokens) != sorted(set(search.rung_tokens)) or not search.rung_tokens:
        raise InputError(f"search.rung_tokens must ascend, such as [20000, 40000], not {list(search.rung_tokens)}")
    both = sorted(set(search.keep_attention) & set(search.always_mamba))
    if both:
        raise InputError(f"layer {both[0]} stands in both search.keep_attention and search.always_mamba")


def _check_levels(config: Config) -> None:
    if config.cache.layers and config.cache.format != "hidden":
        raise InputError(f"cache.layers needs cache.format hidden, not {config.cache.format}")
    if any(layer < 0 for layer in config.cache.layers) or len(set(config.cache.layers)) < len(config.cache.layers):
        raise InputError(f"cache.layers must be different layers, counted from 0, not {list(config.cache.layers)}")
    for level in config.distill.embedding_levels:
        if level != "final" and level not in config.cache.layers:
            raise InputError(f"distill.embedding_levels has layer {level}, which cache.layers does not keep")
