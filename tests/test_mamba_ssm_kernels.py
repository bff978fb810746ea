"""The CUDA path, proven without a GPU: mamba-ssm's real kernels under Triton's interpreter against our CPU scan.

mamba-ssm and Triton go into a folder of their own (benchmarks/foreign_packages.py), never into the environment of the
tests. Installing takes about a minute, the kernels a quarter of one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mamtra_ray.models import mamba, ssd_cuda

PROGRAM = Path(__file__).with_name("mamba_ssm_interpreted.py")
ROOT = PROGRAM.parents[1]


def _kernel_environment() -> str:
    install = [sys.executable, str(ROOT / "benchmarks" / "foreign_packages.py")]
    return subprocess.run(install, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


@pytest.fixture(scope="module")
def report() -> dict:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), _kernel_environment()]),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run([sys.executable, str(PROGRAM)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
def test_cuda_tensors_go_through_mamba_ssm(report: dict) -> None:
    for kernel in ("mamba_chunk_scan_combined", "selective_state_update", "rmsnorm_fn"):
        assert report["calls"].get(kernel, 0) > 0, f"{kernel} was not called"


@pytest.mark.slow
def test_mamba_ssm_agrees_with_the_cpu_path(report: dict) -> None:
    """Values and every gradient, of the scan (padded, with an initial state), the gated norm and the whole mixer."""
    errors = {f"{part}: {name}": e for part, parts in report["errors"].items() for name, e in parts.items()}
    assert len(errors) == 4 * 10 + 3 * 6 + 4
    too_large = {name: e for name, e in errors.items() if not e < 5e-6}
    assert not too_large


@pytest.mark.parametrize("sharing", ["per_query_head", "per_kv_head"])
def test_without_mamba_ssm_cuda_tensors_take_the_cpu_path(monkeypatch: pytest.MonkeyPatch, sharing: str) -> None:
    """No kernels, no error: one warning that names the package, and the numbers of the CPU."""
    mixer = mamba.MambaMixer(mamba.MixerConfig(16, 4, 2, 8, state_sharing=sharing))
    hidden_BLD = torch.randn(2, 9, 16)
    expected = mixer(hidden_BLD)
    monkeypatch.setattr(ssd_cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
    ssd_cuda._installed.cache_clear()
    with pytest.warns(UserWarning, match=r"mamtra-ray\[cuda\]") as warned:
        prefix, state = mixer(hidden_BLD[:, :8], return_state=True)
        last = mixer(hidden_BLD[:, 8:], state=state)
    ssd_cuda._installed.cache_clear()
    assert len(warned) == 1
    torch.testing.assert_close(torch.cat([prefix, last], 1), expected, atol=1e-6, rtol=1e-5)
    last.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("sharing", ["per_query_head", "per_kv_head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_on_a_gpu_compute_what_the_recurrence_does(sharing: str, groups: int, dtype: torch.dtype) -> None:
    """Values and gradients of several chunks, padded, against the recurrence in float64 on the CPU."""
    pytest.importorskip("mamba_ssm", reason="mamba-ssm is not installed, so there are no kernels to compare")
    from mamtra_ray.models.ssd import ssd_scan, ssd_scan_reference

    torch.manual_seed(0)
    batch, length, heads, P = 2, 600, 4, 64
    states = heads if sharing == "per_query_head" else groups
    leaves = {
        "x_BLHP": torch.randn(batch, length, groups, P),
        "dt_BLH": torch.randn(batch, length, states) - 2,
        "A_H": -0.1 - torch.rand(states),
        "B_BLGN": torch.randn(batch, length, groups, P) / 8,
        "C_BLHN": torch.randn(batch, length, heads, P),
        "D_H": torch.randn(heads),
        "initial_state_BHPN": torch.randn(batch, states, P, P),
    }
    rounded = {"x_BLHP", "B_BLGN", "C_BLHN"}
    # Both see the same numbers: those that the smaller type can hold.
    leaves = {name: t.to(dtype).double() if name in rounded else t.double() for name, t in leaves.items()}
    mask_BL = torch.ones(batch, length, dtype=torch.bool)
    mask_BL[0, :40] = False
    weight_BLHP = torch.randn(batch, length, heads, P, dtype=torch.float64) * mask_BL[..., None, None]

    def run(scan: Any, device: str) -> dict[str, torch.Tensor]:
        own = {}
        for name, t in leaves.items():
            kept = torch.float64 if device == "cpu" else dtype if name in rounded else torch.float32
            own[name] = t.detach().to(device, kept, copy=True).requires_grad_()
        y, state = scan(**own, mask_BL=mask_BL.to(device), return_final_state=True)
        ((y * weight_BLHP.to(device)).sum() + state.sum()).backward()
        y = y * mask_BL.to(device)[..., None, None]
        return {"y": y.detach(), "state": state.detach(), **{f"d {name}": leaf.grad for name, leaf in own.items()}}

    expected, found = run(ssd_scan_reference, "cpu"), run(ssd_scan, "cuda")
    assert ssd_cuda.takes(torch.zeros(1, device="cuda"))
    # TF32 and bfloat16 products: about three and two digits.
    tolerance = 5e-3 if dtype == torch.float32 else 3e-2
    for name, value in expected.items():
        error = (found[name].cpu().double() - value).abs().max() / value.abs().max()
        assert error < tolerance, f"{name}: {error}"


def test_no_module_imports_mamba_ssm_on_the_cpu() -> None:
    """Without mamba-ssm everything runs; with it installed, nothing pulls it in before a CUDA tensor comes."""
    program = (
        "import sys, torch; from mamtra_ray.models import mamba, ssd, ssd_cuda; "
        "mixer = mamba.MambaMixer(mamba.MixerConfig(16, 2, 1, 8)); mixer(torch.randn(1, 3, 16)).sum().backward(); "
        "assert 'mamba_ssm' not in sys.modules and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
