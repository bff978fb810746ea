"""Generation speed and memory of the teacher and the paper's hybrids, beside transformers' own generate.

CosyVoice 2's shape (24 layers, width 896, 14 query and 2 key-value heads) with random weights: neither speed
nor memory depends on their values. Decoding starts from a cache already filled to the context length with
random keys, values and states, and draws greedily; stop ids are barred, so every row runs to the end.

    python benchmarks/generate.py            24 layers, contexts 512, 2048 and 8192, batches 1 and 8 (20 minutes, 8 GB)
    python benchmarks/generate.py --quick    4 layers, short contexts, about a minute; nothing is written

"peak MB" is by how much decoding raises the process's resident memory above the weights, cache included. "attention"
and "products" are the shares of a decoding step that PyTorch's profiler finds in attention over the cache and in matrix
products with the weights. "read, of teacher's" is what a step must read at least, weights and cache, beside what the
teacher's must: where memory is the limit, no program can be faster by more than its inverse.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from measurement import paired, print_table, write_result
from random_models import random_teacher
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from mamtra_ray.efficiency import ARCHITECTURES, published_layouts
from mamtra_ray.efficiency.architectures import Architecture
from mamtra_ray.layouts import Layout, from_strategy
from mamtra_ray.models.cache import DecoderCache
from mamtra_ray.models.mamba import MixerState
from mamtra_ray.speech_lm.generate import Prefilled, decode, prefill
from mamtra_ray.speech_lm.sequences import Vocabulary
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student

SHAPE = ARCHITECTURES["cosyvoice2"]
QUICK_LAYERS = 4


class Stopwatch:
    """Seconds of a clock (the processor time of this thread), without what happens while paused."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self.clock = clock
        self.paused_for = 0.0

    def __call__(self) -> float:
        return self.clock() - self.paused_for

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = self.clock()
        yield
        self.paused_for += self.clock() - began


@dataclass(frozen=True)
class Contestant:
    """A model, how it makes an empty cache, and how it decodes a number of tokens from a filled one."""

    model: torch.nn.Module
    new_cache: Callable[[], Any]
    decode: Callable[[Any, int, int, int], Tensor]
    prefill: Callable[[Tensor], object]

    @property
    def weight_bytes(self) -> int:
        tensors = {tensor.data_ptr(): tensor for tensor in self.model.state_dict().values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def cache_bytes(self, batch: int, context: int, dtype: torch.dtype) -> int:
        """Of a cache filled to ``context``."""
        return bytes_in_use(filled_cache(self, SHAPE, batch, context, dtype))


def layouts_of(num_layers: int) -> dict[str, Layout]:
    """The paper's four hybrids (its Table 3); with fewer layers, 1:1 and 1:3."""
    if num_layers == SHAPE.num_layers:
        return {ratio: layout for ratio, layout in published_layouts(SHAPE) if ratio != "1:0"}
    return {ratio: from_strategy("block_beginning", num_layers, ratio) for ratio in ("1:1", "1:3")}


def ours(model: SpeechLM, static: bool | None = None) -> Contestant:
    def run(cache: DecoderCache, batch: int, _context: int, tokens: int) -> Tensor:
        logits_BS = torch.zeros(batch, model.vocabulary.speech_size, dtype=model.dtype, device=model.device)
        logits_BS[:, 1] = 1
        # The first of these comes from the given scores, so there are as many forward passes as tokens.
        bounds = [(tokens + 1, tokens + 1)] * batch
        results = decode(model, Prefilled(cache, None, logits_BS), bounds, static=static)
        return torch.tensor([result.tokens for result in results])

    return Contestant(model, model.new_cache, run, lambda ids_BL: prefill(model, list(ids_BL)))


def transformers_generate(model: torch.nn.Module, vocabulary: Vocabulary) -> Contestant:
    stop_ids = [vocabulary.speech_offset + stop_id for stop_id in vocabulary.stop_ids]
    not_speech = [*range(vocabulary.speech_offset), *range(vocabulary.control_offset, vocabulary.size)]
    model.generation_config = GenerationConfig(pad_token_id=stop_ids[0])

    def run(cache: DynamicCache, batch: int, context: int, tokens: int) -> Tensor:
        # generate() wants the ids of the whole context and feeds those that the cache lacks: the last one.
        ids_BT = torch.full((batch, context + 1), vocabulary.speech_offset + 1, device=model.device)
        output = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            past_key_values=cache,
            max_new_tokens=tokens,
            do_sample=False,
            suppress_tokens=[*not_speech, *stop_ids],
        )
        return output[:, context:] - vocabulary.speech_offset

    def read(ids_BL: Tensor) -> object:
        with torch.inference_mode():
            return model(ids_BL, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    return Contestant(model, lambda: DynamicCache(config=model.config), run, read)


def qwen2(teacher: SpeechLM) -> Qwen2ForCausalLM:
    """transformers' own class with the teacher's very tensors."""
    config = teacher.config
    qwen = Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(config.rope_parameters),
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(qwen)
    tensors = {f"model.{name}": tensor for name, tensor in teacher.body.state_dict().items()}
    tensors["lm_head.weight"] = teacher.head.weight.new_zeros(config.vocab_size, config.hidden_size)
    vocabulary = teacher.vocabulary
    tensors["lm_head.weight"][vocabulary.speech_offset : vocabulary.control_offset] = teacher.head.weight
    model.load_state_dict(tensors, assign=True)
    return model.eval().to(teacher.device)


def contestants(num_layers: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Contestant]:
    teacher = random_teacher(SHAPE, num_layers, dtype=dtype).to(device)
    students = {
        ratio: make_student(teacher, layout, share_weights=True).eval()
        for ratio, layout in layouts_of(num_layers).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        students["1:1"].save_granite(folder)
        granite = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
        for parameter in granite.parameters():
            # Out of the mapped file: its pages would count as memory that decoding takes.
            parameter.data = parameter.data.clone()
    return {
        "teacher": ours(teacher),
        **{ratio: ours(student) for ratio, student in students.items()},
        "teacher, transformers": transformers_generate(qwen2(teacher), teacher.vocabulary),
        "1:1, transformers": transformers_generate(granite, teacher.vocabulary),
    }


def filled_cache(contestant: Contestant, shape: Architecture, batch: int, context: int, dtype: torch.dtype) -> Any:
    """Random keys, values and states on the model's device, equal for equal cache shapes."""
    model, cache = contestant.model, contestant.new_cache()
    device = next(model.parameters()).device
    ours = isinstance(model, SpeechLM)
    kinds = str(model.layout) if ours else ["AM"[kind != "full_attention"] for kind in model.config.layer_types]
    generator = torch.Generator(device).manual_seed(0)
    heads, groups, P = shape.num_heads, shape.num_kv_heads, shape.head_dim
    # The expanded mixer convolves every head's x and B, the compact one every key-value head's.
    channels = (heads + 2 * (groups if ours else heads)) * P
    for layer, kind in enumerate(kinds):
        if kind == "A":
            size = (batch, groups, context, P)
            keys, values = (
                torch.empty(size, dtype=dtype, device=device).normal_(generator=generator) for _ in range(2)
            )
            if ours:
                cache.append(layer, keys, values)
            else:
                cache.update(keys, values, layer)
            continue
        conv = torch.zeros(batch, channels, 4, dtype=dtype, device=device)
        states = torch.empty(batch, heads, P, P, device=device).normal_(generator=generator)
        if ours:
            cache.set_state(layer, MixerState(conv, states))
        else:
            cache.update_conv_state(conv, layer)
            cache.update_recurrent_state(states, layer)
    if ours:
        cache.length = context
    return cache


def bytes_in_use(cache: Any) -> int:
    """Of keys, values and states."""
    if isinstance(cache, DecoderCache):
        return cache.num_bytes
    tensors: list[Tensor] = []
    for layer in cache.layers:
        for value in vars(layer).values():
            held = value.values() if isinstance(value, dict) else [value]
            tensors += [tensor for tensor in held if isinstance(tensor, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def peak_bytes(run: Callable[[], object]) -> int:
    """By how much ``run`` raises the resident memory at its peak, in a forked process of its own (Linux)."""

    def child(connection: Connection) -> None:
        # What earlier rounds freed but the heap still holds would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls back to the present size
        before = _status_bytes("VmRSS")
        run()
        connection.send(_status_bytes("VmHWM") - before)

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender,))
    process.start()
    sender.close()
    raised: int = receiver.recv()
    process.join()
    return raised


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers, contexts 256 and 1024, batches 1 and 2")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; every model runs once in each")
    parser.add_argument("--tokens", type=int, default=8, help="decoding steps per round")
    parser.add_argument("--contexts", type=int, nargs="+", help="context lengths")
    parser.add_argument("--batches", type=int, nargs="+", help="batch sizes")
    parser.add_argument("--prefill-up-to", type=int, help="also time reading prompts of at most this length")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, options.dtype)
    num_layers = QUICK_LAYERS if options.quick else SHAPE.num_layers
    contexts = options.contexts or ([256, 1024] if options.quick else [512, 2048, 8192])
    batches = options.batches or ([1, 2] if options.quick else [1, 8])
    prefill_up_to = options.prefill_up_to or (256 if options.quick else 512)

    models = contestants(num_layers, dtype)
    rows, agreement = [], {}
    for context in contexts:
        for batch in batches:
            found, tokens = decoding_rows(models, context, batch, options.tokens, options.rounds, dtype)
            rows += found
            print_table(found)
            for name in ("teacher", "1:1"):
                same = (tokens[name] == tokens[f"{name}, transformers"]).float().mean().item()
                agreement[f"{name}, context {context}, batch {batch}"] = same
    prefill_rows = [row for context in contexts if context <= prefill_up_to for row in reading_rows(models, context)]
    print_table(prefill_rows)
    print("share of tokens equal to those of transformers' generate:", agreement)
    if not options.quick:
        write_result(
            "generate",
            rows,
            settings=vars(options) | {"layers": num_layers},
            layouts={ratio: str(layout) for ratio, layout in layouts_of(num_layers).items()},
            prefill=prefill_rows,
            share_of_tokens_equal_to_transformers=agreement,
        )


def decoding_rows(
    models: dict[str, Contestant], context: int, batch: int, tokens: int, rounds: int, dtype: torch.dtype
) -> tuple[list[dict[str, object]], dict[str, Tensor]]:
    """One row per model, and the tokens it drew."""
    clock = Stopwatch()
    drawn: dict[str, Tensor] = {}

    def decode_from_filled(name: str) -> None:
        with clock.paused():
            cache = filled_cache(models[name], SHAPE, batch, context, dtype)
        drawn[name] = models[name].decode(cache, batch, context, tokens)

    timings = paired({name: (lambda n=name: decode_from_filled(n)) for name in models}, rounds, clock=clock)
    rows = []
    read = {name: one.weight_bytes + one.cache_bytes(batch, context, dtype) for name, one in models.items()}
    for name, contestant in models.items():
        peak = peak_bytes(lambda n=name: decode_from_filled(n))
        timing = timings[name]
        attention, products = shares_of_a_step(contestant, batch, context, dtype)
        rows.append(
            {
                "model": name,
                "context": context,
                "batch": batch,
                "tokens/s": round(batch * tokens / timing.median, 2),
                "times the teacher's": round(1 / timing.ratio, 2),
                "low": round(1 / timing.ratio_high, 2),
                "high": round(1 / timing.ratio_low, 2),
                "attention": round(attention, 2),
                "products": round(products, 2),
                "read, of teacher's": round(read[name] / read["teacher"], 2),
                "cache MB": round(contestant.cache_bytes(batch, context, dtype) / 1e6, 1),
                "peak MB": round(peak / 1e6, 1),
                "weights MB": round(contestant.weight_bytes / 1e6),
            }
        )
    return rows, drawn


def shares_of_a_step(contestant: Contestant, batch: int, context: int, dtype: torch.dtype) -> tuple[float, float]:
    """Shares of decoding in attention and in matrix products with the weights."""
    cache = filled_cache(contestant, SHAPE, batch, context, dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        contestant.decode(cache, batch, context, 2)
    seconds = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    attention = sum(time for key, time in seconds.items() if "scaled_dot_product" in key)
    products = sum(seconds.get(f"aten::{name}", 0.0) for name in ("mm", "addmm"))
    return attention / sum(seconds.values()), products / sum(seconds.values())


def reading_rows(models: dict[str, Contestant], context: int) -> list[dict[str, object]]:
    """Seconds to read one prompt (batch 1), once per model."""
    vocabulary = models["teacher"].model.vocabulary
    ids_1L = torch.randint(vocabulary.speech_offset, vocabulary.control_offset, (1, context))
    timings = paired({n: (lambda c=c: c.prefill(ids_1L)) for n, c in models.items()}, 1, clock=time.thread_time)
    return [
        {
            "model": name,
            "prompt": context,
            "seconds": round(timing.median, 3),
            "speed, times the teacher's": round(1 / timing.ratio, 2),
        }
        for name, timing in timings.items()
    ]


if __name__ == "__main__":
    main()
