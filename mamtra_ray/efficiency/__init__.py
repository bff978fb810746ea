"""What a layout costs, in closed form: parameters, FLOPs, cache bytes."""

from mamtra_ray.efficiency.architectures import Architecture, from_hf_config
from mamtra_ray.efficiency.closed_form import (
    ARCHITECTURES,
    break_even_length,
    cache_bytes,
    decode_flops,
    efficiency_rows,
    parameters,
    prefill_flops,
    prefill_flops_full,
    published_layouts,
    total_parameters,
)

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "break_even_length",
    "cache_bytes",
    "decode_flops",
    "efficiency_rows",
    "from_hf_config",
    "parameters",
    "prefill_flops",
    "prefill_flops_full",
    "published_layouts",
    "total_parameters",
]
