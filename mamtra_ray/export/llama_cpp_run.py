"""One GGUF file in llama.cpp, in a process of its own: llama.cpp aborts the process where it cannot run a model.

Called by :mod:`mamtra_ray.export.llama_cpp_check`::

    python -m mamtra_ray.export.llama_cpp_run FILE REQUEST RESULT

``REQUEST`` and ``RESULT`` are .npz files. Asked are ``ids_L`` and ``prompt_length``, ``bias_V`` and whether the cache
is ``float32``; answered are the logits ``logits_LV`` of all ids read at once, and ``tokens_K``, the greedy continuation
of the prompt, biased, one id at a time.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np


def run(model: Path, request: Path, result: Path) -> None:
    """See the module."""
    import llama_cpp

    with np.load(request) as asked:
        ids_L, bias_V = asked["ids_L"].tolist(), asked["bias_V"]
        prompt_length, float32 = int(asked["prompt_length"]), bool(asked["float32"])
    kind = llama_cpp.GGML_TYPE_F32 if float32 else llama_cpp.GGML_TYPE_F16
    engine = llama_cpp.Llama(
        str(model),
        n_ctx=len(ids_L) + 1,
        n_threads=1,
        n_threads_batch=1,
        n_gpu_layers=0,
        logits_all=True,
        type_k=kind,
        type_v=kind,
        verbose=False,
    )
    engine.eval(ids_L)
    logits_LV = np.array(engine.scores[: len(ids_L)])
    tokens_K: list[int] = []
    biased = llama_cpp.LogitsProcessorList([lambda ids, scores: scores + bias_V])
    for token in engine.generate(ids_L[:prompt_length], temp=0.0, logits_processor=biased):
        tokens_K.append(token)
        if len(tokens_K) == len(ids_L) - prompt_length:
            break
    np.savez(result, logits_LV=logits_LV, tokens_K=np.array(tokens_K))


if __name__ == "__main__":
    run(*map(Path, sys.argv[1:4]))
