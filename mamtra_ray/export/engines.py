"""What engines other than plain transformers need beside an exported checkpoint, and what its card says of them."""

from __future__ import annotations

from pathlib import Path

from mamtra_ray.artifacts import read_json, write_text
from mamtra_ray.export.check import ExportCheck
from mamtra_ray.models.granite import GENERATION_FILE
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.teachers.teacher import Teacher

TESTED_LLAMA_CPP = "0.3.36"
VLLM_PROCESSOR = "vllm_speech_logits.py"
_ENGINES = {"transformers": "plain transformers", "gguf": "llama.cpp"}


def write_vllm_processor(folder: Path) -> bool:
    """Put vLLM's logits processor into a checkpoint's folder.

    Returns:
        Whether it needs one: a model of text alone may say every id, and its head has no bias.
    """
    if not read_json(folder / GENERATION_FILE).get("sequence_bias"):
        return False
    write_text(folder / VLLM_PROCESSOR, Path(__file__).with_name(VLLM_PROCESSOR).read_text(encoding="utf-8"))
    return True


def checked_text(form: str, check: ExportCheck | None, is_text: bool) -> str:
    """A line of the card: whether, and with which versions, the files were run."""
    if check is None:
        return f"not run in {_ENGINES[form]} when it was written"
    versions = ", ".join(f"{name} {version}" for name, version in check.versions.items())
    return (
        f"checked in {_ENGINES[form]} when it was written: the same greedy {'text' if is_text else 'speech'}, "
        f"logits differ by at most\n  {check.largest_difference:.1e} ({versions})"
    )


def engines_text(form: str, is_text: bool) -> str:
    """The card's paragraphs on versions and on vLLM; empty for forms that neither reads."""
    if form != "transformers":
        return ""
    command = 'vllm serve "PATH" --mamba-ssm-cache-dtype float32'
    processor = ""
    if not is_text:
        module = VLLM_PROCESSOR.removesuffix(".py")
        command = f"""PYTHONPATH="PATH" {command} \\
  --skip-tokenizer-init --logits-processors {module}:SpeechLogits"""
        processor = f"""
`{VLLM_PROCESSOR}` keeps vLLM to speech ids and adds the head's bias; vLLM does not read `sequence_bias`.
"""
    return f"""
Needs transformers 5.23 or newer: older ones read the files without a word and compute something else.

In vLLM (its sources were read, it was not run; mamtra_ray's docs/engines.md says which versions fit):

```bash
{command}
```
{processor}"""


def llama_cpp_use(student: SpeechLM, teacher: Teacher, has_tokenizer: bool) -> str:
    """How llama-cpp-python generates with a GGUF file, stop ids and the bias of every id taken from beside it."""
    vocabulary, is_text = student.vocabulary, teacher.tokens_per_second is None
    prefix, separator = list(teacher.sequence.prefix), list(teacher.sequence.separator)
    text, tokenizer = "[...]  # token ids of your text", ""
    if has_tokenizer:
        tokenizer = "from transformers import AutoTokenizer\n"
        text = 'AutoTokenizer.from_pretrained("PATH")("YOUR TEXT", add_special_tokens=False).input_ids'
    prompt = f"{prefix} + text" + ("" if is_text else f" + {separator}")
    subtracted = f" - {vocabulary.text_size}" if vocabulary.text_size else ""
    return f"""With llama-cpp-python ({TESTED_LLAMA_CPP} was tested). What the file lacks lies beside it: the bias of
every id, the ids that end a generation, and the tokenizer if there is one.

```python
import json
from pathlib import Path

import numpy as np
from llama_cpp import Llama, LogitsProcessorList
{tokenizer}
settings = json.loads(Path("PATH/generation_config.json").read_text())
text = {text}
model = Llama("PATH/model.gguf", n_ctx=2048, verbose=False)
bias = np.zeros(model.n_vocab(), np.float32)
for (token,), value in settings.get("sequence_bias") or []:
    bias[token] = value
biased = LogitsProcessorList([lambda ids, scores: scores + bias])
{"said" if is_text else "speech"} = []
for token in model.generate({prompt}, temp=0.0, logits_processor=biased):  # greedy
    if token in settings["eos_token_id"] or len({"said" if is_text else "speech"}) == 20 * len(text):
        break
    {"said" if is_text else "speech"}.append(token{subtracted})
```

llama.cpp's command-line tools take text, so they are not for this file.
"""
