"""The hybrid's parts: the state-space scan, the Mamba mixer, and how they enter a Transformer body."""
