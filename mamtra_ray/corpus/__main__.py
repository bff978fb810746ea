"""Verb ``corpus``: prepare a corpus.

python -m mamtra_ray.corpus libritts LibriTTS --output corpora/libritts --space search_spaces/cosyvoice2.yaml
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mamtra_ray.config import load_config
from mamtra_ray.errors import InputError, exit_code_2_on_input_error, nearest_name

SOURCES = ("libritts", "length_stress", "seed_tts_eval", "cosyvoice")


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
    parser.add_argument("--space", metavar="FILE_OR_NAME", help="whose teacher's tokenizers (default: the demo)")
    parser.add_argument("--dry-run", action="store_true", help="list the recordings, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. teacher.kind=llasa")
    given = sys.argv[1:] if arguments is None else arguments
    # The verb's name may be said: it is the only one of this module.
    given = given[1:] if given[:1] == ["prepare"] else given
    # Intermixed: overrides may follow the options, behind the two positional arguments.
    options = parser.parse_intermixed_args(given)
    if options.source not in SOURCES:
        raise InputError(f"unknown source {options.source!r}: {nearest_name(options.source, SOURCES)}")
    # The corpus that a teacher of this kind needs is the one that is made here.
    made_here = f"corpus.path={json.dumps(str(options.output))}"
    config = load_config(options.space, [*options.overrides, made_here])

    from mamtra_ray.corpus.preparation import UTTERANCES_PER_PART, prepare_corpus
    from mamtra_ray.corpus.sources import SOURCES as LISTINGS
    from mamtra_ray.corpus.table import REPORT

    # Absolute: workers on other nodes and later evaluations (prompt_audio) stand in other folders.
    recordings, skipped = LISTINGS[options.source](options.path.absolute(), **_source_arguments(options))
    print(f"{options.source} {options.path}: {len(recordings):,} recordings, {len(skipped):,} left out already")
    if options.dry_run:
        parts = -(-len(recordings) // UTTERANCES_PER_PART)
        print(f"{parts} parts of {UTTERANCES_PER_PART} by {config.teacher.kind}'s tokenizers, into {options.output}")
        return 0
    from mamtra_ray.runtime.cluster import connect
    from mamtra_ray.runtime.environment import note_session
    from mamtra_ray.runtime.progress import Costs, Screen
    from mamtra_ray.runtime.resources import worker_resources

    cluster = connect(options.address)
    options.output.mkdir(parents=True, exist_ok=True)
    screen = Screen(("corpus",), Costs(options.output / "costs.json"))
    for line in note_session(options.output, cluster.resources):
        screen.say(line)
    with screen.phase("corpus", f"tokenize into {options.output}"):
        report = prepare_corpus(
            config.teacher,
            recordings,
            skipped,
            options.output,
            made_by={"source": options.source, "path": str(options.path.resolve())},
            speech_tokenizer=options.speech_tokenizer and options.speech_tokenizer.absolute(),
            worker=worker_resources(config.resources, cluster.resources),
            actors=options.actors,
            on_progress=lambda done, total: screen.count(done, total, "recordings"),
        )
    splits = ", ".join(f"{count:,} {split}" for split, count in report["splits"].items())
    print(f"{report['utterances']:,} utterances ({splits}), {report['speech_tokens']:,} speech tokens")
    for reason, count in report["reasons"].items():
        print(f"left out: {count:,} x {reason}")
    print(f"details in {options.output / REPORT}; use it with corpus.path={options.output}")
    return 0


def _source_arguments(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        "libritts": {"subsets": tuple(options.subset)},
        "length_stress": {"per_length": options.per_length},
        "cosyvoice": {"split": options.split},
        "seed_tts_eval": {},
    }
    return given[options.source]


if __name__ == "__main__":
    sys.exit(main())
