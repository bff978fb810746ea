"""Runs the real mamba-ssm Triton kernels on CPU tensors and compares them with our CPU scan; prints errors as JSON.

A program of its own, started by test_mamba_ssm_kernels.py with mamba-ssm on the path: once mamba_ssm can be imported,
transformers binds its kernels at import and CPU models of that kind no longer run in the process.
"""

# ruff: noqa: E402  (the environment must be set up before the kernels are imported)

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import os
import sys
import types

os.environ["TRITON_INTERPRET"] = "1"
os.environ["MAMBA_DETERMINISTIC"] = "1"  # the other mode adds with atomics on workspaces sized by the GPU

import torch

torch.set_num_threads(1)

# Built without CUDA the package lacks this extension of Mamba-1, which it imports all the same.
_stub = types.ModuleType("selective_scan_cuda")
_stub.__spec__ = importlib.machinery.ModuleSpec("selective_scan_cuda", None)
sys.modules["selective_scan_cuda"] = _stub
torch.cuda.device = lambda *_: contextlib.nullcontext()
torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
    multi_processor_count=1, name="interpreter", major=8, minor=0, warp_size=32, total_memory=1 << 30
)

import mamba_ssm
import mamba_ssm.ops.triton.layernorm_gated as layernorm_gated
import mamba_ssm.ops.triton.selective_state_update as state_update
import mamba_ssm.ops.triton.ssd_combined as ssd_combined

from mamtra_ray.models import mamba, ssd, ssd_cuda

ssd_cuda.CHUNK_SIZE = 16  # several chunks in a short sequence: interpreted kernels are slow

CALLS: dict[str, int] = {}


def count_calls(module: types.ModuleType, name: str) -> None:
    kernel = getattr(module, name)

    def counted(*args: object, **kwargs: object) -> object:
        CALLS[name] = CALLS.get(name, 0) + 1
        return kernel(*args, **kwargs)

    setattr(module, name, counted)


@contextlib.contextmanager
def pretending_cuda():
    """CPU tensors that say they are on a GPU: our dispatch, not a copy of it, chooses the kernels."""
    torch.Tensor.is_cuda = property(lambda _: True)
    try:
        yield
    finally:
        del torch.Tensor.is_cuda


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30))


def scan_errors(states: int, *, masked: bool, groups: int = 2) -> dict[str, float]:
    torch.manual_seed(0)
    batch, length, heads, P = 1 if groups > 1 else 2, 20, 4, 16
    inputs = {
        "x_BLHP": torch.randn(batch, length, groups, P),
        "dt_BLH": torch.randn(batch, length, states),
        "A_H": -0.1 - torch.rand(states),
        "B_BLGN": torch.randn(batch, length, groups, P),
        "C_BLHN": torch.randn(batch, length, heads, P),
        "D_H": torch.randn(heads),
        "dt_bias_H": torch.randn(states),
        "initial_state_BHPN": torch.randn(batch, states, P, P),
    }
    mask_BL = torch.ones(batch, length, dtype=torch.bool)
    if masked:
        mask_BL[:, :3] = False
        mask_BL[:, -2:] = False
    y_weight, state_weight = torch.randn(batch, length, heads, P), torch.randn(batch, states, P, P)

    def run(context: contextlib.AbstractContextManager[None]) -> dict[str, torch.Tensor]:
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        with context:
            y, state = ssd.ssd_scan(**leaves, mask_BL=mask_BL if masked else None, return_final_state=True)
        y = y * mask_BL[..., None, None]
        ((y * y_weight).sum() + (state * state_weight).sum()).backward()
        gradients = {f"d {name}": leaf.grad for name, leaf in leaves.items()}
        return {"y": y.detach(), "state": state.detach(), **gradients}

    expected = run(contextlib.nullcontext())
    got = run(pretending_cuda())
    return {name: error(got[name], expected[name]) for name in expected}


def mixer_errors(sharing: mamba.StateSharing, groups: int = 2) -> dict[str, float]:
    torch.manual_seed(0)
    mixer = mamba.MambaMixer(mamba.MixerConfig(32, 4, groups, 16, state_sharing=sharing))
    hidden_BLD = torch.randn(1, 17, 32)
    with torch.no_grad():
        expected, _ = mixer(hidden_BLD, return_state=True)
        with pretending_cuda():
            prefix, state = mixer(hidden_BLD[:, :15], return_state=True)
            before = state.ssm_BHPN.clone()
            first, middle = mixer(hidden_BLD[:, 15:16], state=state, return_state=True)
            after = state.ssm_BHPN.clone()
            second = mixer(hidden_BLD[:, 16:], state=middle)
            mixer(hidden_BLD[:, 15:16], state=state, return_state=True, in_place=True)
            overwritten, again = state.ssm_BHPN.clone(), mixer(hidden_BLD[:, 16:], state=state)
    return {
        "prefill": error(prefix, expected[:, :15]),
        "first step": error(first, expected[:, 15:16]),
        "second step": error(second, expected[:, 16:]),
        "old state untouched": error(after, before),
        "state overwritten": error(overwritten, middle.ssm_BHPN),
        "step after that": error(again, expected[:, 16:]),
    }


def norm_errors() -> dict[str, float]:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 4, 16), torch.randn(2, 3, 4, 16), torch.randn(4, 16)]

    def run(context: contextlib.AbstractContextManager[None]) -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        with context:
            out = mamba.gated_rms_norm(*leaves, 1e-6)
        (out * out.detach().cos()).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    expected, got = run(contextlib.nullcontext()), run(pretending_cuda())
    return {name: error(a, b) for name, a, b in zip(("out", "d y", "d z", "d weight"), got, expected, strict=True)}


def main() -> None:
    count_calls(ssd_combined, "mamba_chunk_scan_combined")
    count_calls(state_update, "selective_state_update")
    count_calls(layernorm_gated, "rmsnorm_fn")
    errors = {
        "scan per_query_head": scan_errors(4, masked=False),
        "scan per_kv_head, padded": scan_errors(2, masked=True),
        "scan of one key-value head": scan_errors(4, masked=True, groups=1),
        "scan of one state": scan_errors(1, masked=False, groups=1),
        "mixer of one key-value head": mixer_errors("per_query_head", groups=1),
        "mixer per_query_head": mixer_errors("per_query_head"),
        "mixer per_kv_head": mixer_errors("per_kv_head"),
        "gated norm": norm_errors(),
    }
    print(json.dumps({"mamba_ssm": mamba_ssm.__version__, "calls": CALLS, "errors": errors}))


if __name__ == "__main__":
    main()
