"""Verb ``corpus``: prepare a corpus.

python -m mamtra_ray.corpus libritts LibriTTS --output corpora/libritts --space search_spaces/cosyvoice2.yaml
python -m mamtra_ray.corpus check corpora/libritts --space cosyvoice2
python -m mamtra_ray.corpus text FILE... --output corpora/text --space search_spaces/smollm2.yaml
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from mamtra_ray.config import load_config
from mamtra_ray.config.command_line import add_address
from mamtra_ray.errors import InputError, exit_code_2_on_input_error, nearest_name

SOURCES = ("libritts", "length_stress", "seed_tts_eval", "cosyvoice", "text")
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=.*", re.DOTALL)


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["text"]:
        return _text(given[1:])
    if given[:1] == ["check"]:
        return _check(given[1:])
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.corpus", description="Prepare a corpus: recordings with transcripts to Parquet."
    )
    known = f"{', '.join(SOURCES)} (LibriTTS-R is libritts too; text and check have options of their own: check --help)"
    parser.add_argument("source", metavar="SOURCE", help=known)
    parser.add_argument("path", type=Path, metavar="PATH", help="its folder, meta.lst or data.list")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the corpus folder")
    parser.add_argument("--speech-tokenizer", type=Path, metavar="FILE", help="default: the teacher's own")
    parser.add_argument("--subset", action="append", default=[], help="of LibriTTS, may be repeated (default: all)")
    parser.add_argument("--per-length", type=int, default=5, help="length_stress: utterances per number of words")
    parser.add_argument("--split", default="train", help="cosyvoice: the split its utterances become")
    parser.add_argument("--actors", type=int, help="Ray Data actors (default: one per free CPU or GPU)")
    add_address(parser)
    parser.add_argument("--space", metavar="FILE_OR_NAME", help="whose teacher's tokenizers (default: the demo)")
    parser.add_argument("--dry-run", action="store_true", help="list the recordings, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. teacher.kind=llasa")
    # The verb's name may be said: it is the only one of this module.
    given = given[1:] if given[:1] == ["prepare"] else given
    # Intermixed: overrides may follow the options, behind the two positional arguments.
    options = parser.parse_intermixed_args(given)
    if options.source not in SOURCES:
        raise InputError(f"unknown source {options.source!r}: {nearest_name(options.source, SOURCES)}")
    # The corpus that a teacher of this kind needs is the one that is made here.
    made_here = f"corpus.path={json.dumps(str(options.output))}"
    config = load_config(options.space, [*options.overrides, made_here])

    from mamtra_ray.corpus.preparation import COSTS, UTTERANCES_PER_PART, check_output_folder, prepare_corpus
    from mamtra_ray.corpus.sources import SOURCES as LISTINGS
    from mamtra_ray.corpus.table import REPORT

    # Absolute: workers on other nodes and later evaluations (prompt_audio) stand in other folders.
    recordings, skipped = LISTINGS[options.source](options.path.absolute(), **_source_arguments(options))
    print(f"{options.source} {options.path}: {len(recordings):,} recordings, {len(skipped):,} left out already")
    check_output_folder(options.output)
    if options.dry_run:
        parts = -(-len(recordings) // UTTERANCES_PER_PART)
        print(f"{parts} parts of {UTTERANCES_PER_PART} by {config.teacher.kind}'s tokenizers, into {options.output}")
        return 0
    from mamtra_ray.runtime.cluster import connect
    from mamtra_ray.runtime.environment import note_session
    from mamtra_ray.runtime.progress import Costs, Screen, said_while
    from mamtra_ray.runtime.resources import worker_resources

    with said_while("connecting to Ray"):
        cluster = connect(options.address)
    options.output.mkdir(parents=True, exist_ok=True)
    screen = Screen(("corpus",), Costs(options.output / COSTS))
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


def _check(arguments: list[str]) -> int:
    """``corpus check``: read one whole and compare it with a teacher."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.corpus check",
        description="Read a corpus whole, check every row, and compare it with a teacher's tokenizers if one is given.",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="a Parquet file or a folder of them")
    parser.add_argument("--space", metavar="FILE_OR_NAME", help="whose teacher to compare it with")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. teacher.kind=llasa teacher.path=MODEL")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.space, [*options.overrides, f"corpus.path={json.dumps(str(options.path))}"])

    from mamtra_ray.corpus.check import check_against_teacher, corpus_summary, fitting_summary
    from mamtra_ray.corpus.table import read_corpus

    print(corpus_summary(options.path))
    if options.space is None and not options.overrides:
        return 0
    from mamtra_ray.teachers.outline import teacher_outline

    outline = teacher_outline(config.teacher.kind, config.teacher.path, config.student.state_sharing)
    table = read_corpus(options.path)
    check_against_teacher(table, outline, config.teacher)
    print(fitting_summary(table, outline))
    return 0


def _text(arguments: list[str]) -> int:
    """``corpus text``: no recordings, no Ray, only files and a tokenizer."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.corpus text", description="Text files to a corpus for a teacher of text."
    )
    parser.add_argument("files", type=str, nargs="+", metavar="FILE", help="UTF-8 text, also .gz; a folder: see --glob")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the corpus folder")
    parser.add_argument("--glob", default="**/*", metavar="PATTERN", help="files of a folder, such as '**/*.py'")
    parser.add_argument(
        "--cut", default="documents", help="documents: joined and cut into rows (default); paragraphs: a row of each"
    )
    parser.add_argument("--row-tokens", type=int, default=512, metavar="N", help="longest row (default: 512)")
    parser.add_argument("--validation", type=float, default=0.1, metavar="SHARE", help="of the files (default: 0.1)")
    parser.add_argument("--space", metavar="FILE_OR_NAME", help="whose teacher's tokenizer, and seed")
    parser.add_argument("--dry-run", action="store_true", help="list what is found, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. teacher.path=MODEL")
    options = parser.parse_intermixed_args(arguments)
    overrides = [text for text in options.files if _OVERRIDE.fullmatch(text) and not Path(text).exists()]
    overrides += options.overrides
    paths = [Path(text).expanduser() for text in options.files if text not in overrides]
    config = load_config(options.space, [*overrides, f"corpus.path={json.dumps(str(options.output))}"])
    if config.teacher.kind != "causal_lm" or config.teacher.path is None:
        raise InputError(
            f"corpus text is for a teacher of text, not {config.teacher.kind!r}: give teacher.kind=causal_lm and "
            "teacher.path=MODEL"
        )

    from mamtra_ray.corpus.text import CUTS, TextSettings, find_files, make_text_corpus, read_documents

    if options.cut not in CUTS:
        raise InputError(f"--cut {options.cut!r}: {nearest_name(options.cut, CUTS)}")
    if options.row_tokens < 1:
        raise InputError(f"--row-tokens must be at least 1, not {options.row_tokens}")
    if not 0 < options.validation < 1:
        raise InputError(f"--validation is a share of the files between 0 and 1, not {options.validation}")
    settings = TextSettings(options.cut, options.row_tokens, options.validation, config.seed)
    files = find_files(paths, options.glob)
    if options.dry_run:
        documents, skipped = read_documents(files)
        characters = sum(len(document.text) for document in documents)
        print(f"{len(documents):,} documents of {characters:,} characters, {len(skipped):,} files left out")
        return 0

    from mamtra_ray.teachers import check_kind
    from mamtra_ray.teachers.causal_lm import text_tokens_of
    from mamtra_ray.teachers.text import transformers_tokenizer

    check_kind(config.teacher.kind, config.teacher.path)
    model = Path(config.teacher.path)
    meaning = text_tokens_of(model)
    if meaning.tokenizer is None:
        raise InputError(f"{model} has no tokenizer (tokenizer.json)")
    report = make_text_corpus(
        files,
        options.output,
        tokenizer=transformers_tokenizer(config.teacher.kind, model),
        tokenizer_name=meaning.tokenizer,
        end=meaning.ends[0],
        settings=settings,
    )
    for split, counts in report["splits"].items():
        print(f"{split}: {counts['documents']:,} documents, {counts['rows']:,} rows, {counts['tokens']:,} tokens")
    if report["skipped"]:
        print(f"left out: {len(report['skipped']):,} files, see {options.output / 'report.json'}")
    print(f"use it with corpus.path={options.output}")
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
