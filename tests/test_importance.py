"""Layer importance against its definition, computed with transformers' own model."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_probe import batches_of, data, setup, validation  # noqa: F401 (fixtures)
from tiny_cache import random_rows
from tiny_models import transformers_model

from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.probe.layout_scoring import cosine_importance
from mamtra_ray.run.names import PROBE
from mamtra_ray.run.rows import ProbeRow, read_table
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.search import importance
from mamtra_ray.search.importance import layer_importance, single_replacements
from mamtra_ray.speech.error_rate import ErrorRate


def test_cosine_importance_is_one_minus_the_mean_cosine_of_transformers_layers(setup):  # noqa: F811
    batches = []
    for batch in batches_of(setup.teacher, random_rows(train=3, validation=0)):
        # Padding on the right must not count.
        padded = torch.cat([batch.input_ids_BL, torch.zeros(1, 5, dtype=torch.long)], 1)
        mask = torch.arange(padded.shape[1])[None] < batch.input_ids_BL.shape[1]
        batches.append(SimpleNamespace(input_ids_BL=padded, attention_mask_BL=mask))
    outputs = []
    model = transformers_model()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, args, output: outputs.append((args[0], output)))
    cosines = [[] for _ in range(4)]
    with torch.no_grad():
        for batch in batches:
            outputs.clear()
            model(batch.input_ids_BL[batch.attention_mask_BL][None])
            for layer, (before, after) in enumerate(outputs):
                cosines[layer] += torch.cosine_similarity(before[0], after[0], dim=-1).tolist()
    found = cosine_importance(setup.teacher.model, batches)
    assert found == pytest.approx([1 - sum(values) / len(values) for values in cosines], abs=1e-4)


def test_single_replacements():
    assert [str(layout) for layout in single_replacements(3)] == ["MAA", "AMA", "AAM"]


@pytest.mark.parametrize("criterion", ["kl", "cosine"])
def test_importance_is_kept_and_reused(setup, data, tmp_path, criterion, monkeypatch):  # noqa: F811
    arguments = (criterion, setup.config, tmp_path, data, WorkerResources())
    scores = layer_importance(*arguments)
    assert len(scores) == 4
    if criterion == "kl":
        kl = {str(row.layout): row.kl for row in read_table(tmp_path / PROBE, ProbeRow)}
        assert scores == [kl[name] for name in ("MAAA", "AMAA", "AAMA", "AAAM")]
    monkeypatch.setattr(importance, "ProbePool", None)  # nothing may be scored again
    assert layer_importance(*arguments) == scores
    content = json.loads((tmp_path / f"importance_{criterion}.json").read_text())
    assert content["criterion"] == criterion and content["made_by"]["teacher"] == setup.teacher.fingerprint


def test_words_lost_are_the_difference_to_the_teacher(setup, data, tmp_path, monkeypatch):  # noqa: F811
    """Students with one replaced layer are spoken; here a fake recognizer gives each layer its WER."""
    spoken = {}

    def fake(config, systems, folder, *, teacher, worker, on_progress):
        from mamtra_ray.speech_lm.speech_lm import SpeechLM

        for name, student in systems.items():
            assert str(SpeechLM.load(student).layout) == name
        spoken.update(systems)
        wer = {name: 0.1 + 0.05 * name.index("M") for name in systems}
        return {name: SimpleNamespace(wer=ErrorRate(value, 0, 1)) for name, value in (wer | {"teacher": 0.08}).items()}

    monkeypatch.setattr(importance, "evaluate_systems", fake)
    scores = layer_importance("wer", setup.config, tmp_path, data, WorkerResources())
    assert scores == pytest.approx([0.02, 0.07, 0.12, 0.17]) and len(spoken) == 4
    assert from_strategy("importance", 4, "1:1", scores) == Layout("MMAA")
