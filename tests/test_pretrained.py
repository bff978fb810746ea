"""Reading foreign checkpoints: every tensor has a place or is named, and the head is the one transformers uses."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import LLAMA3_ROPE, SPEECH, transformers_model, write_folder
from transformers import AutoConfig, AutoModelForCausalLM

from mamtra_ray.errors import InputError
from mamtra_ray.models.pretrained import decoder_config, read_decoder_config
from mamtra_ray.teachers import load_teacher


def changed_folder(folder, kind="qwen2", tensors=None, drop=(), **config):
    """A teacher's folder whose files are then altered."""
    write_folder(folder, transformers_model(kind))
    weights, settings = folder / "model.safetensors", folder / "config.json"
    content = {name: tensor for name, tensor in load_file(weights).items() if name not in drop}
    save_file(content | (tensors or {}), weights, metadata={"format": "pt"})
    settings.write_text(json.dumps(json.loads(settings.read_text()) | config))
    return folder


def load(folder):
    return load_teacher("huggingface", folder).model


def test_scales_of_a_quantized_checkpoint_are_not_dropped(tmp_path):
    """The scale is part of an FP8 weight's value: without it the weights are hundreds of times too large."""
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = dict(transformers_model().state_dict())[name]
    scale = weight.abs().max() / 448
    eighth = {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}_scale": scale.reshape(1)}
    with pytest.raises(InputError, match=r"q_proj.weight is stored as float8_e4m3fn"):
        load(changed_folder(tmp_path / "fp8", tensors=eighth))
    dequantized = {f"{name}_scale": scale.reshape(1)}
    with pytest.raises(InputError, match=r"no place for: model.layers.0.self_attn.q_proj.weight_scale"):
        load(changed_folder(tmp_path / "scale", tensors=dequantized))
    with pytest.raises(InputError, match="quantization_config"):
        load(changed_folder(tmp_path / "config", quantization_config={"quant_method": "fp8"}))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.self_attn.q_norm.weight", "no place for: model.layers.1.self_attn.q_norm.weight"),
        ("model.layers.4.mlp.up_proj.weight", "no place for: model.layers.4.mlp.up_proj.weight"),
        ("value_head.weight", "no place for: value_head.weight"),
        ("model.layers.0.self_attn.o_proj.bias", "no place for: model.layers.0.self_attn.o_proj.bias"),
    ],
)
def test_tensors_without_a_place_are_named(tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        load(changed_folder(tmp_path / "teacher", tensors={name: torch.ones(32)}))


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.3.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_tensors_are_named(tmp_path, name):
    with pytest.raises(InputError, match=f"has no tensor {name}"):
        load(changed_folder(tmp_path / "teacher", drop=(name,)))


def test_a_tied_model_with_a_head_of_its_own(tmp_path):
    """Training frameworks save both; versions of transformers differ in which of them they use."""
    table = dict(transformers_model("llama").state_dict())["model.embed_tokens.weight"]
    equal = changed_folder(tmp_path / "equal", "llama", tensors={"lm_head.weight": table.clone()})
    theirs = AutoModelForCausalLM.from_pretrained(equal)
    assert torch.equal(load(equal).head.weight, theirs.lm_head.weight[SPEECH])
    other = changed_folder(tmp_path / "other", "llama", tensors={"lm_head.weight": table + 1})
    with pytest.raises(InputError, match=r"tie_word_embeddings is true, but lm_head.weight is not"):
        load(other)


def test_stored_rotary_frequencies_are_compared(tmp_path):
    frequencies = transformers_model().model.rotary_emb.inv_freq
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    load(changed_folder(tmp_path / "equal", tensors={name: frequencies.clone()}))
    with pytest.raises(InputError, match=r"are not the rotary frequencies that config.json describes"):
        load(changed_folder(tmp_path / "other", tensors={name: frequencies / 4}))


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (
            {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
            "RoPE type 'longrope' is not supported",
        ),
        ({"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}, "unknown key partial_rotary_factor"),
        ({"rope_type": "default", "mrope_section": [2, 1, 1]}, "unknown key mrope_section"),
        ({**LLAMA3_ROPE, "low_freq_factor": 4.0}, "low_freq_factor must be below"),
    ],
)
def test_rope_that_we_do_not_compute_is_refused_by_name(tmp_path, rope, message):
    with pytest.raises(InputError, match=message):
        load(changed_folder(tmp_path / "teacher", rope_parameters={"rope_theta": 1e4, **rope}))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize(
    "drop", [(), ("rope_parameters",), ("rms_norm_eps", "hidden_act"), ("max_position_embeddings",)], ids=str
)
def test_config_files_with_and_without_defaults(tmp_path, kind, drop):
    """A complete file is read without transformers, one that leaves something out with it: alike."""
    path = changed_folder(tmp_path, kind) / "config.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in drop}
    path.write_text(json.dumps(content))
    expected = AutoConfig.from_pretrained(tmp_path)
    assert read_decoder_config(tmp_path) == (decoder_config(expected), expected.tie_word_embeddings)
    older = {**content, "rope_theta": 5e5}
    older.pop("rope_parameters", None)
    path.write_text(json.dumps(older))
    assert read_decoder_config(tmp_path)[0].rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding-window"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers = '4' is no whole number"),
        ({"hidden_size": 32.5}, "hidden_size = 32.5 is no positive whole number"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple of num_kv_heads 3"),
        ({"model_type": "gpt2"}, "'gpt2' cannot be a teacher body"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "RoPE type None is not supported"),
    ],
)
def test_configs_that_the_decoder_cannot_take(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        load(changed_folder(tmp_path / "teacher", **changes))


def test_the_demo_teacher_is_loaded_without_transformers():
    """Its import would take every worker process of a search more than a second."""
    code = "import sys, mamtra_ray.teachers as t; t.load_teacher('demo'); print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
