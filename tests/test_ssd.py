"""The scan against the recurrence written as it is, in float64, and that recurrence against a sum over pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamtra_ray.models.ssd import ssd_scan, ssd_scan_reference, ssd_step
from mamtra_ray.models.ssd_minimal import ssd_scan_minimal

# heads of x, dt, B, C
HEADS = {
    "per_query_head": (2, 6, 2, 6),
    "per_kv_head": (2, 2, 2, 6),
    "states_shared_by_pairs": (1, 2, 1, 4),
    "mamba2": (4, 4, 2, 2),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2}
# A gradient in bfloat16 (x, B, C) is rounded once more than a float32 one (dt, A, D, bias, state).
NARROW = ("x_BLHP", "B_BLGN", "C_BLHN")
OPTIONAL = ("D_H", "dt_bias_H", "initial_state_BHPN")


def make_inputs(heads: str, length: int, *, batch: int = 2, P: int = 8, N: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """Float64 arguments of the scan; every number is also a bfloat16 number, so all types start from the same."""
    generator = torch.Generator().manual_seed(seed)
    x_heads, dt_heads, B_heads, C_heads = HEADS[heads]
    states = max(x_heads, dt_heads, B_heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    return {
        "x_BLHP": normal(batch, length, x_heads, P),
        "dt_BLH": normal(batch, length, dt_heads) - 1,
        "A_H": -normal(dt_heads).abs() - 0.125,
        "B_BLGN": normal(batch, length, B_heads, N),
        "C_BLHN": normal(batch, length, C_heads, N),
        "D_H": normal(max(states, C_heads)),
        "dt_bias_H": normal(dt_heads),
        "initial_state_BHPN": normal(batch, states, P, N),
    }


def values_and_gradients(
    function: Any, inputs: dict[str, Tensor], dtype: torch.dtype, mask_BL: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {name: t.to(dtype if name in NARROW else wide, copy=True).requires_grad_() for name, t in inputs.items()}
    y, state = function(**leaves, mask_BL=mask_BL, return_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    y_weight = torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype)
    if mask_BL is not None:
        y_weight = y_weight * mask_BL[..., None, None]
        y = y.masked_fill(~mask_BL[..., None, None], 0)
    state_weight = torch.randn(state.shape, generator=generator).bfloat16().to(state.dtype)
    torch.autograd.backward([y, state], [y_weight, state_weight])
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), "state": state.detach(), **gradients}


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference over the largest value, for each tensor; what must be 0 everywhere is compared as it is."""
    assert got.keys() == expected.keys()
    errors = {
        name: float((got[name].double() - expected[name]).abs().max() / (expected[name].abs().max() or 1.0))
        for name in expected
    }
    assert all(error <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize("chunk_size", [1, 4, 12])
def test_the_shortest_chunked_scan_equals_recurrence_and_fast_scan(chunk_size: int) -> None:
    inputs = make_inputs("mamba2", 12)
    del inputs["D_H"], inputs["dt_bias_H"], inputs["initial_state_BHPN"]
    dt_BLH = torch.log1p(torch.exp(inputs["dt_BLH"]))
    B_BLHN, C_BLHN = (inputs[name].repeat_interleave(2, 2) for name in ("B_BLGN", "C_BLHN"))
    y, state = ssd_scan_minimal(inputs["x_BLHP"], dt_BLH, inputs["A_H"], B_BLHN, C_BLHN, chunk_size)
    for scan in (ssd_scan_reference, ssd_scan):
        expected_y, expected_state = scan(**inputs, chunk_size=chunk_size, return_final_state=True)
        assert_close({"y": y, "state": state}, {"y": expected_y, "state": expected_state}, 1e-12)


def test_recurrence_equals_the_sum_over_pairs() -> None:
    """y_t = sum over s <= t of exp(A (dt_(s+1) + ... + dt_t)) dt_s (C_t . B_s) x_s, head by head, written out."""
    inputs = make_inputs("per_query_head", 5)
    del inputs["initial_state_BHPN"]
    y_BLHP = ssd_scan_reference(**inputs)
    dt_BLH = torch.log1p(torch.exp(inputs["dt_BLH"] + inputs["dt_bias_H"]))
    for b, h, t in torch.cartesian_prod(torch.arange(2), torch.arange(6), torch.arange(5)).tolist():
        g = h // 3
        expected_P = inputs["D_H"][h] * inputs["x_BLHP"][b, t, g]
        for s in range(t + 1):
            decay = torch.exp(inputs["A_H"][h] * dt_BLH[b, s + 1 : t + 1, h].sum())
            product = inputs["C_BLHN"][b, t, h] @ inputs["B_BLGN"][b, s, g]
            expected_P = expected_P + decay * dt_BLH[b, s, h] * product * inputs["x_BLHP"][b, s, g]
        torch.testing.assert_close(y_BLHP[b, t, h], expected_P, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 15, 16, 53])
@pytest.mark.parametrize("heads", HEADS)
def test_scan_equals_the_recurrence(heads: str, length: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(heads, length)
    expected = values_and_gradients(ssd_scan_reference, inputs, torch.float64)
    assert_close(values_and_gradients(ssd_scan, inputs, dtype, chunk_size=16), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("heads", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize("share_of_strong_steps", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strong_decay(heads: str, share_of_strong_steps: float, dtype: torch.dtype) -> None:
    """dt |A| = 80 everywhere (the state forgets at once), or at some steps between weak ones (0.1)."""
    inputs = make_inputs(heads, 53)
    strong = torch.rand(inputs["dt_BLH"].shape, generator=torch.Generator().manual_seed(2)) < share_of_strong_steps
    inputs["dt_BLH"] = torch.where(strong, 20.0, -3.625)
    inputs["dt_bias_H"] = torch.zeros_like(inputs["dt_bias_H"])
    inputs["A_H"] = torch.full_like(inputs["A_H"], -4)
    expected = values_and_gradients(ssd_scan_reference, inputs, torch.float64)
    assert_close(values_and_gradients(ssd_scan, inputs, dtype), expected, TOLERANCE[dtype])


def test_the_sizes_of_cosyvoice_2() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = make_inputs("per_query_head", 130, batch=1, P=64, N=64)
    inputs["dt_BLH"] = 2 * torch.randn(1, 130, 14, generator=generator).double() - 3
    inputs["C_BLHN"] = torch.randn(1, 130, 14, 64, generator=generator).double()
    for name in ("A_H", "D_H", "dt_bias_H"):
        inputs[name] = torch.linspace(-16, -1, 14).double()
    inputs["dt_bias_H"] = inputs["dt_bias_H"] / 16
    inputs["initial_state_BHPN"] = torch.randn(1, 14, 64, 64, generator=generator).double()
    expected = values_and_gradients(ssd_scan_reference, inputs, torch.float64)
    assert_close(values_and_gradients(ssd_scan, inputs, torch.float32), expected, 5e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", ["per_query_head", "per_kv_head", "mamba2"])
@pytest.mark.parametrize(("left", "right"), [(5, 0), (0, 6), (4, 3)])
def test_padding_does_not_leak(heads: str, left: int, right: int, dtype: torch.dtype) -> None:
    """The padded row equals the short one in values, state and gradients; what lies under the padding is NaN."""
    length = 30
    short = make_inputs(heads, length)
    padded = dict(short)
    for name in ("x_BLHP", "dt_BLH", "B_BLGN"):
        rest = short[name].shape[2:]
        nan = [torch.full((2, n, *rest), torch.nan, dtype=torch.float64) for n in (left, right)]
        padded[name] = torch.cat([nan[0], short[name], nan[1]], 1)
    padded["C_BLHN"] = torch.nn.functional.pad(short["C_BLHN"], (0, 0, 0, 0, left, right), value=1e3)
    mask_BL = torch.zeros(2, left + length + right, dtype=torch.bool)
    mask_BL[:, left : left + length] = True

    def scan_on_real_rows(**arguments: Any) -> tuple[Tensor, Tensor]:
        arguments["mask_BL"] = None
        return ssd_scan_reference(**arguments)

    expected = values_and_gradients(scan_on_real_rows, short, torch.float64)
    wide = torch.promote_types(dtype, torch.float32)
    leaves = {name: t.to(dtype if name in NARROW else wide, copy=True).requires_grad_() for name, t in padded.items()}
    y, state = ssd_scan(**leaves, mask_BL=mask_BL, chunk_size=16, return_final_state=True)
    generator = torch.Generator().manual_seed(1)
    inner = y[:, left : left + length]
    y_weight = torch.randn(inner.shape, generator=generator).bfloat16().to(inner.dtype)
    state_weight = torch.randn(state.shape, generator=generator).bfloat16().to(state.dtype)
    ((inner * y_weight).sum() + (state * state_weight).sum()).backward()
    got = {"y": inner.detach(), "state": state.detach()}
    for name, leaf in leaves.items():
        gradient = leaf.grad
        if gradient.shape != short[name].shape:
            outside = torch.cat([gradient[:, :left], gradient[:, left + length :]], 1)
            assert not outside.any(), f"{name} takes a gradient under the padding"
            gradient = gradient[:, left : left + length]
        got[f"gradient of {name}"] = gradient
    assert_close(got, expected, TOLERANCE[dtype])


def test_a_row_of_padding_alone_keeps_its_state() -> None:
    inputs = make_inputs("per_query_head", 7)
    mask_BL = torch.tensor([[False] * 7, [True] * 7])
    _, state = ssd_scan(**inputs, mask_BL=mask_BL, return_final_state=True)
    assert torch.equal(state[0], inputs["initial_state_BHPN"][0])
    assert not torch.equal(state[1], inputs["initial_state_BHPN"][1])


@pytest.mark.parametrize("heads", HEADS)
def test_steps_equal_the_recurrence(heads: str) -> None:
    inputs = make_inputs(heads, 9)
    expected_y, expected_state = ssd_scan_reference(**inputs, return_final_state=True)
    state = inputs["initial_state_BHPN"]
    for t in range(9):
        before = state.clone()
        y_BHP, new_state = ssd_step(
            state, inputs["x_BLHP"][:, t], inputs["dt_BLH"][:, t], inputs["A_H"], inputs["B_BLGN"][:, t],
            inputs["C_BLHN"][:, t], inputs["D_H"], inputs["dt_bias_H"],
        )  # fmt: skip
        assert torch.equal(state, before), "the old state was changed"
        state = new_state
        torch.testing.assert_close(y_BHP, expected_y[:, t], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-10, atol=1e-12)


def test_a_sequence_may_be_cut_anywhere() -> None:
    inputs = make_inputs("per_kv_head", 40)
    whole_y, whole_state = ssd_scan(**inputs, return_final_state=True)
    sequence = ("x_BLHP", "dt_BLH", "B_BLGN", "C_BLHN")
    parts, state = [], inputs["initial_state_BHPN"]
    for span in (slice(0, 23), slice(23, 24), slice(24, 40)):
        part = {name: t[:, span] if name in sequence else t for name, t in inputs.items()}
        y, state = ssd_scan(**{**part, "initial_state_BHPN": state}, return_final_state=True)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole_y, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, whole_state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("absent", [("initial_state_BHPN",), ("D_H", "dt_bias_H"), OPTIONAL], ids=" ".join)
@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("heads", HEADS)
def test_optional_arguments(heads: str, length: int, absent: tuple[str, ...]) -> None:
    inputs = {name: t for name, t in make_inputs(heads, length).items() if name not in absent}
    expected = values_and_gradients(ssd_scan_reference, inputs, torch.float64)
    assert_close(values_and_gradients(ssd_scan, inputs, torch.float32, chunk_size=16), expected, 5e-6)


def test_types() -> None:
    inputs = make_inputs("per_query_head", 20)
    needed = {name: t for name, t in inputs.items() if name not in OPTIONAL}
    narrow = {name: t.bfloat16() if name in NARROW else t.float() for name, t in needed.items()}
    y, state = ssd_scan(**narrow, return_final_state=True)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32


@pytest.mark.parametrize("tile_floats", [1, 10**9])
def test_work_is_cut_into_tiles_without_a_trace(monkeypatch: pytest.MonkeyPatch, tile_floats: int) -> None:
    """Blocks of one group, or of the whole batch, give the same as the usual ones."""
    inputs = make_inputs("per_query_head", 20, batch=3)
    expected = values_and_gradients(ssd_scan_reference, inputs, torch.float64)
    monkeypatch.setattr("mamtra_ray.models.ssd_chunked._TILE_FLOATS", tile_floats)
    assert_close(values_and_gradients(ssd_scan, inputs, torch.float64, chunk_size=16), expected, 1e-12)


def test_heads_that_do_not_fit_are_named() -> None:
    inputs = make_inputs("per_query_head", 4)
    inputs["dt_BLH"] = inputs["dt_BLH"][..., :4]
    with pytest.raises(ValueError, match="'dt': 4"):
        ssd_scan(**inputs)
