"""Speech language models: the one class for every teacher and student.

A model reads a *unified* vocabulary: ids [0, text_size) are text, then speech_size speech ids, then
control_size control ids (start of sequence, task, ...), one embedding table for all. Its head scores speech
ids only, counted from 0.

Tensor letters: B batch, L new positions, T past and new positions, D model width, S speech vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.models.cache import DecoderCache
from mamtra_ray.models.checkpoint import load_into, read_model, write_model
from mamtra_ray.models.decoder import Decoder
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.granite import read_granite, write_granite
from mamtra_ray.models.linear import Linear
from mamtra_ray.models.static_cache import StaticCache
from mamtra_ray.speech_lm.sequences import Vocabulary

SCHEMA_VERSION = 2


class SpeechLM(nn.Module):
    """A decoder over text and speech tokens: embedding table and hybrid body (``body``), and ``head``.

    Embedding table and head are frozen (``requires_grad`` False) and stay the teacher's in every student: with
    one head for both, the teacher's exact logits follow from its cached hidden states, D numbers per token
    instead of S, and losses through the head need gradients of its input only.

    Parameters live on the ``meta`` device until :meth:`from_tensors` or :meth:`load` assigns them.
    """

    def __init__(self, config: DecoderConfig, vocabulary: Vocabulary, head_bias: bool) -> None:
        super().__init__()
        if config.vocab_size != vocabulary.size:
            raise InputError(f"the embedding table has {config.vocab_size} rows, the vocabulary {vocabulary.size} ids")
        self.config = config
        self.vocabulary = vocabulary
        self.body = Decoder(config)
        self.head = Linear(config.hidden_size, vocabulary.speech_size, bias=head_bias, device="meta")
        self.body.embed_tokens.requires_grad_(False)
        self.head.requires_grad_(False)

    @classmethod
    def from_tensors(
        cls, config: DecoderConfig, vocabulary: Vocabulary, tensors: Mapping[str, Tensor], source: str | Path = "model"
    ) -> SpeechLM:
        """Assign ``tensors`` (names of :meth:`state_dict`; not copied). ``source`` is named in errors."""
        model = cls(config, vocabulary, head_bias="head.bias" in tensors)
        load_into(model, tensors, source)
        return model.to(next(iter(tensors.values())).device)

    @property
    def layout(self) -> Layout:
        return self.config.layout

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embeddings of unified ids: (...) -> (..., D)."""
        return self.body.embed_tokens(input_ids)

    def new_cache(self) -> DecoderCache:
        """An empty cache for :meth:`hidden_states`."""
        return DecoderCache()

    def hidden_states(
        self,
        input_ids_BL: Tensor | None = None,
        attention_mask_BL: Tensor | None = None,
        inputs_embeds_BLD: Tensor | None = None,
        past_key_values: DecoderCache | StaticCache | None = None,
        return_layers: bool = False,
    ) -> Any:
        """Final hidden states after the last norm, the head's input: (B, L, D).

        Args:
            input_ids_BL: unified ids; or ``inputs_embeds_BLD``.
            attention_mask_BL: 1 for real tokens, over past and new positions; rows may be padded left or
                right. None if nothing is padded, and best left out for right-padded training batches: no
                position ever sees what is on its right, and attention is faster without a mask.
            inputs_embeds_BLD: embeddings in place of ids.
            past_key_values: from :meth:`new_cache`, updated in place.
            return_layers: also return every decoder layer's output (before the final norm).

        Returns:
            ``hidden_BLD``, or ``(hidden_BLD, tuple of num_layers (B, L, D))``.
        """
        if (input_ids_BL is None) == (inputs_embeds_BLD is None):
            raise ValueError("give either input_ids_BL or inputs_embeds_BLD")
        if input_ids_BL is not None:
            inputs_embeds_BLD = self.embed(input_ids_BL)
        assert inputs_embeds_BLD is not None
        if not return_layers:
            return self.body(inputs_embeds_BLD, attention_mask_BL, past_key_values)
        layers: list[Tensor] = []
        hidden_BLD = self.body(inputs_embeds_BLD, attention_mask_BL, past_key_values, outputs=layers)
        return hidden_BLD, tuple(layers)

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Scores of the speech ids: (..., D) -> (..., S)."""
        return self.head(hidden_BLD)

    def forward(
        self,
        input_ids_BL: Tensor | None = None,
        attention_mask_BL: Tensor | None = None,
        inputs_embeds_BLD: Tensor | None = None,
        past_key_values: DecoderCache | StaticCache | None = None,
    ) -> Tensor:
        """Logits (B, L, S); arguments as in :meth:`hidden_states`."""
        return self.logits(self.hidden_states(input_ids_BL, attention_mask_BL, inputs_embeds_BLD, past_key_values))

    def save(self, folder: Path | str) -> None:
        """Write the compact native form (``config.json``, ``model.safetensors``), atomically, dtypes kept."""
        write_model(
            Path(folder),
            "speech_lm",
            SCHEMA_VERSION,
            self.state_dict(),
            model=self.config.to_dict(),
            vocabulary=dataclasses.asdict(self.vocabulary),
        )

    @classmethod
    def load(cls, folder: Path | str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> SpeechLM:
        """Read what :meth:`save` wrote, bit for bit; converted to ``dtype`` if one is given.

        Raises:
            InputError: missing, truncated, damaged or foreign files.
        """
        content, tensors = read_model(Path(folder), "speech_lm", SCHEMA_VERSION, device)
        try:
            config, vocabulary = DecoderConfig.from_dict(content["model"]), Vocabulary(**content["vocabulary"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{Path(folder) / 'config.json'} is incomplete: {error}") from None
        return cls.from_tensors(config, vocabulary, tensors, folder).to(dtype=dtype)

    def save_granite(self, folder: Path | str) -> None:
        """Write a GraniteMoeHybrid checkpoint for ``AutoModelForCausalLM``; see :mod:`mamtra_ray.models.granite`."""
        vocabulary = dataclasses.asdict(self.vocabulary)
        write_granite(Path(folder), self.config, self.state_dict(), vocabulary)

    @classmethod
    def load_granite(cls, folder: Path | str, device: torch.device | str = "cpu") -> SpeechLM:
        """Read what :meth:`save_granite` wrote back into the compact form, bit for bit."""
        config, vocabulary, tensors = read_granite(Path(folder), device)
        return cls.from_tensors(config, Vocabulary(**vocabulary), tensors, folder)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the configuration and all values; equal for any storage type that holds them exactly."""
        digest = hashlib.sha256(repr(sorted(self.config.to_dict().items())).encode())
        digest.update(repr(self.vocabulary).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy())
        return digest.hexdigest()
