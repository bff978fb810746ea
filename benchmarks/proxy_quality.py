"""Does the score of a forward pass predict what distillation ends in, and the words that are heard?

    python benchmarks/proxy_quality.py                     12 layouts at each of two budgets; an hour on two cores
    python benchmarks/proxy_quality.py --space demo24 --layouts 16 --found runs/demo24
                                                           the deep teacher: hours; the found layouts of that run too
    python benchmarks/proxy_quality.py --quick             4 layouts, few tokens and sentences; nothing written

Layouts are spread evenly over the ranking by probe KL; the best one, what a search found and the paper's placements are
among them. Each is distilled from the library with equal settings, once as long as a trial's last rung ("short") and
once, anew, as long as a finalist ("final"), and speaks the same sentences. Spearman correlations are taken inside each
budget, with 95 % intervals of 2,000 bootstrap samples of the layouts; and between the WERs on two random halves of the
sentences, which says how much of the ranking by WER is noise. The found layout is compared with every placement on the
sentences of both. ``--second-recognizer`` hears the found layouts and their closest rival once more. Every distilled
student is kept in the run folder and not distilled again.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import ray
from compared_layouts import Compared, correlations, limits_of_prediction, paired_rows, wer_by_band
from measurement import LONG_DEMO, is_found, print_table, write_result

from mamtra_ray.align.phase import make_library
from mamtra_ray.artifacts import read_manifest, write_manifest
from mamtra_ray.distill.job import DistillData, DistillJob, distill_data
from mamtra_ray.distill.workers import distill
from mamtra_ray.evaluate.evaluation import evaluate_systems
from mamtra_ray.evaluate.results import Evaluation
from mamtra_ray.layouts import PATTERNS, Layout, from_strategy
from mamtra_ray.layouts.constraints import Constraints, sample_layouts
from mamtra_ray.probe.phase import probe_data
from mamtra_ray.probe.pool import ProbePool
from mamtra_ray.run.folder import Run, read_run
from mamtra_ray.run.open_run import open_run
from mamtra_ray.run.session import Session, start_session
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.teacher_cache.phase import make_cache
from mamtra_ray.teacher_cache.shared import SharedCache

RATIOS = {12: ("1:1", "1:3"), 24: ("1:1", "1:3", "1:5", "1:11")}
"""By the teacher's layers."""
QUICK = [
    "corpus.train_tokens=20000",
    "corpus.validation_tokens=600",
    "align.tokens=10000",
    "probe.validation_tokens=300",
    "distill.tokens=3000",
    "evaluate.sentences=2",
    "evaluate.audio_examples=0",
]
PHASES = ("cache", "align", "probe", "distill", "speech", "second recognizer", "more sentences")
_PROBED = 200
"""Drawn of each budget."""


def chosen_layouts(kl: dict[Layout, float], patterns: Sequence[Layout], count: int) -> list[Layout]:
    """The best layout, the patterns, and others evenly over the ranking; ``count`` in all."""
    ranked = sorted(kl, key=kl.__getitem__)
    chosen = list(dict.fromkeys([ranked[0], *patterns]))[:count]
    rest = [layout for layout in ranked if layout not in chosen]
    places = np.linspace(0, len(rest) - 1, count - len(chosen)).round().astype(int)
    return [*chosen, *(rest[place] for place in places)]


@ray.remote(max_retries=1)
def distilled(job: DistillJob, of_trial: DistillJob, folder: str) -> dict[str, Any]:
    """Distill on one process, as a trial and then anew as a finalist, and keep the final student."""
    device = device_of_this_process()
    *_, (short, _) = distill(of_trial, device)
    *_, (final, training) = distill(job, device)
    training.student.save(Path(folder) / "student")
    content = {
        "short CE": short.ce,
        "short KL": short.kl,
        "final CE": final.ce,
        "final KL": final.kl,
        "seconds": final.seconds,
    }
    write_manifest(Path(folder) / "report.json", "distilled", 1, {"layout": str(job.layout)}, report=content)
    return content


def layouts_to_compare(
    session: Session,
    library: Path,
    validation: SharedCache,
    *,
    ratios: Sequence[str],
    found: Sequence[Layout],
    per_budget: Sequence[int],
    probed: int,
) -> list[Compared]:
    """Layouts over the whole ranking of each budget, by scores of the probe."""
    compared = []
    with (
        session.screen.phase("probe", f"{probed} layouts of each budget"),
        ProbePool(probe_data(session, library, validation), session.folder, session.worker) as pool,
    ):
        for ratio, count in zip(ratios, per_budget, strict=True):
            budget = Constraints.from_ratio(session.num_layers, ratio)
            drawn = sample_layouts(budget, min(probed, budget.num_layouts), np.random.default_rng(0))
            origins = {layout: "found" for layout in found if budget.allows(layout)}
            for name in PATTERNS:
                origins.setdefault(from_strategy(name, session.num_layers, ratio), name)
            for done in pool.score([layout for layout in {*drawn, *origins} if layout not in pool.rows], 32):
                session.screen.count(done, probed, "layouts")
            kl = {layout: pool.rows[layout].kl for layout in (*drawn, *origins)}
            chosen = chosen_layouts(kl, list(origins), count)
            rows = {
                layout: {
                    "budget": ratio,
                    "layout": str(layout),
                    "from": origins.get(layout, ""),
                    "probe KL": kl[layout],
                    "probe CE": pool.rows[layout].ce,
                }
                for layout in chosen
            }
            compared.append(Compared(ratio, rows))
    return compared


def distill_all(session: Session, data: DistillData, layouts: Sequence[Layout]) -> dict[Layout, Path]:
    """Folder of each distilled layout; finished ones are kept."""
    config = session.config
    folders = {layout: session.folder.resolve() / "distilled" / str(layout) for layout in layouts}
    missing = [layout for layout, folder in folders.items() if not (folder / "report.json").exists()]
    with session.screen.phase("distill", f"{len(layouts)} layouts, {config.distill.tokens:,} tokens each"):
        running = []
        for layout in missing:
            job = DistillJob(layout, config.distill, config.student, data, (config.distill.tokens,), config.seed)
            of_trial = dataclasses.replace(job, settings=config.distill_of_trials, report_at=config.search.rung_tokens)
            running.append(distilled.remote(job, of_trial, str(folders[layout])))
        for done in range(len(running)):
            finished, running = ray.wait(running, num_returns=1)
            ray.get(finished)
            session.screen.count(done + 1, len(missing), "layouts")
    return folders


def heard(
    session: Session, systems: dict[str, Path | None], phase: str = "speech", **changes: Any
) -> dict[str, Evaluation]:
    """Evaluations by layout, and of the teacher and the codec; with changed settings in a folder of their own."""
    config, folder = session.config, session.folder
    if changes:
        config = config.model_copy(update={"evaluate": config.evaluate.model_copy(update=changes)})
        folder /= phase.replace(" ", "_")
    what = f"{config.evaluate.sentences} sentences by each of {len(systems)}, {config.evaluate.recognizer}"
    with session.screen.phase(phase, what):
        return evaluate_systems(
            config,
            systems,
            folder,
            teacher=session.shared_teacher,
            worker=session.worker,
            on_progress=lambda done, total: session.screen.count(done, total, "utterances"),
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layouts, few tokens; nothing is written")
    parser.add_argument("--layouts", default="12", help="of each budget; or one number for every ratio: 16,16,8")
    parser.add_argument("--ratios", help="with commas between (default: 1:1,1:3; 1:5 and 1:11 of 24 layers)")
    parser.add_argument("--probed", type=int, default=_PROBED, help="drawn of each budget, to choose from")
    parser.add_argument("--found", type=Path, help="run folder whose found layouts are among them")
    parser.add_argument("--second-recognizer", help="such as faster-whisper:FOLDER, for found layouts and rivals")
    parser.add_argument("--second-sentences", type=int, help="so many for it (default: as for the first)")
    parser.add_argument("--more-sentences", type=int, help="so many for the found layouts and their closest rival")
    parser.add_argument("--space", default="demo", help="search-space file (default: the packaged demo)")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/proxy_quality_SPACE)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args()
    is_demo, name = options.space == "demo", f"proxy_quality_{Path(options.space).stem}"
    overrides = [*(LONG_DEMO if is_demo else []), *(QUICK if options.quick else []), *options.overrides]
    folder = options.run or Path("runs") / f"{name}{'_quick' if options.quick else ''}"
    found = found_layouts(read_run(options.found)) if options.found else []
    run = open_run(options.space, folder, overrides)
    session = start_session(run, PHASES, None)
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    assert library is not None
    data = distill_data(session.config, session.shared_teacher, train, validation, str(library.resolve()))
    ratios = options.ratios.split(",") if options.ratios else RATIOS[session.num_layers]
    per_budget, probed = [int(count) for count in options.layouts.split(",")], options.probed
    if len(per_budget) == 1:
        per_budget *= len(ratios)
    if options.quick:
        per_budget, probed = [4] * len(ratios), 10
    compared = layouts_to_compare(
        session, library, validation, ratios=ratios, found=found, per_budget=per_budget, probed=probed
    )
    folders = distill_all(session, data, [layout for one in compared for layout in one.rows])
    systems: dict[str, Path | None] = {str(layout): folder / "student" for layout, folder in folders.items()}
    evaluations = heard(session, systems)
    for layout, row in ((layout, row) for one in compared for layout, row in one.rows.items()):
        evaluation = evaluations[str(layout)]
        row |= read_manifest(folders[layout] / "report.json", "distilled", 1)["report"]
        row |= wer_columns(evaluation)
    tables = {
        "correlations": correlations(compared),
        "limits": limits_of_prediction(compared, evaluations),
        "paired": paired_rows(compared, evaluations),
    }
    if options.second_recognizer:
        again = heard(
            session,
            contenders(compared, systems, 1),
            "second recognizer",
            recognizer=options.second_recognizer,
            sentences=options.second_sentences or session.config.evaluate.sentences,
        )
        tables["second_recognizer"] = [heard_row(system, one) for system, one in again.items()]
        tables["paired_by_second_recognizer"] = paired_rows(compared, again)
    if options.more_sentences:
        longer = heard(session, contenders(compared, systems, 1), "more sentences", sentences=options.more_sentences)
        tables["more_sentences"] = [heard_row(system, one) for system, one in longer.items()]
        tables["paired_by_more_sentences"] = paired_rows(compared, longer)
    rows = [row for one in compared for row in one.rows.values()]
    tables["references"] = [heard_row(name, evaluations[name]) for name in ("codec", "teacher")]
    for table in (rows, *tables.values()):
        print()
        print_table(table)
    if not options.quick:
        settings = {
            key: run.config.distill.model_dump()[key]
            for key in ("tokens", "learning_rate", "pretrained_learning_rate_factor", "tokens_per_batch", "schedule")
        }
        write_result(name, rows, **tables, distill=settings, sentences=run.config.evaluate.sentences)
    return 0


def heard_row(system: str, evaluation: Evaluation) -> dict[str, Any]:
    """A row of the result for one system."""
    return {"system": system, "sentences": len(evaluation.rows)} | wer_columns(evaluation)


def wer_columns(evaluation: Evaluation) -> dict[str, float]:
    """WER with its interval, and by length."""
    wer = evaluation.wer
    return {"WER": wer.value, "WER low": wer.low, "WER high": wer.high} | wer_by_band(evaluation)


def contenders(compared: Sequence[Compared], systems: Mapping[str, Path | None], rivals: int) -> dict[str, Path | None]:
    """Found layouts, and so many others of their budgets with the lowest WER."""
    chosen = []
    for one in compared:
        ranked = sorted(one.rows, key=lambda layout: one.rows[layout]["WER"])
        found = [layout for layout in ranked if one.rows[layout]["from"] == "found"]
        chosen += [*found, *[layout for layout in ranked if layout not in found][:rivals]]
    return {str(layout): systems[str(layout)] for layout in chosen}


def found_layouts(run: Run) -> list[Layout]:
    """What the search proposed, and not the paper: its finalists, or before these the probe's best of every ratio."""
    if run.finalists:
        return [row.layout for row in run.finalists if is_found(row.origin)]
    # Not the single replacements, which the probe scores too.
    counts = sorted(
        {count for row in run.probe if row.layout.num_layers - (count := row.layout.num_attention) > 1}, reverse=True
    )
    of_count = {count: [row for row in run.probe if row.layout.num_attention == count] for count in counts}
    return [min(rows, key=lambda row: row.kl).layout for rows in of_count.values()]


if __name__ == "__main__":
    raise SystemExit(main())
