"""Layouts of a hybrid, the paper's placements, and constraints on both."""

from mamtra_ray.layouts.layout import Layout, num_attention_layers, parse_ratio
from mamtra_ray.layouts.placements import PATTERNS, STRATEGIES, from_strategy

__all__ = ["PATTERNS", "STRATEGIES", "Layout", "from_strategy", "num_attention_layers", "parse_ratio"]
