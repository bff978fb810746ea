"""Zonos-v0.1-hybrid: its parameters, its key layout, and its layers against plain recurrences and loops."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mamtra_ray.errors import InputError
from mamtra_ray.teachers.zonos import ZonosConfig, ZonosHybrid, load_zonos

# The released config.json, as far as the backbone goes.
CONFIG = {
    "backbone": {
        "d_model": 2048,
        "d_intermediate": 0,
        "attn_mlp_d_intermediate": 8192,
        "n_layer": 46,
        "ssm_cfg": {"layer": "Mamba2"},
        "attn_layer_idx": list(range(0, 46, 4)),
        "attn_cfg": {"causal": True, "num_heads": 16, "num_heads_kv": 4, "rotary_emb_dim": 128, "qkv_proj_bias": False},
        "rms_norm": False,
        "residual_in_fp32": False,
        "norm_epsilon": 1e-05,
    },
    "eos_token_id": 1024,
    "masked_token_id": 1025,
}
TINY = {
    **CONFIG,
    "backbone": {
        **CONFIG["backbone"],
        "d_model": 32,
        "attn_mlp_d_intermediate": 40,
        "n_layer": 3,
        "attn_layer_idx": [0],
        "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 16},
        "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 8},
    },
}


def test_parameters_of_the_released_model():
    with torch.device("meta"):
        model = ZonosHybrid(ZonosConfig.from_json(CONFIG))
    assert ZonosConfig.from_json(CONFIG) == ZonosConfig()
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_651_798_912
    assert sum(parameter.numel() for parameter in model.backbone.parameters()) == 1_608_856_448
    layers = [sum(parameter.numel() for parameter in layer.parameters()) for layer in model.backbone.layers]
    assert layers == [60_825_600 if index % 4 == 0 else 25_851_328 for index in range(46)]


def test_key_layout_of_the_released_model():
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in ZonosHybrid(ZonosConfig()).state_dict().items()}
    expected = {
        "backbone.layers.1.norm.weight": (2048,),
        "backbone.layers.1.norm.bias": (2048,),
        "backbone.layers.1.mixer.in_proj.weight": (8512, 2048),
        "backbone.layers.1.mixer.conv1d.weight": (4352, 1, 4),
        "backbone.layers.1.mixer.conv1d.bias": (4352,),
        "backbone.layers.1.mixer.dt_bias": (64,),
        "backbone.layers.1.mixer.A_log": (64,),
        "backbone.layers.1.mixer.D": (64,),
        "backbone.layers.1.mixer.norm.weight": (4096,),
        "backbone.layers.1.mixer.out_proj.weight": (2048, 4096),
        "backbone.layers.4.norm.weight": (2048,),
        "backbone.layers.4.norm.bias": (2048,),
        "backbone.layers.4.mixer.in_proj.weight": (3072, 2048),
        "backbone.layers.4.mixer.out_proj.weight": (2048, 2048),
        "backbone.layers.4.norm2.weight": (2048,),
        "backbone.layers.4.norm2.bias": (2048,),
        "backbone.layers.4.mlp.fc1.weight": (16384, 2048),
        "backbone.layers.4.mlp.fc2.weight": (2048, 8192),
        "backbone.norm_f.weight": (2048,),
        "backbone.norm_f.bias": (2048,),
        "embeddings.8.weight": (1026, 2048),
        "heads.8.weight": (1025, 2048),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    in_these_layers = {name for name in shapes if name.startswith(("backbone.layers.1.", "backbone.layers.4."))}
    assert in_these_layers == {name for name in expected if name.startswith("backbone.layers.")}


def test_prefix_conditioner_has_upstreams_names_and_shapes():
    """Upstream's `conditioning.py`: all but the phonemes may be missing; Fourier weights are a buffer there."""
    with torch.device("meta"):
        module = ZonosHybrid(ZonosConfig()).prefix_conditioner
    expected = {"project.weight": (2048, 2048), "project.bias": (2048,), "norm.weight": (2048,), "norm.bias": (2048,)}
    expected["conditioners.0.phoneme_embedder.weight"] = (189, 2048)
    expected |= {"conditioners.1.project.weight": (2048, 128), "conditioners.1.project.bias": (2048,)}
    for index, inputs in {2: 8, 3: 1, 4: 1, 5: 1, 7: 8, 8: 1, 9: 1}.items():
        expected[f"conditioners.{index}.weight"] = (1024, inputs)
    for index, values in {6: 128, 10: 2}.items():  # -1 to 126, 0 to 1
        expected[f"conditioners.{index}.int_embedder.weight"] = (values, 2048)
    expected |= {f"conditioners.{index}.uncond_vector": (2048,) for index in range(1, 11)}
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in module.parameters()) == 5_138_432


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = ZonosHybrid(ZonosConfig.from_json(TINY))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" not in name and "dt_bias" not in name:
                parameter.normal_(1.0 if "norm" in name and "weight" in name else 0.0, 0.3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return tmp_path


def test_a_folder_loads_and_runs(folder):
    model = load_zonos(folder)
    prefix, codes = torch.randn(2, 3, 32), torch.randint(0, 1026, (2, 9, 5))
    with torch.no_grad():
        logits = model(prefix, codes)
        assert logits.shape == (2, 9, 5, 1025)
        # Causal: a changed last code leaves earlier positions alone and changes its own.
        changed = codes.clone()
        changed[:, :, -1] = (codes[:, :, -1] + 1) % 1024
        difference = (model(prefix, changed) - logits).abs().amax((0, 1, 3))
        assert difference[:-1].max() < 1e-5 < difference[-1]
        torch.testing.assert_close(
            model.embed_codes(codes)[1, 2],
            sum(table.weight[codes[1, k, 2]] for k, table in enumerate(model.embeddings)),
        )
        torch.testing.assert_close(
            logits[0, 4, 2],
            model.heads[4].weight @ model.backbone(torch.cat([prefix, model.embed_codes(codes)], 1))[0, 5],
        )


def test_mamba_layer_equals_the_recurrence(folder):
    """State by state in float64: S <- exp(dt A) S + dt B x, y = C S + D x, gated norm, residual."""
    layer = load_zonos(folder).backbone.layers[1]
    x = torch.randn(1, 7, 32)
    with torch.no_grad():
        found = layer(x)
        mixer = layer.mixer.double()
        inputs = layer.norm.double()(x.double())[0]
        z, conv_in, dt = mixer.in_proj(inputs).split([64, 64 + 16, 4], -1)
        padded = torch.cat([torch.zeros(3, 80, dtype=torch.float64), conv_in])
        kernel = mixer.conv1d.weight[:, 0]
        convolved = torch.stack([(padded[t : t + 4].T * kernel).sum(1) + mixer.conv1d.bias for t in range(7)])
        values, B, C = nn.functional.silu(convolved).split([64, 8, 8], -1)
        values, dt = values.view(7, 4, 16), nn.functional.softplus(dt + mixer.dt_bias)
        state, outputs = torch.zeros(4, 16, 8, dtype=torch.float64), []
        for t in range(7):
            decay = torch.exp(-dt[t] * mixer.A_log.exp())[:, None, None]
            state = decay * state + dt[t][:, None, None] * values[t][:, :, None] * B[t]
            outputs.append((state @ C[t] + mixer.D[:, None] * values[t]).flatten())
        gated = torch.stack(outputs) * nn.functional.silu(z)
        normed = gated / (gated.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight
        expected = x.double() + mixer.out_proj(normed)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_attention_layer_equals_loops_over_heads(folder):
    layer = load_zonos(folder).backbone.layers[0]
    x = torch.randn(1, 6, 32)

    def rotated(vector, position):
        result = vector.clone()
        for i in range(4):
            angle = position * 10_000.0 ** (-2 * i / 8)
            a, b = vector[i], vector[i + 4]
            result[i], result[i + 4] = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
        return result

    with torch.no_grad():
        found = layer(x)[0]
        projected = layer.mixer.in_proj(layer.norm(x))[0].view(6, 8, 8)
        mixed = torch.zeros(6, 4, 8)
        for head in range(4):
            key, value = projected[:, 4 + head // 2], projected[:, 6 + head // 2]
            for t in range(6):
                query = rotated(projected[t, head], t)
                scores = torch.stack([query @ rotated(key[s], s) / math.sqrt(8) for s in range(t + 1)])
                mixed[t, head] = scores.softmax(0) @ value[: t + 1]
        hidden = x[0] + layer.mixer.out_proj(mixed.flatten(1))
        both = layer.mlp.fc1(layer.norm2(hidden))
        expected = hidden + layer.mlp.fc2(both[:, :40] * nn.functional.silu(both[:, 40:]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_the_hybrid_is_refused(folder):
    (folder / "config.json").write_text(json.dumps({**TINY, "backbone": {**TINY["backbone"], "ssm_cfg": {}}}))
    with pytest.raises(InputError, match="no Mamba layers"):
        load_zonos(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(InputError, match="no Zonos config: 'backbone' is missing"):
        load_zonos(folder)
    (folder / "config.json").write_text(json.dumps({**TINY, "backbone": {**TINY["backbone"], "n_layer": 4}}))
    with pytest.raises(InputError, match=r"has no tensor backbone\.layers\.3"):
        load_zonos(folder)
