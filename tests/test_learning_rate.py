"""``distill.learning_rate: auto``, and the separate rates of mixers and pretrained weights."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from test_training import CONFIG, CPU, make_batch, student_of, teacher  # noqa: F401 (a fixture)
from tiny_search import write_search_space

from mamtra_ray.artifacts import write_manifest
from mamtra_ray.config import Config, DistillConfig, StudentConfig, load_config, save_config
from mamtra_ray.distill import __main__ as distill_verb
from mamtra_ray.distill import learning_rate
from mamtra_ray.distill.job import DistillJob
from mamtra_ray.distill.learning_rate import (
    FIRST_RATES,
    HIGHEST,
    LOWEST,
    RateScore,
    chosen,
    next_rates,
    objective,
    rate_of,
    read_scores,
    report_lines,
    write_scores,
)
from mamtra_ray.distill.training import Distillation, parameter_groups
from mamtra_ray.errors import DivergedError, InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.models.mamba import MambaMixer
from mamtra_ray.run.distilled import read_distilled
from mamtra_ray.runtime.progress import Costs, Screen

ALL_RATES = range(LOWEST, HIGHEST + 1)


@dataclasses.dataclass(frozen=True)
class MeasuringSession:
    """What the measuring needs of a session."""

    config: Config
    folder: Path
    screen: Screen


def walk(function):
    """All rates that are tried where a training at a rate ends in ``function(rate)``."""
    values = {}
    while rates := next_rates(values):
        assert not set(rates) & set(values), "a rate was tried twice"
        values |= {rate: function(rate) for rate in rates}
    return values


@pytest.mark.parametrize("minimum", ALL_RATES)
@pytest.mark.parametrize("diverges_above", [0, 2, 99])
def test_the_walk_finds_the_best_of_all_rates(minimum, diverges_above):
    """Brute force over all rates of a loss with one minimum, which diverges somewhat above it."""

    def function(rate):
        return math.inf if rate > minimum + diverges_above else 1 + 0.1 * (rate - minimum) ** 2

    values = walk(function)
    assert min(values, key=values.__getitem__) == min(ALL_RATES, key=function)
    assert len(values) <= len(FIRST_RATES) + max(FIRST_RATES[0] - LOWEST, HIGHEST - FIRST_RATES[-1])


def test_rates_stand_half_a_decade_apart():
    assert [rate_of(step) for step in (-12, -9, -8, -7, -4)] == [1e-6, 3.2e-5, 1e-4, 3.2e-4, 1e-2]


def score(half_decades, ce, kl=0.1):
    return RateScore(half_decades, ce, None if ce is None else kl, 2.0, 0.5, 1.0)


def test_where_every_rate_diverges_the_run_ends_with_all_of_them():
    values = walk(lambda _: math.inf)
    assert set(values) == set(range(LOWEST, FIRST_RATES[-1] + 1)), "only lower ones could help"
    with pytest.raises(InputError, match=r"diverged at every rate tried \(1e-06, .*0.00032\)"):
        chosen(DistillConfig(), [score(rate, None) for rate in values])


def test_a_training_that_diverges_is_a_rate_without_a_score(monkeypatch):
    def diverges(job, device):
        raise DivergedError(f"with {job.settings.learning_rate}")
        yield

    monkeypatch.setattr(learning_rate, "distill", diverges)
    job = DistillJob(Layout("AM"), DistillConfig(), StudentConfig(), None, (100,))
    found = learning_rate._score_of_rate._function(job, -8)
    assert (found.half_decades, found.ce, found.kl) == (-8, None, None)


def test_the_weights_of_the_loss_decide_what_is_best():
    scores = [RateScore(-9, 1.0, 0.5, 2.0, 0.5, 1.0), RateScore(-8, 1.2, 0.1, 2.0, 0.5, 1.0), score(-7, None)]
    for weights, best in (((1, 1), -8), ((1, 0), -9), ((0, 1), -8), ((0, 0), -9), ((3, 1), -9)):
        settings = DistillConfig(ce_weight=weights[0], kl_weight=weights[1])
        assert chosen(settings, scores).half_decades == best
    assert objective(DistillConfig(), math.nan, 0.1) == math.inf
    lines = "\n".join(report_lines(DistillConfig(), scores, scores[1]))
    assert "diverged" in lines and "distill.learning_rate=0.0001" in lines and "warning" not in lines
    assert "worse than before its training" in "\n".join(
        report_lines(DistillConfig(), [score(-9, 3.0)], score(-9, 3.0))
    )


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_pretrained_weights_have_a_rate_of_their_own(teacher, factor):  # noqa: F811
    """AdamW's first step without weight decay moves each weight by its rate (but for its epsilon)."""
    config = CONFIG.model_copy(update={"pretrained_learning_rate_factor": factor, "weight_decay": 0.0})
    training = Distillation(student_of(teacher), config, 100, CPU)
    before = {name: p.clone() for name, p in training.student.named_parameters()}
    rate = training.learning_rate()
    training.step(make_batch(teacher, (9, 4), 0))
    mixers = {id(p) for m in training.student.modules() if isinstance(m, MambaMixer) for p in m.parameters()}
    moved = {True: 0.0, False: 0.0}
    for name, p in training.student.named_parameters():
        change = float((p - before[name]).detach().abs().max())
        moved[id(p) in mixers] = max(moved[id(p) in mixers], change)
    assert moved[True] == pytest.approx(rate, rel=1e-3)
    assert moved[False] == pytest.approx(factor * rate, rel=1e-3)


def test_every_trained_parameter_is_in_one_group(teacher):  # noqa: F811
    student = student_of(teacher)
    grouped = [id(p) for group in parameter_groups(student, CONFIG) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in student.parameters() if p.requires_grad)
    assert all(p.ndim < 2 for g in parameter_groups(student, CONFIG) if not g["weight_decay"] for p in g["params"])


def test_a_training_without_a_number_is_a_fault_of_ours(teacher):  # noqa: F811
    with pytest.raises(ValueError, match="must be a number"):
        Distillation(student_of(teacher), CONFIG.model_copy(update={"learning_rate": "auto"}), 100, CPU)


@pytest.mark.parametrize(
    ("of_finalists", "of_trials", "after"),
    [
        ("auto", None, (1e-4, 1e-4)),
        (3e-4, "auto", (3e-4, 1e-4)),
        ("auto", 2e-5, (1e-4, 2e-5)),
        ("auto", "auto", (1e-4,) * 2),
    ],
)
def test_the_measured_rate_goes_where_auto_stands(tmp_path, monkeypatch, of_finalists, of_trials, after):
    rates = [f"distill.learning_rate={of_finalists}", *([f"search.learning_rate={of_trials}"] if of_trials else [])]
    config = load_config(None, rates)
    monkeypatch.setattr(learning_rate, "student_made_by", lambda *_: {})
    monkeypatch.setattr(learning_rate, "read_scores", lambda *_: [score(-9, 1.2), score(-8, 1.1), score(-7, 1.3)])
    screen = Screen(("learning rate",), Costs(tmp_path / "costs.json"))
    session = MeasuringSession(config, tmp_path, screen)
    measured = learning_rate.with_learning_rate(session, None, Layout("AM")).config
    assert (measured.distill.learning_rate, measured.distill_of_trials.learning_rate) == after


@pytest.mark.slow
def test_a_distillation_tries_rates_once_and_trains_with_the_best(tmp_path, ray_cluster, capsys, monkeypatch):
    space = write_search_space(tmp_path, distill__learning_rate="auto", distill__workers=1, search__rung_tokens=[300])
    run = tmp_path / "runs" / "auto"
    arguments = ["--space", str(space), "--run", str(run), "--layout", "AMAM"]
    assert distill_verb.main(arguments) == 0
    printed = capsys.readouterr().out
    tried = json.loads((run / "learning_rate.json").read_text())["scores"]
    best = min(tried, key=lambda row: row["ce"] + row["kl"])
    assert f"distill.learning_rate={rate_of(best['half_decades']):g}" in printed
    assert len(tried) >= 3 and next_rates({row["half_decades"]: row["ce"] + row["kl"] for row in tried}) == []
    state = torch.load(next(run.glob("train/checkpoint*/training-*.pt")), weights_only=True)
    # Cosine ends at a tenth of the peak, and the last step stands before the end.
    assert 0.1 < state["optimizer"]["param_groups"][0]["lr"] / rate_of(best["half_decades"]) < 1
    row = read_distilled(run)
    assert f"held-out CE {row.ce:.4f}" in printed and str(row.layout) == "AMAM" and row.tokens >= 600
    assert "\n".join(distill_verb.what_next(run, speaks=True)) in printed
    # Again, as after a stop: nothing is tried anew.
    monkeypatch.setattr("mamtra_ray.distill.learning_rate._score_of_rate", None)
    assert distill_verb.main(["--run", str(run), "--layout", "AMAM"]) == 0
    assert read_distilled(run) == row


def test_rates_tried_with_other_settings_do_not_count_and_do_not_stand_in_the_way(tmp_path):
    """A run without a trial may go on with changed settings."""
    tried = [score(-8, 1.0)]
    write_scores(tmp_path, {"settings": "a"}, Layout("AM"), tried)
    assert read_scores(tmp_path, {"settings": "a"}) == tried
    assert read_scores(tmp_path, {"settings": "b"}) == [] == read_scores(tmp_path / "nothing", {"settings": "a"})


def test_a_second_layout_in_one_run_is_refused_at_once_and_told_where_to_go(tmp_path, capsys):
    space, run = write_search_space(tmp_path), tmp_path / "runs" / "one"
    save_config(load_config(space), run / "config.yaml")
    write_manifest(run / "train" / "checkpoint_1" / "training.json", "training state", 3, {"layout": "AMAM"})
    assert distill_verb.main(["--run", str(run), "--layout", "AMAM", "--dry-run"]) == 0
    capsys.readouterr()
    for dry in ([], ["--dry-run"]):
        assert distill_verb.main(["--run", str(run), "--layout", "MAAM", *dry]) == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert "holds the distillation of AMAM" in sentence
    # What it says works.
    command = sentence.partition("mamtra_ray.distill ")[2].split()
    assert distill_verb.main([*command, "--dry-run"]) == 0
