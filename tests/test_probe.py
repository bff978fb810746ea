"""Scores of layouts against students built one by one; rounds against brute force; stop, resume and bad input."""

import itertools
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
from mamtra_ray.layouts.constraints import Constraints, layouts_to_matrix, sample_layouts
from mamtra_ray.losses import HiddenTargets
from mamtra_ray.models.transfer import mixer_from_attention
from mamtra_ray.probe import probing as probe
from mamtra_ray.probe.layout_scoring import MaskScorer, ProbeRow
from mamtra_ray.probe.pool import first_utterances
from mamtra_ray.probe.probing import outcome_table, probe_masks, propose
from mamtra_ray.run.folder import PROBE_COLUMNS, latest_scores, read_rows
from mamtra_ray.run.names import PROBE
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.surrogate.acquisition import CONFIDENT, confidence, fit_log, next_layouts, ranked_layouts
from mamtra_ray.surrogate.quadratic import Quadratic
from mamtra_ray.teacher_cache import batches as shared_batches
from mamtra_ray.teacher_cache import shared as shared_cache
from mamtra_ray.teachers import load_teacher

CPU = torch.device("cpu")
FOUR_LAYERS = [Layout("".join(letters)) for letters in itertools.product("AM", repeat=4)]


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """The tiny teacher, its corpus and cache, and a library of (unaligned) mixers."""
    folder = tmp_path_factory.mktemp("probe")
    config = tiny_config(folder, rows=random_rows(train=8, validation=12))
    config = Config.model_validate(
        config.model_dump() | {"probe": {"masks": 20, "validation_tokens": 120}, "search": {"ratios": ["1:1", "1:3"]}}
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
    scorer = MaskScorer(setup.teacher.model, setup.library, "per_query_head", CPU)
    layouts = [FOUR_LAYERS[index] for index in (9, 0, 15, 5, 6, 7)]
    rows = scorer.score(layouts, batches, share_prefixes)
    assert [row.layout for row in rows] == layouts
    for row in rows:
        ce, kl = plain_scores(setup, row.layout, batches)
        assert row.ce == pytest.approx(ce, rel=1e-5)
        assert row.kl == pytest.approx(kl, rel=1e-4, abs=1e-7)
    assert rows[1].kl == pytest.approx(0, abs=1e-7), "all attention is the teacher"


def test_padded_batches_score_like_single_rows(setup, validation):
    scorer = MaskScorer(setup.teacher.model, setup.library, "per_query_head", CPU)
    layouts = [Layout("AMMA"), Layout("MMAM")]
    together, alone = (
        scorer.score(
            layouts, shared_batches.batches(validation, setup.teacher.sequence, tokens_per_batch=size, seed=0, epoch=0)
        )
        for size in (400, 1)
    )
    for first, second in zip(together, alone, strict=True):
        assert first.tokens == second.tokens == validation.labelled_positions
        # The cache keeps hidden states in half precision.
        assert (first.ce, first.kl) == pytest.approx((second.ce, second.kl), rel=1e-4)


def test_probing_stops_and_goes_on_without_paying_twice(setup, validation, tmp_path):
    arguments = {
        "teacher": setup.teacher,
        "library": setup.folder / "library",
        "validation": validation,
    }

    def interrupt(done, _total):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        probe_masks(setup.config, tmp_path, **arguments, on_progress=interrupt)
    before = read_rows(tmp_path / PROBE, PROBE_COLUMNS)
    assert 0 < len(before) < 10

    seen = []
    rows = probe_masks(setup.config, tmp_path, **arguments, on_progress=lambda *count: seen.append(count))
    assert seen[-1] == (20, 20)
    # Two budgets of four layers have only 6 + 4 layouts: all are scored, then probing ends by itself.
    allowed = [layout for layout in FOUR_LAYERS if len(layout.attention_layers) in (1, 2)]
    assert {row.layout for row in rows} == set(allowed) and len(rows) == 10
    after = read_rows(tmp_path / PROBE, PROBE_COLUMNS)
    assert after[: len(before)] == before, "a scored layout was scored again"
    held_out = first_utterances(validation, setup.config.probe.validation_tokens)
    assert held_out.speech_tokens <= 120 < validation.speech_tokens
    assert all(row.tokens == held_out.labelled_positions for row in rows)

    scorer = MaskScorer(setup.teacher.model, setup.library, "per_query_head", CPU)
    batches = shared_batches.batches(held_out, setup.teacher.sequence, tokens_per_batch=400, seed=0, epoch=0)
    truth = {row.layout: row.kl for row in scorer.score(allowed, batches)}
    for row in rows:
        assert row.kl == pytest.approx(truth[row.layout], rel=1e-3)
    for ratio, kept in (("1:1", 2), ("1:3", 1)):
        best = min((truth[layout], layout) for layout in allowed if len(layout.attention_layers) == kept)
        assert propose(setup.config, rows, ratio, 3)[0] == best[1]


def test_scores_of_other_budgets_and_settings_stay_apart(setup, validation, tmp_path):
    """Going on with another budget spends scores on it; scores on other tokens answer no later question."""

    def probed(masks, ratios, tokens):
        config = Config.model_validate(
            setup.config.model_dump()
            | {"probe": {"masks": masks, "validation_tokens": tokens}, "search": {"ratios": ratios}}
        )
        rows = probe_masks(
            config, tmp_path, teacher=setup.teacher, library=setup.folder / "library", validation=validation
        )
        return config, rows

    probed(6, ["1:1"], 120)
    config, rows = probed(4, ["1:3"], 120)
    assert sorted(row.layout.ratio for row in rows) == ["1:1"] * 6 + ["1:3"] * 4
    [line] = [line for line in outcome_table(config, rows).splitlines() if line.split()[0] == "1:3"]
    best = min((row for row in rows if row.layout.ratio == "1:3"), key=lambda row: row.kl)
    assert str(best.layout) in line and "100%" in line, "every layout of this budget is scored"
    for tokens, count in ((60, 6), (120, 10), (60, 6)):
        probed(6, ["1:1"], tokens)
        latest = latest_scores(tmp_path)
        assert len(latest) == count and len({row["tokens"] for row in latest}) == 1
    assert len(read_rows(tmp_path / PROBE, PROBE_COLUMNS)) == 16, "nothing was scored twice or lost"


def test_the_last_scores_confirm_predicted_optima(setup, validation, tmp_path, monkeypatch):
    asked = []
    confirming = probe.best_unscored
    monkeypatch.setattr(probe, "best_unscored", lambda *a: asked.append(confirming(*a)) or asked[-1])
    config = Config.model_validate(
        setup.config.model_dump()
        | {"probe": {"masks": 8, "validation_tokens": 120}, "search": {"ratios": ["1:1", "1:3"]}}
    )
    rows = probe_masks(config, tmp_path, teacher=setup.teacher, library=setup.folder / "library", validation=validation)
    assert len(rows) == 8 and asked and rows[-1].layout in {layout for found in asked for layout in found}


def test_a_library_of_another_teacher_is_one_sentence(setup, validation, tmp_path):
    save_library(
        tmp_path / "library",
        setup.library,
        {"teacher": "someone else", "corpus": "c", "settings": "s"},
        LibraryManifest({0: 1.0}, {0: 1.0}, {0: 1.0}, 1, 1, 1.0, 1),
    )
    with pytest.raises(InputError, match="made with another teacher: 'someone else'"):
        probe_masks(setup.config, tmp_path, teacher=setup.teacher, library=tmp_path / "library", validation=validation)


def synthetic_kl(num_layers, seed):
    """log KL: layers, neighbours, and a part that no surrogate of pairs can represent."""
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
    assert propose(Config(), rows, "1:1", 5) == [Layout("MMAA"), Layout("AMAM")]
    with pytest.raises(InputError, match="no layout was scored"):
        propose(Config(), [], "1:1", 1)
    search = Config().search.model_copy(update={"keep_attention": (0, 1, 2)})
    with pytest.raises(InputError, match="no layout has 2 to 2 attention layers"):
        propose(Config().model_copy(update={"search": search}), rows, "1:1", 1)
