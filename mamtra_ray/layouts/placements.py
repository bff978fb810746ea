"""The paper's placements: where the attention of a ratio goes (Table 1)."""

from __future__ import annotations

from collections.abc import Sequence

from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.layouts.layout import Layout, num_attention_layers, parse_ratio

PATTERNS = ("block_beginning", "block_end", "front", "middle", "back", "sandwich")
"""The paper's strategies that need nothing but the number of layers and the ratio."""
STRATEGIES = (*PATTERNS, "importance")


def from_strategy(name: str, num_layers: int, ratio: str, importance: Sequence[float] | None = None) -> Layout:
    """The paper's placement strategies (Table 1).

    The name says where the *attention* goes. The paper shows front, middle and back only as a drawing, which
    does not survive in its text. We read them like BlockBeginning and BlockEnd, whose kept layers are known
    (BlockBeginning 1:1 keeps 0, 2, ..., 22): in Fig. 4 every usable configuration keeps layer 0 as attention
    and Front is by far the best contiguous one at 1:1 (34.7 % WER, against 118.5 for Middle and 114.7 for
    Back), which fits attention at the front and contradicts Mamba there.

    - ``block_beginning`` / ``block_end``: the first / last layers of every repeating block.
    - ``front`` / ``middle`` / ``back``: one contiguous block of attention.
    - ``sandwich``: half of the attention at the front, half at the back (the front gets the odd one).
    - ``importance``: the layers with the highest ``importance`` (ties: the earlier layer).

    Args:
        name: one of :data:`STRATEGIES`.
        num_layers: decoder layers.
        ratio: attention to Mamba, e.g. ``"1:3"``.
        importance: one score per layer, higher = more important; only for ``importance``.

    Raises:
        InputError: unknown name, a ratio that does not fit, missing or misplaced ``importance``.
    """
    if name not in STRATEGIES:
        raise InputError(f"unknown strategy {name!r}: {nearest_name(name, STRATEGIES)}")
    kept = num_attention_layers(num_layers, ratio)
    if name == "importance":
        if importance is None or len(importance) != num_layers:
            given = "none" if importance is None else str(len(importance))
            raise InputError(f"strategy 'importance' needs one score per layer ({num_layers}), got {given}")
        ranked = sorted(range(num_layers), key=lambda layer: (-importance[layer], layer))
        return Layout.from_attention_layers(ranked[:kept], num_layers)
    attention_per_block, mamba_per_block = parse_ratio(ratio)
    block = attention_per_block + mamba_per_block
    first_of_middle = (num_layers - kept) // 2
    layers = {
        "block_beginning": [i for i in range(num_layers) if i % block < attention_per_block],
        "block_end": [i for i in range(num_layers) if i % block >= mamba_per_block],
        "front": range(kept),
        "middle": range(first_of_middle, first_of_middle + kept),
        "back": range(num_layers - kept, num_layers),
        "sandwich": [*range(kept - kept // 2), *range(num_layers - kept // 2, num_layers)],
    }
    return Layout.from_attention_layers(layers[name], num_layers)
