"""Speech LMs: sequences, the Hugging Face loader, students, and the native checkpoint."""

import json

import pytest
import torch
from tiny_models import NUM_LAYERS, SEQUENCE, SPEECH, VOCABULARY, transformers_model, write_folder
from torch import nn
from transformers import GPT2Config

from mamtra_ray.artifacts import with_checksum
from mamtra_ray.errors import InputError
from mamtra_ray.losses import IGNORE
from mamtra_ray.speech_lm.sequences import Vocabulary
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher

IDS = torch.randint(VOCABULARY.size, (2, 21), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def teacher_folder(tmp_path):
    return write_folder(tmp_path / "teacher", transformers_model())


@pytest.fixture
def teacher(teacher_folder):
    return load_teacher("huggingface", teacher_folder)


def test_training_example_and_prompt():
    input_ids, labels = SEQUENCE.training_example([5, 6, 7], [40, 0])
    assert input_ids.tolist() == [71, 5, 6, 7, 72, 73, 30 + 40, 30]
    assert labels.tolist() == [IGNORE] * 5 + [40, 0, 38]
    assert input_ids.dtype == labels.dtype == torch.int64
    assert SEQUENCE.training_example([5], [])[1].tolist() == [IGNORE] * 3 + [38]
    assert SEQUENCE.prompt([5], [6, 7], [1]).tolist() == [71, 6, 7, 5, 72, 73, 31]
    with pytest.raises(InputError, match="text token 30"):
        SEQUENCE.prompt([5, 30])
    with pytest.raises(InputError, match="speech token -1"):
        SEQUENCE.training_example([5], [3, -1])


def test_vocabulary_checks_its_stop_ids():
    assert (VOCABULARY.speech_offset, VOCABULARY.control_offset, VOCABULARY.size) == (30, 71, 75)
    with pytest.raises(InputError, match="must contain"):
        Vocabulary(10, 10, 1, 9, (8,))
    with pytest.raises(InputError, match="below 10"):
        Vocabulary(10, 10, 1, 9, (9, 10))


def test_length_bounds(teacher):
    assert teacher.length_bounds([1, 2, 3]) == (6, 60)
    limited = type(teacher)(**{**teacher.__dict__, "max_length": 20})
    assert limited.length_bounds([1, 2, 3]) == (6, 14)
    with pytest.raises(InputError, match="no room"):
        limited.length_bounds(list(range(20)))


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_teacher_equals_transformers_bit_for_bit(tmp_path, kind, max_shard_size):
    model = transformers_model(kind)
    folder = write_folder(tmp_path / kind, model, max_shard_size=max_shard_size)
    assert (folder / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    teacher = load_teacher("huggingface", folder)
    with torch.no_grad():
        assert torch.equal(teacher.model(IDS), model(IDS).logits[..., SPEECH])
        hidden, layers = teacher.model.hidden_states(IDS, return_layers=True)
        expected = model.model(IDS, output_hidden_states=True)
    assert torch.equal(hidden, expected.last_hidden_state)
    assert len(layers) == NUM_LAYERS
    for ours, theirs in zip(layers[:-1], expected.hidden_states[1:-1], strict=True):
        assert torch.equal(ours, theirs)
    assert not teacher.model.training and teacher.tokens_per_second == 25.0


def test_llama_with_biases_everywhere_and_a_padded_vocabulary(tmp_path):
    model = transformers_model("llama", attention_bias=True, vocab_size=80)
    teacher = load_teacher("huggingface", write_folder(tmp_path, model))
    assert teacher.model.body.embed_tokens.weight.shape[0] == VOCABULARY.size
    with torch.no_grad():
        assert torch.equal(teacher.model(IDS), model(IDS).logits[..., SPEECH])


def test_head_bias_and_half_precision_files(tmp_path):
    model = transformers_model().half()
    model.lm_head.bias = nn.Parameter(torch.randn(VOCABULARY.size).half())
    teacher = load_teacher("huggingface", write_folder(tmp_path, model))
    assert teacher.model.dtype == torch.float32
    assert torch.equal(teacher.model.head.bias, model.lm_head.bias[SPEECH].float())
    half = load_teacher("huggingface", tmp_path, dtype=torch.float16)
    assert half.model.dtype == torch.float16
    assert half.fingerprint == teacher.fingerprint
    with torch.no_grad():
        teacher.model.head.bias[3] += 0.01
    assert teacher.model.fingerprint() != teacher.fingerprint


def test_unusable_folders_get_one_sentence(teacher_folder, tmp_path):
    with pytest.raises(InputError, match="did you mean 'llasa'"):
        load_teacher("lasa", teacher_folder)
    with pytest.raises(InputError, match=r"needs teacher\.path"):
        load_teacher("huggingface")
    with pytest.raises(InputError, match="is no folder"):
        load_teacher("huggingface", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="does not exist"):
        load_teacher("huggingface", tmp_path / "empty")
    weights = teacher_folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="truncated"):
        load_teacher("huggingface", teacher_folder)
    weights.unlink()
    with pytest.raises(InputError, match="neither"):
        load_teacher("huggingface", teacher_folder)
    GPT2Config().save_pretrained(teacher_folder)
    with pytest.raises(InputError, match="gpt2"):
        load_teacher("huggingface", teacher_folder)
    (teacher_folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no transformers config"):
        load_teacher("huggingface", teacher_folder)
    (teacher_folder / "speech_lm.json").write_text(json.dumps({"kind": "tokenizer"}))
    with pytest.raises(InputError, match="no speech_lm_format"):
        load_teacher("huggingface", teacher_folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_sliding_window": True, "max_window_layers": 1}, "sliding-window"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_hidden_layers": 5, "layer_types": None}, "no tensor model.layers.4"),
        ({"num_key_value_heads": 4}, "k_proj"),
        ({"vocab_size": 60}, "60 embeddings are fewer"),
    ],
)
def test_configs_that_do_not_fit_are_refused(teacher_folder, changes, message):
    path = teacher_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=message):
        load_teacher("huggingface", teacher_folder)


def test_student_shares_values_and_leaves_the_teacher_alone(teacher):
    before = teacher.model.fingerprint()
    student = make_student(teacher.model, "AMMA")
    assert str(student.layout) == "AMMA" and sorted(student.body.mixers) == [1, 2]
    for name, tensor in student.state_dict().items():
        if ".mamba." not in name:
            assert torch.equal(tensor, teacher.model.state_dict()[name])
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {"body.embed_tokens.weight", "head.weight"}
    student(IDS).square().mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1
    assert teacher.model.fingerprint() == before
    with torch.no_grad():
        all_attention = make_student(teacher.model, "AAAA")
        assert torch.equal(all_attention(IDS), teacher.model(IDS))
        shared = make_student(teacher.model, "AMMA", share_weights=True)
    assert shared.head.weight.data_ptr() == teacher.model.head.weight.data_ptr()


def test_a_layers_mixer_is_the_same_in_every_layout(teacher):
    one, other = (make_student(teacher.model, letters, seed=3).body.mixers[2] for letters in ("AMMA", "AAMM"))
    another_seed = make_student(teacher.model, "AAMA", seed=4).body.mixers[2]
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    assert not torch.equal(one.in_proj.weight, another_seed.in_proj.weight)


def test_aligned_students_take_their_mixers_from_the_library(teacher):
    donor = make_student(teacher.model, "MMMM", seed=9)
    library = {layer: dict(mixer.state_dict()) for layer, mixer in donor.body.mixers.items()}
    student = make_student(teacher.model, "AMAM", "aligned", library)
    assert torch.equal(student.body.mixers[3].in_proj.weight, library[3]["in_proj.weight"])
    with torch.no_grad():
        student.body.mixers[3].in_proj.weight += 1
    assert not torch.equal(student.body.mixers[3].in_proj.weight, library[3]["in_proj.weight"])
    with pytest.raises(InputError, match="needs a mixer library"):
        make_student(teacher.model, "AMAM", "aligned")
    with pytest.raises(InputError, match=r"no layer 3.*\[1\]"):
        make_student(teacher.model, "AMAM", "aligned", {1: library[1]})
    with pytest.raises(InputError, match="A_log is missing"):
        make_student(teacher.model, "AAAM", "aligned", {3: {k: v for k, v in library[3].items() if k != "A_log"}})
    with pytest.raises(InputError, match="does not fit"):
        make_student(teacher.model, "AAAM", "aligned", library, state_sharing="per_kv_head")


def test_students_that_cannot_be_made(teacher):
    with pytest.raises(InputError, match="has 3 layers"):
        make_student(teacher.model, "AMA")
    with pytest.raises(InputError, match="did you mean 'kaiming'"):
        make_student(teacher.model, "AMAM", "kaming")
    student = make_student(teacher.model, "AMAM")
    with pytest.raises(InputError, match="layer 3"):
        make_student(student, "AMMA")
    further = make_student(student, "MMAM", seed=5)
    assert torch.equal(further.body.mixers[1].in_proj.weight, student.body.mixers[1].in_proj.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_sharing", ["per_query_head", "per_kv_head"])
def test_native_checkpoint_survives_bit_for_bit(teacher, tmp_path, dtype, state_sharing):
    student = make_student(teacher.model, "MAAM", state_sharing=state_sharing).to(dtype)
    student.save(tmp_path)
    loaded = SpeechLM.load(tmp_path)
    assert loaded.config == student.config and loaded.vocabulary == VOCABULARY and loaded.dtype == dtype
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        assert torch.equal(loaded(IDS), student(IDS))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in student.named_parameters() if p.requires_grad
    }
    assert SpeechLM.load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_damaged_native_checkpoints_get_one_sentence(teacher, tmp_path):
    make_student(teacher.model, "AMAM").save(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    good, content = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(good[:-100])
    with pytest.raises(InputError, match="truncated"):
        SpeechLM.load(tmp_path)
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(InputError, match="hash differs"):
        SpeechLM.load(tmp_path)
    weights.write_bytes(good)
    config.write_text(json.dumps(content | {"kind": "teacher_cache"}))
    with pytest.raises(InputError, match="no speech_lm"):
        SpeechLM.load(tmp_path)
    config.write_text(json.dumps(content | {"schema_version": 99}))
    with pytest.raises(InputError, match="99"):
        SpeechLM.load(tmp_path)
    other_layout = content | {"model": content["model"] | {"layout": "AMMM"}}
    config.write_text(json.dumps(other_layout))
    with pytest.raises(InputError, match="has not the checksum"):
        SpeechLM.load(tmp_path)
    config.write_text(json.dumps(with_checksum(other_layout)))
    with pytest.raises(InputError, match=r"layers\.2"):
        SpeechLM.load(tmp_path)
    without_heads = {key: value for key, value in content["model"].items() if key != "num_heads"}
    config.write_text(json.dumps(with_checksum(content | {"model": without_heads})))
    with pytest.raises(InputError, match="lacks num_heads"):
        SpeechLM.load(tmp_path)
    config.write_text("[]")
    with pytest.raises(InputError, match="no speech_lm"):
        SpeechLM.load(tmp_path)
