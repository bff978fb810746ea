"""Verb ``efficiency``: parameters, FLOPs and cache bytes in closed form."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mamtra_ray.artifacts import read_json
from mamtra_ray.efficiency.architectures import (
    Architecture,
    StateSharing,
    cosyvoice2,
    demo,
    from_hf_config,
    llasa_1b,
    zonos_v0_1_hybrid,
)
from mamtra_ray.efficiency.closed_form import ARCHITECTURES, efficiency_rows
from mamtra_ray.errors import InputError, exit_code_2_on_input_error, nearest_name
from mamtra_ray.layouts import Layout
from mamtra_ray.runtime.progress import table

_BREAK_EVEN = ("break_even_length", "break_even_length_with_weights")


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.efficiency",
        description="Parameters, FLOPs and cache bytes in closed form, for every architecture and layout.",
    )
    parser.add_argument("--json", action="store_true", help="a list of rows instead of the table")
    parser.add_argument("--length", type=int, default=2048, help="tokens (default: 2048, as the paper's Table 3)")
    parser.add_argument("--dtype", default="float32", help="type of the cache (default: float32, as in Fig. 5)")
    parser.add_argument("--state-dtype", help="type of the SSM states where it differs from --dtype")
    parser.add_argument("--state-sharing", default="per_query_head", help="per_query_head (paper) or per_kv_head")
    parser.add_argument("--config", type=Path, help="config.json of a Qwen2 or Llama model of your own")
    parser.add_argument("--layout", action="append", help="such as AMAM...; may be repeated (default: every ratio)")
    parser.add_argument("--system", help=f"only one of {', '.join(ARCHITECTURES)}")
    options = parser.parse_args(arguments)
    if options.length <= 0:
        raise InputError(f"--length must be positive, not {options.length}")
    rows = []
    for architecture in _chosen_architectures(options):
        layouts = [(layout.ratio, layout) for layout in map(Layout.from_string, options.layout or [])]
        rows += efficiency_rows(
            architecture, layouts, length=options.length, dtype=options.dtype, state_dtype=options.state_dtype
        )
    print(json.dumps(rows, indent=2) if options.json else _as_table(rows))
    return 0


def _chosen_architectures(options: argparse.Namespace) -> list[Architecture]:
    sharings: tuple[StateSharing, ...] = ("per_query_head", "per_kv_head")
    sharing = options.state_sharing
    if sharing not in sharings:
        raise InputError(f"unknown state sharing {sharing!r}: {nearest_name(sharing, sharings)}")
    if options.config:
        return [from_hf_config(read_json(options.config), options.config.resolve().parent.name, sharing)]
    architectures = {a.name: a for a in (cosyvoice2(sharing), llasa_1b(sharing), zonos_v0_1_hybrid(), demo(sharing))}
    if not options.system:
        return list(architectures.values())
    if options.system not in architectures:
        raise InputError(f"unknown system {options.system!r}: {nearest_name(options.system, architectures)}")
    return [architectures[options.system]]


def _as_table(rows: list[dict[str, Any]]) -> str:
    header = ["system", "ratio", "M params", "TFLOP", "full", "GFLOP/token", "cache MB", "cache <", "memory <"]
    cells = [
        [
            row["system"],
            row["ratio"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['prefill_flops'] / 1e12:.3f}",
            f"{row['prefill_flops_full'] / 1e12:.3f}",
            f"{row['decode_flops'] / 1e9:.3f}",
            f"{row['cache_bytes'] / 1e6:.2f}",
            *("-" if row[key] is None else f"{row[key]:,}" for key in _BREAK_EVEN),
        ]
        for row in rows
    ]
    counted = f"{rows[0]['length']:,} tokens; cache in {rows[0]['dtype']}, 1 MB = 1e6 bytes"
    lines = [counted, "", table(header, cells)]
    notes = [
        "",
        "M params: decoder without embedding tables and head (Zonos: the whole checkpoint, as published).",
        "TFLOP: one forward pass in the paper's accounting; full: with convolution, scan and one head position.",
        "cache <: tokens of context above which the cache is smaller than the all-attention model's;",
        "memory <: the same for weights and cache of one sequence together (mixers have more weights).",
        "The paper's CosyVoice 2 rows lie 0.05 TFLOP below these (1.78 for 1:0); the savings between rows agree.",
    ]
    return "\n".join(lines + notes)


if __name__ == "__main__":
    sys.exit(main())
