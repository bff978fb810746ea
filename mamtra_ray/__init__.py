"""Turn Transformer speech models into Mamba hybrids: search the layout, distill it, export it."""

__version__ = "0.2.0"
