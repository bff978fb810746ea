"""Closed-form efficiency against the paper, transformers' own models and torch's FLOP counter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_models import CACHE, transformers_model, write_folder
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from mamtra_ray.efficiency import (
    ARCHITECTURES,
    break_even_length,
    cache_bytes,
    decode_flops,
    from_hf_config,
    parameters,
    prefill_flops,
    prefill_flops_full,
    published_layouts,
    total_parameters,
)
from mamtra_ray.efficiency.__main__ import main
from mamtra_ray.efficiency.architectures import cosyvoice2
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.report import paper_results
from mamtra_ray.run.session import architecture_of
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher

COSYVOICE = ARCHITECTURES["cosyvoice2"]
ZONOS = ARCHITECTURES["zonos_v0_1_hybrid"]
TEACHER = Layout("A" * 24)
PAPER_LAYOUTS = {
    ratio: Layout.from_attention_layers(kept, 24) for ratio, kept in paper_results.ATTENTION_LAYERS_KEPT.items()
}
SMALL = dict(
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    vocab_size=50,
    tie_word_embeddings=False,
)


@pytest.mark.parametrize(
    ("ratio", "millions"), [("1:0", 357.90), ("1:1", 367.75), ("1:3", 372.67), ("1:5", 374.32), ("1:11", 375.96)]
)
def test_parameters_of_the_hybrids(ratio, millions):
    layout = PAPER_LAYOUTS.get(ratio, TEACHER)
    assert parameters(COSYVOICE, layout) / 1e6 == pytest.approx(millions, abs=0.005)


def test_whole_checkpoints():
    # Counted from the tensors of the published checkpoints.
    assert total_parameters(COSYVOICE, TEACHER) == 505_803_812
    assert total_parameters(ARCHITECTURES["llasa_1b"], Layout("A" * 16)) == 1_370_048_512
    [(ratio, layout)] = published_layouts(ZONOS)
    assert ratio == "1:3" and layout.attention_layers == tuple(range(0, 46, 4))
    assert parameters(ZONOS, layout) == total_parameters(ZONOS, layout) == 1_651_798_912


@pytest.mark.parametrize("ratio", paper_results.RATIOS)
def test_the_cache_of_figure_5(ratio):
    layout = PAPER_LAYOUTS[ratio]
    constant = cache_bytes(COSYVOICE, layout, 0, "float32")
    assert constant / 1e6 == pytest.approx(paper_results.FIGURE_5_CONSTANT_MB[ratio], abs=0.01)
    for length in paper_results.FIGURE_5_LENGTHS:
        growth = cache_bytes(COSYVOICE, layout, length, "float32", dummy_key_value=True) - constant
        published = paper_results.FIGURE_5_GROWTH_AT_4096_MB[ratio] * length / 4096
        assert growth / 1e6 == pytest.approx(published, abs=0.01)
        # To the byte: 1,024 a token and attention layer, 8 a token and Mamba layer (247,808 each at the start).
        attention = len(layout.attention_layers)
        assert growth == length * (1024 * attention + 8 * (24 - attention))
    assert constant == 247_808 * (24 - attention)


def test_table_3_flops():
    published = {row.ratio: row.tflop for row in paper_results.TABLE_3 if row.model in ("MamTra", "CosyVoice 2")}
    ours = {ratio: round(prefill_flops(COSYVOICE, layout, 2048) / 1e12, 2) for ratio, layout in PAPER_LAYOUTS.items()}
    teacher = round(prefill_flops(COSYVOICE, TEACHER, 2048) / 1e12, 2)
    for ratio in paper_results.RATIOS:
        assert teacher - ours[ratio] == pytest.approx(published["1:0"] - published[ratio], abs=1e-9)
        assert ours[ratio] - published[ratio] == pytest.approx(0.05, abs=1e-9)
    llasa = prefill_flops(ARCHITECTURES["llasa_1b"], Layout("A" * 16), 2048)
    assert llasa / 1e12 == pytest.approx(4.53, abs=0.01)
    zonos = prefill_flops(ZONOS, published_layouts(ZONOS)[0][1], 2048)
    assert zonos / 1e12 == pytest.approx(7.32, abs=0.01)


def test_zonos_against_its_checkpoint():
    layout = published_layouts(ZONOS)[0][1]
    # bf16: SSM 35,651,584 B + convolution 1,183,744 B + 24,576 B a token.
    assert cache_bytes(ZONOS, layout, 0, "bfloat16") == 35_651_584 + 1_183_744
    assert cache_bytes(ZONOS, layout, 1000, "bfloat16") == 35_651_584 + 1_183_744 + 24_576_000
    assert prefill_flops(ZONOS, layout, 2048, scan=False) / 1e12 == pytest.approx(6.9976, abs=5e-5)
    assert decode_flops(ZONOS, layout, 2048) / 1e9 == pytest.approx(3.417, abs=5e-4)


def test_break_even_is_where_the_two_caches_cross():
    for sharing in ("per_query_head", "per_kv_head"):
        for dtype, state_dtype in (("float32", None), ("bfloat16", None), ("bfloat16", "float32")):
            architecture = cosyvoice2(sharing)
            for layout in PAPER_LAYOUTS.values():
                at = break_even_length(architecture, layout, dtype, state_dtype=state_dtype)
                for length, smaller in ((at, False), (at + 1, True)):
                    hybrid = cache_bytes(architecture, layout, length, dtype, state_dtype=state_dtype)
                    assert (hybrid < cache_bytes(architecture, TEACHER, length, dtype)) == smaller
    assert break_even_length(COSYVOICE, TEACHER) is None
    for sequences in (1, 7):
        at = break_even_length(COSYVOICE, PAPER_LAYOUTS["1:3"], "bfloat16", weights_for_sequences=sequences)
        for length, smaller in ((at, False), (at + 1, True)):
            hybrid, teacher = (
                2 * parameters(COSYVOICE, layout) + sequences * cache_bytes(COSYVOICE, layout, length, "bfloat16")
                for layout in (PAPER_LAYOUTS["1:3"], TEACHER)
            )
            assert (hybrid < teacher) == smaller
    assert break_even_length(COSYVOICE, PAPER_LAYOUTS["1:1"]) == 242


@pytest.mark.parametrize(
    "attention",
    [
        Qwen2Config(**SMALL),
        LlamaConfig(**SMALL),
        LlamaConfig(**SMALL, head_dim=16),
        LlamaConfig(**SMALL, attention_bias=True),
    ],
)
def test_an_instantiated_transformer(attention):
    model_class = Qwen2ForCausalLM if attention.model_type == "qwen2" else LlamaForCausalLM
    # The counter does not know the fused attention kernel of the CPU; eager attention is two matrix products.
    attention._attn_implementation = "eager"
    model = model_class(attention).eval()
    architecture = from_hf_config(attention.to_dict())
    layout = Layout("AAA")
    assert total_parameters(architecture, layout) == sum(parameter.numel() for parameter in model.parameters())

    cache = DynamicCache(config=attention)
    prompt_BL = torch.zeros(1, 37, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(prompt_BL, logits_to_keep=1, **{CACHE: cache})
    assert counter.get_total_flops() == prefill_flops_full(architecture, layout, 37)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == cache_bytes(architecture, layout, 37, "float32")

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.model(prompt_BL[:, :1], **{CACHE: cache})
    assert counter.get_total_flops() == decode_flops(architecture, layout, 38)


@pytest.mark.parametrize("sharing", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize("letters", ["AAAA", "AMMA", "MMMM"])
def test_an_instantiated_hybrid(sharing, letters, hybrid_teacher):
    layout = Layout(letters)
    student = make_student(hybrid_teacher.model, layout, "transfer", None, state_sharing=sharing)
    architecture = architecture_of(hybrid_teacher, sharing)
    assert total_parameters(architecture, layout) == sum(parameter.numel() for parameter in student.parameters())

    cache, counter = student.new_cache(), FlopCounterMode(display=False)
    # torch counts the products of the plain form of attention only.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        student.logits(student.hidden_states(torch.zeros(1, 128, dtype=torch.int64), past_key_values=cache)[:, -1])
    # Not counted: the convolution (the mixer shifts and adds), and reading the empty state in the first chunk.
    mamba = architecture.mamba
    conv = 2 * 128 * mamba.conv_kernel * (mamba.x_channels + mamba.b_channels + mamba.c_channels)
    assert mamba.chunk_size == student.config.chunk_size
    first_chunk = mamba.chunk_size * mamba.num_output_heads * 2 * mamba.head_dim * mamba.state_size
    uncounted = len(layout.mamba_layers) * (conv + first_chunk)
    assert counter.get_total_flops() == prefill_flops_full(architecture, layout, 128) - uncounted
    assert cache.num_bytes == cache_bytes(architecture, layout, 128)
    with torch.no_grad():
        student.hidden_states(torch.zeros(1, 9, dtype=torch.int64), past_key_values=cache)
    assert cache.num_bytes == cache_bytes(architecture, layout, 137)


@pytest.fixture(scope="module")
def hybrid_teacher(tmp_path_factory):
    folder = write_folder(tmp_path_factory.mktemp("teacher"), transformers_model("qwen2"))
    return load_teacher("huggingface", str(folder))


def test_the_verb(capsys, tmp_path):
    assert main(["--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["system"] for row in rows} == set(ARCHITECTURES)
    wanted = {"system", "layout", "ratio", "parameters", "prefill_flops", "prefill_flops_full", "decode_flops"}
    assert wanted | {"cache_bytes", "break_even_length"} <= set(rows[0])
    assert main([]) == 0
    assert "367.75" in capsys.readouterr().out

    config = tmp_path / "config.json"
    config.write_text(Qwen2Config(**SMALL).to_json_string())
    assert main(["--config", str(config), "--layout", "AMM", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["layout"] == "AMM" and row["ratio"] == "1:2"

    config.write_text('{"model_type": "gpt2"}')
    for wrong in (["--config", str(config)], ["--system", "cosyvoice"], ["--dtype", "int3"], ["--length", "0"]):
        assert main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough(unbuffered):
    """Nobody reads the pipe: no traceback, whether Python notices while it prints or when it flushes."""
    command = [sys.executable, "-m", "mamtra_ray.efficiency"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, env=environment)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_layout_of_another_depth_is_refused():
    with pytest.raises(InputError, match="12 layers, cosyvoice2 has 24"):
        parameters(COSYVOICE, from_strategy("front", 12, "1:1"))
