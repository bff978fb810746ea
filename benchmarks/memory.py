"""Peak memory of decoding at growing context: teacher and hybrids of CosyVoice 2's shape, beside the closed form.

    python benchmarks/memory.py            contexts 512 to 8,192 (about ten minutes on 2 cores, 4 GB)
    python benchmarks/memory.py --quick    two contexts, two layouts; nothing is written

Weights are random (memory does not depend on them), the text vocabulary is left out. Every layout runs in a process of
its own, layouts alternate over the rounds. In a process, the cache is filled to the context with copies of one token's
entries; then the peak is reset and a few tokens are decoded. ``decode peak`` is what the process holds at most
meanwhile, above what it held before the cache (so without the weights); ``held`` sums the tensors in the cache, without
the spare room (an eighth) that its buffers keep to grow into. On a GPU (--device cuda) the peak is the allocator's, on
a CPU the kernel's resident set.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import statistics
import sys
from pathlib import Path

import torch
from measurement import print_table, quartiles, write_result

from mamtra_ray.efficiency import ARCHITECTURES, cache_bytes, published_layouts, total_parameters
from mamtra_ray.layouts import Layout
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.speech_lm.sequences import Vocabulary
from mamtra_ray.speech_lm.speech_lm import SpeechLM

SHAPE = ARCHITECTURES["cosyvoice2"]
VOCABULARY = Vocabulary(text_size=0, speech_size=6564, control_size=2, eos_id=6561, stop_ids=(6561, 6562, 6563))
DECODED = 8


def random_model(layout: Layout, dtype: torch.dtype, device: str) -> SpeechLM:
    """A student of CosyVoice 2's shape with random weights."""
    config = DecoderConfig(
        layout=layout,
        vocab_size=VOCABULARY.size,
        hidden_size=SHAPE.hidden_size,
        intermediate_size=SHAPE.intermediate_size,
        num_heads=SHAPE.num_heads,
        num_kv_heads=SHAPE.num_kv_heads,
        head_dim=SHAPE.head_dim,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        max_position_embeddings=32768,
        qkv_bias=True,
    )
    shapes = {name: tensor.shape for name, tensor in SpeechLM(config, VOCABULARY, head_bias=True).state_dict().items()}
    tensors = {name: torch.randn(shape, dtype=dtype, device=device).mul_(0.02) for name, shape in shapes.items()}
    return SpeechLM.from_tensors(config, VOCABULARY, tensors).eval()


@torch.inference_mode()
def measure(letters: str, contexts: list[int], batch: int, dtype_name: str, device: str) -> list[dict[str, float]]:
    """One process: bytes held by the cache and the peak of decoding, above the model, at every context."""
    torch.set_num_threads(1)
    layout = Layout(letters)
    model = random_model(layout, getattr(torch, dtype_name), device)
    decode(model, filled_cache(model, contexts[0], batch), batch)
    rows = []
    for context in contexts:
        release_free_memory()
        before = held_now(device)
        cache = filled_cache(model, context, batch)
        held = cache.num_bytes
        release_free_memory()
        reset_peak(device)
        decode(model, cache, batch)
        rows.append({"context": context, "held": held, "decode_peak": peak(device) - before})
        del cache
    return rows


def release_free_memory() -> None:
    """Give freed memory back, which the C library otherwise keeps: it would hide the next cache."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def filled_cache(model: SpeechLM, context: int, batch: int):  # type: ignore[no-untyped-def]
    """A cache of ``context`` tokens for ``batch`` sequences: one token's, then zeros for keys and values."""
    cache, shape = model.new_cache(), model.config
    model.hidden_states(torch.zeros(batch, 1, dtype=torch.int64, device=model.device), past_key_values=cache)
    zeros = torch.zeros(batch, shape.num_kv_heads, context - 1, shape.head_dim, dtype=model.dtype, device=model.device)
    for layer in model.layout.attention_layers:
        cache.append(layer, zeros, zeros)
    cache.length = context
    return cache


def decode(model: SpeechLM, cache, batch: int) -> None:  # type: ignore[no-untyped-def]
    """A few tokens, one at a time."""
    token_B1 = torch.zeros(batch, 1, dtype=torch.int64, device=model.device)
    for _ in range(DECODED):
        hidden_BLD = model.hidden_states(token_B1, past_key_values=cache)
        token_B1 = model.logits(hidden_BLD).argmax(-1)


def held_now(device: str) -> int:
    """Bytes in use: of the allocator on a GPU, resident on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else status_bytes("VmRSS")


def peak(device: str) -> int:
    """Most bytes in use since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def reset_peak(device: str) -> None:
    """Start the peak anew at what is held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        # 5 = reset the peak resident set (Linux, proc(5)).
        Path("/proc/self/clear_refs").write_text("5")


def status_bytes(field: str) -> int:
    """A line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def in_a_process(*arguments: object) -> list[dict[str, float]]:
    """:func:`measure` in a fresh process, so that no layout sees what another left in the heap."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(measure, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--batch", type=int, default=4, help="sequences at once")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    layouts = dict(published_layouts(SHAPE))
    contexts, rounds = [512, 1024, 2048, 4096, 8192], options.rounds
    if options.quick:
        layouts, contexts, rounds = {ratio: layouts[ratio] for ratio in ("1:0", "1:1")}, [256, 1024], 1

    measured: dict[tuple[str, int], list[dict[str, float]]] = {}
    for turn in range(rounds):
        for ratio, layout in layouts.items():
            for row in in_a_process(str(layout), contexts, options.batch, options.dtype, options.device):
                measured.setdefault((ratio, row["context"]), []).append(row)
                print(json.dumps({"round": turn, "ratio": ratio, **row}), flush=True)

    rows = []
    for (ratio, context), found in measured.items():
        expected = options.batch * cache_bytes(SHAPE, layouts[ratio], context, options.dtype, state_dtype="float32")
        peaks = [row["decode_peak"] for row in found]
        teacher = [row["decode_peak"] for row in measured["1:0", context]]
        to_teacher, low, high = quartiles([own / base for own, base in zip(peaks, teacher, strict=True)])
        rows.append(
            {
                "ratio": ratio,
                "context": context,
                "closed form MB": round(expected / 1e6, 2),
                "held MB": round(found[0]["held"] / 1e6, 2),
                "decode peak MB": round(statistics.median(peaks) / 1e6, 1),
                "peak to teacher": round(to_teacher, 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "weights MB": round(total_parameters(SHAPE, layouts[ratio]) * expected_bytes(options.dtype) / 1e6),
            }
        )
    print_table(rows)
    if not options.quick:
        settings = {"batch": options.batch, "rounds": rounds, "dtype": options.dtype, "device": options.device}
        write_result("memory", rows, settings=settings)


def expected_bytes(dtype: str) -> int:
    """Bytes of one value."""
    return getattr(torch, dtype).itemsize


if __name__ == "__main__":
    main()
