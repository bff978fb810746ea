"""What the hybrids gain on a GPU, beside the alternatives, in one run: scan, training step, decoding, memory, search.

    python benchmarks/gpu.py                          on a CUDA device
    python benchmarks/gpu.py --device cpu --quick     tiny sizes, a few minutes: that it runs; nothing is written
    python benchmarks/gpu.py --parts scan decode      some of: scan train decode search

Writes benchmarks/results/gpu_<card>.json. Everything has CosyVoice 2's shape and random weights; the contenders of a
table run in turn, in an order that rotates, and times are of the wall with the device waited for. A contender that
cannot be imported or does not run is named with the reason.

scan     our scan as it is dispatched (mamba-ssm's kernels where installed), called once for each key-value head (its
         shared x and B are then views and no copies), and by PyTorch's operations; mamba-ssm's kernel called directly;
         fla's chunk_simple_gla; causal attention.
train    Eq. 5's step of a 1:1 student: ours, with compiled layers, without kernels; transformers' GraniteMoeHybrid.
decode   teacher and 1:1 to 1:11 with captured graphs (`static`) and without (`growing`), 1:1 without kernels;
         transformers' Qwen2 and GraniteMoeHybrid. Speeds are over the teacher's own best way.
search   the phases of the demo's search, one GPU for every worker.

"peak MB" is by how much a run raises the memory that PyTorch has allocated on the device; empty on a CPU. All
trainings of a table are on the card at once, with their optimizers; one that no longer fits is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import generate
import scan
import torch
import train_step
from measurement import Timing, machine, paired, print_table, write_result
from torch import Tensor

from mamtra_ray.distill.compilation import compile_layers
from mamtra_ray.models import ssd_cuda
from mamtra_ray.models.ssd import ssd_scan
from mamtra_ray.run.folder import read_run
from mamtra_ray.runtime.training import autocast
from mamtra_ray.speech_lm.speech_lm import SpeechLM

PARTS = ("scan", "train", "decode", "search")
Row = dict[str, Any]
TINY_SEARCH = [
    "corpus.train_tokens=4000", "corpus.validation_tokens=1000", "align.tokens=2000", "probe.num_layouts=8",
    "probe.validation_tokens=500", "search.trials=2", "search.rung_tokens=1000,2000", "search.sentences=2",
    "distill.tokens=2000", "distill.checkpoint_every_tokens=2000", "evaluate.sentences=4",
]  # fmt: skip


class Bench:
    """The device, the sizes, and who was left out and why."""

    def __init__(self, device: str, quick: bool, rounds: int) -> None:
        self.device, self.quick, self.rounds = device, quick, rounds
        self.is_cuda = device == "cuda"
        self.dtype = torch.bfloat16 if self.is_cuda else torch.float32
        self.left_out: list[Row] = []

    def clock(self) -> float:
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def able(self, part: str, functions: Mapping[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
        """Those that run once without an error."""
        able = {}
        for name, function in functions.items():
            try:
                function()
            except Exception as error:  # a benchmark of others' code on a machine we do not know
                self.leave_out(part, name, error)
                if self.is_cuda:
                    torch.cuda.empty_cache()
            else:
                able[name] = function
        return able

    def leave_out(self, part: str, name: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        self.left_out.append({"part": part, "contender": name, "reason": reason})
        print(f"{part}: {name} is left out: {reason}", flush=True)

    def times(
        self, part: str, functions: Mapping[str, Callable[[], object]], clock: Callable[[], float] | None = None
    ) -> dict[str, tuple[Timing, float | None]]:
        """Timing over the first contender's, and by how many MB a run raises the memory."""
        able = self.able(part, functions)
        timings = paired(able, self.rounds, clock=clock or self.clock) if able else {}
        return {name: (timing, self.peak_mb(able[name])) for name, timing in timings.items()}

    def peak_mb(self, function: Callable[[], object]) -> float | None:
        if not self.is_cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Our own PyTorch operations, as if mamba-ssm were not installed."""
    takes = ssd_cuda.takes
    ssd_cuda.takes = lambda x: False
    try:
        yield
    finally:
        ssd_cuda.takes = takes


def kernel_free(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        with without_kernels():
            return function(*arguments)

    return run


def foreign_kernels(bench: Bench) -> dict[str, Callable[..., Tensor]]:
    """Scans of (x, dt, A, B, C), dt after softplus, all with 14 heads, that run on the device by themselves."""

    def mamba_ssm() -> Callable[..., Tensor]:
        kernel = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
        return lambda x, dt, A, B, C: kernel(x, dt, A, B, C, chunk_size=ssd_cuda.CHUNK_SIZE)

    def fla() -> Callable[..., Tensor]:
        kernel = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
        return lambda x, dt, A, B, C: kernel(C, B, x * dt[..., None].to(x.dtype), dt * A, scale=1.0)[0]

    found = {}
    for name, load in (("mamba-ssm mamba_chunk_scan_combined", mamba_ssm), ("fla chunk_simple_gla", fla)):
        try:
            found[name] = load()
        except Exception as error:
            bench.leave_out("scan", name, error)
    return found


def scan_rows(bench: Bench) -> list[Row]:
    rows: list[Row] = []
    foreign = foreign_kernels(bench)
    for length in (64, 128) if bench.quick else (512, 1024, 2048, 4096, 8192, 16384):
        contenders = scan.core_contenders(length, bench.dtype, foreign, bench.device)
        function, inputs = contenders[scan.OURS]
        x, dt, A, B, C, bias = inputs

        def by_group(x: Tensor = x, dt: Tensor = dt, A: Tensor = A, B: Tensor = B, C: Tensor = C, bias: Tensor = bias):
            heads = torch.arange(scan.HEADS).chunk(scan.KV_HEADS)
            parts = [slice(int(part[0]), int(part[-1]) + 1) for part in heads]
            outputs = [
                ssd_scan(x[:, :, g : g + 1], dt[:, :, p], A[p], B[:, :, g : g + 1], C[:, :, p], dt_bias_H=bias[p])
                for g, p in enumerate(parts)
            ]
            return torch.cat(outputs, 2)

        contenders["ours, a call for each key-value head"] = (by_group, inputs)
        contenders["ours, without kernels"] = (kernel_free(function), inputs)
        for backward in (False, True):
            way = scan.with_backward if backward else scan.without_gradients
            runs = {name: way(*pair) if backward else way(pair[0]) for name, pair in contenders.items()}
            for name, (timing, peak) in bench.times("scan", runs).items():
                rows.append(
                    {
                        "pass": "forward+backward" if backward else "forward",
                        "length": length,
                        "contender": name,
                        "ms": round(1e3 * timing.median, 3),
                        "time over ours": timing.ratio_text(),
                        "peak MB": peak,
                    }
                )
    return rows


def train_rows(bench: Bench) -> list[Row]:
    layers, batch, length = (2, 2, 48) if bench.quick else (24, 8, 768)
    precision = "bfloat16" if bench.is_cuda else "float32"
    rows: list[Row] = []

    def made() -> train_step.Setting:
        return train_step.setting("cosyvoice2", layers, batch, length, bench.device)

    def step(setting: train_step.Setting, make: Callable[..., Any]) -> Callable[[], object]:
        model, loss = make(setting)

        def under_autocast() -> Tensor:
            with autocast(torch.device(bench.device), precision):
                return loss()

        return train_step.training_step(model, under_autocast, fused=True)

    def compiled(setting: train_step.Setting) -> Any:
        compile_layers(setting.student)
        return train_step.ours(setting)

    makers: dict[str, Callable[[], Callable[[], object]]] = {
        "ours": lambda: step(made(), train_step.ours),
        "ours, without kernels": lambda: kernel_free(step(made(), train_step.ours)),
        "transformers GraniteMoeHybrid": lambda: step(made(), train_step.obvious),
    }
    if bench.is_cuda:
        makers["ours, compiled layers"] = lambda: step(made(), compiled)
    steps = {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except Exception as error:
            bench.leave_out("train", name, error)
    for name, (timing, peak) in bench.times("train", steps).items():
        rows.append(
            {
                "layers": layers,
                "tokens": batch * length,
                "precision": precision,
                "contender": name,
                "ms": round(1e3 * timing.median, 2),
                "tokens/s": round(batch * length / timing.median),
                "time over ours": timing.ratio_text(),
                "peak MB": peak,
            }
        )
    return rows


def decode_rows(bench: Bench) -> list[Row]:
    layers, tokens = (4, 4) if bench.quick else (24, 128)
    contexts, batches = ((32, 64), (1, 2)) if bench.quick else ((512, 2048, 8192), (1, 8, 32))
    models = generate.contestants(layers, bench.dtype, bench.device)
    contestants: dict[str, generate.Contestant] = {}
    for name, one in models.items():
        if isinstance(one.model, SpeechLM):
            contestants[f"{name}, static"] = generate.ours(one.model, static=True)
            contestants[f"{name}, growing"] = generate.ours(one.model, static=False)
        else:
            contestants[name] = one
    without = generate.ours(models["1:1"].model, static=False)
    contestants["1:1, growing, without kernels"] = replace(without, decode=kernel_free(without.decode))
    rows: list[Row] = []
    for context in contexts:
        for batch in batches:
            watch = generate.Stopwatch(bench.clock)

            def run(name: str, context: int = context, batch: int = batch, watch: Any = watch) -> None:
                one = contestants[name]
                with watch.paused():
                    cache = generate.filled_cache(one, generate.SHAPE, batch, context, bench.dtype)
                one.decode(cache, batch, context, tokens)

            found = bench.times("decode", {name: (lambda n=name: run(n)) for name in contestants}, watch)
            teacher = min((t.median for name, (t, _) in found.items() if name.startswith("teacher, ")), default=None)
            new = [
                {
                    "context": context,
                    "batch": batch,
                    "contender": name,
                    "tokens/s": round(batch * tokens / timing.median, 1),
                    "ms of a step": round(1e3 * timing.median / tokens, 3),
                    "times the teacher's": round(teacher / timing.median, 2) if teacher else None,
                    "quartiles over median": f"[{timing.low / timing.median:.2f}, {timing.high / timing.median:.2f}]",
                    "cache MB": round(contestants[name].cache_bytes(batch, context, bench.dtype) / 1e6, 1),
                    "peak MB": peak,
                }
                for name, (timing, peak) in found.items()
            ]
            print_table(new)
            rows += new
    return rows


def search_rows(bench: Bench) -> list[Row]:
    gpus = f"resources.gpus_per_worker={1 if bench.is_cuda else 0}"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "mamtra_ray.search", "--run", str(run), gpus]
        began = time.perf_counter()
        ended = subprocess.run([*command, *(TINY_SEARCH if bench.quick else [])], stdout=sys.stderr)
        seconds = time.perf_counter() - began
        # 3: a student of so few tokens does not speak well; its phases took their time all the same.
        if ended.returncode not in (0, 3):
            bench.leave_out("search", "the demo's search", RuntimeError(f"exit code {ended.returncode}"))
            return []
        phases = {name: phase["seconds"] for name, phase in read_run(run).phases.items()}
    return [{"phase": name, "seconds": round(value, 1)} for name, value in {**phases, "in all": seconds}.items()]


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"cuda": torch.version.cuda}
    for package in ("torch", "triton", "mamba-ssm", "fla-core", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; nothing is written")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, help="default 7; 2 with --quick")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("PyTorch finds no CUDA device; --device cpu --quick shows that the benchmark runs", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(options.device, options.quick, options.rounds or (2 if options.quick else 7))
    measure = {"scan": scan_rows, "train": train_rows, "decode": decode_rows, "search": search_rows}
    found = {}
    for part in options.parts:
        began = time.perf_counter()
        found[part] = measure[part](bench)
        print(f"\n{part}, {time.perf_counter() - began:.0f} s", flush=True)
        print_table(found[part])
    if not options.quick:
        card = re.sub(r"[^a-z0-9]+", "_", str(machine()["gpu"] or "cpu").lower()).strip("_")
        name = f"gpu_{card}" if options.parts == list(PARTS) else f"gpu_{card}_{'_'.join(options.parts)}"
        write_result(name, [], parts=found, left_out=bench.left_out, versions=versions(), settings=vars(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
