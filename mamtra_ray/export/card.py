"""The README of an exported checkpoint: what it is, how well it does, how plain transformers or an engine uses it."""

from __future__ import annotations

from mamtra_ray import __version__
from mamtra_ray.export.check import ExportCheck
from mamtra_ray.export.engines import checked_text, engines_text, llama_cpp_use
from mamtra_ray.run.rows import FinalistRow
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.teachers.teacher import Teacher

_INPUT = 'AutoTokenizer.from_pretrained("PATH")("YOUR TEXT", add_special_tokens=False).input_ids'


def model_card(
    student: SpeechLM,
    row: FinalistRow,
    teacher: Teacher,
    kind: str,
    has_tokenizer: bool,
    check: ExportCheck | None,
    form: str,
) -> str:
    """The card, with the front matter that model hubs read.

    Args:
        student: what was exported.
        row: its scores.
        teacher: what it was distilled from.
        kind: ``teacher.kind``, which says what makes sound of its tokens.
        has_tokenizer: whether the teacher's tokenizer lies beside it.
        check: of the comparison with plain transformers or llama.cpp; None where none was made.
        form: of the weights: transformers, gguf, or native.
    """
    is_text = teacher.tokens_per_second is None
    layout, fingerprint = student.layout, teacher.fingerprint[:16]
    scores = [f"held-out cross-entropy {row.ce:.4f} nats per token"]
    if row.wer is not None:
        interval = f"95 % interval {row.wer.low:.2%} to {row.wer.high:.2%}"
        scores.append(f"word error rate {row.wer.value:.2%} ({interval})")
    if row.alarm:
        scores.append(f"**do not use**: it {row.alarm}")
    if not is_text:
        scores.append(f"{teacher.tokens_per_second:g} speech tokens are one second of sound")
    if form != "native":
        scores.append(checked_text(form, check, is_text))
    listed = "\n".join(f"- {score}" for score in scores)
    if form == "native":
        use = _native_use(teacher)
    elif form == "gguf":
        use = llama_cpp_use(student, teacher, has_tokenizer)
    else:
        use = _text_use(teacher, has_tokenizer) if is_text else _speech_use(student, teacher, has_tokenizer)
    return f"""---
library_name: { {"native": "mamtra_ray", "gguf": "llama.cpp"}.get(form, form) }
pipeline_tag: {"text-generation" if is_text else "text-to-speech"}
tags: [mamba, hybrid, distillation{"" if is_text else ", speech"}]
---
# {teacher.name}, {layout.ratio} Mamba hybrid

Layout `{layout}` (A attention, M Mamba; attention kept in layers {", ".join(map(str, layout.attention_layers))}),
distilled from {teacher.name} (fingerprint {fingerprint}) on {row.tokens:,} tokens by mamtra_ray
{__version__}, after MamTra (arXiv 2603.12342).

{listed}

## Use

{use}{"" if is_text or form == "gguf" else _sound(kind)}{engines_text(form, is_text)}"""


_SETTINGS = {
    "demo": ("", "The codec is in the package."),
    "demo24": ("--space demo24 ", "The codec is in the package."),
    "cosyvoice2": (
        "--space cosyvoice2 teacher.path=COSYVOICE2 ",
        "COSYVOICE2 is the folder of the teacher, with flow.pt and hift.pt; the package minicpmo-utils decodes them.",
    ),
    "llasa": (
        "--space llasa_1b teacher.path=LLASA evaluate.codec=XCODEC2 ",
        "LLASA is the folder of the teacher, XCODEC2 that of its codec for transformers.",
    ),
}
"""How ``speak`` finds tokenizer and codec of a kind of teacher, and what the user must have for it."""


def _sound(kind: str) -> str:
    """One command from text to a sound file."""
    known = "RUN is the run's folder, whose settings name the teacher and its codec (evaluate.codec)."
    settings, needed = _SETTINGS.get(kind, ("--run RUN ", known))
    return f"""
## Sound

With mamtra_ray installed, `speech.wav` is:

```bash
python -m mamtra_ray.speak --student PATH {settings}--output speech.wav "YOUR TEXT"
```

{needed}
"""


def _speech_use(student: SpeechLM, teacher: Teacher, has_tokenizer: bool) -> str:
    vocabulary = student.vocabulary
    prefix, separator = list(teacher.sequence.prefix), list(teacher.sequence.separator)
    text = _INPUT if has_tokenizer else f"[...]  # text token ids, 0 to {vocabulary.text_size - 1}"
    return f"""```python
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


def _native_use(teacher: Teacher) -> str:
    """Sampling and sound are the evaluation's; this is the model alone."""
    prefix, separator = list(teacher.sequence.prefix), list(teacher.sequence.separator)
    ids = f"{prefix} + token_ids" if teacher.tokens_per_second is None else f"{prefix} + text_ids + {separator}"
    return f"""Plain transformers has no class for this model. With mamtra_ray installed:

```python
import torch
from mamtra_ray.speech_lm.generate import generate
from mamtra_ray.speech_lm.speech_lm import SpeechLM

model = SpeechLM.load("PATH").eval()
(result,) = generate(model, [torch.tensor({ids})], [(0, 40)])  # at most 40 tokens, greedy
print(result.tokens)
```
"""


def _text_use(teacher: Teacher, has_tokenizer: bool) -> str:
    """A sequence begins as those that it learned from."""
    if not has_tokenizer:
        return f"""```python
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("PATH")
ids = torch.tensor([{list(teacher.sequence.prefix)} + [...]])  # token ids of your text
print(model.generate(ids, max_new_tokens=40, do_sample=False)[0].tolist())
```
"""
    return f"""```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("PATH"), AutoTokenizer.from_pretrained("PATH")
ids = torch.tensor([{list(teacher.sequence.prefix)} + tokenizer("YOUR TEXT", add_special_tokens=False).input_ids])
print(tokenizer.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0]))
```
"""
