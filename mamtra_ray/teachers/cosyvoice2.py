"""CosyVoice 2's language model: its folder read as a teacher, and a student written back as such a folder.

The LM is a Qwen2 body between two tables of its own (upstream ``cosyvoice/llm/llm.py``, class ``Qwen2LM``); the
unified vocabulary joins Qwen's text table, ``speech_embedding`` and ``llm_embedding`` (start, task). Of the
speech ids 0 to 6560 are codes, 6561 ends an utterance, 6563 asks for more text in streams of text (``fill``).

Tensor letters: V text, S speech and control rows, D model width.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mamtra_ray.artifacts import OUTPUTS, check_outputs, file_hash, read_manifest, write_manifest, write_output
from mamtra_ray.errors import InputError
from mamtra_ray.losses import IGNORE
from mamtra_ray.models.checkpoint import load_into
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.models.pretrained import read_decoder_config, split_checkpoint
from mamtra_ray.speech_lm.sampling import COSYVOICE2
from mamtra_ray.speech_lm.sequences import SequenceFormat, Vocabulary
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.teachers.teacher import Teacher

WEIGHTS = "llm.pt"
BODY_FOLDER = "CosyVoice-BlankEN"
HYBRID_FILE = "hybrid_llm.json"
"""Beside a hybrid's ``llm.pt``: the shape of the model in it."""
SCHEMA_VERSION = 2

TOKENS_PER_SECOND = 25.0
LENGTH_PER_TEXT_TOKEN = (2.0, 20.0)
TEXT_PER_BLOCK, SPEECH_PER_BLOCK = 5, 15
"""Text and speech tokens of a block in streams of text (upstream's ``mix_ratio``)."""

_DECODER = "llm.model.model."
_TRAINING_STATE = ("epoch", "step")
"""Integers that upstream's train.py saves among the tensors."""


def load(path: Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Teacher:
    """Read a CosyVoice 2 folder: ``llm.pt`` and ``CosyVoice-BlankEN/config.json``, or a hybrid written by us.

    Raises:
        InputError: a file is missing or damaged, or ``llm.pt`` has missing, unknown or misshapen tensors.
    """
    checkpoint = read_weights(path)
    if (path / HYBRID_FILE).exists():
        model = empty_hybrid(path)
        load_into(model, checkpoint, path / WEIGHTS)
    else:
        config, _ = read_decoder_config(path / BODY_FOLDER)  # the LM's own head is never used
        model = _from_checkpoint(config, checkpoint, path / WEIGHTS)
    model = model.to(device, dtype)
    return Teacher(
        name=path.resolve().name,
        model=model,
        sequence=sequence_of(model.vocabulary),
        fingerprint=model.fingerprint(),
        tokens_per_second=TOKENS_PER_SECOND,
        length_per_text_token=LENGTH_PER_TEXT_TOKEN,
        sampling=vars(COSYVOICE2),
    )


def vocabulary_of(text_size: int, speech_rows: int) -> Vocabulary:
    """Upstream's ids: the last three of ``speech_rows`` speech ids stop generation, the first of these ends it."""
    codes = speech_rows - 3
    return Vocabulary(text_size, speech_rows, 2, eos_id=codes, stop_ids=(codes, codes + 1, codes + 2))


def sequence_of(vocabulary: Vocabulary) -> SequenceFormat:
    """Upstream's sequence for whole texts ("unistream"): start, text, task, speech."""
    start = vocabulary.control_offset
    return SequenceFormat(prefix=(start,), separator=(start + 1,), vocabulary=vocabulary)


def fill_id(vocabulary: Vocabulary) -> int:
    """The speech id that asks for the next block of text."""
    return vocabulary.eos_id + 2


def bistream_example(
    sequence: SequenceFormat, text_tokens: Sequence[int], speech_tokens: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Training sequence for text that arrives in pieces: 5 text tokens, 15 speech tokens, and so on.

    Upstream draws it for half of the utterances that have more than 3 speech tokens per text token
    (``prepare_lm_input_target``). After each full block the label is ``fill``; the last block holds the rest of the
    text (0 to 4 tokens), the task id and the rest of the speech.

    Returns:
        ``(input_ids, labels)`` int64, equally long, as in :meth:`SequenceFormat.training_example`. Labeled
        positions are not the last ones here.

    Raises:
        InputError: too few speech tokens for the text.
    """
    if len(speech_tokens) * TEXT_PER_BLOCK <= len(text_tokens) * SPEECH_PER_BLOCK:
        raise InputError(
            f"{len(speech_tokens)} speech tokens are too few for {len(text_tokens)} text tokens in blocks of "
            f"{TEXT_PER_BLOCK} to {SPEECH_PER_BLOCK}"
        )
    vocabulary = sequence.vocabulary
    speech_ids = [vocabulary.speech_offset + token for token in speech_tokens]
    input_ids = list(sequence.prefix)
    labels = [IGNORE] * len(sequence.prefix)
    full_blocks = len(text_tokens) // TEXT_PER_BLOCK
    for block in range(full_blocks):
        speech = slice(block * SPEECH_PER_BLOCK, (block + 1) * SPEECH_PER_BLOCK)
        input_ids += [*text_tokens[block * TEXT_PER_BLOCK : (block + 1) * TEXT_PER_BLOCK], *speech_ids[speech]]
        labels += [IGNORE] * (TEXT_PER_BLOCK - 1) + [*speech_tokens[speech], fill_id(vocabulary)]
    rest = text_tokens[full_blocks * TEXT_PER_BLOCK :]
    rest_of_speech = slice(full_blocks * SPEECH_PER_BLOCK, None)
    input_ids += [*rest, *sequence.separator, *speech_ids[rest_of_speech]]
    labels += [IGNORE] * len(rest) + [*speech_tokens[rest_of_speech], vocabulary.eos_id]
    return torch.tensor(input_ids), torch.tensor(labels)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of ``llm.pt``, without the counters of a training checkpoint."""
    path = folder / WEIGHTS
    if not path.is_file():
        raise InputError(f"{folder} is no CosyVoice 2 folder: {WEIGHTS} is missing")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch errors of many types
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is damaged or no PyTorch file of plain tensors: {reason}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    content = {name: value for name, value in content.items() if name not in _TRAINING_STATE}
    foreign = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if foreign:
        raise InputError(f"{path}: {foreign[0]} is no tensor")
    return content


def expected_shapes(config: DecoderConfig, speech_rows: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of ``llm.pt``; upstream's class has 295 of them: 291 of Qwen2 and 4 of its own."""
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.q_proj.bias": (queries,),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.k_proj.bias": (keys,),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.v_proj.bias": (keys,),
        "self_attn.o_proj.weight": (width, queries),
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "llm_embedding.weight": (2, width),
        f"{_DECODER}embed_tokens.weight": (config.vocab_size, width),
        f"{_DECODER}norm.weight": (width,),
        "llm.model.lm_head.weight": (config.vocab_size, width),
        "llm_decoder.weight": (speech_rows, width),
        "llm_decoder.bias": (speech_rows,),
        "speech_embedding.weight": (speech_rows, width),
    }
    for index in range(config.num_layers):
        shapes |= {f"{_DECODER}layers.{index}.{name}": shape for name, shape in layer.items()}
    return shapes


def _from_checkpoint(config: DecoderConfig, checkpoint: Mapping[str, Tensor], source: Path) -> SpeechLM:
    speech_table = checkpoint.get("speech_embedding.weight")
    if speech_table is None or speech_table.dim() != 2 or len(speech_table) < 4:
        raise InputError(f"{source} is no CosyVoice 2 LM: it has no table speech_embedding.weight")
    expected = expected_shapes(config, len(speech_table))
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise InputError(f"{source} does not fit {BODY_FOLDER}/config.json: {problems[0]}{more}")
    decoder, _ = split_checkpoint(checkpoint, config, _DECODER, source)
    tensors = {f"body.{name}": tensor for name, tensor in decoder.items()}
    tables = ("speech_embedding.weight", "llm_embedding.weight")
    tensors["body.embed_tokens.weight"] = torch.cat(
        [tensors["body.embed_tokens.weight"], *[checkpoint[name] for name in tables]]
    )
    tensors["head.weight"] = checkpoint["llm_decoder.weight"]
    tensors["head.bias"] = checkpoint["llm_decoder.bias"]
    # Copies, because the file is mapped into memory and may be overwritten later.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    vocabulary = vocabulary_of(config.vocab_size, len(speech_table))
    config = DecoderConfig.from_dict(config.to_dict() | {"vocab_size": vocabulary.size})
    return SpeechLM.from_tensors(config, vocabulary, tensors, source)


def empty_hybrid(folder: Path) -> SpeechLM:
    """The model that ``hybrid_llm.json`` describes, its parameters on the ``meta`` device."""
    content = read_manifest(folder / HYBRID_FILE, "cosyvoice2_hybrid", SCHEMA_VERSION)
    try:
        vocabulary = Vocabulary(**content["vocabulary"])
        return SpeechLM(DecoderConfig.from_dict(content["model"]), vocabulary, head_bias=True)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / HYBRID_FILE} is incomplete: {error}") from None


def write_folder(model: SpeechLM, original: Path, folder: Path) -> None:
    """Write ``model`` as a CosyVoice 2 folder; all other files are linked or copied from ``original``.

    An all-attention model becomes an ordinary ``llm.pt`` in the original's data types, which upstream loads. A
    hybrid's ``llm.pt`` holds its own tensors, and ``cosyvoice2.yaml`` names
    :class:`~mamtra_ray.teachers.cosyvoice2_drop_in.HybridLM` as the LM: where mamtra_ray is installed beside
    CosyVoice, ``CosyVoice2(folder)`` loads and speaks with it unchanged.

    Raises:
        InputError: ``original`` is no CosyVoice 2 folder or of another shape, or ``folder`` is it, lies in it, or holds
            something else than what this function wrote there before.
    """
    original, folder = Path(original), Path(folder)
    if folder.resolve().is_relative_to(original.resolve()):
        raise InputError(f"{folder} is in the original CosyVoice folder; write the student to another one")
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / OUTPUTS).is_file())):
        raise InputError(f"{folder} is there and holds no export: give another --output")
    for name in _YAML_NAMES:
        # A link to the original's, or its copy, where an all-attention model was written.
        both = (folder / name).is_file() and (original / name).is_file()
        if both and file_hash(folder / name) == file_hash(original / name):
            (folder / name).unlink()
    check_outputs(folder, (WEIGHTS, HYBRID_FILE, *_YAML_NAMES))
    reference = read_weights(original)
    if model.layout.mamba_layers:
        yaml_path = next((original / name for name in _YAML_NAMES if (original / name).is_file()), None)
        if yaml_path is None:
            raise InputError(f"{original} has no {_YAML_NAMES[0]}, which a hybrid's folder needs")
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        yaml = _yaml_with_hybrid(yaml_path)
        written = {WEIGHTS, HYBRID_FILE, *_YAML_NAMES}
    else:
        weights = dict(_original_tensors(model, reference, original))
        yaml = None
        written = {WEIGHTS, HYBRID_FILE}
        # Of a hybrid that was written there before.
        for name in (HYBRID_FILE, *_YAML_NAMES):
            (folder / name).unlink(missing_ok=True)
    write_output(folder, WEIGHTS, lambda path: torch.save(weights, path))
    _link_others(original, folder, written)
    if yaml is not None:
        write_output(folder, _YAML_NAMES[0], lambda path: path.write_text(yaml, encoding="utf-8"))
        made_by = {"fingerprint": model.fingerprint()}
        content = {"model": model.config.to_dict(), "vocabulary": vars(model.vocabulary)}
        write_output(
            folder,
            HYBRID_FILE,
            lambda path: write_manifest(path, "cosyvoice2_hybrid", SCHEMA_VERSION, made_by, **content),
        )


_YAML_NAMES = ("cosyvoice2.yaml", "cosyvoice.yaml")


def _original_tensors(model: SpeechLM, reference: Mapping[str, Tensor], source: Path) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors under upstream's names, in the order and data types of ``reference``."""
    state, vocabulary = model.state_dict(), model.vocabulary
    table = state["body.embed_tokens.weight"]
    tensors = {
        f"{_DECODER}embed_tokens.weight": table[: vocabulary.text_size],
        "speech_embedding.weight": table[vocabulary.speech_offset : vocabulary.control_offset],
        "llm_embedding.weight": table[vocabulary.control_offset :],
        "llm_decoder.weight": state["head.weight"],
        "llm_decoder.bias": state["head.bias"],
        f"{_DECODER}norm.weight": state["body.norm.weight"],
    }
    for name, tensor in state.items():
        if name.startswith("body.layers."):
            tensors[_DECODER + name.removeprefix("body.")] = tensor
    for name, old in reference.items():
        # The LM never uses its lm_head; it stays as it was.
        new = tensors.get(name, old if "lm_head" in name else None)
        if new is None or new.shape != old.shape:
            raise InputError(f"the model does not fit {source / WEIGHTS}: {name} is {tuple(old.shape)} there")
        yield name, new.detach().to("cpu", old.dtype).clone()


def _yaml_with_hybrid(path: Path) -> str:
    """The yaml with its ``llm:`` section replaced, its ``sampling`` kept; as text, since its tags are hyperpyyaml's."""
    lines = path.read_text(encoding="utf-8").splitlines()
    first = next((index for index, line in enumerate(lines) if line.startswith("llm:")), None)
    if first is None:
        raise InputError(f"{path} has no section llm")
    last = next((index for index in range(first + 1, len(lines)) if lines[index][:1] not in ("", " ", "#")), len(lines))
    section = lines[first + 1 : last]
    start = next((index for index, line in enumerate(section) if line.strip().startswith("sampling:")), None)
    sampling: list[str] = []
    if start is not None:
        indent = len(section[start]) - len(section[start].lstrip())
        sampling = [section[start]]
        for line in section[start + 1 :]:
            if not line.strip() or len(line) - len(line.lstrip()) <= indent:
                break
            sampling.append(line)
    hybrid = [
        "llm: !new:mamtra_ray.teachers.cosyvoice2_drop_in.HybridLM",
        "    pretrain_path: !ref <qwen_pretrain_path>",
        *sampling,
        "",
    ]
    return "\n".join([*lines[:first], *hybrid, *lines[last:]]) + "\n"


def _link_others(original: Path, folder: Path, written: set[str]) -> None:
    """Every other file of ``original`` into ``folder``: hard links where possible (they are gigabytes), else copies."""
    for source in sorted(original.rglob("*")):
        relative = source.relative_to(original)
        if not source.is_file() or str(relative) in (*written, OUTPUTS):
            continue
        if (there := folder / relative).exists():
            if not there.samefile(source) and file_hash(there) != file_hash(source):
                raise InputError(f"{there} is not the file of {original}: give another --output")
            continue
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source.resolve(), folder / relative)
        except OSError:
            shutil.copy2(source, folder / relative)
