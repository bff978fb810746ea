"""Verb ``search``: from a teacher and a corpus to the best hybrid under the budget.

Straight down: teacher cache -> aligned mixers -> probe -> Tune + Optuna -> finalists on Ray Train -> speech and WER
-> export -> report. Every step leaves its result in a folder named by what made it and is reused when that fits, so
the same command goes on after any stop.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import ray
from tensorboardX import SummaryWriter

from mamtra_ray.artifacts import content_hash
from mamtra_ray.candidates import Candidate, meets_constraints, paper_candidates, without_repeats
from mamtra_ray.config import Config, add_common_arguments, config_from_arguments, explain, load_config
from mamtra_ray.errors import exit_code_2_on_input_error
from mamtra_ray.evaluate import evaluate_systems
from mamtra_ray.export import export_student
from mamtra_ray.finalists import choose_best, choose_finalists, distill_finalist
from mamtra_ray.layouts import Layout, num_attention_layers
from mamtra_ray.metrics import SearchMetrics
from mamtra_ray.plan import print_plan
from mamtra_ray.probe import probe_masks, propose
from mamtra_ray.progress import table
from mamtra_ray.records import TrialRecords
from mamtra_ray.report import write_report
from mamtra_ray.run_folder import FINALIST_COLUMNS, FINALISTS, TRIAL_COLUMNS, TRIALS, read_rows, write_rows
from mamtra_ray.session import Session, check_run_folder, make_cache, make_library, start_session
from mamtra_ray.shared_batches import SharedCache
from mamtra_ray.trial import TrialSettings
from mamtra_ray.tuning import run_trials

PHASES = ("cache", "align", "probe", "trials", "finalists", "speech", "export", "report")


def search(config: Config, folder: Path, address: str | None) -> None:
    """Run all phases; see the module's docstring."""
    session = start_session(config, folder, PHASES, address)
    config = session.config
    budgets = ", ".join(config.search.ratios)
    session.screen.say(f"run {folder}: {session.num_layers} layers, budgets {budgets}; dashboard {_dashboard_url()}")
    metrics = SearchMetrics(folder.name)
    train, validation = make_cache(session)
    library = make_library(session, train, validation)
    proposals = probe(session, library, validation)
    settings = TrialSettings(
        config=config,
        num_layers=session.num_layers,
        train=train,
        validation=validation,
        library=str(library.resolve()) if library else None,
        costs={str(kept): session.costs(kept)[config.search.cost] for kept in range(session.num_layers + 1)},
        weights_folder=str((folder / "trial_weights").resolve()),
        records=None,
    )
    rows, settings = run_the_trials(session, settings, proposals, metrics)
    finalists = distill_the_finalists(session, settings, rows)
    finalists = hear(session, finalists, metrics)
    best = export(session, finalists)
    with session.screen.phase("report", "tables, figures, audio"):
        report = write_report([folder], folder)
    closing_words(session, finalists, best, report)


def probe(session: Session, library: Path | None, validation: SharedCache) -> list[Candidate]:
    """Forward-only scores of many layouts, and the surrogate's optimum of every budget."""
    if library is None or session.config.probe.masks == 0:
        return []
    with session.screen.phase("probe", f"{session.config.probe.masks} layouts by forward passes"):
        rows = probe_masks(
            session.config,
            session.folder,
            teacher=session.teacher,
            library=library,
            validation=validation,
            on_progress=lambda done, total: session.screen.count(done, total, "layouts"),
        )
        return [
            Candidate(layout, "probe")
            for ratio in session.config.search.ratios
            for layout in propose(session.config, rows, ratio, 3)
        ]


def run_the_trials(
    session: Session, settings: TrialSettings, proposals: list[Candidate], metrics: SearchMetrics
) -> tuple[list[dict[str, Any]], TrialSettings]:
    """Tune + Optuna; returns the rows of the trials table and the settings with the records actor in them."""
    search_config = session.config.search
    starting = without_repeats([*paper_candidates(search_config, session.num_layers), *proposals])
    known = known_layouts(session)
    candidates = without_repeats([*known, *starting])
    records = (
        ray.remote(TrialRecords)
        .options(num_cpus=0, name=f"records-{session.folder.name}-{content_hash(str(session.folder.resolve()))}")
        .remote(
            session.folder.resolve(),
            content_hash(session.made_from(*_TRIAL_SECTIONS)),
            {str(candidate.layout): candidate.origin for candidate in candidates},
            {kept: session.costs(kept) for kept in range(session.num_layers + 1)},
        )
    )
    settings = dataclasses.replace(settings, records=records)
    total = len(candidates) if search_config.sampler == "grid" else max(search_config.trials, len(candidates))
    progress = _TrialsProgress(session, metrics, records, total)
    goes_on = f", {len(known)} known" if known else ""
    with session.screen.phase("trials", f"{total} layouts by Tune + Optuna ({search_config.sampler}){goes_on}"):
        run_trials(settings, candidates, session.folder, progress)
    return ray.get(records.all_rows.remote()), settings


class _TrialsProgress:
    """What the screen, the metrics and the records are told while trials run."""

    def __init__(self, session: Session, metrics: SearchMetrics, records: Any, total: int) -> None:
        self.session, self.metrics, self.records, self.total = session, metrics, records, total
        self.finished = 0
        self.best: dict[str, Any] | None = None

    def __call__(self, result: dict[str, Any], finished: bool) -> None:
        if finished:
            self.finished += 1
            self.metrics.trials_finished.inc()
        if "error" in result:
            self.session.screen.say(f"    a trial failed and is left out; its traceback: {result['error']}")
        elif "ce" in result:
            if finished:
                ray.get(self.records.finish.remote(result["layout"]))
            if self.best is None or (result["rung"], -result["ce"]) > (self.best["rung"], -self.best["ce"]):
                self.best = result
                self.metrics.best_ce.set(result["ce"])
                self.metrics.cache_bytes.set(self.session.costs(result["layout"].count("A"))["cache_bytes"])
            self.metrics.tokens_per_second.set(result["tokens_per_second"])
        note = f"best CE {self.best['ce']:.3f} {self.best['layout']}" if self.best else ""
        self.session.screen.count(self.finished, self.total, "trials", note)


def known_layouts(session: Session) -> list[Candidate]:
    """Layouts that an earlier session of this run already scored under the same settings, oldest first."""
    made_by = content_hash(session.made_from(*_TRIAL_SECTIONS))
    kept = {num_attention_layers(session.num_layers, ratio) for ratio in session.config.search.ratios}
    return without_repeats(
        candidate
        for row in read_rows(session.folder / TRIALS, TRIAL_COLUMNS)
        if row["settings_hash"] == made_by
        and row["layout"].count("A") in kept
        and meets_constraints(
            (candidate := Candidate(Layout(row["layout"]), row["origin"])).layout, session.config.search
        )
    )


# What a trial's score depends on; the search's own settings (how many, which sampler) do not change a score.
_TRIAL_SECTIONS = ("teacher", "corpus", "cache", "student", "align", "distill")


def distill_the_finalists(
    session: Session, settings: TrialSettings, rows: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Every finalist with the full token budget; rows of ``finalists.parquet`` without their WER."""
    finalists = choose_finalists(session.config.search, session.num_layers, rows)
    total = session.config.distill.tokens * len(finalists)
    results = []
    with session.screen.phase(
        "finalists", f"{len(finalists)} layouts on {session.config.distill.workers} Ray Train workers"
    ):
        for index, candidate in enumerate(finalists):
            folder = finalist_folder(session.folder, candidate.layout)

            def on_progress(tokens: int, index: int = index, candidate: Candidate = candidate) -> None:
                done = index * session.config.distill.tokens + min(tokens, session.config.distill.tokens)
                session.screen.count(done, total, "tokens", f"{candidate.origin} {candidate.layout}")

            report = distill_finalist(
                settings, candidate.layout, folder, session.made_from(*_TRIAL_SECTIONS), on_progress
            )
            log_to_tensorboard(session.folder / "tensorboard" / str(candidate.layout), report.curve)
            session.screen.say(
                f"    {candidate.origin} {candidate.layout}: CE {report.ce:.3f} (from {report.ce_start:.3f})"
            )
            results.append(
                {
                    "layout": str(candidate.layout),
                    "origin": candidate.origin,
                    "ratio": candidate.layout.ratio,
                    "tokens": report.tokens,
                    "steps": report.step,
                    "seconds": report.seconds,
                    "ce": report.ce,
                    "kl": report.kl,
                    "ce_start": report.ce_start,
                    "wer": None,
                    "wer_low": None,
                    "wer_high": None,
                    "cer": None,
                    **session.costs(len(candidate.layout.attention_layers)),
                }
            )
    return results


def hear(session: Session, finalists: list[dict[str, Any]], metrics: SearchMetrics) -> list[dict[str, Any]]:
    """Generate speech with every finalist, recognise it, and add its WER to its row."""
    systems: dict[str, Path | None] = {
        row["layout"]: finalist_folder(session.folder, Layout(row["layout"])) / "student" for row in finalists
    }
    if session.config.evaluate.sentences:
        with session.screen.phase(
            "speech", f"{session.config.evaluate.sentences} sentences by the teacher and each finalist"
        ):
            scores = evaluate_systems(
                session.config,
                systems,
                session.folder,
                on_progress=lambda done, total: session.screen.count(done, total, "utterances"),
            )
        for row in finalists:
            score = scores[row["layout"]]
            row.update(wer=score.wer, wer_low=score.wer_low, wer_high=score.wer_high, cer=score.cer)
        metrics.best_wer.set(min(row["wer"] for row in finalists))
    write_rows(session.folder / FINALISTS, finalists, FINALIST_COLUMNS)
    return finalists


def export(session: Session, finalists: list[dict[str, Any]]) -> dict[str, Path]:
    """The best finalist of every budget as a checkpoint for plain transformers; ``best`` is the first budget's."""
    folders = {}
    with session.screen.phase("export", "a checkpoint that plain transformers loads"):
        for index, ratio in enumerate(session.config.search.ratios):
            kept = num_attention_layers(session.num_layers, ratio)
            row = choose_best([row for row in finalists if row["layout"].count("A") == kept])
            folder = session.folder / ("best" if index == 0 else f"best-{ratio.replace(':', '-')}")
            export_student(finalist_folder(session.folder, Layout(row["layout"])) / "student", folder, row, session.teacher)
            folders[row["layout"]] = folder
    return folders


def closing_words(session: Session, finalists: list[dict[str, Any]], best: dict[str, Path], report: Path) -> None:
    """A table of the outcome, where everything lies, and how to go on."""
    rows = [
        [
            row["ratio"],
            row["layout"],
            row["origin"] + (" *" if row["layout"] in best else ""),
            f"{row['ce']:.3f}",
            "" if row["wer"] is None else f"{row['wer']:.1%} [{row['wer_low']:.1%}, {row['wer_high']:.1%}]",
            f"{row['cache_bytes'] / 1e6:.2f}",
        ]
        for row in finalists
    ]
    say = session.screen.say
    say("")
    say(
        table(
            ["ratio", "layout", "from", "CE", "WER [95 %]", f"cache MB at {session.config.search.context_length}"], rows
        )
    )
    say("* exported")
    say("")
    for layout, folder in best.items():
        say(f"checkpoint  {folder}  ({layout})")
    say(f"report      {report}")
    say(f"audio       {session.folder / 'audio'}")
    say(f"trials      {session.folder / 'trials.parquet'}")
    say("")
    more = 2 * session.config.search.trials
    say(f"go on with more trials:  python -m mamtra_ray.search --resume --run {session.folder} search.trials={more}")
    say(
        f"export another finalist: python -m mamtra_ray.export --run {session.folder} --layout {finalists[0]['layout']}"
    )


def log_to_tensorboard(folder: Path, curve: list[dict[str, float]]) -> None:
    """The training curve of a finalist, by tokens."""
    with SummaryWriter(str(folder)) as writer:
        for point in curve:
            for name in ("total", "ce", "logits", "emb"):
                writer.add_scalar(f"loss/{name}", point[name], int(point["tokens"]))


def finalist_folder(run_folder: Path, layout: Layout) -> Path:
    """Where a finalist's training and its ``student`` lie."""
    return run_folder / "finalists" / str(layout)


def _dashboard_url() -> str:
    return ray._private.worker.global_worker.node.webui_url or "off"  # type: ignore[attr-defined]


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(prog="python -m mamtra_ray.search", description=__doc__.splitlines()[0])
    add_common_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run, also with other settings")
    parser.add_argument("--address", help="Ray cluster (default: $RAY_ADDRESS, else a new local one)")
    parser.add_argument("--explain", action="store_true", help="print every key of a search-space file and stop")
    options = parser.parse_args(arguments)
    if options.explain:
        print(explain())
        return 0
    config, folder = config_from_arguments(options)
    if options.resume and options.space is None and (folder / "config.yaml").exists():
        config = load_config(folder / "config.yaml", options.overrides)
    check_run_folder(config, folder, options.resume)
    if options.dry_run:
        print_plan(config, folder)
        return 0
    try:
        search(config, folder, options.address)
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: python -m mamtra_ray.search --resume --run {folder}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
