"""Recordings with transcripts to our Parquet, tokenized by Ray Data actors.

    python -m mamtra_ray.corpus libritts LibriTTS --output corpora/libritts --space search_spaces/cosyvoice2.yaml

The output is a folder: ``part-00000.parquet`` and so on, and ``report.json`` with what was left out and why. Each part
is written when it is finished; a stopped run goes on with the parts that are missing.
"""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mamtra_ray.artifacts import check_made_by, content_hash, file_hash, read_manifest, write_manifest
from mamtra_ray.config import TeacherConfig
from mamtra_ray.corpus.sources import Recording, Skipped, without_repeats
from mamtra_ray.corpus.table import PART_REPORTS, REPORT, made_by_of, write_corpus
from mamtra_ray.corpus.tokenization_worker import TokenizationWorker, Tokenizers
from mamtra_ray.errors import InputError
from mamtra_ray.runtime.environment import ENVIRONMENT
from mamtra_ray.runtime.resources import WorkerResources

SCHEMA_VERSION = 1
UTTERANCES_PER_PART = 512
COSTS = "costs.json"
_BEFORE_PARTS = {COSTS, ENVIRONMENT}


def prepare_corpus(
    teacher: TeacherConfig,
    recordings: Sequence[Recording],
    skipped: Sequence[Skipped],
    output: Path,
    *,
    made_by: dict[str, Any],
    speech_tokenizer: Path | None = None,
    worker: WorkerResources,
    actors: int | None = None,
    utterances_per_part: int = UTTERANCES_PER_PART,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Tokenize ``recordings`` into a corpus folder; Ray must be initialized.

    Args:
        teacher: whose tokenizers.
        recordings: from one of :data:`~mamtra_ray.corpus.sources.SOURCES`.
        skipped: what the source left out already; goes into the report.
        output: corpus folder; parts that are there from the same recordings and tokenizers are kept.
        made_by: what the recordings come from, for metadata and report.
        speech_tokenizer: file or folder of the speech tokenizer, if it is not the teacher's own.
        worker: what an actor asks Ray for.
        actors: Ray Data actors; one per free CPU or GPU if None.
        utterances_per_part: recordings of one part.
        on_progress: called with (recordings done, of how many).

    Returns:
        The content of ``report.json``: numbers of kept and left-out utterances, each one's reason, speech tokens.

    Raises:
        InputError: the tokenizers cannot be loaded, ``output`` holds another corpus, or nothing could be used.
    """
    recordings, repeated = without_repeats(recordings)
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
    check_output_folder(output)
    _refuse_other_corpus(output, len(groups), identity)
    missing = [index for index in range(len(groups)) if not _part_report(output, index).exists()]
    if missing:
        (output / REPORT).unlink(missing_ok=True)
    done = len(recordings) - sum(len(groups[index]) for index in missing)
    on_progress(done, len(recordings))
    for index, rows, left_out in _tokenized(tokenizers, {index: groups[index] for index in missing}, actors, worker):
        _write_part(output, index, rows, left_out, teacher.kind, identity)
        done += len(groups[index])
        on_progress(done, len(recordings))
    return _write_report(output, len(groups), [*skipped, *repeated], identity)


def _tokenized(
    tokenizers: Tokenizers, groups: dict[int, list[Recording]], actors: int | None, worker: WorkerResources
) -> Any:
    """Yield (group, rows, skipped) as they finish."""
    if not groups:
        return
    import ray
    import ray.data

    # One CPU stays free: Ray Data's own reading task needs one.
    cluster = ray.cluster_resources() | {"CPU": ray.cluster_resources().get("CPU", 1) - 1}
    slots = max(1, worker.slots(cluster))
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    items = [{"group": index, "recordings": pickle.dumps(recordings)} for index, recordings in groups.items()]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        TokenizationWorker,
        fn_constructor_args=(tokenizers,),
        batch_size=1,
        batch_format="numpy",
        **worker.options(),
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


def check_output_folder(output: Path) -> None:
    """Refuse a folder that is there, not empty, and that no corpus was ever prepared into; light, for a dry run.

    Raises:
        InputError: names a file of somebody else's.
    """
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file, not a folder")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if names and not any(output.glob(PART_REPORTS)) and (foreign := sorted(names - _BEFORE_PARTS)):
        first = output / foreign[0]
        # A killed process may have left its first part without the report that is written after it.
        if not (first.name == _part(output, 0).name and _tells_made_by(first)):
            raise InputError(f"{output} is there and holds {first.name}, which is no corpus: give another --output")


def _tells_made_by(path: Path) -> bool:
    """Whether ``path`` is a corpus that was prepared from recordings."""
    try:
        return "recordings" in made_by_of(path)
    except InputError:
        return False


def _refuse_other_corpus(output: Path, num_parts: int, identity: dict[str, Any]) -> None:
    expected = {_part(output, index) for index in range(num_parts)}
    if foreign := sorted(set(output.glob("*.parquet")) - expected):
        raise InputError(f"{output} holds {foreign[0].name}, which is not of this corpus; give another --output")
    for index in range(num_parts):
        part = _part(output, index)
        if part.exists() and not _part_report(output, index).exists() and made_by_of(part) != identity:
            raise InputError(f"{part} is of another corpus and would be overwritten; give another --output")
    if (output / REPORT).exists():
        read_manifest(output / REPORT, "corpus_report", SCHEMA_VERSION)
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
