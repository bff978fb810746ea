"""How a search ends: what is measured of the finalists, which is exported, what the screen says, the exit code."""

import json
from importlib import metadata

import pyarrow.parquet as pq
import pytest
import ray
import torch
from made_run import finalist_row
from tiny_models import VOCABULARY
from tiny_search import write_search_space
from tiny_whisper import write_tiny_whisper

from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.run_scores import choose
from mamtra_ray.evaluate.verdict import EXIT_UNUSABLE
from mamtra_ray.run.folder import Reference, Score, read_run
from mamtra_ray.run.names import FINALISTS
from mamtra_ray.search import __main__ as search
from mamtra_ray.search import outcome
from mamtra_ray.search.outcome import verdict_lines
from mamtra_ray.speech import tokenizer as tk
from mamtra_ray.speech.demo_codec import Codec, DecoderConfig, TokenDecoder
from mamtra_ray.speech.error_rate import ErrorRate
from mamtra_ray.speech_lm import generation_check


def row(layout, wer=0.02, **changes):
    interval = None if wer is None else ErrorRate(wer, wer - 0.01, wer + 0.01)
    return finalist_row(layout, wer=interval, **changes)


def test_the_exported_one_has_no_alarm_if_there_is_any_without():
    rows = [
        row("AAMM", ce=1.0, alarm="stops at once"),
        row("AMAM", ce=1.2),
        row("AMMM", ce=1.1, alarm="does not stop"),
        row("MAMM", ce=1.2, alarm="stops at once"),
    ]
    after, best = choose(rows, ("1:1", "1:3"))
    assert [str(best["1:1"].layout), str(best["1:3"].layout)] == ["AMAM", "AMMM"]
    assert [one.alarm for one in after] == ["stops at once", None, "does not stop", "stops at once"]
    assert after == rows


def test_an_export_far_worse_than_one_that_was_ruled_out_has_an_alarm_too():
    rows = [row("AAMM", wer=0.02, alarm="does not stop"), row("AMAM", wer=0.4)]
    after, best = choose(rows, ("1:1",))
    assert str(best["1:1"].layout) == "AMAM"
    assert "far above that of AAMM, 2.0 %" in after[1].alarm
    assert best["1:1"] == after[1]


def test_last_lines_of_the_screen():
    rows = [
        row("AMAM", wer_difference=ErrorRate(0.0, -0.02, 0.02)),
        row("AMMM", alarm="does not stop"),
        row("AAMM", alarm="stops at once"),
    ]
    reference = Reference(1.0, 40, Score(ErrorRate(0.02, 0.01, 0.03)))
    assert verdict_lines(rows, reference, {"1:1": rows[0], "1:3": rows[1]}, 10) == [
        "alarm: AMMM does not stop",
        "alarm: AAMM stops at once",
        "AMAM: WER 2.0 % [1.0, 3.0], as good as the teacher's 2.0 % [1.0, 3.0] within the intervals,"
        " at 50 % of its cache",
        "AMMM: do not use: it does not stop; every finalist of its ratio has an alarm",
    ]


@pytest.fixture
def speaking_space(tmp_path):
    """A search of random models that speak, with a codec and a recognizer as random."""
    torch.manual_seed(0)
    codebook = torch.randn(VOCABULARY.speech_size, tk.FRAMES_PER_TOKEN * tk.NUM_MELS)
    decoder = TokenDecoder(DecoderConfig(channels=8, num_blocks=1))
    Codec(tk.Tokenizer(codebook), decoder, {"made": "by a test"}).save(tmp_path / "codec.safetensors")
    return write_search_space(
        tmp_path,
        evaluate__sentences=4,
        evaluate__codec=str(tmp_path / "codec.safetensors"),
        evaluate__recognizer=f"whisper:{write_tiny_whisper(tmp_path / 'whisper')}",
        evaluate__normalization="whisper_basic",
        search__trials=1,
        search__rung_tokens=[200],
        search__finalists=1,
        search__sentences=3,
        distill__tokens=200,
        distill__workers=1,
        distill__checkpoint_every_tokens=200,
        student__initialization="transfer",
    )


@pytest.mark.slow
def test_a_search_with_alarms_is_complete_but_no_success(speaking_space, ray_cluster, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "alarmed"
    arguments = ["--space", str(speaking_space), "--run", str(run)]
    code = search.main(arguments)
    printed = capsys.readouterr().out
    rows = pq.read_table(run / FINALISTS).to_pylist()
    spoken = {
        name: [json.loads(line) for line in (run / f"evaluation/{name}.jsonl").read_text().splitlines()]
        for name in ("teacher", *[row["layout"] for row in rows])
    }
    not_stopped = {name: sum(not one["stopped"] for one in sentences) / 4 for name, sentences in spoken.items()}
    (trial,) = read_run(run).trials
    heard = json.loads((run / "trial_speech.json").read_text())["rows"]
    assert len(heard) == 3 and {row["utterance_id"].partition("-")[0] for row in heard} == {"validation"}
    assert trial.wer is not None and trial.token_error_rate > 0 and trial.evaluation
    assert all(not_stopped.values()), "random models run into the length limit, else this test says nothing"
    assert code == EXIT_UNUSABLE == 3
    for finalist in rows:
        assert finalist["not_stopped"] == not_stopped[finalist["layout"]]
        alarm = f"does not stop by itself in {100 * finalist['not_stopped']:.0f} % of the sentences"
        assert alarm in finalist["alarm"] and f"alarm: {finalist['layout']} {alarm}" in printed
    assert "does not stop by itself" in read_run(run).reference.teacher_alarm
    best = json.loads((run / "best" / "layout.json").read_text())
    assert "does not stop" in best["alarm"] and best["check"]["largest_difference"] < 1e-4
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"{best['layout']}: cannot be judged, because the teacher itself does not stop")
    assert "Do not use these results as they are" in (run / "report.html").read_text()

    # The same run again, with an export that is refused: the old one stays, and the report is written all the same.
    def refuse(*_):
        raise InputError("plain transformers computes other logits")

    monkeypatch.setattr(outcome, "export_student", refuse)
    (run / "report.html").unlink()
    for name in ray.util.list_named_actors():  # they would have ended with the first search's process
        ray.kill(ray.get_actor(name))
    assert search.main([*arguments, "--resume"]) == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: plain transformers computes other logits"
    assert (run / "report.html").exists()
    assert json.loads((run / "best" / "layout.json").read_text()) == best


def test_a_search_that_cannot_generate_stops_before_it_computes(
    speaking_space, ray_cluster, tmp_path, monkeypatch, capsys
):
    sound = generation_check.prefill

    def forgetful(model, prompts):
        start = sound(model, prompts)
        if model.layout.mamba_layers:
            start.logits_BS = start.logits_BS.roll(1, -1)
        return start

    monkeypatch.setattr(generation_check, "prefill", forgetful)
    run = tmp_path / "runs" / "broken"
    assert search.main(["--space", str(speaking_space), "--run", str(run)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: an untrained hybrid of") and f"torch {metadata.version('torch')}" in error
    assert not (run.parent / "shared").exists() and not (run / "trials.parquet").exists()
