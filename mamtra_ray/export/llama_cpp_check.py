"""Does llama.cpp compute and say from a GGUF file what our own model does?

Run where the package llama-cpp-python is installed, on the file itself, before it takes the place of an older export.
Our model computes in float32, so the difference is all that the file's dtype and llama.cpp's rounding cost.

Tensor letters: L prompt and spoken ids, K speech tokens, S speech vocabulary, V unified vocabulary.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib import metadata, util
from pathlib import Path

import numpy as np
import torch

from mamtra_ray.export.check import ExportCheck, ExportCheckError, check_tokens, greedy_example
from mamtra_ray.models.granite import NEVER
from mamtra_ray.speech_lm.generation_check import compared, library_versions, tolerance
from mamtra_ray.speech_lm.sequences import SequenceFormat
from mamtra_ray.speech_lm.speech_lm import SpeechLM

PACKAGE = "llama-cpp-python"
_SECONDS = 600
_LAST_LINES = 3


@torch.inference_mode()
def check_gguf(file: Path, student: SpeechLM, sequence: SequenceFormat, dtype: torch.dtype) -> ExportCheck | None:
    """Run ``file`` with llama.cpp on the CPU and compare logits and a greedy continuation.

    Args:
        file: what :func:`~mamtra_ray.models.granite_gguf.write_granite_gguf` wrote.
        student: what it was written from, on the CPU; becomes float32.
        sequence: how prompts look.
        dtype: of the file's matrices. With float32 the attention's cache is float32 too, otherwise llama.cpp's
            default, float16.

    Returns:
        What was found; None where llama-cpp-python is not installed.

    Raises:
        ExportCheckError: llama.cpp does not run the file, or computes or says something else.
    """
    if util.find_spec("llama_cpp") is None:
        return None
    student = student.float().eval()
    prompt_L, tokens_K = greedy_example(student, sequence)
    speech = slice(student.vocabulary.speech_offset, student.vocabulary.speech_offset + student.vocabulary.speech_size)
    ids_L = torch.cat([prompt_L, tokens_K + speech.start])
    ours_LS = student.logits(student.hidden_states(input_ids_BL=ids_L[None])[0])
    bias_V = torch.full((student.vocabulary.size,), NEVER)
    bias_V[speech] = 0.0 if student.head.bias is None else student.head.bias
    head_bias_S = bias_V[speech].clone()
    # No stop id: `greedy_example` goes on as long as it was asked to.
    bias_V[[speech.start + stop_id for stop_id in student.vocabulary.stop_ids]] = NEVER
    with tempfile.TemporaryDirectory() as name:
        request, result = Path(name) / "request.npz", Path(name) / "result.npz"
        np.savez(
            request,
            ids_L=ids_L.numpy(),
            prompt_length=len(prompt_L),
            bias_V=bias_V.numpy(),
            float32=dtype == torch.float32,
        )
        _run(file, request, result)
        with np.load(result) as answer:
            logits_LV, said_K = torch.from_numpy(answer["logits_LV"]), torch.from_numpy(answer["tokens_K"])
    versions = library_versions() | {PACKAGE: metadata.version(PACKAGE)}
    named = ", ".join(f"{name} {version}" for name, version in versions.items())
    difference = compared(logits_LV[:, speech] + head_bias_S, ours_LS, "logits")
    bound = tolerance(dtype, torch.device("cpu"))
    if not difference.relative <= bound:
        raise ExportCheckError(
            f"{file} computes other logits in llama.cpp, by up to {difference.largest:.3g}"
            f" ({difference.relative:.1%} of their spread), so it was not exported; found with {named}"
        )
    scores_KS = ours_LS[len(prompt_L) - 1 : -1]
    check_tokens(f"{file} in llama.cpp", said_K - speech.start, tokens_K, scores_KS, bound, named)
    return ExportCheck(difference.largest, difference.relative, versions)


def _run(file: Path, request: Path, result: Path) -> None:
    command = [sys.executable, "-m", "mamtra_ray.export.llama_cpp_run", *map(str, (file, request, result))]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
            # Where llama.cpp aborts, its last words are the reason then, and no trace of a debugger.
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
        )
    except subprocess.TimeoutExpired:
        raise ExportCheckError(f"llama.cpp took more than {_SECONDS} s for {file}, so it was not exported") from None
    if done.returncode or not result.exists():
        lines = " / ".join(done.stderr.strip().splitlines()[-_LAST_LINES:]) or f"exit status {done.returncode}"
        raise ExportCheckError(f"llama.cpp does not run {file}, so it was not exported: {lines}")
