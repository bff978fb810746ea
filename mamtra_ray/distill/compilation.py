"""``distill.compile``: every decoder layer by itself through torch.compile.

Layers of a kind have one graph, so compiling takes as long for 24 of them as for two. The scan stays as it is: its
loops over chunks are no graph, and on a GPU it is a kernel already. Tensor names do not change.
"""

from __future__ import annotations

import torch

from mamtra_ray.models.mamba import MambaMixer
from mamtra_ray.runtime.compiler import check_compiler
from mamtra_ray.speech_lm.speech_lm import SpeechLM

BACKEND = "inductor"


def compile_layers(student: SpeechLM) -> None:
    """Have the layers of ``student`` compiled when they are first called. Lengths vary, so shapes are dynamic.

    Raises:
        InputError: no compiler is installed here.
    """
    if BACKEND == "inductor":
        check_compiler(is_cuda=student.device.type == "cuda")
    for layer in student.body.layers:
        mixer = layer.mamba
        if isinstance(mixer, MambaMixer):
            mixer.scan = torch.compiler.disable(mixer.scan)
        layer.compile(backend=BACKEND, dynamic=True)
