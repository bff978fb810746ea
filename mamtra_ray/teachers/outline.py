"""Shape and vocabulary of a teacher, for plans and checks.

The packaged teacher's are read without torch, so that a dry run of the demo answers at once. Another one is loaded: a
dry run refuses what the run would refuse, also a tensor.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mamtra_ray.assets import PACKAGED, demo_asset, packaged_folder
from mamtra_ray.efficiency.architectures import Architecture, StateSharing, decoder_architecture, from_hf_config
from mamtra_ray.teachers import cached_teacher, check_kind

if TYPE_CHECKING:
    from mamtra_ray.models.decoder_config import DecoderConfig
    from mamtra_ray.teachers.teacher import Teacher


@dataclass(frozen=True)
class TeacherOutline:
    """What can be said of a teacher without its weights."""

    name: str
    architecture: Architecture
    text_size: int
    speech_size: int
    sequence_overhead: int
    """Tokens of a sequence beside its text and speech."""
    max_length: int | None = None
    """Tokens of its longest sequence; None if not limited."""
    tokenizer: str | None = None
    """That a corpus must name; None where it is not asked for it."""
    decoder: DecoderConfig | None = None
    """Of a teacher that was loaded; the packaged one is known to do for everything."""


def teacher_outline(kind: str, path: str | None, state_sharing: StateSharing) -> TeacherOutline:
    """Shape and vocabulary of a teacher.

    Raises:
        InputError: as :func:`mamtra_ray.teachers.load_teacher`.
    """
    check_kind(kind, path)
    if kind not in PACKAGED or path is not None:
        teacher = cached_teacher(kind, path)
        vocabulary = teacher.model.vocabulary
        architecture = architecture_of(teacher, state_sharing)
        return TeacherOutline(
            teacher.name,
            architecture,
            vocabulary.text_size,
            vocabulary.speech_size,
            teacher.sequence.overhead,
            teacher.max_length,
            teacher.tokenizer,
            teacher.model.config,
        )
    folder = demo_asset("teacher", packaged_folder(kind))
    config, format_ = (json.loads((folder / name).read_text()) for name in ("config.json", "speech_lm.json"))
    vocabulary = format_["vocabulary"]
    return TeacherOutline(
        kind,
        from_hf_config(config, kind, state_sharing),
        vocabulary["text_size"],
        vocabulary["speech_size"],
        sum(len(ids) for ids in format_["sequence"].values()),
        format_.get("max_length"),
    )


def architecture_of(teacher: Teacher, state_sharing: StateSharing) -> Architecture:
    """The shape of ``teacher`` and its students, for parameters, FLOPs and cache bytes in closed form."""
    shape, vocabulary = teacher.model.config, teacher.model.vocabulary
    # A head that is the table, of a model of text, is counted once, as in the checkpoints of it.
    tied = teacher.model.head.weight.equal(teacher.model.body.embed_tokens.weight)
    tables = (vocabulary.size + (0 if tied else vocabulary.speech_size)) * shape.hidden_size
    return decoder_architecture(
        teacher.name,
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        qkv_bias=shape.qkv_bias,
        o_bias=shape.o_bias,
        qk_norm=shape.qk_norm,
        table_parameters=tables + (0 if teacher.model.head.bias is None else vocabulary.speech_size),
        head_outputs=vocabulary.speech_size,
        state_sharing=state_sharing,
    )
