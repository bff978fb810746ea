"""Turn Transformer speech models into Mamba hybrids: search the layout, distil it, export it."""

__version__ = "0.1.0"
