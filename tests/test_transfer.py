"""Mixers from attention: against linear attention with decay written out in float64."""

import pytest
import torch
from torch import nn

from mamtra_ray.errors import InputError
from mamtra_ray.models.mamba import MixerConfig
from mamtra_ray.models.transfer import mixer_from_attention

D, HEADS, KV_HEADS, WIDTH = 48, 6, 2, 8
CONFIG = MixerConfig(hidden_size=D, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=WIDTH)


class Attention(nn.Module):
    """The projections of an attention layer, under transformers' names."""

    def __init__(self, qkv_bias=True, o_bias=False):
        super().__init__()
        self.q_proj = nn.Linear(D, HEADS * WIDTH, bias=qkv_bias)
        self.k_proj = nn.Linear(D, KV_HEADS * WIDTH, bias=qkv_bias)
        self.v_proj = nn.Linear(D, KV_HEADS * WIDTH, bias=qkv_bias)
        self.o_proj = nn.Linear(HEADS * WIDTH, D, bias=o_bias)


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return Attention()


def linear_attention(attention, mixer, hidden_LD):
    """Eq. 4 of the paper with the mixer's decay, skip and gate: a loop over positions and heads, in float64."""
    q, k, v, o = (p.double() for p in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj))
    hidden = hidden_LD.double()
    silu = nn.functional.silu
    query, key, value = (silu(p(hidden)) for p in (q, k, v))
    rows = mixer.config.in_proj_slices()
    weight = mixer.in_proj.weight.double()
    gate = silu(hidden @ weight[rows["z"]].T)
    step = nn.functional.softplus(hidden @ weight[rows["dt"]].T + mixer.dt_bias.double())
    heads = []
    for head in range(HEADS):
        state_of_head = head if mixer.config.num_states == HEADS else head * KV_HEADS // HEADS
        mine = slice(head * WIDTH, (head + 1) * WIDTH)
        group = head * KV_HEADS // HEADS
        shared = slice(group * WIDTH, (group + 1) * WIDTH)
        state = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
        outputs = []
        for t in range(len(hidden)):
            decay = torch.exp(-mixer.A_log.double().exp()[state_of_head] * step[t, state_of_head])
            state = decay * state + step[t, state_of_head] * torch.outer(value[t, shared], key[t, shared])
            y = state @ query[t, mine] + mixer.D.double()[head] * value[t, shared]
            gated = y * gate[t, mine]
            outputs.append(gated / (gated.square().mean() + mixer.config.norm_eps).sqrt())
        heads.append(torch.stack(outputs))
    return o(torch.cat(heads, -1))


@pytest.mark.parametrize("sharing", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize(("qkv_bias", "o_bias"), [(True, False), (False, False), (True, True)])
def test_transfer_is_attention_without_softmax_and_rope(sharing, qkv_bias, o_bias):
    torch.manual_seed(1)
    attention = Attention(qkv_bias, o_bias)
    config = MixerConfig(D, HEADS, KV_HEADS, WIDTH, state_sharing=sharing, out_bias=o_bias)
    mixer = mixer_from_attention(attention, config, "transfer", seed=3)
    hidden_BLD = torch.randn(2, 13, D)
    with torch.no_grad():
        found = mixer(hidden_BLD)
        for row in range(2):
            expected = linear_attention(attention, mixer, hidden_BLD[row])
            torch.testing.assert_close(found[row].double(), expected, atol=2e-6, rtol=1e-4)
            attention.float()


def test_the_new_parts_start_as_in_mamba2(attention):
    mixer = mixer_from_attention(attention, CONFIG, "transfer", seed=3)
    step = nn.functional.softplus(mixer.dt_bias)
    assert ((step >= 9e-4) & (step <= 0.11)).all() and step.std() > 0
    decay = mixer.A_log.exp()
    assert ((decay >= 1) & (decay <= 16)).all() and decay.std() > 0
    assert (mixer.D == 1).all() and (mixer.norm.weight == 1).all()
    # A gate of zeros would be silu(0) = 0 into the norm, and its gradient 1/sqrt(eps).
    assert mixer.in_proj.weight[CONFIG.in_proj_slices()["z"]].abs().mean() > 0.01
    hidden = torch.randn(1, 20, D, requires_grad=True)
    mixer(hidden).square().mean().backward()
    assert hidden.grad.isfinite().all() and hidden.grad.abs().max() < 10


@pytest.mark.parametrize(("initialization", "std"), [("xavier", (2 / (D + D)) ** 0.5), ("kaiming", (1 / D) ** 0.5)])
def test_random_baselines(attention, initialization, std):
    mixer = mixer_from_attention(attention, CONFIG, initialization, seed=0)
    assert mixer.out_proj.weight.std().item() == pytest.approx(std, rel=0.1)
    rows = CONFIG.in_proj_slices()["C"]
    assert (mixer.in_proj.weight[rows] - attention.q_proj.weight).abs().max() > 0.1


def test_seeds_leave_the_global_generator_alone(attention):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = mixer_from_attention(attention, CONFIG, "transfer", seed=1)
    assert torch.equal(torch.rand(3), expected)
    same, other = (mixer_from_attention(attention, CONFIG, "transfer", seed=seed) for seed in (1, 2))
    assert torch.equal(one.dt_bias, same.dt_bias) and not torch.equal(one.dt_bias, other.dt_bias)
    assert torch.equal(one.out_proj.weight, other.out_proj.weight)


def test_dtype_of_the_attention_and_unknown_names(attention):
    mixer = mixer_from_attention(attention.bfloat16(), CONFIG, "transfer")
    assert {parameter.dtype for parameter in mixer.parameters()} == {torch.bfloat16}
    assert all(parameter.requires_grad for parameter in mixer.parameters())
    with pytest.raises(InputError, match="did you mean 'transfer'"):
        mixer_from_attention(attention, CONFIG, "transfr")
