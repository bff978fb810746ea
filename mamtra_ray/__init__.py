"""Turn Transformer speech models into Mamba hybrids: search the layout, distill it, export it.

Data flows through the packages in this order, and imports go the other way only: ``corpus``, ``teacher_cache``,
``align``, ``probe`` (with ``surrogate``), ``search`` (with ``distill`` and ``evaluate``), ``export``, ``report``.
``layouts``, ``losses`` and ``models`` know neither Ray nor the files of a run.

Tensor names end in one letter per axis. What a letter means depends on the part of the package only::

              models, speech_lm          losses, distill, cache     speech                    surrogate, layouts
    B         batch                      batch                      batch                     layouts
    L         new positions              positions                                            decoder layers
    T         past and new positions                                mel frames
    D         model width                model width
    V         unified vocabulary         speech vocabulary
    N         state size of a mixer      labeled positions
    H, G, R   query heads, key-value     groups of dimensions (G)                            halves of the layers (H, W)
              heads, heads of a group
    P         head dim
    S         states of a mixer;         speech vocabulary          speech tokens
              speech vocabulary
    I, C, K   MLP width, convolved       kept classes (K)           channels (C), codebook    kept layouts (K)
              channels, taps             positions of a chunk (Q)   entries (K)
    F, M                                                            frequency bins, mel bands features (F)
"""

__version__ = "0.2.0"
