"""Speech language models: the one class for every teacher and student.

A model reads a *unified* vocabulary: ids [0, text_size) are text, then speech_size speech ids, then
control_size control ids (start of sequence, task, ...), one embedding table for all. Its head scores speech
ids only, counted from 0.

Tensor letters: B batch, L new positions, T past and new positions, D model width, S speech vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.layouts import Layout
from mamtra_ray.losses import IGNORE
from mamtra_ray.models.cache import DecoderCache
from mamtra_ray.models.checkpoint import load_into, read_model, write_model
from mamtra_ray.models.decoder import Decoder
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.granite import read_granite, write_granite
from mamtra_ray.models.linear import Linear
from mamtra_ray.models.mamba import StateSharing
from mamtra_ray.models.transfer import INITIALISATIONS, mixer_from_attention, mixer_from_library
from mamtra_ray.teachers.sequences import SequenceFormat, Vocabulary

__all__ = ["IGNORE", "SequenceFormat", "SpeechLM", "Teacher", "Vocabulary", "make_student"]

SCHEMA_VERSION = 2


class SpeechLM(nn.Module):
    """A decoder over text and speech tokens: embedding table and hybrid body (``body``), and ``head``.

    Embedding table and head are frozen (``requires_grad`` False) and stay the teacher's in every student: with
    one head for both, the teacher's exact logits follow from its cached hidden states, D numbers a token
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
        past_key_values: DecoderCache | None = None,
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
        past_key_values: DecoderCache | None = None,
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


@torch.no_grad()
def make_student(
    teacher: SpeechLM,
    layout: Layout | str,
    initialisation: str = "transfer",
    mixer_library: Mapping[int, Mapping[str, Tensor]] | None = None,
    state_sharing: StateSharing = "per_query_head",
    seed: int = 0,
    share_weights: bool = False,
) -> SpeechLM:
    """A student of ``layout``: the teacher with Mamba mixers in place of some attentions.

    Everything a layer has besides its mixer (MLP, norms), attention where it stays, embeddings and head are
    the teacher's. The mixer of a layer depends on ``seed`` and the layer only, so students of different
    layouts start from the same mixers.

    Args:
        teacher: all attention, or a hybrid whose Mamba layers ``layout`` keeps (they are copied).
        layout: one letter per decoder layer.
        initialisation: ``transfer``, ``xavier``, ``kaiming`` (see :func:`mixer_from_attention`) or ``aligned``.
        mixer_library: for ``aligned``: per layer, the tensors of a mixer.
        state_sharing: see :class:`~mamtra_ray.models.mamba.MixerConfig`.
        seed: of the random parts of the mixers.
        share_weights: use the teacher's own tensors instead of copies, for forward passes only (probing many
            layouts in milliseconds each); training such a student would change the teacher.

    Raises:
        InputError: a layout of another length, attention asked for where the teacher has none, an unknown
            initialisation, or a library without a needed layer.
    """
    layout = Layout.from_string(layout) if isinstance(layout, str) else layout
    if layout.num_layers != teacher.config.num_layers:
        raise InputError(f"layout {layout} has {layout.num_layers} layers, the teacher {teacher.config.num_layers}")
    if initialisation not in INITIALISATIONS:
        raise InputError(f"unknown initialisation {initialisation!r}: {nearest_name(initialisation, INITIALISATIONS)}")
    if initialisation == "aligned" and mixer_library is None:
        raise InputError("initialisation 'aligned' needs a mixer library")
    own_mixers = teacher.body.mixers
    if lost := sorted(set(layout.attention_layers) & set(own_mixers)):
        raise InputError(f"layout {layout} wants attention in layer {lost[0]}, where {teacher.layout} has none left")
    if own_mixers and state_sharing != teacher.config.state_sharing:
        raise InputError(f"the Mamba layers of {teacher.layout} share states {teacher.config.state_sharing}")
    config = dataclasses.replace(teacher.config, layout=layout, state_sharing=state_sharing)
    new_layers = set(layout.mamba_layers) - set(own_mixers)
    replaced = tuple(f"body.layers.{layer}.self_attn." for layer in new_layers)
    tensors = {
        name: tensor if share_weights else tensor.clone()
        for name, tensor in teacher.state_dict().items()
        if not name.startswith(replaced)
    }
    for layer in sorted(new_layers):
        attention: Any = teacher.body.layers[layer].self_attn
        if initialisation == "aligned":
            assert mixer_library is not None
            mixer = mixer_from_library(mixer_library, layer, attention, config.mixer)
        else:
            mixer = mixer_from_attention(attention, config.mixer, initialisation, seed * config.num_layers + layer)
        tensors |= {f"body.layers.{layer}.mamba.{name}": tensor for name, tensor in mixer.state_dict().items()}
    return SpeechLM.from_tensors(config, teacher.vocabulary, tensors)


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher and what generation and evaluation must know about it.

    Attributes:
        fingerprint: of the model, see :meth:`SpeechLM.fingerprint`.
        tokens_per_second: speech tokens per second of audio.
        length_per_text_token: fewest and most speech tokens an utterance may have, per text token.
        max_length: longest sequence (text and speech) the model was trained for; None if not limited.
        sampling: the system's own sampling settings, by the names of :class:`mamtra_ray.generate.Sampling`.
    """

    name: str
    model: SpeechLM
    sequence: SequenceFormat
    fingerprint: str
    tokens_per_second: float
    length_per_text_token: tuple[float, float]
    max_length: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def length_bounds(self, text_tokens: Sequence[int]) -> tuple[int, int]:
        """(fewest, most) speech tokens to generate for ``text_tokens``."""
        fewest, most = self.length_per_text_token
        longest = int(most * len(text_tokens))
        if self.max_length is not None:
            longest = min(longest, self.max_length - len(self.sequence.prompt(text_tokens)))
        if longest < 1:
            raise InputError(f"a text of {len(text_tokens)} tokens leaves no room for speech")
        return min(int(fewest * len(text_tokens)), longest), longest
