"""Export: a process that knows only transformers must compute and generate the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import SEQUENCE, SPEECH, VOCABULARY, transformers_model, write_folder
from torch import nn
from transformers import AutoModelForCausalLM

from mamtra_ray.errors import InputError
from mamtra_ray.speech_lm.generate import generate
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher

IDS = torch.randint(VOCABULARY.size, (2, 21), generator=torch.Generator().manual_seed(1))
CASES = {
    "qwen2 per_query_head": ("qwen2", "AMMA", "per_query_head", False, {}),
    "qwen2 per_kv_head, head with bias": ("qwen2", "MAAM", "per_kv_head", True, {}),
    "llama, pure Mamba": ("llama", "MMMM", "per_query_head", False, {}),
    "llama with biases": ("llama", "MAAM", "per_query_head", False, {"attention_bias": True}),
}
READER = """
import json, sys, torch
from transformers import AutoModelForCausalLM
assert "mamtra_ray" not in sys.modules
ids, prompt = torch.load("inputs.pt", weights_only=True)
results = {}
for folder in json.loads(sys.argv[1]):
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(prompt, do_sample=False, max_new_tokens=12, min_new_tokens=12, output_logits=True,
                                output_scores=True, return_dict_in_generate=True)
    results[folder] = {"logits": logits, "tokens": tokens.sequences[:, prompt.shape[1]:], "scores": tokens.scores[0],
                       "name": type(model).__name__}
assert "mamtra_ray" not in sys.modules
torch.save(results, "results.pt")
"""


def make_exportable(kind, layout, sharing, head_bias, changes, folder):
    model = transformers_model(kind, **changes)
    if head_bias:
        model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY.size, generator=torch.Generator().manual_seed(2)))
    teacher = load_teacher("huggingface", write_folder(folder, model)).model
    student = make_student(teacher, layout, state_sharing=sharing)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if ".mamba." in name and "A_log" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return student.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Per case: the student, its exported folder, and what a process with transformers alone made of it."""
    root = tmp_path_factory.mktemp("export")
    students = {}
    for number, (name, case) in enumerate(CASES.items()):
        students[name] = make_exportable(*case, root / f"teacher{number}")
        students[name].save_granite(root / str(number))
    prompt = SEQUENCE.prompt([3, 4, 5], (), [7, 7])[None]
    torch.save((IDS, prompt), root / "inputs.pt")
    names = [str(number) for number in range(len(CASES))]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", READER, json.dumps(names)]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    results = torch.load(root / "results.pt", weights_only=True)
    return {name: (students[name], root / number, results[number]) for name, number in zip(CASES, names, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_transformers_alone_computes_the_same(exported, case):
    student, _, result = exported[case]
    with torch.no_grad():
        expected = student.hidden_states(IDS) @ student.head.weight.T
    assert result["name"] == "GraniteMoeHybridForCausalLM"
    torch.testing.assert_close(result["logits"][..., SPEECH], expected, atol=1e-5, rtol=1e-5)
    others = torch.ones(VOCABULARY.size, dtype=torch.bool)
    others[SPEECH] = False
    assert result["logits"][..., others].abs().max() == 0


@pytest.mark.parametrize("case", CASES)
def test_transformers_generate_is_restricted_and_biased_as_the_head(exported, case):
    student, _, result = exported[case]
    prompt = SEQUENCE.prompt([3, 4, 5], (), [7, 7])
    (expected,) = generate(student, [prompt], [(12, 12)])
    assert (result["tokens"][0] - VOCABULARY.speech_offset).tolist() == list(expected.tokens)
    with torch.no_grad():
        scores = student(prompt[None])[:, -1]
    running = [token for token in range(VOCABULARY.speech_size) if token not in VOCABULARY.stop_ids]
    torch.testing.assert_close(result["scores"][:, SPEECH][:, running], scores[:, running], atol=1e-5, rtol=1e-5)
    others = torch.ones(VOCABULARY.size, dtype=torch.bool)
    others[SPEECH] = False
    assert result["scores"][:, others].max() < -1e8


@pytest.mark.parametrize("case", CASES)
def test_reading_back_is_bit_for_bit(exported, case):
    student, folder, _ = exported[case]
    loaded = SpeechLM.load_granite(folder)
    assert loaded.config == student.config and loaded.vocabulary == student.vocabulary
    assert loaded.fingerprint() == student.fingerprint()
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("case", ["qwen2 per_query_head", "llama with biases"])
def test_readers_of_the_older_keys_alone_compute_the_same(exported, case, tmp_path):
    """Names of before transformers 5: layer_types mamba and attention, rope_theta and rope_scaling side by side."""
    student, folder, result = exported[case]
    content = json.loads((folder / "config.json").read_text())
    assert content["layer_types"] == [{"A": "attention", "M": "mamba"}[letter] for letter in str(student.layout)]
    rope = content.pop("rope_parameters")
    assert content["rope_theta"] == rope["rope_theta"] == student.config.rope_parameters["rope_theta"]
    assert ("rope_scaling" in content) == (rope["rope_type"] != "default")
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, result["logits"], atol=1e-6, rtol=1e-6)


def test_half_precision(exported, tmp_path):
    student = exported["qwen2 per_kv_head, head with bias"][0]
    half = SpeechLM.load_granite(exported["qwen2 per_kv_head, head with bias"][1]).bfloat16()
    half.save_granite(tmp_path / "half")
    loaded = SpeechLM.load_granite(tmp_path / "half")
    assert loaded.dtype == torch.bfloat16 and loaded.fingerprint() == half.fingerprint()
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded.fingerprint() != student.fingerprint()


def test_unusable_folders_get_one_sentence(exported, tmp_path):
    student = exported["qwen2 per_query_head"][0]
    student.save_granite(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[:1000])
    with pytest.raises(InputError, match="truncated"):
        SpeechLM.load_granite(tmp_path)
    weights.write_bytes(content)
    plain = {key: value for key, value in json.loads(config.read_text()).items() if key != "mamtra_ray"}
    config.write_text(json.dumps(plain))
    with pytest.raises(InputError, match="no export of this project"):
        SpeechLM.load_granite(tmp_path)
    with pytest.raises(InputError, match="no speech_lm"):
        SpeechLM.load(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        SpeechLM.load_granite(tmp_path / "nowhere")


def test_foreign_and_swapped_files_get_one_sentence(exported, tmp_path):
    student = exported["qwen2 per_kv_head, head with bias"][0]
    student.save_granite(tmp_path / "one")
    other = make_exportable(*CASES["qwen2 per_kv_head, head with bias"], tmp_path / "teacher")
    with torch.no_grad():
        other.head.bias += 0.25
    other.save_granite(tmp_path / "other")
    other.save(tmp_path / "native")
    for name, problem in (("generation_config.json", "has not the head's bias"), ("model.safetensors", "hash differs")):
        mine = (tmp_path / "one" / name).read_bytes()
        (tmp_path / "one" / name).write_bytes((tmp_path / "other" / name).read_bytes())
        if name == "model.safetensors":
            (tmp_path / "one" / name).write_bytes((tmp_path / "native" / name).read_bytes())
        with pytest.raises(InputError, match=problem):
            SpeechLM.load_granite(tmp_path / "one")
        (tmp_path / "one" / name).write_bytes(mine)
    SpeechLM.load_granite(tmp_path / "one")
    with pytest.raises(InputError, match="no export of this project"):
        SpeechLM.load_granite(write_folder(tmp_path / "foreign", transformers_model("llama")))
    torch.save({"a": torch.zeros(2)}, tmp_path / "one" / "model.safetensors")
    with pytest.raises(InputError, match="no safetensors file"):
        SpeechLM.load_granite(tmp_path / "one")
    with pytest.raises(InputError, match="is no speech_lm manifest"):
        SpeechLM.load(tmp_path / "one")


def test_settings_of_the_generation_config_may_be_changed(exported, tmp_path):
    student = exported["qwen2 per_kv_head, head with bias"][0]
    student.save_granite(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "temperature": 0.7}))
    assert SpeechLM.load_granite(tmp_path).fingerprint() == student.fingerprint()


def test_a_mixer_trained_in_the_expanded_form_is_not_compacted(exported, tmp_path):
    from mamtra_ray.artifacts import file_hash, with_checksum
    from mamtra_ray.models.checkpoint import read_tensors, write_tensors

    exported["qwen2 per_query_head"][0].save_granite(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors = read_tensors(weights)
    name = "model.layers.1.mamba.in_proj.weight"
    tensors[name][40] += 1  # a row of x, of which its group's other heads hold copies
    write_tensors(weights, tensors)
    content = json.loads(config.read_text())
    content["mamtra_ray"] = with_checksum(content["mamtra_ray"] | {"weights_sha256": file_hash(weights)})
    config.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"layers\.1\.mamba\.in_proj\.weight is not an expanded"):
        SpeechLM.load_granite(Path(tmp_path))
