"""The mixer against a float64 copy of the published layer, written without any of its code."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mamtra_ray.models.mamba import (
    MambaMixer,
    MixerConfig,
    MixerState,
    causal_conv_silu,
    gated_rms_norm,
    initial_state,
    parameter_count,
    state_bytes,
)

SHARINGS = ("per_query_head", "per_kv_head")


def small_mixer(sharing: str, seed: int = 0) -> MambaMixer:
    torch.manual_seed(seed)
    return MambaMixer(MixerConfig(24, 6, 2, 8, state_sharing=sharing, chunk_size=8))


def published_layer(mixer: MambaMixer, hidden_BLD: Tensor) -> Tensor:
    """MambaInLlama's grouped-query Mamba-2 layer in float64: nn.Conv1d, x and B repeated for the query heads, the
    recurrence position by position, mamba-ssm's RMSNormGated with norm_before_gate=False."""
    config = mixer.config
    P, H, G, S = config.head_dim, config.num_heads, config.num_kv_heads, len(mixer.A_log)
    weights = {name: p.detach().double() for name, p in mixer.named_parameters()}
    z, xBC, dt = (hidden_BLD.double() @ weights["in_proj.weight"].T).split([H * P, 2 * G * P + H * P, S], -1)
    conv = F.conv1d(
        xBC.transpose(1, 2), weights["conv1d.weight"], weights["conv1d.bias"], padding=3, groups=xBC.shape[-1]
    )
    x, B, C = F.silu(conv[..., : xBC.shape[1]].transpose(1, 2)).split([G * P, G * P, H * P], -1)
    batch, length, _ = hidden_BLD.shape
    x, B, C = (t.reshape(batch, length, -1, P) for t in (x, B, C))
    x, B = (t.repeat_interleave(H // G, 2) for t in (x, B))
    dt = F.softplus(dt + weights["dt_bias"]).repeat_interleave(H // S, 2)
    A = -weights["A_log"].exp().repeat_interleave(H // S)
    state, ys = torch.zeros(batch, H, P, P, dtype=torch.float64), []
    for t in range(length):
        state = torch.exp(dt[:, t] * A)[..., None, None] * state
        state = state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + weights["D"][:, None] * x[:, t])
    gated = torch.stack(ys, 1).flatten(2) * F.silu(z)
    grouped = gated.unflatten(-1, (H, P))
    normed = grouped / torch.sqrt(grouped.square().mean(-1, keepdim=True) + config.norm_eps)
    return (normed.flatten(2) * weights["norm.weight"]) @ weights["out_proj.weight"].T


@pytest.mark.parametrize("sharing", SHARINGS)
def test_mixer_equals_the_published_layer(sharing: str) -> None:
    mixer = small_mixer(sharing)
    with torch.no_grad():
        for parameter in (mixer.D, mixer.norm.weight):
            parameter.uniform_(0.5, 2)
    hidden_BLD = torch.randn(2, 21, 24)
    with torch.no_grad():
        torch.testing.assert_close(mixer(hidden_BLD), published_layer(mixer, hidden_BLD).float(), rtol=1e-5, atol=1e-6)


def test_sizes_of_cosyvoice_2() -> None:
    """2062 rows, 2,657,066 parameters and 247,808 bytes of state are the paper's figures."""
    config = MixerConfig(896, 14, 2, 64)
    mixer = MambaMixer(config)
    assert mixer.in_proj.weight.shape == (2062, 896)
    assert config.in_proj_slices() == {
        "z": slice(0, 896), "x": slice(896, 1024), "B": slice(1024, 1152),
        "C": slice(1152, 2048), "dt": slice(2048, 2062),
    }  # fmt: skip
    assert config.conv_slices() == {"x": slice(0, 128), "B": slice(128, 256), "C": slice(256, 1152)}
    assert sum(p.numel() for p in mixer.parameters()) == 2_657_066
    assert state_bytes(config) == 247_808


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("out_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_counts_are_those_of_real_tensors(sharing: str, out_bias: bool, dtype: torch.dtype) -> None:
    config = MixerConfig(24, 6, 2, 8, state_sharing=sharing, out_bias=out_bias)
    mixer = MambaMixer(config).to(dtype)
    assert parameter_count(config) == sum(p.numel() for p in mixer.parameters())
    _, state = mixer(torch.randn(3, 5, 24, dtype=dtype), return_state=True)
    for real in (state, initial_state(config, 3, dtype)):
        tensors = (real.conv_BCK, real.ssm_BHPN)
        assert state_bytes(config, 3, dtype) == sum(t.numel() * t.itemsize for t in tensors)


def test_one_state_for_each_kv_head_is_smaller_by_their_ratio() -> None:
    per_query, per_kv = (initial_state(MixerConfig(896, 14, 2, 64, state_sharing=s), 1) for s in SHARINGS)
    assert per_query.ssm_BHPN.numel() == 7 * per_kv.ssm_BHPN.numel()


def test_shared_states_are_equal_query_head_states() -> None:
    """per_kv_head is per_query_head with the same dt and A in all query heads of a group."""
    shared, separate = small_mixer("per_kv_head"), small_mixer("per_query_head")
    rows = shared.config.in_proj_slices()
    with torch.no_grad():
        for name, parameter in separate.named_parameters():
            own = shared.get_parameter(name)
            if name == "in_proj.weight":
                own = torch.cat([own[: rows["dt"].start], own[rows["dt"]].repeat_interleave(3, 0)])
            elif name in ("dt_bias", "A_log"):
                own = own.repeat_interleave(3)
            parameter.copy_(own)
    hidden_BLD = torch.randn(2, 19, 24)
    torch.testing.assert_close(shared(hidden_BLD), separate(hidden_BLD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("prefill", [0, 1, 2, 11])
def test_decoding_step_by_step_equals_the_whole(sharing: str, prefill: int) -> None:
    mixer = small_mixer(sharing)
    hidden_BLD = torch.randn(2, 20, 24)
    with torch.no_grad():
        expected, end = mixer(hidden_BLD, return_state=True)
        outputs, state = [], initial_state(mixer.config, 2)
        if prefill:
            output, state = mixer(hidden_BLD[:, :prefill], return_state=True)
            outputs.append(output)
        for t in range(prefill, 20):
            output, state = mixer(hidden_BLD[:, t : t + 1], state=state, return_state=True)
            outputs.append(output)
        two_parts = [mixer(hidden_BLD[:, :9], return_state=True)]
        two_parts.append(mixer(hidden_BLD[:, 9:], state=two_parts[0][1], return_state=True))
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([two_parts[0][0], two_parts[1][0]], 1), expected, rtol=0, atol=1e-5)
    for other in (state, two_parts[1][1]):
        torch.testing.assert_close(other.ssm_BHPN, end.ssm_BHPN, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.conv_BCK, end.conv_BCK, rtol=0, atol=1e-5)


def rows_of(state: MixerState, rows: list[int]) -> MixerState:
    return MixerState(state.conv_BCK[rows], state.ssm_BHPN[rows])


@pytest.mark.parametrize("sharing", SHARINGS)
def test_padding_on_either_side_does_not_leak(sharing: str) -> None:
    """Rows of 12 and 7 positions in one batch, padded left or right with NaN, go on exactly as they do alone."""
    mixer = small_mixer(sharing)
    long, short, following = torch.randn(1, 12, 24), torch.randn(1, 7, 24), torch.randn(2, 1, 24)
    nan = torch.full((1, 5, 24), torch.nan)
    ones, zeros = torch.ones(1, 7), torch.zeros(1, 5)
    for side in ("left", "right"):
        parts = [nan, short] if side == "left" else [short, nan]
        mask_parts = [zeros, ones] if side == "left" else [ones, zeros]
        batch_BLD = torch.cat([long, torch.cat(parts, 1)])
        mask_BL = torch.cat([torch.ones(1, 12), torch.cat(mask_parts, 1)])
        real = slice(5, 12) if side == "left" else slice(0, 7)
        output, state = mixer(batch_BLD, mask_BL, return_state=True)
        after, _ = mixer(following, torch.ones(2, 13), state=state, return_state=True)
        for row, (alone_BLD, span) in enumerate([(long, slice(0, 12)), (short, real)]):
            alone, alone_state = mixer(alone_BLD, return_state=True)
            torch.testing.assert_close(output[row, span], alone[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(state.ssm_BHPN[row], alone_state.ssm_BHPN[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(state.conv_BCK[row], alone_state.conv_BCK[0], rtol=0, atol=1e-6)
            alone_after = mixer(following[row : row + 1], state=alone_state)
            torch.testing.assert_close(after[row], alone_after[0], rtol=0, atol=1e-6)


def test_padding_takes_no_gradient() -> None:
    mixer = small_mixer("per_query_head")
    hidden_BLD = torch.randn(1, 9, 24)
    mixer(hidden_BLD)[:, :6].sum().backward()  # the causal mixer never sees the last three
    expected = {name: p.grad.clone() for name, p in mixer.named_parameters()}
    mixer.zero_grad()
    padded_BLD = hidden_BLD.clone().index_fill_(1, torch.tensor([6, 7, 8]), 1e3).requires_grad_()
    mixer(padded_BLD, torch.tensor([[1] * 6 + [0] * 3]))[:, :6].sum().backward()
    assert not padded_BLD.grad[:, 6:].any()
    for name, parameter in mixer.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_masked_step_keeps_the_state(sharing: str) -> None:
    mixer = small_mixer(sharing)
    with torch.no_grad():
        _, state = mixer(torch.randn(2, 6, 24), return_state=True)
        _, after = mixer(torch.randn(2, 1, 24), torch.tensor([[0], [1]]), state=state, return_state=True)
    assert torch.equal(after.ssm_BHPN[0], state.ssm_BHPN[0])
    assert torch.equal(after.conv_BCK[0], state.conv_BCK[0])
    assert not torch.equal(after.ssm_BHPN[1], state.ssm_BHPN[1])


def test_gradients_reach_every_parameter_and_earlier_states() -> None:
    mixer = small_mixer("per_query_head")
    _, state = mixer(torch.randn(2, 6, 24), return_state=True)
    second = mixer(torch.randn(2, 6, 24), state=state)
    second.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in mixer.parameters())


@pytest.mark.parametrize("before", [None, 5])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_convolution_equals_conv1d(before: int | None, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    past = before or 0
    u_BLC = torch.randn(2, past + length, 6, dtype=torch.float64, generator=generator)
    conv = torch.nn.Conv1d(6, 6, 4, groups=6, padding=3, dtype=torch.float64)
    weight, bias = (p.detach().clone().requires_grad_() for p in (conv.weight, conv.bias))
    expected_in, got_in = u_BLC.clone().requires_grad_(), u_BLC.clone().requires_grad_()
    expected = F.silu(conv(expected_in.transpose(1, 2))[..., past : past + length].transpose(1, 2))
    before_BCK = None if before is None else got_in[:, past - 4 : past].transpose(1, 2)
    got = causal_conv_silu(got_in[:, past:], weight, bias, before_BCK)
    torch.testing.assert_close(got, expected)
    weights = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    torch.testing.assert_close(got_in.grad, expected_in.grad)
    torch.testing.assert_close(weight.grad, conv.weight.grad)
    torch.testing.assert_close(bias.grad, conv.bias.grad)


def test_gated_norm_equals_the_formula_with_gradients() -> None:
    y, z = (torch.randn(2, 5, 6, 8, dtype=torch.float64) for _ in range(2))
    weight = torch.rand(6, 8, dtype=torch.float64) + 0.5
    results = []
    for function in (gated_rms_norm, None):
        leaves = [t.clone().requires_grad_() for t in (y, z, weight)]
        if function is None:
            gated = leaves[0] * leaves[1] * torch.sigmoid(leaves[1])
            out = gated / torch.sqrt((gated**2).mean(-1, keepdim=True) + 1e-6) * leaves[2]
        else:
            out = function(*(leaf.float() for leaf in leaves), 1e-6).double()
        (out * torch.cos(torch.arange(out.numel()).double()).view_as(out)).sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_bf16_autocast_stays_close_and_keeps_a_float32_state() -> None:
    mixer = small_mixer("per_query_head")
    hidden_BLD = torch.randn(2, 33, 24)
    expected = mixer(hidden_BLD)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = mixer(hidden_BLD, return_state=True)
        output.float().square().sum().backward()
    assert state.ssm_BHPN.dtype == torch.float32
    assert (output.float() - expected).norm() < 2e-2 * expected.norm()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in mixer.parameters())


def test_fresh_parameters_follow_the_recipe() -> None:
    torch.manual_seed(0)
    mixer = MambaMixer(MixerConfig(8, 4096, 4096, 1))
    dt = F.softplus(mixer.dt_bias)
    assert 1e-3 * 0.999 <= dt.min() < 1.1e-3
    assert 0.9e-1 < dt.max() <= 1e-1 * 1.001
    assert math.log(1e-2) - 0.1 < dt.log().mean() < math.log(1e-2) + 0.1  # log-uniform: the middle is the geometric one
    A = mixer.A_log.exp()
    assert 1 <= A.min() < 1.1
    assert 15.9 < A.max() <= 16
    assert 8.2 < A.mean() < 8.8
    assert (mixer.D == 1).all()
    assert mixer.in_proj.weight[mixer.config.in_proj_slices()["z"]].abs().min(-1).values.max() > 0


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of num_kv_heads 4"):
        MixerConfig(24, 6, 4, 8)
    with pytest.raises(ValueError, match="per_query_head or per_kv_head"):
        MixerConfig(24, 6, 2, 8, state_sharing="per_head")
