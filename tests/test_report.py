"""The report of made-up runs: what is in the page, in the files, and what is said when input is missing."""

import csv
import dataclasses
import html.parser
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import needs_chromium, told_by
from made_run import finalist_row, made_run, quality, write_audio
from scipy import stats

from mamtra_ray.artifacts import write_checked_json
from mamtra_ray.config import load_config, save_config
from mamtra_ray.efficiency import ARCHITECTURES
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.results import scored, write_rows, write_summary
from mamtra_ray.evaluate.run_scores import update_distilled
from mamtra_ray.layouts import Layout
from mamtra_ray.listening_test.opinion_scores import OpinionScore, read_scores, write_scores
from mamtra_ray.report import paper_results
from mamtra_ray.report.__main__ import main
from mamtra_ray.report.lengths import length_bounds
from mamtra_ray.report.naming import finalist_names
from mamtra_ray.report.report import build_report, write_report
from mamtra_ray.report.search import pareto_front, rank_agreement
from mamtra_ray.report.summary import summary
from mamtra_ray.run.distilled import write_distilled
from mamtra_ray.run.folder import read_architecture, read_run, read_runs, write_reference
from mamtra_ray.run.names import AUDIO_INDEX, CURVES, EXPORTED_LAYOUT, FINALISTS, PROBE, REFERENCE, TRIALS
from mamtra_ray.run.rows import FinalistRow, TrialRow, columns, read_table, write_table
from mamtra_ray.speech.end_of_speech import EndOfSpeech
from mamtra_ray.speech.error_rate import ErrorRate
from mamtra_ray.surrogate.correlations import pearson, spearman


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """One plain run, one with another initialization, one without a part of the loss."""
    base = tmp_path_factory.mktemp("runs")
    return [
        made_run(base / "plain"),
        made_run(base / "xavier", ("student.initialization=xavier",), penalty=0.1, seed=1),
        made_run(base / "no_ce", ("distill.ce_weight=0",), penalty=0.2, seed=2),
    ]


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    return write_report(runs, tmp_path_factory.mktemp("out"))


class _Page(html.parser.HTMLParser):
    """Collects addresses, text and the nesting of tags."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses, self.text, self.open, self.audio = [], [], [], 0

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "source", "link", "br"):
            self.open.append(tag)
        self.audio += tag == "audio"
        self.addresses += [value for name, value in attributes if name in ("src", "href", "srcset")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_needs_no_network(page):
    parsed = _Page()
    parsed.feed(page.read_text())
    assert parsed.open == []
    assert parsed.addresses and all(address.startswith(("data:", "#")) for address in parsed.addresses)
    # Two utterances: codec and teacher once, one student of each of the three runs.
    assert parsed.audio == 2 * (2 + 3)
    text = " ".join(parsed.text)
    for wanted in ("Table 1", "Table 2", "Table 3", "Table 4", "Fig. 3", "Fig. 4", "Fig. 5", "Fig. 6"):
        assert wanted in text
    # A text of the corpus is shown as it is and is no markup.
    assert 'seven green <cats> & "one" owl' in text
    assert "<cats>" not in page.read_text()


def test_every_table_and_figure_is_also_a_file(page):
    written = {path.name for path in page.with_suffix("").iterdir()}
    for figure in (
        "search_progress",
        "search_front",
        "figure_3_memory",
        "figure_4_ce_against_wer",
        "figure_5_cache_growth",
        "figure_6_convergence",
    ):
        assert {f"{figure}.png", f"{figure}.csv"} <= written
    rows = list(csv.DictReader((page.with_suffix("") / "table_3_systems.csv").open()))
    students = [row for row in rows if row["ratio"] not in ("", "1:0")]
    assert len(students) == 27
    for row in students[:9]:
        assert float(row["ce"]) == quality(Layout(row["layout"]))
    teacher = next(row for row in rows if row["system"] == "teacher")
    assert float(teacher["wer"]) == 0.06 and float(teacher["ce"]) == 1.02
    assert float(teacher["utmos"]) == 4.1
    assert float(teacher["cache_bytes"]) == 12 * 2 * 2 * 32 * 2048 * 4
    # The paper's accounting: two FLOPs a weight of the projections and the MLP, and the full attention square.
    weights = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 336
    assert float(teacher["prefill_flops"]) == 12 * (2 * 2048 * weights + 4 * 2048**2 * 128)


def test_correlations_pooled_and_inside_ratios(runs):
    report = build_report([read_run(runs[0])])
    [section] = [section for section in report.sections if section.slug == "ce_and_wer"]
    rows = {(row["points"], row["scope"]): row for row in section.tables[0].rows}
    finalists = read_run(runs[0]).finalists
    for ratio in ("1:1", "1:3"):
        chosen = [row for row in finalists if row.layout.ratio == ratio]
        own = stats.spearmanr([row.ce for row in chosen], [row.wer.value for row in chosen]).statistic
        assert rows["these runs", ratio]["spearman"] == pytest.approx(own)
    # What was computed from the published figure.
    assert rows["paper, Fig. 4", "all pooled"]["pearson"] == pytest.approx(0.930, abs=5e-4)
    assert rows["paper, Fig. 4", "all pooled"]["spearman"] == pytest.approx(0.962, abs=5e-4)
    usable = [row for row in paper_results.figure_4_points() if row["wer"] < 0.6]
    assert pearson([p["ce"] for p in usable], [p["wer"] for p in usable]).value == pytest.approx(0.904, abs=5e-4)


def test_intervals_of_correlations_cover():
    """With a known correlation, about 95 % of the intervals hold it."""
    randomness = np.random.default_rng(0)
    covered = {pearson: 0, spearman: 0}
    true = {pearson: 0.7, spearman: 6 / np.pi * np.arcsin(0.35)}
    for _ in range(400):
        x, noise = randomness.normal(size=(2, 25))
        y = 0.7 * x + np.sqrt(1 - 0.49) * noise
        for coefficient in covered:
            result = coefficient(list(x), list(y))
            covered[coefficient] += result.low <= true[coefficient] <= result.high
    assert all(0.92 <= count / 400 <= 0.98 for count in covered.values())
    assert pearson([1.0, 2.0, 3.0], [1.0, 2.0, 4.0]).value is None
    assert spearman([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0]).value is None


def test_the_front_is_what_nothing_beats():
    def row(ce, cost, rung=1):
        return {"ce": ce, "cost": cost, "rung": rung}

    rows = [row(1.0, 9), row(1.2, 5), row(1.1, 9), row(1.2, 5), row(0.5, 1, rung=0), row(1.3, 6)]
    assert [r["on_front"] for r in pareto_front(rows, "cost")] == [True, True, False, True, False, False]


def test_rank_agreement_stays_inside_ratios(runs):
    run = read_run(runs[0])

    # Within each ratio the first rung reverses the probe's order; pooled, the two would agree.
    def reversed_ce(layout: Layout) -> float:
        return (10 if layout.ratio == "1:3" else 0) - quality(layout)

    run = dataclasses.replace(run, trials=[dataclasses.replace(t, ce=reversed_ce(t.layout)) for t in run.trials])
    rows = [row for row in rank_agreement(run) if row["scores"] == "probe and rung 0"]
    assert {row["ratio"] for row in rows} == {"1:1", "1:3"}
    for row in rows:
        assert row["spearman"] == pytest.approx(-1) and row["remark"].startswith("low")


def test_comparisons_need_runs_that_differ_in_one_thing(runs, tmp_path):
    def section(of, slug):
        return next(s for s in build_report([read_run(path) for path in of]).sections if s.slug == slug)

    assert "student.initialization=xavier" in section(runs[:1], "convergence").missing
    assert "distill.ce_weight=0" in section(runs[:1], "loss_ablation").missing
    # The run without CE differs in the loss, so it is no third initialization, and the reverse.
    assert {row["series"] for row in section(runs, "convergence").figures[0].rows} == {"aligned", "xavier"}
    # Nor is one that trains for another number of tokens, even if it comes first.
    shorter = Path(shutil.copytree(runs[0], tmp_path / "shorter"))
    config = read_run(shorter).config
    less = config.model_copy(update={"distill": config.distill.model_copy(update={"tokens": 17})})
    save_config(less, shorter / "config.yaml")
    assert "differ in the initialization" in section([shorter, runs[1]], "convergence").missing
    assert {row["series"] for row in section([shorter, *runs], "convergence").figures[0].rows} == {"aligned", "xavier"}
    ablation = section(runs, "loss_ablation").tables[0].rows
    assert [(row["run"], row["components"]) for row in ablation] == [("plain", "all"), ("no_ce", "without ce")]


def test_a_run_that_has_only_begun(runs, tmp_path, capsys):
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(runs[0] / "config.yaml", begun)
    page = write_report([begun], tmp_path / "page.html")
    assert page == tmp_path / "page.html"
    text = page.read_text()
    assert text.count('class="missing"') >= 7
    assert "python -m mamtra_ray.search" in text
    assert main(["--run", str(begun), "--dry-run"]) == 0
    assert "No trial yet" in capsys.readouterr().out


def test_runs_of_one_name_and_of_another_depth(tmp_path, capsys):
    """Two folders called alike stay apart; a ratio of one teacher's run need not fit the layers of the other's."""
    folders = [made_run(tmp_path / "a" / "demo"), made_run(tmp_path / "b" / "demo", seed=1)]
    tables = {table.slug: table for s in build_report(read_runs(folders)).sections for table in s.tables}
    assert {row["run"] for row in tables["table_3_systems"].rows} == {"a/demo", "b/demo"}
    sections = {section.slug: section for section in build_report(read_runs(folders)).sections}
    assert [len(row.clips) for row in sections["audio"].audio] == [4, 4]
    assert main(["--run", str(folders[0]), "--run", str(folders[0])]) == 2
    assert "given twice" in capsys.readouterr().err

    shallow = made_run(tmp_path / "shallow", ("search.ratios=1:3",))
    rows = [
        dataclasses.replace(row, layout=Layout(layout))
        for row in read_table(shallow / TRIALS, TrialRow)
        for layout in [str(row.layout)[:8]]
    ]
    write_table(shallow / TRIALS, rows, TrialRow)
    for table in (FINALISTS, PROBE, CURVES):
        (shallow / table).unlink()
    # 1:11 fits the twelve layers of one and not the eight of the other.
    deep = made_run(tmp_path / "deep", ("search.ratios=1:11",))
    table = {t.slug: t for s in build_report(read_runs([deep, shallow])).sections for t in s.tables}["table_1_layouts"]
    assert {(len(row["layout"]), row["ratio"]) for row in table.rows[:12]} == {(12, "1:11"), (8, "1:3")}


def test_an_output_that_is_a_file_gets_one_sentence(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--run", str(runs[0]), "--output", str(tmp_path / "file")]) == 2
    assert "no report can be written to" in capsys.readouterr().err


def test_what_is_no_run_gets_one_sentence(runs, tmp_path, capsys):
    def refused(folder: Path) -> str:
        assert main(["--run", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "does not exist" in refused(tmp_path / "nothing")
    assert "no run folder" in refused(tmp_path)

    broken = tmp_path / "broken"
    shutil.copytree(runs[0], broken)
    (broken / TRIALS).write_bytes(b"not parquet")
    assert TRIALS in refused(broken)
    shutil.copy(runs[0] / FINALISTS, broken / TRIALS)
    assert "lacks the columns trial_id" in refused(broken)
    shutil.copy(runs[0] / TRIALS, broken / TRIALS)
    (broken / REFERENCE).write_text('{"kind": "reference", "schema_version": 99}')
    assert "schema version 99" in refused(broken)
    shutil.copy(runs[0] / REFERENCE, broken / REFERENCE)
    index = broken / AUDIO_INDEX
    content = json.loads(index.read_text())
    content["clips"][0]["file"] = "../config.yaml"
    write_checked_json(index, content)
    assert "is not in" in refused(broken)


def test_what_the_report_did_not_write_stays(runs, tmp_path, capsys):
    def reported(output: Path, *arguments: str) -> int:
        return main(["--run", str(runs[0]), "--output", str(output), *arguments])

    for mine in ("report.html", "report/table_3_systems.csv"):
        folder = tmp_path / f"of {Path(mine).stem}"
        (folder / mine).parent.mkdir(parents=True)
        (folder / mine).write_text("mine")
        before = sorted(folder.rglob("*"))
        for arguments in (["--dry-run"], []):
            assert reported(folder, *arguments) == 2
            assert f"{mine} would be overwritten" in capsys.readouterr().err
        assert (folder / mine).read_text() == "mine" and sorted(folder.rglob("*")) == before
    ours = tmp_path / "ours"
    assert reported(ours) == 0 and reported(ours) == 0, "its own report is replaced"
    (ours / "report" / "notes.txt").write_text("mine")
    assert reported(ours) == 0 and (ours / "report" / "notes.txt").read_text() == "mine"
    page = ours / "report.html"
    page.write_text(page.read_text() + "<!-- my remark -->")
    assert reported(ours) == 2 and "my remark" in page.read_text()


def test_alarms_stand_above_everything_and_in_the_table(runs, tmp_path):
    alarmed = Path(shutil.copytree(runs[0], tmp_path / "alarmed"))
    run = read_run(alarmed)
    rows = [dataclasses.replace(row, ends=EndOfSpeech(0.35, 0.0, 0.0), alarm=None) for row in run.finalists]
    rows[0] = dataclasses.replace(rows[0], alarm="does not stop by itself in <35> % of the sentences")
    rows[3] = dataclasses.replace(rows[3], alarm="stops at once")
    write_table(alarmed / FINALISTS, rows, FinalistRow)
    write_reference(alarmed, dataclasses.replace(run.reference, teacher_alarm="has a WER of 90.0 %"))
    again = read_run(alarmed)
    assert again.finalists == rows and again.reference.teacher_alarm == "has a WER of 90.0 %"

    text = write_report([alarmed], tmp_path / "page.html").read_text()
    block = text[text.index('class="alarms"') : text.index('class="facts"')]
    exported = run.best_layout
    assert rows[0].layout == exported
    for sentence in (  # which one it is, and what it is called elsewhere
        f"<li>{exported} (block beginning 1:1, exported) does not stop by itself in &lt;35&gt; % of the "
        "sentences.</li>",
        f"<li>{rows[3].layout} (block beginning 1:3) stops at once.</li>",
        "<li>the teacher has a WER of 90.0 %.</li>",
    ):
        assert sentence in block
    table = list(csv.DictReader((tmp_path / "page" / "table_3_systems.csv").open()))
    assert [row["alarm"] for row in table if row["alarm"]] == [
        "has a WER of 90.0 %", rows[0].alarm, "stops at once"
    ]  # fmt: skip
    # Of several runs it is said which one; a run of an earlier version has no alarm to show.
    both = build_report(read_runs([alarmed, runs[1]]))
    assert len(both.alarms) == 3 and all(alarm.startswith("alarmed: ") for alarm in both.alarms)
    assert 'class="alarms"' not in write_report([runs[0]], tmp_path / "old.html").read_text()


def test_a_column_of_alarms_is_text_even_without_any(runs, tmp_path):
    rows = read_run(runs[0]).finalists
    assert {row.alarm for row in rows} == {None}
    write_table(tmp_path / "t.parquet", rows, FinalistRow)
    assert pq.read_schema(tmp_path / "t.parquet").field("alarm").type == pa.string()


def test_a_listening_test_gives_the_nmos_column(runs, tmp_path):
    scores = [OpinionScore("teacher", 3.7, 0.16, 15, 50, 750), OpinionScore("AM", 3.6, 0.17, 15, 50, 750, -0.1, 0.05)]
    write_scores(tmp_path, "0123", scores)
    report = build_report([read_run(runs[0])], read_scores(tmp_path))
    [table] = next(section for section in report.sections if section.slug == "naturalness").tables
    shown = [[column.text(row) for column in table.columns[:3]] for row in table.rows]
    assert shown == [["teacher", "3.70 ± 0.16", "–"], ["AM", "3.60 ± 0.17", "-0.10 ± 0.05"]]


def test_a_table_keeps_every_column_of_every_row(runs, tmp_path):
    first, second = read_run(runs[0]).finalists[:2]
    rows = [dataclasses.replace(first, wer=None, metrics={}), dataclasses.replace(second, metrics={"later": 0.5})]
    write_table(tmp_path / "t.parquet", rows, FinalistRow)
    assert read_table(tmp_path / "t.parquet", FinalistRow) == rows
    written = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert written == [{**columns(rows[0]), "later": None}, columns(rows[1])]
    write_table(tmp_path / "t.parquet", [], FinalistRow)
    assert read_table(tmp_path / "t.parquet", FinalistRow) == []
    assert set(pq.read_schema(tmp_path / "t.parquet").names) == set(columns(rows[0]))
    with pytest.raises(TypeError, match="'layout'"):  # a row that lacks a column cannot be made
        FinalistRow(**{part.name: getattr(first, part.name) for part in dataclasses.fields(first)[1:]})
    pq.write_table(pq.read_table(runs[0] / FINALISTS).drop_columns(["kl"]), tmp_path / "t.parquet")
    with pytest.raises(InputError, match="lacks the column kl"):
        read_table(tmp_path / "t.parquet", FinalistRow)


def test_the_architecture_survives_the_file(runs):
    assert read_architecture(runs[0]) == ARCHITECTURES["demo"]
    with pytest.raises(InputError, match="at least one run"):
        build_report([])


def test_a_finalist_has_one_name_everywhere(runs, tmp_path):
    run = read_run(runs[0])
    names = finalist_names(run)
    found = {str(row.layout): row.origin for row in run.finalists if row.origin in ("probe", "optuna")}
    assert len(found) == 3
    assert [name for layout, name in names.items() if str(layout) in found] == [
        "found 1:1 no. 1", "found 1:3", "found 1:1 no. 2"
    ]  # fmt: skip
    exported = names[run.best_layout]
    assert exported == "block beginning 1:1, exported" and sum("exported" in name for name in names.values()) == 1
    # The best of another ratio lies beside best/.
    other = Layout("AMMMMAMMMMAM")
    copy = Path(shutil.copytree(runs[0], tmp_path / "copy"))
    content = {"kind": "layout", "schema_version": 1, "layout": str(other)}
    write_checked_json(copy / "best-1-3" / EXPORTED_LAYOUT, content)
    assert finalist_names(read_run(copy))[other] == "found 1:3, exported"

    report = build_report([run])
    tables = {table.slug: table for section in report.sections for table in section.tables}
    of_systems = {row["layout"]: row["system"] for row in tables["table_3_systems"].rows if "origin" in row}
    assert of_systems == {str(layout): name for layout, name in names.items()}
    of_layouts = {row["layout"]: row["origin"] for row in tables["table_1_layouts"].rows}
    assert all(of_layouts[layout] == name for layout, name in of_systems.items())
    of_trials = {row["layout"]: row["finalist"] for row in tables["trials"].rows}
    assert all(of_trials[layout] == name for layout, name in of_systems.items())
    assert report.facts[0] == ("best layout", str(run.best_layout), exported)
    clips = next(section for section in report.sections if section.slug == "audio").audio[0].clips
    assert [label for label, *_ in clips] == ["codec", "teacher", f"{exported} {run.best_layout}"]
    page = write_report([runs[0]], tmp_path / "page.html").read_text()
    assert f'<code class="letters">{run.best_layout}</code>' in page, "a layout can be copied"


def test_the_first_paragraphs_say_what_was_found_whether_it_is_good_and_what_to_do(runs, tmp_path):
    run = read_run(runs[0])
    text = " ".join(build_report([run]).summary)
    assert text.startswith("Of 9 layouts tried, 9 were distilled to the end.")
    for name in ("block beginning 1:1, exported", "1:3"):
        assert name in text
    assert "as good as the teacher's" in text or "worse than the teacher's" in text
    assert "Next: listen to it below; then load" in text and str(run.path / "best") in text

    def said(finalists, **reference):
        changed = dataclasses.replace(run, finalists=finalists)
        if reference:
            changed = dataclasses.replace(changed, reference=dataclasses.replace(run.reference, **reference))
        return " ".join(summary([changed]))

    found = next(row for row in run.finalists if row.origin == "probe")
    paper = [row for row in run.finalists if row.layout.ratio == found.layout.ratio and row.origin not in ("probe",)]
    best = min(row.ce for row in paper)
    for ce, words in ((best - 0.5, "is below"), (best + 0.5, "is not below")):
        low = dataclasses.replace(found, ce=ce, wer=ErrorRate(0.0, 0.0, 0.0))
        text = said([low, *paper])
        assert f"its CE of {ce:.3f} {words} the {best:.3f} of the paper's best placement, " in text
    alarmed = [dataclasses.replace(row, alarm="stops at once") for row in run.finalists]
    assert "do not use" in said(alarmed) and "train longer (distill.tokens)" in said(alarmed)
    worse = [dataclasses.replace(row, wer_difference=ErrorRate(0.2, 0.1, 0.3)) for row in run.finalists]
    assert "worse than the teacher's" in said(worse) and "keep more attention" in said(worse)
    silent = [dataclasses.replace(row, wer=None) for row in run.finalists]
    assert "python -m mamtra_ray.evaluate" in said(silent, teacher=None, codec=None)
    assert "why the teacher itself" in said(run.finalists, teacher_alarm="has a WER of 90 %")
    assert "--resume" in said([])
    of_three = [text.split(": Of 9")[0] for text in build_report(read_runs(runs)).summary if ": Of 9" in text]
    assert of_three == ["plain", "xavier", "no_ce"]


def test_what_training_gained_is_in_the_tables(runs):
    run = read_run(runs[0])
    tables = {table.slug: table for section in build_report([run]).sections for table in section.tables}
    for row, shown in zip(sorted(run.trials, key=lambda row: (-row.rung, row.ce)), tables["trials"].rows, strict=True):
        assert shown["layout"] == str(row.layout) and shown["ce_gain"] == row.ce_start - row.ce
    assert any(column.key == "ce_gain" for column in tables["trials"].columns)
    gains = {row["layout"]: row["ce_gain"] for row in tables["table_3_systems"].rows if "ce_gain" in row}
    assert gains == {str(row.layout): row.ce_start - row.ce for row in run.finalists}


def test_one_ratio_has_a_front_too(runs):
    """All its layouts cost the same: the teacher is what they are compared with."""
    run = read_run(runs[0])
    one = dataclasses.replace(run, trials=[row for row in run.trials if row.layout.ratio == "1:1"])
    section = next(section for section in build_report([one]).sections if section.slug == "search")
    front = next(figure for figure in section.figures if figure.slug == "search_front").rows
    teacher = front[-1]
    assert (teacher["origin"], teacher["ratio"], teacher["ce"]) == ("teacher", "1:0", 1.02) and teacher["on_front"]
    assert teacher["cache_bytes"] > max(row["cache_bytes"] for row in front[:-1])
    last = [row for row in front[:-1] if row["rung"] == 1]
    assert [row["ce"] for row in front[:-1] if row["on_front"]] == [min(row["ce"] for row in last)]


def test_wer_by_length_is_counted_as_by_hand(runs, tmp_path):
    folder = Path(shutil.copytree(runs[0], tmp_path / "heard"))
    run = read_run(folder)
    student = str(run.best_layout)
    lengths = [2, 3, 3, 5, 6, 6, 9, 10, 12]
    for system, errors in (("teacher", [0] * 9), (student, [0, 0, 1, 1, 1, 2, 4, 5, 6])):
        rows = [
            {"utterance_id": str(n), "evaluation_hash": "h", "words": words, "word_errors": wrong}
            for n, (words, wrong) in enumerate(zip(lengths, errors, strict=True))
        ]
        # Of an earlier, longer evaluation.
        write_rows(
            folder, system, [*rows, {"utterance_id": "old", "evaluation_hash": "g", "words": 5, "word_errors": 5}]
        )
    write_reference(folder, dataclasses.replace(run.reference, evaluation_sentences=9))
    section = next(s for s in build_report([read_run(folder)]).sections if s.slug == "wer_by_length")
    [table] = section.tables
    titles = [column.title for column in table.columns]
    assert titles[1::2] == ["WER %, 2 to 3 words", "WER %, 5 to 6 words", "WER %, 9 to 12 words"]
    teacher, hybrid = table.rows
    assert hybrid["system"] == "block beginning 1:1, exported"
    assert [teacher[f"wer_{group}"] for group in range(3)] == [0, 0, 0]
    assert [hybrid[f"wer_{group}"] for group in range(3)] == [1 / 8, 4 / 17, 15 / 31]
    assert all(row[f"sentences_{group}"] == 3 for row in table.rows for group in range(3))
    assert all(hybrid[f"wer_{g}_low"] <= hybrid[f"wer_{g}"] <= hybrid[f"wer_{g}_high"] for g in range(3))
    unheard = build_report([read_run(runs[0])]).sections
    missing = next(section for section in unheard if section.slug == "wer_by_length").missing
    assert "evaluate.sentences" in missing


@pytest.mark.parametrize("seed", range(5))
def test_the_groups_of_lengths_hold_every_sentence_once(seed):
    randomness = np.random.default_rng(seed)
    lengths = sorted(randomness.integers(1, 20, 6 + 30 * seed).tolist())
    bounds = length_bounds(lengths)
    groups = [[n for n in lengths if low <= n <= high] for low, high in bounds]
    assert [n for group in groups for n in group] == lengths and all(groups)
    assert length_bounds([4] * 50) == [] and length_bounds([1, 2, 3, 4, 5]) == []


@needs_chromium
@pytest.mark.parametrize(("scheme", "background"), [("1", "rgb(255, 255, 255)"), ("0", "rgb(21, 27, 35)")])
def test_in_a_browser(page, tmp_path, scheme, background):
    """Tables sort, sounds play, pictures follow the scheme, and nothing is wider than a phone."""
    script = """
      const table = document.querySelector("#search table:has(tbody tr td[data-key='40000'])");
      const header = [...table.querySelectorAll("th")].find(th => th.textContent === "CE");
      const values = () => [...table.tBodies[0].rows].map(r => +r.cells[header.cellIndex].dataset.key);
      header.firstChild.click(); const up = values();
      const box = header.getBoundingClientRect();  // its very corner sorts too
      header.scrollIntoView(); header.click(); const down = values();
      const filled = header.firstChild.getBoundingClientRect().width / box.width;
      const pressed = getComputedStyle(header.firstChild, "::after").content;
      const played = [];
      for (const audio of document.querySelectorAll("audio")) {
        const ended = new Promise(done => audio.addEventListener("ended", done, {once: true}));
        await audio.play();
        await ended;
        played.push(audio.duration);
      }
      const phone = document.createElement("iframe");
      phone.style.cssText = "width: 360px; height: 700px; border: 0";
      phone.srcdoc = document.documentElement.outerHTML.replaceAll(/<script>[^]*?<\\/script>/g, "");
      document.body.append(phone);
      await new Promise(done => phone.addEventListener("load", done));
      const inside = phone.contentDocument, shown = inside.documentElement;
      const pictures = [...document.querySelectorAll("picture")].map(p =>
        p.querySelector("img").currentSrc === p.querySelector("source").srcset);
      const open = [...document.querySelectorAll(".scroll")].filter(r => !r.closest("details:not([open])"));
      const hints = open.map(region =>
        [region.scrollWidth > region.clientWidth, !region.previousElementSibling.hidden]);
      tell(JSON.stringify({up, down, filled, pressed, hints, played, pictures,
        overflow: shown.scrollWidth - shown.clientWidth,
        tables: inside.querySelectorAll("table").length, background: getComputedStyle(document.body).backgroundColor}));
    """
    told = json.loads(told_by(page, script, tmp_path, f"--blink-settings=preferredColorScheme={scheme}"))
    assert told["up"] == sorted(told["up"]) and told["down"] == told["up"][::-1] and len(told["up"]) == 3 * 14
    assert told["filled"] > 0.95 and "\u25bc" in told["pressed"]
    # Open tables: one that is cut off says so, and no other one.
    assert all(is_cut_off == is_said for is_cut_off, is_said in told["hints"]), told["hints"]
    assert [True, True] in told["hints"] and [False, False] in told["hints"]
    assert told["played"] == pytest.approx([0.1] * 10)
    assert told["background"] == background
    # The dark pictures are the <source> elements.
    assert set(told["pictures"]) == {scheme == "0"}
    assert told["overflow"] == 0 and told["tables"] > 5


def with_distilled(folder: Path, layout: str, **changes) -> Path:
    """The run with a student of ``distill``, as far as a report reads one."""
    (folder / "student").mkdir(parents=True)
    (folder / "student" / "config.json").write_text(json.dumps({"kind": "speech_lm", "model": {"layout": layout}}))
    write_distilled(folder, finalist_row(layout, origin="distill", **changes))
    return folder


def systems_of(folder: Path) -> dict[str, dict]:
    """Rows of Table 3 by system."""
    report = build_report([read_run(folder)])
    [section] = [section for section in report.sections if section.slug == "systems"]
    return {row["system"]: row for row in section.tables[0].rows}


def test_the_student_of_distill_stands_beside_the_finalists(tmp_path):
    heard = {"wer": ErrorRate(0.25, 0.2, 0.3), "cer": 0.125, "metrics": {"utmos": 3.5}}
    folder = with_distilled(made_run(tmp_path / "run"), "MMMAMMMMMMMA", ce=1.5, ce_start=2.5, **heard)
    write_audio(folder, ("teacher", "MMMAMMMMMMMA"))
    before, after = (systems_of(path) for path in (made_run(tmp_path / "plain"), folder))
    assert set(after) - set(before) == {"distilled 1:5"} and len(after) == len(before) + 1
    row = after["distilled 1:5"]
    assert (row["wer"], row["cer"], row["utmos"], row["ce"], row["ce_gain"]) == (0.25, 0.125, 3.5, 1.5, 1.0)
    assert row["layout"] == "MMMAMMMMMMMA" and row["prefill_flops"] > 0
    page = write_report([folder], tmp_path / "out").read_text()
    assert "distilled 1:5 MMMAMMMMMMMA" in page, "the label of its sound"
    assert "The student of distill, MMMAMMMMMMMA (distilled 1:5), has a held-out CE of 1.500 (from 2.500)" in page
    assert "a WER of 25.0 %." in page and "9 distilled to the end, 1 by distill." in page
    # Its alarm stands above everything, and it is no point among the finalists of Fig. 4.
    write_distilled(folder, finalist_row("MMMAMMMMMMMA", origin="distill", alarm="stops at once", **heard))
    report = build_report([read_run(folder)])
    assert "MMMAMMMMMMMA (distilled 1:5) stops at once." in report.alarms
    [pairs] = [section for section in report.sections if section.slug == "ce_and_wer"]
    assert pairs.tables[0].rows[0]["n"] == 9


def test_a_distilled_student_of_a_finalists_layout_is_another_system(tmp_path):
    folder = made_run(tmp_path / "run")
    layout = str(read_run(folder).finalists[0].layout)
    (folder / "finalists" / layout / "student").mkdir(parents=True)
    with_distilled(folder, layout, ce=1.25)
    write_audio(folder, ("teacher", layout, f"distilled {layout}"))
    rows = [row for row in systems_of(folder).values() if row.get("layout") == layout]
    assert [row["system"] for row in rows] == ["block beginning 1:1, exported", "distilled 1:1"]
    assert [row["ce"] for row in rows] == [quality(Layout(layout)), 1.25]
    page = write_report([folder], tmp_path / "out").read_text()
    assert f"distilled 1:1 {layout}" in page and f"exported {layout}" in page
    assert "distilled distilled" not in page


def test_rates_of_another_evaluation_than_the_teachers_are_not_beside_them(tmp_path):
    folder = made_run(tmp_path / "run")
    with_distilled(folder, "AMMMMMMMMMMM", wer=ErrorRate(0.25, 0.2, 0.3), evaluation="an older one", alarm="is silent")
    row = systems_of(folder)["distilled 1:11"]
    assert row["wer"] is None and row["alarm"] is None and row["ce"] == 1.0
    text = " ".join(build_report([read_run(folder)]).summary)
    assert f"heard in another evaluation than the teacher: python -m mamtra_ray.evaluate --run {folder}" in text


def test_a_run_of_distill_alone_has_a_report(tmp_path):
    folder = tmp_path / "mine"
    save_config(load_config(None, []), folder / "config.yaml")
    with_distilled(folder, "AMMMAMMMAMMM", ce=1.5)
    assert set(systems_of(folder)) == {"distilled 1:3"}
    page = write_report([folder], folder).read_text()
    summary_text = " ".join(build_report([read_run(folder)]).summary)
    assert f"hear it: python -m mamtra_ray.evaluate --run {folder}." in summary_text and "hear it:" in page
    assert "Nothing is found" not in summary_text and "search" not in summary_text
    # Heard: the evaluation's own summary has teacher and codec.
    other = {"failure": None, "stopped": True, "fewest_tokens": 0, "speech_tokens": [1], "evaluation_hash": "x"}
    words = [" ".join(["word"] * number) for number in range(10)]

    def spoken(wrong: int) -> list[dict]:
        return [
            {"utterance_id": f"u{n}", "text": words[n], "hypothesis": words[n - wrong], "audio_seconds": 1.0, **other}
            for n in range(1, 10)
        ]

    rows = {system: spoken(system == "AMMMAMMMAMMM") for system in ("codec", "teacher", "AMMMAMMMAMMM")}
    evaluations = scored(rows, "whisper_en", identity="this one")
    write_summary(folder, evaluations, {}, [], {})
    for system, evaluation in evaluations.items():
        write_rows(folder, system, evaluation.rows)
    update_distilled(folder, evaluations)
    found = systems_of(folder)
    assert list(found) == ["codec", "teacher", "distilled 1:3"]
    assert found["teacher"]["wer"] == 0 and found["distilled 1:3"]["wer"] == pytest.approx(9 / 45)
    report = build_report([read_run(folder)])
    [lengths] = [section for section in report.sections if section.slug == "wer_by_length"]
    assert [row["system"] for row in lengths.tables[0].rows] == ["codec", "teacher", "distilled 1:3"]
    assert "on 9 sentences" in " ".join(next(s for s in report.sections if s.slug == "systems").text)
