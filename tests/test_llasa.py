"""Llasa: its vocabulary and chat prompt, against transformers' own Llama; its codec through transformers."""

import importlib
import json
import math
import types

import numpy as np
import pytest
import torch
from kaldi_features import fbank
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Xcodec2Config, Xcodec2Model

from mamtra_ray.errors import InputError
from mamtra_ray.losses import IGNORE
from mamtra_ray.models.pretrained import decoder_config
from mamtra_ray.speech.speech_tokenizers import speech_tokenizer_of_teacher
from mamtra_ray.speech.vocoders import vocoder_of_teacher
from mamtra_ray.speech_lm.generate import GREEDY, generate
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.llasa import load_tokenizer

NUM_CODES = 50
CONTROLS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"] + [
    f"<|{name}_{place}|>"
    for name in ("TEXT_GENERATION", "TEXT_UNDERSTANDING", "SPEECH_GENERATION", "SPEECH_UNDERSTANDING")
    for place in ("START", "END")
]
# The turns of Llama 3.2's template, with its date.
TEMPLATE = """\
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{{- "<|begin_of_text|><|start_header_id|>system<|end_header_id|>Today Date: " + date_string + "<|eot_id|>" }}
{%- for message in messages %}
{{- "<|start_header_id|>" + message["role"] + "<|end_header_id|>\\n\\n" + message["content"] + "<|eot_id|>" }}
{%- endfor %}"""


def write_llasa(folder, tied=True, num_codes=NUM_CODES):
    """A random Llama with the tokenizer's special tokens in Llasa's order: text, controls, codes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokens = [*CONTROLS, *[f"<|s_{index}|>" for index in range(num_codes)]]
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in tokens])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|eot_id|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=256 + len(CONTROLS) + NUM_CODES,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    )
    model = LlamaForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path):
    return write_llasa(tmp_path / "Llasa-tiny", tied=request.param)


def test_prompt_is_the_chat_template_of_the_model_card(folder):
    teacher, tokenizer = load_teacher("llasa", folder), load_tokenizer(folder)
    text = "Hello, it's me."
    chat = [
        {
            "role": "user",
            "content": f"Convert the text to speech:<|TEXT_UNDERSTANDING_START|>{text}<|TEXT_UNDERSTANDING_END|>",
        },
        {"role": "assistant", "content": "<|SPEECH_GENERATION_START|><|s_7|><|s_0|>"},
    ]
    expected = tokenizer.apply_chat_template(
        chat, tokenize=True, continue_final_message=True, return_dict=False, date_string="26 Jul 2024"
    )
    text_tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert teacher.sequence.prompt(text_tokens, prompt_speech_tokens=[7, 0]).tolist() == expected
    assert "26 Jul 2024" in tokenizer.decode(teacher.sequence.prefix)


def test_logits_equal_transformers_llama(folder):
    teacher = load_teacher("llasa", folder)
    upstream = LlamaForCausalLM.from_pretrained(folder).eval()
    offset, end = (
        teacher.model.vocabulary.speech_offset,
        load_tokenizer(folder).get_vocab()["<|SPEECH_GENERATION_END|>"],
    )
    input_ids, labels = teacher.sequence.training_example([1, 2, 3], [5, 9, 49])
    assert input_ids[-3:].tolist() == [offset + 5, offset + 9, offset + 49]
    assert labels[-4:].tolist() == [5, 9, 49, NUM_CODES] and set(labels[:-4].tolist()) == {IGNORE}
    with torch.no_grad():
        ours, theirs = teacher.model(input_ids[None])[0], upstream(input_ids[None]).logits[0]
    torch.testing.assert_close(ours, theirs[:, [*range(offset, offset + NUM_CODES), end]], rtol=1e-4, atol=1e-5)


def test_generation_equals_transformers_generate(folder):
    teacher = load_teacher("llasa", folder)
    upstream = LlamaForCausalLM.from_pretrained(folder).eval()
    offset, end = (
        teacher.model.vocabulary.speech_offset,
        load_tokenizer(folder).get_vocab()["<|SPEECH_GENERATION_END|>"],
    )
    prompt = teacher.sequence.prompt([1, 2, 3])
    (ours,) = generate(teacher.model, [prompt], [(0, 15)], GREEDY)
    text_ids = [index for index in range(offset) if index != end]
    theirs = upstream.generate(
        prompt[None], do_sample=False, max_new_tokens=15, eos_token_id=end, pad_token_id=end, suppress_tokens=text_ids
    )[0, len(prompt) :].tolist()
    assert [offset + token for token in ours.tokens] == [token for token in theirs if token != end]


def test_context_limits_the_speech(folder):
    teacher = load_teacher("llasa", folder)
    fewest, most = teacher.length_bounds([1] * 40)
    assert fewest == 0 and most + len(teacher.sequence.prompt([1] * 40)) == 2048
    with pytest.raises(InputError, match="no room"):
        teacher.length_bounds([1] * 2048)
    student = make_student(teacher.model, "AMM")
    assert student.layout.mamba_layers == (1, 2)


def test_the_released_shape_has_the_published_parameters():
    config = decoder_config(
        LlamaConfig(
            vocab_size=193_800,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
        )
    )
    layer = 2048 * (2 * 2048 + 2 * 512) + 3 * 2048 * 8192 + 2 * 2048
    assert config.num_layers * layer + 193_800 * 2048 + 2048 == 1_370_048_512
    assert not config.qkv_bias and config.mixer.num_kv_heads == 8


def test_foreign_models_are_refused(tmp_path):
    folder = write_llasa(tmp_path / "short", num_codes=NUM_CODES - 1)
    with pytest.raises(InputError, match=r"tokenizer has no <\|s_49\|>"):
        load_teacher("llasa", folder)
    other = write_llasa(tmp_path / "other")
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace("TEXT_UNDERSTANDING_END", "SOMETHING_ELSE"))
    with pytest.raises(InputError, match="TEXT_UNDERSTANDING_END"):
        load_teacher("llasa", other)
    (other / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        load_teacher("llasa", other)


def write_xcodec2(folder):
    """A random Xcodec2 of 64 codes, with the preprocessor_config.json that the published folder has."""
    config = Xcodec2Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        encoder_hidden_size=4,
        quantization_dim=48,
        quantization_levels=[4, 4, 4],
        semantic_model_config={
            "model_type": "wav2vec2-bert",
            "num_hidden_layers": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "feature_projection_input_dim": 160,
        },
    )
    torch.manual_seed(0)
    model = Xcodec2Model(config).eval()
    model.save_pretrained(folder)
    settings = {"feature_extractor_type": "Xcodec2FeatureExtractor", "sampling_rate": 16_000, "hop_length": 320}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return model


def test_xcodec2_decodes_through_transformers(tmp_path):
    model = write_xcodec2(tmp_path / "xcodec2")
    vocoder = vocoder_of_teacher("llasa", None, tmp_path / "xcodec2")
    tokens = [0, 63, 5, 17, 42]
    sound = vocoder.decode(tokens)
    assert vocoder.sample_rate == 16_000 and vocoder.num_tokens == 64 and sound.dtype == np.float32
    assert len(sound) == 320 * len(tokens)
    with torch.no_grad():
        expected = model.decode(torch.tensor(tokens)[None, None]).audio_values.flatten()
    np.testing.assert_allclose(sound, expected.numpy(), atol=1e-5)
    assert np.abs(sound - vocoder.decode([*tokens[:-1], 0])).max() > 0
    for wrong in ([], [64], [-1]):
        with pytest.raises(InputError, match="from 0 to 63"):
            vocoder.decode(wrong)
    with pytest.raises(InputError, match=r"evaluate\.codec"):
        vocoder_of_teacher("llasa", None)
    assert math.prod([4] * 8) == 65_536


@pytest.mark.parametrize("num_samples", [320, 3199, 3200, 5000])
def test_xcodec2_encodes_what_transformers_extractor_gives(tmp_path, monkeypatch, num_samples):
    """transformers' extractor needs torchaudio for one function; here it is written out."""
    model = write_xcodec2(tmp_path / "xcodec2")
    tokenizer = speech_tokenizer_of_teacher("llasa", None, tmp_path / "xcodec2")
    kaldi = types.SimpleNamespace(fbank=lambda wave, **_: torch.from_numpy(fbank(wave[0].numpy())).float())
    stand_in = types.SimpleNamespace(compliance=types.SimpleNamespace(kaldi=kaldi))
    module = importlib.import_module("transformers.models.xcodec2.feature_extraction_xcodec2")
    monkeypatch.setattr(module, "torchaudio", stand_in, raising=False)
    sound = 0.1 * np.random.default_rng(num_samples).normal(size=num_samples).astype(np.float32)
    extractor = module.Xcodec2FeatureExtractor()
    expected = extractor(sound, sampling_rate=16_000, return_tensors="pt")
    given = {}
    encode = tokenizer.codec.model.encode
    monkeypatch.setattr(tokenizer.codec.model, "encode", lambda **inputs: given.update(inputs) or encode(**inputs))
    (found,) = tokenizer.encode([sound])
    assert torch.equal(given["input_values"], expected["input_values"])
    torch.testing.assert_close(given["input_features"], expected["input_features"], atol=2e-3, rtol=0)
    with torch.no_grad():
        encoded = model.encode(**expected)
    assert found.tolist() == encoded.audio_codes[0, 0][encoded.audio_codes_mask[0].bool()].tolist()
    assert len(found) == (num_samples + 1) // 320 and found.dtype == np.int32
