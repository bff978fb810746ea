"""The hybrid decoder and its parts, in plain PyTorch: nothing here imports transformers before it must.

``decoder`` puts together ``attention`` (with ``rope``) and ``mamba`` (with ``ssd``); ``cache`` holds the past of both.
``transfer`` makes mixers of attention weights. ``pretrained`` reads Qwen2 and Llama checkpoints, ``checkpoint`` our own
folders, ``granite`` writes what plain transformers loads.

Letters of tensor names, here and in every module below:

    B batch                 D model width               H query heads (and heads of y)    C convolved channels
    L new positions         I inner width of an MLP     G key-value heads                 K taps of the convolution
    T past and new ones     V unified vocabulary        R query heads of a group          S states of a mixer
                            P head dim                  N state size (= P)
"""
