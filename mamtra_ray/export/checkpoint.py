"""A distilled student as a Hugging Face checkpoint with a model card."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

from mamtra_ray import __version__
from mamtra_ray.artifacts import write_json, write_text
from mamtra_ray.config import TeacherConfig
from mamtra_ray.export.check import ExportCheck, check_export
from mamtra_ray.models.granite import write_granite
from mamtra_ray.run.rows import FinalistRow, columns
from mamtra_ray.speech_lm.generation_check import check_generation
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.teachers.teacher import Teacher
from mamtra_ray.teachers.text import save_text_tokenizer

LAYOUT_FILE = "layout.json"


def export_student(
    student_folder: Path, folder: Path, row: FinalistRow, teacher: Teacher, source: TeacherConfig
) -> None:
    """Write the student as a GraniteMoeHybrid checkpoint that plain transformers loads, with tokenizer, layout, card.

    What was written is loaded by plain transformers and compared with the student first. The folder is replaced as a
    whole after that, so it never mixes two students, and keeps the old one where a check fails.

    Args:
        student_folder: what ``SpeechLM.save`` wrote.
        folder: the checkpoint's folder.
        row: the student's row of the finalists table.
        teacher: what it was distilled from.
        source: where the teacher came from, and with it the text tokenizer.

    Raises:
        GenerationCheckError, NonFiniteLogitsError: the student does not generate what it computes.
        ExportCheckError: plain transformers computes something else from the written files.
    """
    student = SpeechLM.load(student_folder).eval()
    check_generation(student, teacher.sequence, f"student {student.layout}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        new.chmod(0o755)
        write_granite(new, student.config, student.state_dict(), dataclasses.asdict(student.vocabulary))
        check = check_export(new, student, teacher.sequence)
        scores = columns(row)
        write_json(
            new / LAYOUT_FILE,
            {
                "kind": "layout",
                "schema_version": 1,
                "layout": str(student.layout),
                "attention_layers": student.layout.attention_layers,
                "ratio": student.layout.ratio,
                "teacher": {"name": teacher.name, "fingerprint": teacher.fingerprint},
                "sequence": {"prefix": teacher.sequence.prefix, "separator": teacher.sequence.separator},
                "scores": {name: scores[name] for name in ("ce", "kl", "wer", "wer_low", "wer_high", "cer", "tokens")},
                "mamtra_ray": __version__,
                "alarm": row.alarm,
                "check": dataclasses.asdict(check),
            },
        )
        has_tokenizer = save_text_tokenizer(source.kind, Path(source.path) if source.path else None, new)
        write_text(new / "README.md", model_card(student, row, teacher, has_tokenizer, check))
        if folder.exists():
            shutil.rmtree(folder)
        new.replace(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def model_card(student: SpeechLM, row: FinalistRow, teacher: Teacher, has_tokenizer: bool, check: ExportCheck) -> str:
    """The README of an exported checkpoint, with the front matter that model hubs read."""
    layout, vocabulary = student.layout, student.vocabulary
    heard = ""
    if row.wer is not None:
        heard = f"- word error rate {row.wer.value:.2%} (95 % interval {row.wer.low:.2%} to {row.wer.high:.2%})\n"
    if row.alarm:
        heard += f"- **do not use**: it {row.alarm}\n"
    versions = ", ".join(f"{name} {version}" for name, version in check.versions.items())
    text = f"[...]  # text token ids, 0 to {vocabulary.text_size - 1}"
    if has_tokenizer:
        text = 'AutoTokenizer.from_pretrained("PATH")("YOUR TEXT", add_special_tokens=False).input_ids'
    prefix, separator = list(teacher.sequence.prefix), list(teacher.sequence.separator)
    return f"""---
library_name: transformers
pipeline_tag: text-to-speech
tags: [mamba, hybrid, distillation, speech]
---
# {teacher.name}, {layout.ratio} Mamba hybrid

Layout `{layout}` (A attention, M Mamba; attention kept in layers {", ".join(map(str, layout.attention_layers))}),
distilled from {teacher.name} (fingerprint {teacher.fingerprint[:16]}) on {row.tokens:,} tokens by mamtra_ray
{__version__}, after MamTra (arXiv 2603.12342).

- held-out cross-entropy {row.ce:.4f} nats per token
{heard}- {teacher.tokens_per_second:g} speech tokens are one second of sound
- checked in plain transformers when it was written: the same greedy speech, logits differ by at most
  {check.largest_difference:.1e} ({versions})

## Use

```python
import torch
from transformers import AutoModelForCausalLM{", AutoTokenizer" if has_tokenizer else ""}

model = AutoModelForCausalLM.from_pretrained("PATH")
text = {text}
ids = torch.tensor([{prefix} + text + {separator}])
speech = model.generate(ids, max_new_tokens=20 * len(text), do_sample=False)[0, ids.shape[1]:] - {vocabulary.text_size}
```

Ids {vocabulary.speech_offset} to {vocabulary.control_offset - 1} are speech tokens (subtract {vocabulary.text_size});
{vocabulary.eos_id} ends an utterance. `generation_config.json` keeps `generate` to speech ids; calling the model's
forward gives logits of the whole vocabulary, 0 for ids that are not speech.
"""
