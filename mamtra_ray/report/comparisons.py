"""The sections that compare runs which differ in one thing: convergence by initialization, loss ablation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict

from mamtra_ray.artifacts import content_hash
from mamtra_ray.layouts import Layout
from mamtra_ray.listening_test.opinion_scores import OpinionScore
from mamtra_ray.report import paper_results
from mamtra_ray.report.content import Column, Figure, Row, Section, Table, as_rows, percent, percent_with_interval
from mamtra_ray.report.figures import convergence
from mamtra_ray.report.sections import speaks
from mamtra_ray.run.folder import Run
from mamtra_ray.run.rows import FINALIST_CURVE, CurvePoint


def convergence_by_initialization(runs: Sequence[Run]) -> Section:
    """Fig. 6: the training curves of one layout under several initializations, of runs that train alike."""
    comparable: dict[tuple[str, Layout], dict[str, Run]] = defaultdict(dict)
    for run in runs:
        for layout in {row.layout for row in run.curves}:
            sections = (run.config.teacher, run.config.corpus, run.config.distill)
            trained_alike = content_hash([section.model_dump() for section in sections])
            comparable[trained_alike, layout].setdefault(run.config.student.initialization, run)
    chosen = max(comparable, key=lambda key: (len(comparable[key]), key), default=None)
    compared: dict[str, Run] = comparable[chosen] if chosen else {}
    shared = chosen[1] if chosen else None
    rows = [
        {"series": initialization, "layout": str(shared), "tokens": row.tokens, "ce": row.ce}
        for initialization, run in compared.items()
        for row in (_longest_curve(run, shared) if shared else ())
    ]
    if len(compared) < 2:
        known = f" (these runs: {', '.join(compared)})" if compared else ""
        missing = (
            f"Needs runs that share a layout and differ in the initialization{known}: repeat the search with"
            " student.initialization=xavier, kaiming, transfer or aligned and another --run, and give them all to"
            " the report."
        )
        return Section("convergence", "Convergence by initialization", missing=missing)
    figure = Figure(
        "figure_6_convergence",
        f"Fig. 6: cross-entropy on the training batches of {shared} by initialization of the Mamba mixers.",
        "Line plot, one line per initialization: " + ", ".join(compared) + ".",
        convergence(rows, "training CE (nats per token)"),
        rows,
    )
    return Section("convergence", "Convergence by initialization", figures=(figure,))


def _longest_curve(run: Run, layout: Layout) -> list[CurvePoint]:
    """The curve of the layout as a finalist, which starts anew; of its trial if it was none."""
    points = [row for row in run.curves if row.layout == layout]
    return [row for row in points if row.trial_id == FINALIST_CURVE] or points


def naturalness(scores: Sequence[OpinionScore]) -> Section:
    """The NMOS column of Table 3, from a listening test over these runs."""
    if not scores:
        missing = (
            "No listening test: python -m mamtra_ray.listening_test make writes a page for listeners, its score verb"
            " reads what they send back, and --listening-test DIR brings it here."
        )
        return Section("naturalness", "Naturalness", missing=missing)
    rows = [asdict(score) for score in scores]
    columns = (
        Column("system", "system"), Column("mean", "NMOS ± 95 %", _plus_minus("mean", "half_width")),
        Column("difference", f"minus {scores[0].system}", _plus_minus("difference", "difference_half_width")),
        *(Column(key, key, "d") for key in ("listeners", "utterances", "ratings")),
    )  # fmt: skip
    text = (
        "Mean opinion scores from 1 to 5; intervals by the two-way variance of CrowdMOS, which respects that ratings"
        " of one listener, and of one utterance, resemble each other. Differences are paired.",
    )
    table = Table("table_3_naturalness", "NMOS of the listening test", columns, rows)
    return Section("naturalness", "Naturalness", text, tables=(table,))


def _plus_minus(key: str, half_width: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.2f}" + ("" if row[half_width] is None else f" ± {row[half_width]:.2f}")


def loss_ablation(runs: Sequence[Run]) -> Section:
    """Table 4: runs that leave out parts of the loss, at one layout and initialization."""
    comparable: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for run in runs:
        for row in as_rows(run.finalists):
            named = {"run": run.name, "components": _loss_components(run)}
            comparable[run.config.student.initialization, row["layout"]].setdefault(
                named["components"], {**named, **row}
            )
    chosen = max(comparable, key=lambda key: (len(comparable[key]), key), default=None)
    rows = list(comparable[chosen].values()) if chosen else []
    paper = (_paper_table_4(),) if speaks(runs) else ()
    if len(rows) < 2:
        missing = (
            "Needs runs that share a finalist and differ in the loss: repeat the search with distill.ce_weight=0,"
            " distill.kl_weight=0 and distill.hidden_weight=0 and another --run each, and give them all to"
            " the report."
        )
        return Section("loss_ablation", "Loss ablation", tables=paper, missing=missing)
    columns = [Column("components", "loss"), Column("run", "run"), Column("ce", "CE", ".3f"), Column("kl", "KL", ".3f")]
    if speaks(runs):
        columns += [Column("wer", "WER %", percent_with_interval("wer")), Column("cer", "CER %", percent("cer"))]
    caption = f"Table 4 of these runs: layout {rows[0]['layout']}, mixers {chosen[0] if chosen else ''}"
    table = Table("table_4_loss_ablation", caption, tuple(columns), rows)
    return Section("loss_ablation", "Loss ablation", tables=(table, *paper))


def _loss_components(run: Run) -> str:
    distill = run.config.distill
    weights = {"ce": distill.ce_weight, "kl": distill.kl_weight, "hidden": distill.hidden_weight}
    absent = [name for name, weight in weights.items() if weight == 0]
    return f"without {', '.join(absent)}" if absent else "all"


def _paper_table_4() -> Table:
    rows = [
        {"components": name, "wer": wer / 100, "cer": cer / 100, "speaker_similarity": similarity, "utmos": utmos}
        for name, wer, cer, similarity, utmos in paper_results.TABLE_4
    ]
    columns = (
        Column("components", "loss"), Column("wer", "WER %", percent("wer")), Column("cer", "CER %", percent("cer")),
        Column("speaker_similarity", "SSIM", ".2f"), Column("utmos", "UTMOS", ".2f"),
    )  # fmt: skip
    return Table("table_4_paper", "Table 4 of the paper: MamTra 1:1 after 15 epochs", columns, rows, folded=True)
