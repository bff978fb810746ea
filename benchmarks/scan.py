"""How fast is the state-space scan on a CPU, beside other scans and beside attention?

    python benchmarks/scan.py                 # all lengths, 256 to 8192: about 20 minutes on one core
    python benchmarks/scan.py --quick         # a minute
    python benchmarks/scan.py --parts core --lengths 1024 2048 --dtypes float32

One thread, batch 1, the sizes of CosyVoice 2 (hidden 896, 14 query and 2 key-value heads of 64). Three parts: the
``core`` (scan against scans and scaled-dot-product attention), the ``mixer`` (with projections, against our attention,
which equals Qwen2's) and the whole ``layer`` (with norms and MLP). Every contender gets the same inputs and does
what its interface asks for (repeating heads, softplus); a contender that takes longer than --limit for one call is
left out at greater lengths. Mixer and layer are measured in bfloat16 only where the processor multiplies in it; where
it does not (AVX2), their projections take 30 times as long as in float32 and nothing else is to be seen.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import os
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from foreign_packages import folder
from measurement import Timing, paired, print_table, write_result
from torch import Tensor, nn

from mamtra_ray.layouts import Layout
from mamtra_ray.models.attention import Attention
from mamtra_ray.models.decoder import DecoderLayer
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.mamba import MambaMixer
from mamtra_ray.models.pass_inputs import pass_inputs
from mamtra_ray.models.ssd import ssd_scan

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, CHUNK = 896, 14, 2, 64, 64
OURS = "ours, per_query_head"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _module_from(path: Path, stubs: Iterable[str] = ()) -> types.ModuleType:
    """One file of a package, without the package: importing mamba_ssm would break transformers' CPU path."""
    spec = importlib.util.spec_from_file_location(f"foreign_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    for name in stubs:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].mamba_chunk_scan_combined = None  # imported by the file, not used by what we call
    try:
        spec.loader.exec_module(module)
    finally:
        for name in stubs:
            del sys.modules[name]
    return module


def foreign_scans() -> dict[str, Callable[..., Tensor]]:
    """Scans of (x, dt, A, B, C): dt after softplus, all with 14 heads."""
    place = folder()
    sys.path.append(str(place))
    import einops  # noqa: F401  (both files need it; the rest of the folder must not be found)

    sys.path.remove(str(place))
    packages = ["mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", "mamba_ssm.ops.triton.ssd_combined"]
    minimal = _module_from(place / "mamba_ssm/modules/ssd_minimal.py", packages).ssd_minimal_discrete
    simple_gla = _module_from(place / "fla/ops/simple_gla/naive.py").naive_chunk_simple_gla

    def mamba_ssm_minimal(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = (dt * A).to(x.dtype)
        return minimal(x * dt[..., None].to(x.dtype), decay, B, C, CHUNK)[0]

    def fla_naive_chunk(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return simple_gla(C, B, x * dt[..., None].to(x.dtype), dt * A, chunk_size=CHUNK, scale=1.0)[0]

    return {"mamba-ssm ssd_minimal_discrete": mamba_ssm_minimal, "fla naive_chunk_simple_gla": fla_naive_chunk}


def core_contenders(
    length: int, dtype: torch.dtype, foreign: dict[str, Callable[..., Tensor]], device: str = "cpu"
) -> dict[str, Any]:
    """name -> (function without arguments, its differentiable inputs)."""
    generator = torch.Generator().manual_seed(0)

    def normal(heads: int, *size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(1, length, heads, *size, generator=generator).to(device, dtype).requires_grad_()

    x, B, C = normal(KV_HEADS, HEAD_DIM), normal(KV_HEADS, HEAD_DIM), normal(HEADS, HEAD_DIM)
    group = HEADS // KV_HEADS

    def decay(heads: int) -> tuple[Tensor, Tensor, Tensor]:
        dt = normal(heads, dtype=torch.float32)
        A = -torch.linspace(1, 16, heads, device=device)
        return dt, A.requires_grad_(), torch.full((heads,), -4.0, device=device).requires_grad_()

    def repeated(function: Callable[..., Tensor], decays: tuple[Tensor, ...]) -> Callable[[], Tensor]:
        dt, A, bias = decays
        return lambda: function(
            x.repeat_interleave(group, 2), F.softplus(dt + bias), A, B.repeat_interleave(group, 2), C
        )

    contenders: dict[str, Any] = {}
    for name, heads in ((OURS, HEADS), ("ours, per_kv_head", KV_HEADS)):
        dt, A, bias = decay(heads)

        def ours(dt: Tensor = dt, A: Tensor = A, bias: Tensor = bias) -> Tensor:
            return ssd_scan(x, dt, A, B, C, dt_bias_H=bias, chunk_size=CHUNK)

        contenders[name] = (ours, [x, dt, A, B, C, bias])
    for name, function in foreign.items():
        decays = decay(HEADS)
        contenders[name] = (repeated(function, decays), [x, B, C, *decays])
    contenders["SDPA, causal"] = (
        lambda: F.scaled_dot_product_attention(
            C.transpose(1, 2), B.transpose(1, 2), x.transpose(1, 2), is_causal=True, enable_gqa=True
        ),
        [x, B, C],
    )
    return contenders


def layer_contenders(part: str, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """Our mixer against attention, alone or in a decoder layer. bfloat16 is autocast, as in training."""
    torch.manual_seed(0)
    hidden = torch.randn(1, length, HIDDEN, requires_grad=True)
    contenders: dict[str, Any] = {}
    for name in (OURS, "ours, per_kv_head", "attention (SDPA)"):
        is_ours = name.startswith("ours")
        sharing: Any = name.removeprefix("ours, ") if is_ours else "per_query_head"
        config = DecoderConfig(
            layout=Layout("M" if is_ours else "A"), vocab_size=1, hidden_size=HIDDEN, intermediate_size=4864,
            num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, rms_norm_eps=1e-6,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6}, max_position_embeddings=32768, qkv_bias=True,
            state_sharing=sharing, chunk_size=CHUNK,
        )  # fmt: skip
        inputs = pass_inputs(config.rope, hidden)
        if part == "layer":
            module: nn.Module = DecoderLayer(config, 0)
        else:
            module = MambaMixer(config.mixer) if is_ours else Attention(config, 0)
        arguments = (hidden,) if isinstance(module, MambaMixer) else (hidden, inputs)

        def run(module: nn.Module = module, arguments: tuple[Any, ...] = arguments) -> Tensor:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                return module(*arguments)

        contenders[name] = (run, [hidden, *module.parameters()])
    return contenders


def core_matmul_flops(name: str, length: int, backward: bool) -> float | None:
    """FLOPs of the matrix products of our scan, and of causal attention; None for the others."""
    if name == "SDPA, causal":
        products = 2 + 5 * backward  # backward: recomputed scores, and two gradients for each product
        return products * 2 * length * (length + 1) / 2 * HEAD_DIM * HEADS
    if not name.startswith("ours"):
        return None
    states = HEADS if name == OURS else KV_HEADS
    inside = (2 + 5 * backward) * 2 * CHUNK * HEAD_DIM * HEADS
    through_state = (1 + 2 * backward) * 2 * HEAD_DIM**2 * HEADS + (1 + 2 * backward) * 2 * HEAD_DIM**2 * states
    return length * (inside + through_state)


def matmul_roofline(dtype: torch.dtype) -> float:
    """FLOP/s of a product of two 1024 x 1024 matrices, the best of five."""
    a = torch.randn(1024, 1024).to(dtype)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        _ = a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds)


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether a product of bfloat16 matrices is not slower than one of float32."""
    return matmul_roofline(torch.bfloat16) >= matmul_roofline(torch.float32)


def with_backward(function: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        out = function()
        torch.autograd.grad(out, inputs, torch.ones_like(out), allow_unused=True)

    return run


def without_gradients(function: Callable[[], Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            function()

    return run


def crossover(rows: list[dict[str, Any]], ours: str, attention: str) -> str:
    """The length at which ours becomes the faster one, interpolated between the measured lengths."""
    times = {(row["contender"], row["length"]): row["milliseconds"] for row in rows}
    lengths = sorted({row["length"] for row in rows if (attention, row["length"]) in times})
    gains = [math.log(times[attention, length] / times[ours, length]) for length in lengths]
    if not gains or gains[0] > 0:
        return f"below {lengths[0]}" if gains else "not measured"
    for (short, low), (long, high) in zip(
        zip(lengths, gains, strict=True), list(zip(lengths, gains, strict=True))[1:], strict=False
    ):
        if high > 0:
            return f"{short * (long / short) ** (low / (low - high)):.0f}"
    return f"above {lengths[-1]}"


def measure(part: str, dtype_name: str, lengths: list[int], rounds: int, limit: float) -> list[dict[str, Any]]:
    dtype = DTYPES[dtype_name]
    foreign = foreign_scans() if part == "core" else {}
    roofline = matmul_roofline(dtype)
    rows: list[dict[str, Any]] = []
    for backward in (False, True):
        dropped: set[str] = set()
        for length in lengths:
            contenders = (
                core_contenders(length, dtype, foreign) if part == "core" else layer_contenders(part, length, dtype)
            )
            functions = {
                name: with_backward(function, inputs) if backward else without_gradients(function)
                for name, (function, inputs) in contenders.items()
                if name not in dropped
            }
            timings = paired(functions, rounds if length <= 2048 else max(3, rounds // 3), baseline=OURS)
            dropped |= {name for name, timing in timings.items() if timing.median > limit}
            rows += [
                _row(part, dtype_name, backward, length, name, timing, roofline) for name, timing in timings.items()
            ]
            print_table(
                [
                    {k: v for k, v in row.items() if k not in ("ratio_low", "ratio_high")}
                    for row in rows[-len(timings) :]
                ]
            )
            print(flush=True)
    return rows


def _row(
    part: str, dtype: str, backward: bool, length: int, name: str, timing: Timing, roofline: float
) -> dict[str, Any]:
    # All scans compute in float32 inside; only where bfloat16 products exist are they a roofline of their own.
    comparable = part == "core" and (dtype == "float32" or has_bfloat16_products())
    flops = core_matmul_flops(name, length, backward) if comparable else None
    return {
        "part": part,
        "dtype": dtype,
        "pass": "forward+backward" if backward else "forward",
        "length": length,
        "contender": name,
        "milliseconds": 1e3 * timing.median,
        "tokens_per_second": round(length / timing.median),
        "time_over_ours": timing.ratio_text(),
        "ratio_low": timing.ratio_low,
        "ratio_high": timing.ratio_high,
        "of_matmul_roofline": "" if flops is None else round(flops / timing.median / roofline, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["core", "mixer", "layer"], choices=["core", "mixer", "layer"])
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=9, help="a third of it above 2048 positions")
    parser.add_argument("--limit", type=float, default=10.0, help="seconds of one call")
    parser.add_argument("--quick", action="store_true", help="two short lengths, three rounds, no result file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.lengths, arguments.rounds = [256, 512], 3
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    crossovers: list[dict[str, str]] = []
    for part in arguments.parts:
        attention = "SDPA, causal" if part == "core" else "attention (SDPA)"
        for dtype in arguments.dtypes:
            if part != "core" and dtype == "bfloat16" and not has_bfloat16_products():
                print(f"{part}, bfloat16: left out, this processor has no products of bfloat16", flush=True)
                continue
            new_rows = measure(part, dtype, arguments.lengths, arguments.rounds, arguments.limit)
            rows += new_rows
            for name in ("forward", "forward+backward"):
                chosen = [row for row in new_rows if row["pass"] == name]
                for ours in (OURS, "ours, per_kv_head"):
                    length = crossover(chosen, ours, attention)
                    crossovers.append(
                        {"part": part, "dtype": dtype, "pass": name, "ours": ours, "faster_than_attention_from": length}
                    )
    print_table(crossovers)
    if not arguments.quick:
        write_result("scan", rows, crossovers=crossovers)


if __name__ == "__main__":
    main()
