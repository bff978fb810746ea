"""A teacher whose layers come one at a time computes what it computes as a whole, and lets go of every layer."""

import pytest
import torch
from test_align import batch_of
from test_probe import batches_of
from tiny_cache import cache_without_ray, random_rows, tiny_config
from tiny_models import transformers_model, write_folder

from mamtra_ray.align.mixer_training import MixerTraining
from mamtra_ray.config import AlignConfig, Config
from mamtra_ray.layouts import Layout
from mamtra_ray.probe.layout_scoring import LayoutScorer
from mamtra_ray.speech_lm.offloading import with_layers_on_cpu
from mamtra_ray.teachers import load_teacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher("huggingface", write_folder(tmp_path_factory.mktemp("teacher"), transformers_model()))


def pointers(layer):
    return {name: parameter.data_ptr() for name, parameter in layer.named_parameters()}


def test_one_layer_at_a_time_is_elsewhere(teacher):
    ids_BL = batch_of([9, 5, 7]).input_ids_BL
    offloaded = with_layers_on_cpu(teacher.model, CPU)
    at_home = [pointers(layer) for layer in teacher.model.body.layers]
    assert [pointers(layer) for layer in offloaded.body.layers] == at_home, "the tensors are shared"
    away = []

    def look(*_):
        now = [pointers(layer) for layer in offloaded.body.layers]
        away.append([index for index, (a, b) in enumerate(zip(now, at_home, strict=True)) if a != b])
        for index in away[-1]:
            assert not set(now[index].values()) & set(at_home[index].values()), "all of the layer is"

    for layer in offloaded.body.layers:
        layer.mlp.register_forward_hook(look)
    with torch.inference_mode():
        found = offloaded.hidden_states(ids_BL)
        torch.testing.assert_close(found, teacher.model.hidden_states(ids_BL), rtol=0, atol=0)
    assert away == [[0], [1], [2], [3]]
    assert [pointers(layer) for layer in offloaded.body.layers] == at_home
    assert teacher.model.fingerprint() == offloaded.fingerprint()


def test_a_layer_that_fails_is_let_go(teacher):
    offloaded = with_layers_on_cpu(teacher.model, CPU)
    layer = offloaded.body.layers[2]

    def fail(*_):
        raise torch.OutOfMemoryError("too large a batch")

    handle, at_home = layer.mlp.register_forward_hook(fail), pointers(layer)
    ids_BL = batch_of([9]).input_ids_BL
    with torch.no_grad():
        with pytest.raises(torch.OutOfMemoryError):
            offloaded.hidden_states(ids_BL)
        assert pointers(layer) == at_home
        handle.remove()
        torch.testing.assert_close(offloaded.hidden_states(ids_BL), teacher.model.hidden_states(ids_BL), rtol=0, atol=0)


def test_alignment_and_probe_are_the_same(teacher):
    config = AlignConfig(tokens=1000, tokens_per_batch=30)
    models = (teacher.model, with_layers_on_cpu(teacher.model, CPU))
    libraries = []
    for model in models:
        training = MixerTraining(model, config, "per_query_head", CPU)
        training.fit_output_projections([batch_of([30, 25], 1)])
        training.step(batch_of([9, 5, 7]))
        libraries.append(training.library())
    for layer, tensors in libraries[0].items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, libraries[1][layer][name]), f"{layer}.{name}"
    rows = random_rows(train=3, validation=0)
    layouts = [Layout("AMAM"), Layout("MMAA"), Layout("AAAA")]
    whole, offloaded = (
        LayoutScorer(model, libraries[0], "per_query_head", CPU, cpu_offload).score(
            layouts, list(batches_of(teacher, rows))
        )
        for model, cpu_offload in zip(models, (False, True), strict=True)
    )
    assert [(row.ce, row.kl) for row in whole] == [(row.ce, row.kl) for row in offloaded]
    assert whole[0].kl > whole[2].kl


def test_the_cache_is_the_same(tmp_path):
    contents = []
    for cpu_offload in (False, True):
        folder = tmp_path / str(cpu_offload)
        folder.mkdir()
        config = tiny_config(folder, rows=random_rows(train=8, validation=2))
        config = Config.model_validate(
            config.model_dump() | {"teacher": config.teacher.model_dump() | {"cpu_offload": cpu_offload}}
        )
        cache_without_ray(config, folder / "cache")
        contents.append({path.name: path.read_bytes() for path in (folder / "cache").rglob("*.parquet")})
    assert contents[0] and contents[0] == contents[1]


def test_two_ways_to_hold_a_teacher_are_refused():
    with pytest.raises(ValueError, match="two ways to hold a large teacher"):
        Config.model_validate({"teacher": {"cpu_offload": True}, "align": {"workers": 2, "fully_shard": True}})
