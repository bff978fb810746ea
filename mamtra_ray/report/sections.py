"""The quality sections of the report: layouts, systems, CE against WER, audio.

Every function takes the runs and returns a :class:`Section`; one whose input no run holds says what would make it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from mamtra_ray.efficiency import cache_bytes, parameters, prefill_flops
from mamtra_ray.layouts import PATTERNS, Layout, from_strategy
from mamtra_ray.report import paper_results
from mamtra_ray.report.content import (
    AudioRow,
    Column,
    Figure,
    Row,
    Section,
    Table,
    as_rows,
    percent,
    percent_with_interval,
    scaled,
    with_interval,
)
from mamtra_ray.report.distilled import distilled_of, hearing_of
from mamtra_ray.report.figures import ce_against_wer
from mamtra_ray.report.naming import finalist_names, placement, student_names
from mamtra_ray.run.distilled import BESIDE_A_FINALIST
from mamtra_ray.run.folder import Run
from mamtra_ray.run.names import AUDIO, CODEC, TEACHER
from mamtra_ray.surrogate.correlations import Correlation, pearson, spearman

AUDIO_LIMIT_BYTES = 20_000_000
"""Sound embedded in one page; what goes beyond it stays in the run folder."""

LAYOUT = Column("layout", "layout", is_layout=True)
WER = Column("wer", "WER %", percent_with_interval("wer"))
GAIN = Column("ce_gain", "CE gained", ".3f")
"""By how much training lowered the held-out CE; negative: it did harm."""


def layouts(runs: Sequence[Run]) -> Section:
    """Table 1: the paper's placements at the runs' ratios, and the layouts that were found."""
    rows: list[Row] = []
    names = {one.row.layout: one.name for one in map(distilled_of, reversed(runs)) if one}
    names |= {layout: name for run in reversed(runs) for layout, name in finalist_names(run).items()}
    depths_and_ratios = [
        (num_layers, ratio)
        for run in runs
        for num_layers in sorted({row.layout.num_layers for row in (*run.finalists, *run.trials, *run.probe)})
        for ratio in run.config.search.ratios
    ]
    for num_layers, ratio in dict.fromkeys(depths_and_ratios):
        for strategy in PATTERNS:
            layout = from_strategy(strategy, num_layers, ratio)
            name = names.get(layout, f"{placement(strategy)} {ratio}")
            rows.append({"ratio": ratio, "origin": name, "layout": str(layout)})
        if num_layers == 24 and ratio in ("1:5", "1:11"):
            kept = paper_results.ATTENTION_LAYERS_KEPT[ratio]
            letters = str(Layout.from_attention_layers(kept, 24))
            rows.append({"ratio": ratio, "origin": "wer (paper)", "layout": letters})
    placed = {row["layout"] for row in rows}
    for layout, name in names.items():
        if str(layout) not in placed:
            rows.append({"ratio": layout.ratio, "origin": name, "layout": str(layout)})
    columns = (Column("ratio", "ratio"), Column("origin", "placement"), LAYOUT)
    return Section(
        "layouts",
        "Layouts",
        ("Which layers keep attention (blue) and which got a Mamba mixer (orange), first layer on the left.",),
        tables=(Table("table_1_layouts", "Table 1: placements at the ratios of these runs", columns, rows),),
        missing=None if rows else "No layout yet: python -m mamtra_ray.search tries the first ones.",
    )


def systems(runs: Sequence[Run]) -> Section:
    """Table 3: recordings, codec, teacher, finalists and the student of ``distill``; and the paper's rows."""
    rows = [row for run in runs for row in (*_reference_rows(run), *_student_rows(run))]
    columns = [
        Column("system", "system"), Column("ratio", "ratio"), WER,
        Column("wer_difference", "WER - teacher (paired)", percent_with_interval("wer_difference")),
        Column("alarm", "alarm"), Column("cer", "CER %", percent("cer")), Column("ce", "CE", ".3f"), GAIN, LAYOUT,
        Column("speaker_similarity", "similarity", ".3f"), Column("utmos", "UTMOS", ".2f"),
        Column("dnsmos", "DNSMOS", ".2f"), Column("distillmos", "Distill-MOS", ".2f"),
        Column("parameters", "M parameters", scaled("parameters", 1e6)),
        Column("prefill_flops", "TFLOP", scaled("prefill_flops", 1e12, 3)),
        Column("cache_bytes", "cache MB", scaled("cache_bytes", 1e6)), Column("tokens", "tokens", ",d"),
    ]  # fmt: skip
    optional = ["wer_difference", "alarm", "speaker_similarity", "utmos", "dnsmos", "distillmos"]
    optional += [] if speaks(runs) else ["wer", "cer"]
    columns = [c for c in columns if c.key not in optional or any(row.get(c.key) is not None for row in rows)]
    if len(runs) > 1:
        columns.insert(0, Column("run", "run"))
    heard = max((hearing.sentences for hearing in map(hearing_of, runs) if hearing), default=0)
    text: tuple[str, ...] = (
        f"WER of generated speech on {heard} sentences, with its 95 % interval. What the codec costs is the floor of"
        " every system below it.",
        "TFLOP: a forward pass as the paper counts it (python -m mamtra_ray.efficiency); cache: float32; both for one"
        " sequence of the runs' context length.",
    )
    if any(map(distilled_of, runs)):
        text += ("distilled: the student of python -m mamtra_ray.distill, with that verb's own number of tokens.",)
    if not speaks(runs):
        text = text[1:]
    elif not heard:
        text = ("No speech was generated in these runs (evaluate.sentences=0), so there is no WER.", *text[2:])
    own = Table("table_3_systems", "Table 3: these runs", tuple(columns), rows)
    return Section(
        "systems",
        "Quality and efficiency",
        text,
        tables=(own, _paper_table_3()) if speaks(runs) else (own,),
        missing=None if rows else "No finalist yet: python -m mamtra_ray.search distills the best layouts.",
    )


def speaks(runs: Sequence[Run]) -> bool:
    """Whether any of the runs is of a model of speech; what the paper measured of speech stands only beside these."""
    return any(run.config.teacher.speaks for run in runs)


def _reference_rows(run: Run) -> list[Row]:
    """Recordings, codec and teacher, as far as they were heard; the teacher's costs in closed form."""
    hearing = hearing_of(run)
    if hearing is None:
        return []
    rows: list[Row] = []
    for name in (CODEC, TEACHER):
        score = hearing.references.get(name)
        rows.append({"run": run.name, "system": name, **(score.columns() if score else {})})
    teacher = rows[-1]
    if run.reference is not None:
        teacher["ce"], teacher["alarm"] = run.reference.teacher_ce, run.reference.teacher_alarm
    if run.architecture is not None:
        layout, length = Layout.all_attention(run.architecture.num_layers), run.config.context_length
        teacher["ratio"], teacher["layout"] = layout.ratio, str(layout)
        teacher["parameters"] = parameters(run.architecture, layout)
        teacher["cache_bytes"] = cache_bytes(run.architecture, layout, length)
        teacher |= _prefill_flops(run, teacher)
    return [row for row in rows if len(row) > 2]


def _student_rows(run: Run) -> list[Row]:
    """Finalists, then the student of ``distill``."""
    named = [(finalist_names(run)[row.layout], row) for row in run.finalists]
    if (distilled := distilled_of(run)) is not None:
        named.append((distilled.name, distilled.row))
    rows = []
    for (name, student), row in zip(named, as_rows(row for _, row in named), strict=True):
        gain = student.ce_start - student.ce
        rows.append({"run": run.name, "system": name, **row, "ce_gain": gain, **_prefill_flops(run, row)})
    return rows


def _prefill_flops(run: Run, row: Row) -> Row:
    if run.architecture is None:
        return {}
    return {"prefill_flops": prefill_flops(run.architecture, Layout(row["layout"]), run.config.context_length)}


def ce_and_wer(runs: Sequence[Run]) -> Section:
    """Fig. 4: is the cheap score, CE, a good stand-in for WER? Pooled and inside every ratio."""
    rows = [
        {"run": run.name, "strategy": placement(row["origin"]), **{key: row.get(key) for key in _POINT}}
        for run in runs
        for row in as_rows(run.finalists)
        if row["wer"] is not None
    ]
    paper = paper_results.figure_4_points()
    teacher = next(
        ((r.reference.teacher_ce, r.reference.teacher.wer.value) for r in runs if r.reference and r.reference.teacher),
        None,
    )
    paper_figure = Figure(
        "figure_4_paper",
        "Fig. 4 of the paper: 32 configurations of CosyVoice 2 after 15 epochs, Seed-TTS-eval.",
        "Scatter plot: configurations with a cross-entropy under about 4.0 have a WER under 60 percent.",
        ce_against_wer(paper, None),
        paper,
        size=(4.9, 4.1),
    )
    if not rows:
        missing = "Needs finalists with a WER: python -m mamtra_ray.search with evaluate.sentences above 0."
        return Section("ce_and_wer", "CE against WER", figures=(paper_figure,), missing=missing)
    correlations = [
        *_correlations("these runs", rows),
        *_correlations("paper, Fig. 4", paper),
    ]
    columns = (
        Column("points", "points"), Column("scope", "ratio"), Column("n", "n", "d"),
        Column("pearson", "Pearson [95 %]", with_interval("pearson")),
        Column("spearman", "Spearman [95 %]", with_interval("spearman")),
    )  # fmt: skip
    figure = Figure(
        "figure_4_ce_against_wer",
        "Fig. 4 of these runs: held-out cross-entropy against WER of generated speech; lines are 95 % intervals.",
        "Scatter plot of the finalists; the correlations are in the table below.",
        ce_against_wer(rows, teacher),
        rows,
        size=(4.9, 4.1),
    )
    return Section(
        "ce_and_wer",
        "CE against WER",
        (
            "A search can only be as good as the score it follows. Pooled over ratios a correlation mostly says that"
            " more attention is better; what a search at one ratio needs is the correlation inside that ratio.",
            "Intervals by Fisher's z. Under four points, or with a constant score, there is none.",
        ),
        tables=(Table("figure_4_correlations", "Correlation of CE with WER", columns, correlations),),
        figures=(figure, paper_figure),
    )


def audio(runs: Sequence[Run]) -> Section:
    """Teacher and students to listen to, utterance by utterance over all runs, as far as the page may grow."""
    texts = {utterance_id: text for run in reversed(runs) for utterance_id, text in run.audio.texts.items()}
    rows: list[AudioRow] = []
    left_out, embedded = 0, 0
    for utterance_id, text in texts.items():
        clips = _clips_of(utterance_id, runs)
        size = sum(file.stat().st_size for _, file, _ in clips)
        if embedded + size > AUDIO_LIMIT_BYTES:
            left_out += 1
        else:
            embedded += size
            rows.append(AudioRow(text, clips))
    note = (f"{left_out} more utterances are in the audio folder; the page would grow too large.",) if left_out else ()
    missing = None if rows else "No audio: python -m mamtra_ray.search with evaluate.audio_examples above 0 keeps some."
    return Section("audio", "Listen", note, audio=tuple(rows), missing=missing)


def _clips_of(utterance_id: str, runs: Sequence[Run]) -> list[tuple[str, Path, str | None]]:
    """(label, file, hypothesis) in each run's order; what students are compared with is taken from the first run."""
    clips: dict[str, tuple[str, Path, str | None]] = {}
    for run in runs:
        students = student_names(run)
        in_run = f" ({run.name})" if len(runs) > 1 else ""
        for system in run.audio.systems:
            label = system if system in (CODEC, TEACHER) else _label(system, students) + in_run
            for clip in run.audio.clips:
                if clip.system == system and clip.utterance_id == utterance_id:
                    clips.setdefault(label, (label.strip(), run.path / AUDIO / clip.file, clip.hypothesis))
    return list(clips.values())


def _label(system: str, students: Mapping[str, str]) -> str:
    """A student by name and layout."""
    return f"{students.get(system, '')} {system.removeprefix(BESIDE_A_FINALIST)}"


_POINT = ("ratio", "ce", "wer", "wer_low", "wer_high")


def _correlations(points: str, rows: Sequence[Row]) -> list[Row]:
    scopes = [("all pooled", list(rows))]
    scopes += [
        (ratio, [row for row in rows if row["ratio"] == ratio]) for ratio in dict.fromkeys(r["ratio"] for r in rows)
    ]
    table = []
    for scope, chosen in scopes:
        x, y = [row["ce"] for row in chosen], [row["wer"] for row in chosen]
        row = {"points": points, "scope": scope, "n": len(chosen)}
        table.append(
            row | correlation_columns("pearson", pearson(x, y)) | correlation_columns("spearman", spearman(x, y))
        )
    return table


def correlation_columns(name: str, correlation: Correlation) -> Row:
    """``name``, ``name_low`` and ``name_high`` of a row."""
    return {name: correlation.value, f"{name}_low": correlation.low, f"{name}_high": correlation.high}


def _paper_table_3() -> Table:
    rows = []
    for row in paper_results.TABLE_3:
        content = asdict(row)
        for key in ("seed_wer", "libritts_wer"):
            content[key] /= 100
        rows.append(content)
    columns = (
        Column("model", "model"), Column("ratio", "ratio"), Column("strategy", "placement"),
        Column("tflop", "TFLOP", ".2f"),
        Column("nmos", "NMOS ± 95 %", lambda row: f"{row['nmos']:.2f} ± {row['nmos_half_width']:.2f}"),
        Column("seed_wer", "WER % Seed", percent("seed_wer")), Column("seed_similarity", "SSIM Seed", ".2f"),
        Column("seed_utmos", "UTMOS Seed", ".2f"), Column("libritts_wer", "WER % LibriTTS", percent("libritts_wer")),
        Column("libritts_similarity", "SSIM LibriTTS", ".2f"), Column("libritts_utmos", "UTMOS LibriTTS", ".2f"),
    )  # fmt: skip
    return Table("table_3_paper", "Table 3 of the paper (CosyVoice 2 as teacher)", columns, rows, folded=True)
