"""vLLM's logits processor for the checkpoint that this file lies in: speech ids only, with the bias of the head.

vLLM reads neither ``sequence_bias`` nor ``suppress_tokens`` of ``generation_config.json``. This file reads them there
and applies them to all requests, as transformers' ``generate`` does. It needs torch and vLLM alone::

    PYTHONPATH=FOLDER vllm serve FOLDER --logits-processors vllm_speech_logits:SpeechLogits --skip-tokenizer-init

It has the methods of both of vLLM's interfaces: that of ``vllm.v1.sample.logits_processor``, and that of model runner
V2, which newer versions have besides.

Tensor letters: R rows of a batch, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from vllm.v1.sample.logits_processor import LogitsProcessor

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as RunnerV2LogitsProcessor
except ImportError:
    _INTERFACES: tuple[type, ...] = (LogitsProcessor,)
else:
    _INTERFACES = (LogitsProcessor, RunnerV2LogitsProcessor)

_NEVER = -1e9
"""``sequence_bias`` of ids that must not be generated; JSON has no infinity."""


class SpeechLogits(*_INTERFACES):  # type: ignore[misc]
    """Adds the same numbers to every row, so it keeps no state of requests."""

    def __init__(self, vllm_config: Any, device_or_requests: Any, is_pin_memory: bool = False) -> None:
        folder = Path(__file__).resolve().parent
        size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
        bias_V = torch.zeros(size)
        for ids, bias in generation.get("sequence_bias") or []:
            if len(ids) != 1:
                raise ValueError(f"{folder}: sequence_bias of the sequence {ids}: only single ids are supported here")
            bias_V[ids[0]] = bias if bias > _NEVER else -torch.inf
        bias_V[generation.get("suppress_tokens") or []] = -torch.inf
        # A device, or in model runner V2 what it knows of the requests, its device among that.
        self.bias_V = bias_V.to(getattr(device_or_requests, "device", device_or_requests))

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:
        """Change the logits (R, V) in place."""
        if logits.shape[-1] != len(self.bias_V):
            raise ValueError(f"logits of {logits.shape[-1]} ids, but this checkpoint has {len(self.bias_V)}")
        return logits.add_(self.bias_V)

    def is_argmax_invariant(self) -> bool:
        """Greedy generation needs it too."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Which requests are in the batch does not matter."""

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Every request's logits are changed."""
        return True
