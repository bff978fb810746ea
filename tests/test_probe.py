"""Scores of layouts against students built one by one; rounds against brute force; stop, resume and bad input."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_cache import cache_without_ray, random_rows, tiny_config

from mamtra_ray.align.mixer_library import LibraryManifest, save_library
from mamtra_ray.config import Config
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.layouts.candidates import SearchSpace, paper_candidates
from mamtra_ray.layouts.constraints import Constraints, layouts_to_matrix, sample_layouts
from mamtra_ray.losses import HiddenTargets
from mamtra_ray.models.transfer import mixer_from_attention
from mamtra_ray.probe import rounds as probe_rounds
from mamtra_ray.probe.layout_scoring import LayoutScorer
from mamtra_ray.probe.pool import ProbeData, first_utterances
from mamtra_ray.probe.probing import outcome_table, probe_layouts, propose
from mamtra_ray.run.folder import latest_scores
from mamtra_ray.run.names import PROBE
from mamtra_ray.run.rows import ProbeRow, read_table
from mamtra_ray.run.session import search_space
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.surrogate.acquisition import CONFIDENT, confidence, fit_log, next_layouts, ranked_layouts
from mamtra_ray.surrogate.quadratic import Quadratic
from mamtra_ray.teacher_cache import batches as shared_batches
from mamtra_ray.teacher_cache import shared as shared_cache
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.shared import share_teacher

CPU = torch.device("cpu")
FOUR_LAYERS = [Layout("".join(letters)) for letters in itertools.product("AM", repeat=4)]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """The tiny teacher, its corpus and cache, and a library of (unaligned) mixers."""
    folder = tmp_path_factory.mktemp("probe")
    config = tiny_config(folder, rows=random_rows(train=8, validation=12))
    config = Config.model_validate(
        config.model_dump()
        | {"probe": {"num_layouts": 20, "validation_tokens": 120}, "search": {"ratios": ["1:1", "1:3"]}}
    )
    cache_without_ray(config, folder / "cache")
    teacher = load_teacher(config.teacher.kind, config.teacher.path)
    library = {
        layer: mixer_from_attention(
            teacher.model.body.layers[layer].self_attn, teacher.model.config.mixer, "transfer", seed=layer
        ).state_dict()
        for layer in range(4)
    }
    save_library(
        folder / "library",
        library,
        {"teacher": teacher.fingerprint, "corpus": "c", "settings": "s"},
        LibraryManifest({0: 1.0}, {0: 1.0}, {0: 1.0}, 1, 1, 1.0, 1),
    )
    return SimpleNamespace(config=config, folder=folder, teacher=teacher, library=library)


@pytest.fixture(scope="module")
def validation(setup, ray_cluster):
    from mamtra_ray.corpus.table import corpus_identity, read_corpus

    corpus_hash = corpus_identity(read_corpus(setup.config.corpus.path)).corpus_hash
    return shared_cache.share_cache(
        setup.folder / "cache",
        teacher_fingerprint=setup.teacher.fingerprint,
        corpus_hash=corpus_hash,
        split="validation",
    )


@pytest.fixture(scope="module")
def data(setup, validation):
    """What layouts are scored with, as a session has it."""
    return ProbeData(
        share_teacher(setup.teacher),
        setup.folder / "library",
        "per_query_head",
        validation,
        setup.config.probe.validation_tokens,
    )


def probe(config, folder, data, **options):
    return probe_layouts(
        config.probe,
        search_space(config, 4),
        [candidate.layout for candidate in paper_candidates(search_space(config, 4), config.search.strategies)],
        folder,
        replace(data, validation_tokens=config.probe.validation_tokens),
        WorkerResources(),
        **options,
    )


def batches_of(teacher, rows):
    """One batch per utterance, its teacher rows computed here."""
    for row in rows:
        ids, labels = teacher.sequence.training_example(row["text_tokens"], row["speech_tokens"])
        with torch.no_grad():
            hidden = teacher.model.hidden_states(ids[None])[0, labels != -100]
        yield SimpleNamespace(input_ids_BL=ids[None], labels_BL=labels[None], teacher_targets=HiddenTargets(hidden))


def plain_scores(setup, layout, batches):
    """Cross-entropy and KL of a student built for this layout alone, by torch's own functions."""
    student = make_student(setup.teacher.model, layout, "aligned", setup.library).eval()
    ce = kl = tokens = 0.0
    with torch.no_grad():
        for batch in batches:
            at = batch.labels_BL[0] != -100
            labels = batch.labels_BL[0, at]
            student_log = F.log_softmax(student(batch.input_ids_BL)[0, at].double(), -1)
            teacher_log = F.log_softmax(setup.teacher.model(batch.input_ids_BL)[0, at].double(), -1)
            ce += float(F.nll_loss(student_log, labels, reduction="sum"))
            kl += float(F.kl_div(student_log, teacher_log, log_target=True, reduction="sum"))
            tokens += len(labels)
    return ce / tokens, kl / tokens


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_scores_equal_those_of_single_students(setup, share_prefixes):
    batches = list(batches_of(setup.teacher, random_rows(train=3, validation=0)))
    scorer = LayoutScorer(setup.teacher.model, setup.library, "per_query_head", CPU)
    layouts = [FOUR_LAYERS[index] for index in (9, 0, 15, 5, 6, 7)]
    rows = scorer.score(layouts, batches, share_prefixes)
    assert [row.layout for row in rows] == layouts
    for row in rows:
        ce, kl = plain_scores(setup, row.layout, batches)
        assert row.ce == pytest.approx(ce, rel=1e-5)
        assert row.kl == pytest.approx(kl, rel=1e-4, abs=1e-7)
    assert rows[1].kl == pytest.approx(0, abs=1e-7), "all attention is the teacher"


def test_padded_batches_score_like_single_rows(setup, validation):
    scorer = LayoutScorer(setup.teacher.model, setup.library, "per_query_head", CPU)
    layouts = [Layout("AMMA"), Layout("MMAM")]
    together, alone = (
        scorer.score(
            layouts, shared_batches.batches(validation, setup.teacher.sequence, tokens_per_batch=size, seed=0, epoch=0)
        )
        for size in (400, 1)
    )
    for first, second in zip(together, alone, strict=True):
        assert first.tokens == second.tokens == validation.labeled_positions
        # The cache keeps hidden states in half precision.
        assert (first.ce, first.kl) == pytest.approx((second.ce, second.kl), rel=1e-4)


def test_probing_stops_and_goes_on_without_paying_twice(setup, validation, data, tmp_path):
    def interrupt(done, _total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe(setup.config, tmp_path, data, on_progress=interrupt)
    before = read_table(tmp_path / PROBE, ProbeRow)
    assert 0 < len(before) < 10

    seen = []
    rows = probe(setup.config, tmp_path, data, on_progress=lambda *count: seen.append(count))
    assert seen[-1] == (10, 20), "it ends below the total where all is settled earlier"
    # Two budgets of four layers have only 6 + 4 layouts: all are scored, then probing ends by itself.
    allowed = [layout for layout in FOUR_LAYERS if len(layout.attention_layers) in (1, 2)]
    assert {row.layout for row in rows} == set(allowed) and len(rows) == 10
    after = read_table(tmp_path / PROBE, ProbeRow)
    assert after[: len(before)] == before, "a scored layout was scored again"
    held_out = first_utterances(validation, setup.config.probe.validation_tokens)
    assert held_out.speech_tokens <= 120 < validation.speech_tokens
    assert all(row.tokens == held_out.labeled_positions for row in rows)

    scorer = LayoutScorer(setup.teacher.model, setup.library, "per_query_head", CPU)
    batches = shared_batches.batches(held_out, setup.teacher.sequence, tokens_per_batch=400, seed=0, epoch=0)
    truth = {row.layout: row.kl for row in scorer.score(allowed, batches)}
    for row in rows:
        assert row.kl == pytest.approx(truth[row.layout], rel=1e-3)
    for ratio, kept in (("1:1", 2), ("1:3", 1)):
        best = min((truth[layout], layout) for layout in allowed if len(layout.attention_layers) == kept)
        assert propose(search_space(setup.config, 4), rows, ratio, 3)[0] == best[1]


def test_scores_of_other_budgets_and_settings_stay_apart(setup, data, tmp_path):
    """Going on with another budget spends scores on it; scores on other tokens answer no later question."""

    def probed(num_layouts, ratios, tokens):
        config = Config.model_validate(
            setup.config.model_dump()
            | {"probe": {"num_layouts": num_layouts, "validation_tokens": tokens}, "search": {"ratios": ratios}}
        )
        return config, probe(config, tmp_path, data)

    probed(6, ["1:1"], 120)
    config, rows = probed(4, ["1:3"], 120)
    assert sorted(row.layout.ratio for row in rows) == ["1:1"] * 6 + ["1:3"] * 4
    [line] = [line for line in outcome_table(search_space(config, 4), rows).splitlines() if line.split()[0] == "1:3"]
    best = min((row for row in rows if row.layout.ratio == "1:3"), key=lambda row: row.kl)
    assert str(best.layout) in line and "100%" in line, "every layout of this budget is scored"
    for tokens, count in ((60, 6), (120, 10), (60, 6)):
        probed(6, ["1:1"], tokens)
        latest = latest_scores(tmp_path)
        assert len(latest) == count and len({row.tokens for row in latest}) == 1
    assert len(read_table(tmp_path / PROBE, ProbeRow)) == 16, "nothing was scored twice or lost"


def test_the_last_scores_confirm_predicted_optima(setup, data, tmp_path, monkeypatch):
    asked = []
    confirming = probe_rounds.best_unscored
    monkeypatch.setattr(probe_rounds, "best_unscored", lambda *a: asked.append(confirming(*a)) or asked[-1])
    config = Config.model_validate(
        setup.config.model_dump()
        | {"probe": {"num_layouts": 8, "validation_tokens": 120}, "search": {"ratios": ["1:1", "1:3"]}}
    )
    rows = probe(config, tmp_path, data)
    assert len(rows) == 8 and asked and rows[-1].layout in {layout for found in asked for layout in found}


def test_a_library_of_another_teacher_is_one_sentence(setup, data, tmp_path):
    save_library(
        tmp_path / "library",
        setup.library,
        {"teacher": "someone else", "corpus": "c", "settings": "s"},
        LibraryManifest({0: 1.0}, {0: 1.0}, {0: 1.0}, 1, 1, 1.0, 1),
    )
    with pytest.raises(InputError, match="made with another teacher: 'someone else'"):
        probe(setup.config, tmp_path, replace(data, library=tmp_path / "library"))


def synthetic_kl(num_layers, seed):
    """log KL: layers, neighbors, and a part that no surrogate of pairs can represent."""
    rng = np.random.default_rng(seed)
    pairs = np.triu(np.tril(rng.normal(size=(num_layers, num_layers)) * 0.15, 3), 1)
    quadratic = Quadratic(-4.0, 0.3 + 0.2 * rng.normal(size=num_layers), pairs)
    triple = 0.05 * rng.normal(size=num_layers - 2)

    def kl(layout):
        x = layouts_to_matrix([layout], num_layers)[0]
        return float(np.exp(quadratic(x[None])[0] + np.sum(triple * x[:-2] * x[1:-1] * x[2:])))

    return kl


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rounds_find_the_best_of_all_layouts_and_know_it(seed):
    kl, rng = synthetic_kl(12, seed), np.random.default_rng(seed)
    constraints = Constraints.from_ratio(12, "1:1", keep_attention=(0,))
    every = [layout for layout in sample_layouts(constraints, 462, rng)]
    assert len(every) == 462
    best = min(every, key=kl)
    scored = {layout: kl(layout) for layout in sample_layouts(constraints, 40, rng)}
    assert best not in scored
    while confidence(fit_log(scored), scored, constraints, rng) < CONFIDENT and len(scored) < 150:
        new = next_layouts(fit_log(scored), scored, constraints, 10, rng)
        assert new and not set(new) & set(scored) and all(constraints.allows(layout) for layout in new)
        scored |= {layout: kl(layout) for layout in new}
    assert len(scored) < 150
    assert min(scored.values()) <= 1.02 * kl(best)
    [(first, score, was_scored)] = ranked_layouts(fit_log(scored), scored, constraints, 1)
    assert was_scored and score == min(scored.values()) == scored[first]


def test_few_scores_are_ranked_without_a_surrogate():
    rows = [ProbeRow(Layout("AMAM"), 1.0, 0.3, 9, 0.1), ProbeRow(Layout("MMAA"), 1.0, 0.2, 9, 0.1)]
    space = SearchSpace(4, ("1:1",))
    assert propose(space, rows, "1:1", 5) == [Layout("MMAA"), Layout("AMAM")]
    with pytest.raises(InputError, match="no layout was scored"):
        propose(space, [], "1:1", 1)
    with pytest.raises(InputError, match="1:1 keeps 2 attention layers, but the constraints allow 3 to 4"):
        propose(replace(space, keep_attention=frozenset({0, 1, 2})), rows, "1:1", 1)
    with pytest.raises(InputError, match="no layout has 2 to 2 attention layers"):
        Constraints.from_ratio(4, "1:1", keep_attention=(0, 1, 2))
