"""The LM part of an installed CosyVoice 2, replaced by a hybrid.

``cosyvoice2.yaml`` of a folder written by :func:`~mamtra_ray.teachers.cosyvoice2.write_folder` names
:class:`HybridLM` where upstream's ``Qwen2LM`` stands; flow, vocoder and front end stay upstream's::

    from cosyvoice.cli.cosyvoice import CosyVoice2
    tts = CosyVoice2("student_folder")                   # nothing else changes
    for chunk in tts.inference_zero_shot("Hello there.", "What the prompt says.", "prompt.wav", stream=True): ...

Or into a CosyVoice that is loaded already: ``tts.model.llm = HybridLM.from_folder("student_folder")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamtra_ray.models.checkpoint import load_into
from mamtra_ray.speech_lm.sampling import COSYVOICE2, next_tokens
from mamtra_ray.teachers.cosyvoice2 import (
    LENGTH_PER_TEXT_TOKEN,
    SPEECH_PER_BLOCK,
    TEXT_PER_BLOCK,
    empty_hybrid,
    fill_id,
    read_weights,
    sequence_of,
)

try:  # upstream recognizes a CosyVoice 2 by the class of its LM
    from cosyvoice.llm.llm import Qwen2LM as _Upstream
except ImportError:
    _Upstream = nn.Module

Sampler = Callable[[Tensor, list[int], int], int]
"""Upstream's: (log-probabilities (S,), tokens so far, an unused number) -> token."""


def repetition_aware(log_probabilities_S: Tensor, decoded_tokens: list[int], _: int = 25) -> int:
    """Upstream's ``ras_sampling`` with its default settings; draws from torch's global generator."""
    recent = decoded_tokens[-COSYVOICE2.repetition_window :]
    recent_BW = torch.tensor([recent], dtype=torch.int64, device=log_probabilities_S.device)
    uniform_B2 = torch.rand(1, 2, dtype=torch.float64).to(log_probabilities_S.device)
    return int(next_tokens(log_probabilities_S[None], COSYVOICE2, uniform_B2, recent_BW))


class HybridLM(_Upstream):  # type: ignore[misc, valid-type]
    """Takes the calls CosyVoice makes to its LM: loading, and speech tokens one by one for a text or a text stream.

    Args:
        pretrain_path: ``CosyVoice-BlankEN`` of the student's folder (what upstream's yaml hands to its LM).
        sampling: how a token is drawn; upstream's function, or :func:`repetition_aware`.
    """

    def __init__(self, pretrain_path: str | Path, sampling: Sampler = repetition_aware) -> None:
        nn.Module.__init__(self)
        self.model = empty_hybrid(Path(pretrain_path).parent)
        self.vocabulary = self.model.vocabulary
        self.sequence = sequence_of(self.vocabulary)
        self.sampling = sampling

    @classmethod
    def from_folder(cls, folder: str | Path, device: torch.device | str | None = None) -> HybridLM:
        """Load a folder by itself; on the GPU if there is one and no ``device`` is given."""
        hybrid = cls(Path(folder) / "CosyVoice-BlankEN")
        hybrid.load_state_dict(read_weights(Path(folder)))
        return hybrid.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Load the tensors of a hybrid's ``llm.pt``; all of them must fit, whatever ``strict`` says."""
        load_into(self.model, state_dict, "the hybrid's llm.pt")

    @torch.inference_mode()
    def inference(
        self,
        text: Tensor,
        text_len: Tensor,
        prompt_text: Tensor,
        prompt_text_len: Tensor,
        prompt_speech_token: Tensor,
        prompt_speech_token_len: Tensor,
        embedding: Tensor,
        sampling: int = 25,
        max_token_text_ratio: float = LENGTH_PER_TEXT_TOKEN[1],
        min_token_text_ratio: float = LENGTH_PER_TEXT_TOKEN[0],
        uuid: str = "",
    ) -> Iterator[int]:
        """Yield the speech tokens of a text; arguments as upstream passes them (token tensors of shape (1, n)).

        The lengths and the speaker embedding are not used (the LM of CosyVoice 2 does not see the speaker).
        """
        prompt = self.sequence.prompt(text[0].tolist(), prompt_text[0].tolist(), prompt_speech_token[0].tolist())
        fewest, most = int(text.shape[1] * min_token_text_ratio), int(text.shape[1] * max_token_text_ratio)
        cache, new_ids = self.model.new_cache(), prompt.tolist()
        drawn: list[int] = []
        while len(drawn) < most:
            barred = self.vocabulary.stop_ids if len(drawn) < fewest else ()
            token = self._draw(self._logits(new_ids, cache), drawn, barred, sampling)
            if token in self.vocabulary.stop_ids:
                return
            yield token
            drawn.append(token)
            new_ids = [self.vocabulary.speech_offset + token]

    @torch.inference_mode()
    def inference_bistream(
        self,
        text: Iterator[Tensor],
        prompt_text: Tensor,
        prompt_text_len: Tensor,
        prompt_speech_token: Tensor,
        prompt_speech_token_len: Tensor,
        embedding: Tensor,
        sampling: int = 25,
        max_token_text_ratio: float = LENGTH_PER_TEXT_TOKEN[1],
        min_token_text_ratio: float = LENGTH_PER_TEXT_TOKEN[0],
    ) -> Iterator[int]:
        """Yield speech tokens while the text still arrives, in blocks of 5 text and 15 speech tokens.

        The sequence is the one of training (:func:`~mamtra_ray.teachers.cosyvoice2.bistream_example`), which
        upstream's code leaves at its edges: it feeds the last speech token before the final block twice, goes on
        speaking where a prompt ends with a full block, drops what a short text leaves of the prompt, and has no
        upper length.
        """
        speech_offset, fill = self.vocabulary.speech_offset, fill_id(self.vocabulary)
        never = [stop for stop in self.vocabulary.stop_ids if stop not in (fill, self.vocabulary.eos_id)]
        waiting_text = prompt_text[0].tolist()
        prompt_speech = [speech_offset + token for token in prompt_speech_token[0].tolist()]
        needs_text = not prompt_speech
        # Speech that the prompt's last block already has.
        in_block = (len(prompt_speech) - 1) % SPEECH_PER_BLOCK + 1
        cache, new_ids, num_text = self.model.new_cache(), list(self.sequence.prefix), 0
        drawn: list[int] = []

        for piece in text:
            waiting_text += piece.flatten().tolist()
            num_text += piece.numel()
            while prompt_speech and len(waiting_text) >= TEXT_PER_BLOCK:
                new_ids += waiting_text[:TEXT_PER_BLOCK] + prompt_speech[:SPEECH_PER_BLOCK]
                waiting_text, prompt_speech = waiting_text[TEXT_PER_BLOCK:], prompt_speech[SPEECH_PER_BLOCK:]
            if prompt_speech:
                continue
            while not needs_text or len(waiting_text) >= TEXT_PER_BLOCK:
                if needs_text:
                    new_ids += waiting_text[:TEXT_PER_BLOCK]
                    waiting_text, needs_text, in_block = waiting_text[TEXT_PER_BLOCK:], False, 0
                logits_S = self._logits(new_ids, cache)
                token = fill
                if in_block < SPEECH_PER_BLOCK:
                    token = self._draw(logits_S, drawn, [self.vocabulary.eos_id, *never], sampling)
                drawn.append(token)
                new_ids = []
                if token == fill:
                    needs_text = True
                    continue
                yield token
                in_block += 1
                new_ids = [speech_offset + token]

        new_ids += [*waiting_text, *self.sequence.separator, *prompt_speech]
        while len(drawn) < max_token_text_ratio * num_text:
            token = self._draw(self._logits(new_ids, cache), drawn, [fill, *never], sampling)
            if token == self.vocabulary.eos_id:
                return
            yield token
            drawn.append(token)
            new_ids = [speech_offset + token]

    def _logits(self, new_ids: list[int], cache: Any) -> Tensor:
        ids_BL = torch.tensor([new_ids], device=self.model.device)
        # No mask: nothing is padded. (Upstream's one-step call passes a mask of length 1 beside a longer cache, which
        # transformers took for "attend to one position" from 4.53 on; speech came out garbled.)
        hidden_BLD = self.model.hidden_states(ids_BL, past_key_values=cache)
        return self.model.logits(hidden_BLD[0, -1]).float()

    def _draw(self, logits_S: Tensor, drawn: list[int], barred: Any, sampling: int) -> int:
        log_probabilities_S = logits_S.log_softmax(-1)
        log_probabilities_S[list(barred)] = -torch.inf
        return self.sampling(log_probabilities_S, drawn, sampling)
