"""The hybrid decoder: equal to the teacher where it keeps attention, and consistent under caches and padding."""

import copy
import functools
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_models import SPEECH, VOCABULARY, transformers_model, write_folder

from mamtra_ray.errors import InputError
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher

LENGTH = 29
GENERATOR = torch.Generator().manual_seed(1)
IDS = torch.randint(VOCABULARY.size, (3, LENGTH), generator=GENERATOR)
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


KINDS = ["qwen2", "llama", "llama with biases"]


@functools.cache
def load(kind):
    """(transformers' model, our teacher)."""
    model = transformers_model(kind.split()[0], **({"attention_bias": True} if "biases" in kind else {}))
    with tempfile.TemporaryDirectory() as folder:
        return model, load_teacher("huggingface", write_folder(Path(folder), model)).model


@pytest.fixture(scope="module", params=KINDS)
def models(request):
    return load(request.param)


@pytest.fixture(
    scope="module",
    params=[
        ("AMAM", "qwen2", "per_query_head"),
        ("MAAM", "llama", "per_query_head"),
        ("MMMM", "qwen2", "per_query_head"),
        ("AMMA", "llama with biases", "per_kv_head"),
    ],
    ids=" ".join,
)
def student(request):
    letters, kind, sharing = request.param
    student = make_student(load(kind)[1], letters, state_sharing=sharing)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Away from the identity convolution of a fresh transfer, which would hide mistakes in its state.
        for name, parameter in student.named_parameters():
            if "conv1d.weight" in name:
                parameter.normal_(0, 0.5, generator=generator)
    return student.eval()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def padding_mask(lengths, side):
    position = torch.arange(LENGTH)
    return torch.stack([position < n if side == "right" else position >= LENGTH - n for n in lengths])


def place(rows, lengths, side, fill):
    """Rows (their first ``lengths`` positions) moved to one side of a padded batch."""
    padded = torch.full_like(rows, fill) if rows.dim() == 2 else torch.full_like(rows, float(fill))
    for row, n in enumerate(lengths):
        padded[row, :n] = rows[row, :n]
        if side == "left":
            padded[row] = padded[row].roll(LENGTH - n, 0)
    return padded


def test_all_attention_is_the_teacher_bit_for_bit(models):
    model, teacher = models
    student = make_student(teacher, "AAAA")
    lengths = [LENGTH, 17, 5]
    mask = padding_mask(lengths, "right")
    expected = model(IDS, attention_mask=mask.long()).logits[..., SPEECH]
    found = student(IDS, mask)
    assert torch.equal(student(IDS), model(IDS).logits[..., SPEECH])
    for row, n in enumerate(lengths):
        assert torch.equal(found[row, :n], expected[row, :n])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_attention_is_the_teacher_in_half_precision(models, dtype):
    model, teacher = models
    student = make_student(teacher, "AAAA").to(dtype)
    # transformers keeps its RoPE frequencies in float32 when it loads half precision, not in .to(dtype).
    frequencies = model.model.rotary_emb.inv_freq.clone()
    half = transformers_model(model.config.model_type, **({"attention_bias": True} if _has_bias(model) else {})).to(
        dtype
    )
    half.model.rotary_emb.inv_freq = frequencies
    assert torch.equal(student(IDS), half(IDS).logits[..., SPEECH])


def _has_bias(model):
    return model.config.model_type == "llama" and model.config.attention_bias


def test_cached_decoding_equals_the_full_forward(student):
    expected = student(IDS)
    cache = student.new_cache()
    torch.testing.assert_close(student(IDS[:, :11], past_key_values=cache), expected[:, :11], **CLOSE)
    # A second stretch of several positions, then one by one.
    torch.testing.assert_close(student(IDS[:, 11:14], past_key_values=cache), expected[:, 11:14], **CLOSE)
    for position in range(14, LENGTH):
        step = student(IDS[:, position : position + 1], past_key_values=cache)
        torch.testing.assert_close(step[:, 0], expected[:, position], **CLOSE)


def test_a_prompt_shorter_than_the_convolution(student):
    expected, cache = student(IDS), student.new_cache()
    for position in range(6):
        step = student(IDS[:, position : position + 1], past_key_values=cache)
        torch.testing.assert_close(step[:, 0], expected[:, position], **CLOSE)


def test_batched_equals_single(student):
    torch.testing.assert_close(student(IDS), torch.cat([student(row[None]) for row in IDS]), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(student, side, fill=74):
    lengths = [LENGTH, 17, 2]
    logits = student(place(IDS, lengths, side, fill), padding_mask(lengths, side))
    for row, n in enumerate(lengths):
        found = logits[row, :n] if side == "right" else logits[row, LENGTH - n :]
        torch.testing.assert_close(found, student(IDS[row : row + 1, :n])[0], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cuts", [(0, 11, LENGTH), tuple(range(LENGTH + 1))], ids=["two parts", "one by one"])
def test_padded_rows_fed_in_parts(student, side, cuts):
    """Padding inside a later part must not reach the states either, nor where a part is one position."""
    student = copy.deepcopy(student).double()
    lengths = [LENGTH, 17, 2]
    padded, mask, cache = place(IDS, lengths, side, 74), padding_mask(lengths, side), student.new_cache()
    parts = [student(padded[:, a:b], mask[:, :b], past_key_values=cache) for a, b in itertools.pairwise(cuts)]
    logits = torch.cat(parts, 1)
    for row, n in enumerate(lengths):
        found = logits[row, :n] if side == "right" else logits[row, LENGTH - n :]
        torch.testing.assert_close(found, student(IDS[row : row + 1, :n])[0], atol=1e-9, rtol=1e-9)


def test_right_padding_needs_no_mask(student):
    lengths = [LENGTH, 17, 2]
    padded = place(IDS, lengths, "right", 0)
    without, with_mask = student(padded), student(padded, padding_mask(lengths, "right"))
    for row, n in enumerate(lengths):
        torch.testing.assert_close(without[row, :n], with_mask[row, :n], **CLOSE)


def test_embeddings_in_place_of_ids_padded_left_and_decoded(student):
    """The way a TTS prompt arrives: embeddings of different lengths, garbage in the padding, then single steps."""
    prompt_lengths, steps = [19, 12, 7], 8
    embeds = student.embed(IDS)
    prompts = embeds[:, :LENGTH].clone()
    longest = max(prompt_lengths)
    padded = torch.full((3, longest, embeds.shape[-1]), 7.0)
    mask = torch.zeros(3, longest, dtype=torch.bool)
    for row, n in enumerate(prompt_lengths):
        padded[row, longest - n :] = prompts[row, :n]
        mask[row, longest - n :] = True
    cache = student.new_cache()
    outputs = [student(inputs_embeds_BLD=padded, attention_mask_BL=mask, past_key_values=cache)[:, -1]]
    for step in range(steps):
        new = torch.stack([embeds[row, n + step : n + step + 1] for row, n in enumerate(prompt_lengths)])
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.bool)], 1)
        outputs.append(student(inputs_embeds_BLD=new, attention_mask_BL=mask, past_key_values=cache)[:, 0])
    for row, n in enumerate(prompt_lengths):
        expected = student(IDS[row : row + 1, : n + steps])[0, n - 1 :]
        torch.testing.assert_close(torch.stack(outputs, 1)[row], expected, **CLOSE)


def test_rows_can_leave_the_cache(student):
    expected, cache = student(IDS), student.new_cache()
    student(IDS[:, :10], past_key_values=cache)
    cache.keep_rows(torch.tensor([2, 0]))
    for position in range(10, 14):
        step = student(IDS[[2, 0], position : position + 1], past_key_values=cache)
        torch.testing.assert_close(step[:, 0], expected[[2, 0], position], **CLOSE)


def test_a_mask_that_forgets_the_past_is_refused(models):
    """A mask over the new position only gives silently wrong logits in several versions of transformers."""
    student = make_student(models[1], "AMAM")
    cache = student.new_cache()
    student(IDS[:, :10], past_key_values=cache)
    with pytest.raises(ValueError, match="10 past and 1 new"):
        student(IDS[:, 10:11], torch.ones(3, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="either"):
        student(IDS, inputs_embeds_BLD=student.embed(IDS))


def test_mamba_layers_are_seen_through(models):
    """A Mamba layer changes the output and carries information forward only."""
    student = make_student(models[1], "MMMM")
    changed = IDS.clone()
    changed[:, 20] = (changed[:, 20] + 1) % VOCABULARY.size
    difference = (student(changed) - student(IDS)).abs().amax(-1)
    assert difference[:, :20].max() == 0 and difference[:, 20:].min() > 1e-6


@pytest.mark.parametrize("value", ["text", None, [], -1, 0.5])
def test_a_damaged_value_of_the_config_is_one_sentence(value):
    content = load("qwen2")[1].config.to_dict()
    assert DecoderConfig.from_dict(content).to_dict() == content
    rope = content["rope_parameters"]
    damaged = [{**content, key: value} for key in content]
    damaged += [{**content, "rope_parameters": {**rope, key: value}} for key in rope]
    # Half is a number as good as others for these two.
    numbers = [{**content, "rms_norm_eps": 0.5}, {**content, "rope_parameters": {**rope, "rope_theta": 0.5}}]
    damaged = [changed for changed in damaged if changed not in numbers]
    for changed in damaged:
        with pytest.raises(InputError, match=r"config is not valid|a layout is"):
            DecoderConfig.from_dict(changed)
