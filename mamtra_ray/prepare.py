"""Verb ``corpus``: recordings with transcripts to our Parquet, tokenised by Ray Data actors.

    python -m mamtra_ray.corpus libritts LibriTTS --output corpora/libritts --space search_spaces/cosyvoice2.yaml

The output is a folder: ``part-00000.parquet`` and so on, and ``report.json`` with what was left out and why. Each part
is written when it is finished; a stopped run goes on with the parts that are missing.
"""

from __future__ import annotations

import argparse
import logging
import pickle
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mamtra_ray.artifacts import check_made_by, content_hash, file_hash, read_manifest, write_manifest
from mamtra_ray.config import Config, add_common_arguments, load_config
from mamtra_ray.corpus import PART_REPORTS, REPORT, write_corpus
from mamtra_ray.errors import InputError, exit_code_2_on_input_error, nearest_name
from mamtra_ray.recordings import SOURCES, Recording, Skipped, without_repeats
from mamtra_ray.tokenization_worker import TokenizationWorker, Tokenizers

SCHEMA_VERSION = 1
UTTERANCES_PER_PART = 512


def prepare_corpus(
    config: Config,
    recordings: Sequence[Recording],
    skipped: Sequence[Skipped],
    output: Path,
    *,
    made_by: dict[str, Any],
    speech_tokenizer: Path | None = None,
    actors: int | None = None,
    utterances_per_part: int = UTTERANCES_PER_PART,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Tokenise ``recordings`` into a corpus folder; Ray must be initialised.

    Args:
        config: section ``teacher`` says whose tokenizers.
        recordings: from one of :data:`~mamtra_ray.recordings.SOURCES`.
        skipped: what the source left out already; goes into the report.
        output: corpus folder; parts that are there from the same recordings and tokenizers are kept.
        made_by: what the recordings come from, for metadata and report.
        speech_tokenizer: file or folder of the speech tokenizer, if it is not the teacher's own.
        actors: Ray Data actors, each with one CPU (and a GPU where there are any); one per free CPU or GPU if None.
        utterances_per_part: recordings of one part.
        on_progress: called with (recordings done, of how many).

    Returns:
        The content of ``report.json``: numbers of kept and left-out utterances, each one's reason, speech tokens.

    Raises:
        InputError: the tokenizers cannot be loaded, ``output`` holds another corpus, or nothing could be used.
    """
    recordings, repeated = without_repeats(recordings)
    teacher = config.teacher
    tokenizers = Tokenizers(teacher.kind, Path(teacher.path).absolute() if teacher.path else None, speech_tokenizer)
    identity = {
        **made_by,
        "teacher": teacher.kind,
        "speech_tokenizer": _identity(tokenizers),
        "recordings": content_hash([asdict(recording) for recording in recordings]),
        "utterances_per_part": utterances_per_part,
    }
    groups = [
        recordings[first : first + utterances_per_part] for first in range(0, len(recordings), utterances_per_part)
    ]
    _refuse_other_corpus(output, len(groups), identity)
    missing = [index for index in range(len(groups)) if not _part_report(output, index).exists()]
    if missing:
        (output / REPORT).unlink(missing_ok=True)
    done = len(recordings) - sum(len(groups[index]) for index in missing)
    on_progress(done, len(recordings))
    for index, rows, left_out in _tokenized(tokenizers, {index: groups[index] for index in missing}, actors):
        _write_part(output, index, rows, left_out, teacher.kind, identity)
        done += len(groups[index])
        on_progress(done, len(recordings))
    return _write_report(output, len(groups), [*skipped, *repeated], identity)


def _tokenized(tokenizers: Tokenizers, groups: dict[int, list[Recording]], actors: int | None) -> Any:
    """Yield (group, rows, skipped) as they finish."""
    if not groups:
        return
    import ray
    import ray.data

    resources = ray.cluster_resources()
    gpus = 1 if resources.get("GPU", 0) >= 1 else 0
    # One CPU stays free: Ray Data's own reading task needs one.
    slots = int(resources.get("GPU", 0) if gpus else max(1, resources.get("CPU", 1) - 1))
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    items = [{"group": index, "recordings": pickle.dumps(recordings)} for index, recordings in groups.items()]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        TokenizationWorker,
        fn_constructor_args=(tokenizers,),
        batch_size=1,
        batch_format="numpy",
        num_cpus=tokenizers.cpus,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(size=max(1, min(actors or slots, len(items)))),
    )
    for result in dataset.iter_rows():
        if result["error"]:
            raise InputError(result["error"])
        yield result["group"], *pickle.loads(result["result"])


def _identity(tokenizers: Tokenizers) -> str:
    path = tokenizers.speech_tokenizer
    if path is None and tokenizers.teacher_path is not None:
        path = tokenizers.teacher_path / "speech_tokenizer_v2.onnx"
    return file_hash(path) if path is not None and path.is_file() else str(path or "packaged")


def _part(output: Path, index: int) -> Path:
    return output / f"part-{index:05d}.parquet"


def _part_report(output: Path, index: int) -> Path:
    return output / f"part-{index:05d}.json"


def _refuse_other_corpus(output: Path, num_parts: int, identity: dict[str, Any]) -> None:
    expected = {_part(output, index) for index in range(num_parts)}
    if foreign := sorted(set(output.glob("*.parquet")) - expected):
        raise InputError(f"{output} holds {foreign[0].name}, which is not of this corpus; give another --output")
    for path in sorted(output.glob(PART_REPORTS)):
        manifest = read_manifest(path, "corpus_part", SCHEMA_VERSION)
        check_made_by(path, manifest["made_by"], identity)


def _write_part(
    output: Path,
    index: int,
    rows: list[dict[str, Any]],
    skipped: list[Skipped],
    tokenizer: str,
    identity: dict[str, Any],
) -> None:
    if rows:
        write_corpus(_part(output, index), rows, tokenizer=tokenizer, made_by=identity)
    # Written last: a part counts as finished when its report is there.
    write_manifest(
        _part_report(output, index),
        "corpus_part",
        SCHEMA_VERSION,
        identity,
        utterances=len(rows),
        speech_tokens=sum(len(row["speech_tokens"]) for row in rows),
        splits=dict(Counter(row["split"] for row in rows)),
        skipped=[asdict(one) for one in skipped],
    )


def _write_report(output: Path, num_parts: int, skipped: Sequence[Skipped], identity: dict[str, Any]) -> dict[str, Any]:
    parts = [read_manifest(_part_report(output, index), "corpus_part", SCHEMA_VERSION) for index in range(num_parts)]
    left_out = [asdict(one) for one in skipped] + [one for part in parts for one in part["skipped"]]
    splits: Counter[str] = Counter()
    for part in parts:
        splits.update(part["splits"])
    report = {
        "utterances": sum(part["utterances"] for part in parts),
        "splits": dict(splits),
        "speech_tokens": sum(part["speech_tokens"] for part in parts),
        "skipped": len(left_out),
        "reasons": dict(Counter(_kind_of_reason(one["reason"]) for one in left_out).most_common()),
        "skipped_utterances": left_out,
    }
    write_manifest(output / REPORT, "corpus_report", SCHEMA_VERSION, identity, **report)
    if not report["utterances"]:
        raise InputError(f"none of {len(left_out)} recordings could be used; {output / REPORT} says why")
    return report


def _kind_of_reason(reason: str) -> str:
    """A reason without what is particular to one utterance (paths and numbers), for counting."""
    words = ["..." if "/" in word or any(c.isdigit() for c in word) else word for word in reason.split()]
    return " ".join(words)


def _source_arguments(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "libritts": {"subsets": tuple(options.subset)},
        "length_stress": {"per_length": options.per_length},
        "cosyvoice": {"split": options.split},
        "seed_tts_eval": {},
    }
    return given[options.source]


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.corpus", description="Prepare a corpus: recordings with transcripts to Parquet."
    )
    parser.add_argument("source", metavar="SOURCE", help=f"{', '.join(SOURCES)} (LibriTTS-R is libritts too)")
    parser.add_argument("path", type=Path, metavar="PATH", help="its folder, meta.lst or data.list")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the corpus folder")
    parser.add_argument("--speech-tokenizer", type=Path, metavar="FILE", help="default: the teacher's own")
    parser.add_argument("--subset", action="append", default=[], help="of LibriTTS, may be repeated (default: all)")
    parser.add_argument("--per-length", type=int, default=5, help="length_stress: utterances per number of words")
    parser.add_argument("--split", default="train", help="cosyvoice: the split its utterances become")
    parser.add_argument("--actors", type=int, help="Ray Data actors (default: one per free CPU or GPU)")
    parser.add_argument("--address", help="Ray cluster (default: $RAY_ADDRESS, else a new local one)")
    add_common_arguments(parser)
    given = sys.argv[1:] if arguments is None else arguments
    # The verb's name may be said: it is the only one of this module.
    given = given[1:] if given[:1] == ["prepare"] else given
    # Intermixed: overrides may follow the options, behind the two positional arguments.
    options = parser.parse_intermixed_args(given)
    if options.source not in SOURCES:
        raise InputError(f"unknown source {options.source!r}: {nearest_name(options.source, SOURCES)}")
    config = load_config(options.space, options.overrides)
    # Absolute: workers on other nodes and later evaluations (prompt_audio) stand in other folders.
    recordings, skipped = SOURCES[options.source](options.path.absolute(), **_source_arguments(options))
    print(f"{options.source} {options.path}: {len(recordings):,} recordings, {len(skipped):,} left out already")
    if options.dry_run:
        parts = -(-len(recordings) // UTTERANCES_PER_PART)
        print(f"{parts} parts of {UTTERANCES_PER_PART} by {config.teacher.kind}'s tokenizers, into {options.output}")
        return 0
    from mamtra_ray.cluster import connect
    from mamtra_ray.environment import note_session
    from mamtra_ray.progress import Ledger, Screen

    cluster = connect(options.address)
    options.output.mkdir(parents=True, exist_ok=True)
    screen = Screen(("corpus",), Ledger(options.output / "ledger.json"))
    for line in note_session(options.output, cluster.resources):
        screen.say(line)
    with screen.phase("corpus", f"tokenise into {options.output}"):
        report = prepare_corpus(
            config,
            recordings,
            skipped,
            options.output,
            made_by={"source": options.source, "path": str(options.path.resolve())},
            speech_tokenizer=options.speech_tokenizer and options.speech_tokenizer.absolute(),
            actors=options.actors,
            on_progress=lambda done, total: screen.count(done, total, "recordings"),
        )
    splits = ", ".join(f"{count:,} {split}" for split, count in report["splits"].items())
    print(f"{report['utterances']:,} utterances ({splits}), {report['speech_tokens']:,} speech tokens")
    for reason, count in report["reasons"].items():
        print(f"left out: {count:,} x {reason}")
    print(f"details in {options.output / REPORT}; use it with corpus.path={options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
