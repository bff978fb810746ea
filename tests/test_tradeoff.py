"""Questions about cost and constraints, answered from scores, against brute force over all layouts."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from made_run import DEMO, made_run

from mamtra_ray.efficiency import cache_bytes, decode_flops
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.constraints import Constraints
from mamtra_ray.run.folder import read_run
from mamtra_ray.run.names import PROBE
from mamtra_ray.run.rows import ProbeRow, read_table, write_table
from mamtra_ray.search.costs import cost_by_rung
from mamtra_ray.teacher_cache.manifest import CacheManifest
from mamtra_ray.tradeoff import __main__ as verb
from mamtra_ray.tradeoff import tradeoff

EVERY = [Layout("".join(letters)) for letters in itertools.product("AM", repeat=12)]
COST_IN_FULL = {
    "cache_bytes": lambda layout: cache_bytes(DEMO, layout, 2048) / cache_bytes(DEMO, Layout("A" * 12), 2048),
    "decode_flops": lambda layout: decode_flops(DEMO, layout, 2048) / decode_flops(DEMO, Layout("A" * 12), 2048),
}


def kl(layout: Layout) -> float:
    """Exactly what the surrogate can represent: log KL with a term per layer and one pair."""
    mamba = layout.mamba_layers
    return math.exp(-4 + sum(0.5 / (1 + layer) for layer in mamba) + 0.1 * (2 in mamba and 3 in mamba))


SCORES = {layout: kl(layout) for layout in np.random.default_rng(0).choice(EVERY, 150, replace=False)}


@pytest.mark.parametrize("cost", ["cache_bytes", "decode_flops"])
@pytest.mark.parametrize(
    ("weight", "bounds"),
    [
        (0.0, {"max_cost": 0.6}),
        (3.0, {}),
        (1.5, {"max_attention": 4, "keep_attention": (5,), "always_mamba": (0,)}),
    ],
)
def test_answers_are_the_optima_of_brute_force(cost, weight, bounds):
    relative = tradeoff.relative_cost(DEMO, cost, 2048)
    constraints = Constraints(12, cost=relative, **bounds)
    answers = tradeoff.best_by_ratio(SCORES, constraints, relative, weight)

    def objective(layout):
        return math.log(kl(layout)) + weight * COST_IN_FULL[cost](layout)

    allowed = [
        layout
        for layout in EVERY
        if len(layout.attention_layers) <= bounds.get("max_attention", 12)
        and set(bounds.get("keep_attention", ())) <= set(layout.attention_layers)
        and set(bounds.get("always_mamba", ())) <= set(layout.mamba_layers)
        and COST_IN_FULL[cost](layout) <= bounds.get("max_cost", math.inf)
    ]
    assert objective(answers[0].layout) == pytest.approx(min(map(objective, allowed)), abs=2e-3)
    assert answers[0].tradeoff == pytest.approx(objective(answers[0].layout), abs=2e-3)
    assert {len(a.layout.attention_layers) for a in answers} == {len(x.attention_layers) for x in allowed}
    for answer in answers:
        assert answer.cost == pytest.approx(COST_IN_FULL[cost](answer.layout))
        assert answer.kl == pytest.approx(kl(answer.layout), rel=0.02)


@pytest.fixture
def run_folder(tmp_path):
    folder = made_run(tmp_path / "run")
    rows = [dataclasses.replace(row, kl=kl(row.layout)) for row in read_table(folder / PROBE, ProbeRow)]
    write_table(folder / PROBE, rows, ProbeRow)
    return folder


def test_the_verb_prints_an_answer_and_how_to_train_it(run_folder, capsys):
    assert verb.main(["--run", str(run_folder), "--max-cost", "0.6", "--keep-attention", "0"]) == 0
    output = capsys.readouterr().out
    best = output.splitlines()[-1].split()[-1]
    assert best.startswith("A") and COST_IN_FULL["cache_bytes"](Layout(best)) <= 0.6


def falling_kl(layout: Layout) -> float:
    """A KL that a sum of terms in the exponent does not describe: it saturates, as measured ones do."""
    lost = sum(1 / (1 + layer) + 0.2 for layer in layout.mamba_layers)
    return 0.4 * lost**1.5 / (6 + lost**1.5)


@pytest.mark.parametrize("scored_ratios", [(6,), (9, 6), (6, 2), (10, 3)])
@pytest.mark.parametrize("weight", [0.0, 2.0, -3.0])
def test_ratios_without_scores_are_ranked_below_and_stay_between_their_neighbors(scored_ratios, weight):
    """As when only 1:1 was probed: the surrogate then has no evidence of how KL changes with the number of layers."""
    generator = np.random.default_rng(1)
    scores = {
        layout: falling_kl(layout)
        for attention in scored_ratios
        for layout in generator.choice([x for x in EVERY if x.num_attention == attention], 12, replace=False)
    }
    relative = tradeoff.relative_cost(DEMO, "cache_bytes", 2048)
    answers = tradeoff.best_by_ratio(scores, Constraints(12, max_attention=11, cost=relative), relative, weight)
    assert len(answers) == 12
    extrapolated = [answer.layout.num_attention not in scored_ratios for answer in answers]
    assert extrapolated == sorted(extrapolated), "one without scores was ranked above one with"
    assert [answer.evidence == "extrapolated" for answer in answers] == extrapolated
    best = {count: min(kl for x, kl in scores.items() if x.num_attention == count) for count in scored_ratios}
    held = sorted((x for x in answers if x.evidence == "extrapolated"), key=lambda x: x.layout.num_attention)
    for answer in held:
        count = answer.layout.num_attention
        assert all(answer.kl >= kl and answer.kl_low >= kl for more, kl in best.items() if more > count)
        assert all(answer.kl <= kl and answer.kl_high <= kl for fewer, kl in best.items() if fewer < count)
        assert answer.kl_low <= answer.kl <= answer.kl_high
        assert answer.tradeoff == pytest.approx(math.log(max(answer.kl, 1e-8)) + weight * answer.cost)
    assert [x.kl for x in held] == sorted((x.kl for x in held), reverse=True), "KL rises with attention"


def test_where_no_allowed_ratio_has_scores_the_verb_says_how_to_get_them(run_folder, capsys):
    rows = [row for row in read_run(run_folder).probe if row.layout.num_attention == 6]
    write_table(run_folder / PROBE, rows, ProbeRow)
    assert verb.main(["--run", str(run_folder), "--max-attention", "1", "--min-attention", "1"]) == 0
    output = capsys.readouterr().out
    assert "extrapolated" in output and "search.ratios=1:11" in output and "mamtra_ray.distill" not in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--max-cost", "0.01"], "the cheapest allowed one has"),
        (["--keep-attention", "3", "--always-mamba", "3"], "layer 3 cannot both"),
        (["--min-attention", "5", "--max-attention", "4"], "no layout has 5 to 4 attention layers"),
        (["--cost", "cache_byte"], "did you mean 'cache_bytes'"),
    ],
)
def test_bad_questions_are_one_sentence(run_folder, capsys, arguments, sentence):
    assert verb.main(["--run", str(run_folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_rungs_count_every_token_once(run_folder):
    """Rows of trials count from the first step; their rungs' costs are differences, finalists train anew."""
    run = read_run(run_folder)
    finalists = [dataclasses.replace(row, seconds=10.0) for row in run.finalists]
    cache = CacheManifest(made_by={}, hidden_size=DEMO.hidden_size, utterances_per_shard=8, complete=True, shards={})
    rows = {row["rung"]: row for row in cost_by_rung(run_folder, DEMO, cache, 7.0, None, run.trials, finalists)}
    assert set(rows) == {"cache", "probe", "trials, rung 0", "trials, rung 1", "finalists", "all"}
    last = {row.layout: row for row in sorted(run.trials, key=lambda row: row.rung)}
    for amount in ("tokens", "seconds"):
        trials = rows["trials, rung 0"][amount] + rows["trials, rung 1"][amount]
        assert trials == pytest.approx(sum(getattr(row, amount) for row in last.values()))
    saved = sum(row.tokens for row in [*run.probe, *last.values(), *finalists])
    assert rows["all"]["teacher_tokens_saved"] == saved
    assert rows["all"]["seconds"] == pytest.approx(
        7.0 + sum(row.seconds for row in [*run.probe, *last.values(), *finalists])
    )
