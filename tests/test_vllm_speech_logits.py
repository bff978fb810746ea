"""The logits processor in an exported folder does to a batch what transformers' generate does. vLLM itself is not
run: stand-ins have the abstract methods of its two interfaces, as its sources of 2026 declare them."""

import ast
import importlib.util
import json
import sys
from abc import ABC, abstractmethod
from types import ModuleType, SimpleNamespace

import pytest
import torch
from test_granite import CASES, make_exportable
from tiny_models import SEQUENCE, VOCABULARY
from transformers import AutoModelForCausalLM

from mamtra_ray.export.engines import engines_text, write_vllm_processor


class RunnerV1(ABC):
    @classmethod
    def validate_params(cls, sampling_params):
        return None

    @abstractmethod
    def __init__(self, vllm_config, device, is_pin_memory): ...

    @abstractmethod
    def apply(self, logits): ...

    @abstractmethod
    def is_argmax_invariant(self): ...

    @abstractmethod
    def update_state(self, batch_update): ...


class RunnerV2(ABC):
    def __init__(self, vllm_config, req_states):
        self.given = (vllm_config, req_states)

    @classmethod
    def validate_params(cls, sampling_params):
        return None

    def add_request(self, req_idx, sampling_params):
        return True

    def apply_staged_writes(self):
        return None

    @abstractmethod
    def apply(self, logits, ctx): ...


def load_processor(folder, monkeypatch, with_v2):
    """The class in the folder, imported by its file as vLLM does with the folder on its path."""
    path = ""
    for part in ("vllm", "v1", "sample", "logits_processor"):
        path = f"{path}.{part}".removeprefix(".")
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    sys.modules[path].LogitsProcessor = RunnerV1
    path = "vllm.v1"
    for part in ("worker", "gpu", "sample", "logits_processor"):
        path = f"{path}.{part}"
        if with_v2:
            monkeypatch.setitem(sys.modules, path, ModuleType(path))
        else:
            monkeypatch.delitem(sys.modules, path, raising=False)
    if with_v2:
        sys.modules[path].LogitsProcessor = RunnerV2
    spec = importlib.util.spec_from_file_location("vllm_speech_logits", folder / "vllm_speech_logits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SpeechLogits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    make_exportable(*CASES["qwen2 per_kv_head, head with bias"], root / "teacher").save_granite(root / "best")
    write_vllm_processor(root / "best")
    path = root / "best" / "generation_config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "suppress_tokens": [VOCABULARY.speech_offset + 5]}))
    return root / "best"


@pytest.mark.parametrize("with_v2", [False, True])
def test_a_batch_is_changed_as_transformers_generate_changes_it(folder, monkeypatch, with_v2):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = torch.stack([SEQUENCE.prompt([3, 4, 5], (), [7, number]) for number in range(3)])
    said = model.generate(prompts, do_sample=False, max_new_tokens=6, output_logits=True, output_scores=True,
                          return_dict_in_generate=True)  # fmt: skip
    processor_class = load_processor(folder, monkeypatch, with_v2)
    assert issubclass(processor_class, RunnerV1) and issubclass(processor_class, RunnerV2) == with_v2
    if with_v2:
        processor = processor_class(None, SimpleNamespace(device=torch.device("cpu"), vocab_size=VOCABULARY.size))
        assert processor.add_request(0, None) is True
    else:
        processor = processor_class(None, torch.device("cpu"), False)
    assert not processor.is_argmax_invariant()
    processor.update_state(None)
    finished = torch.zeros(3, dtype=torch.bool)
    for step, (logits_BV, scores_BV) in enumerate(zip(said.logits, said.scores, strict=True)):
        batch_BV = logits_BV.clone().float()
        found_BV = processor.apply(batch_BV, SimpleNamespace()) if with_v2 else processor.apply(batch_BV)
        torch.testing.assert_close(found_BV.softmax(-1), scores_BV.softmax(-1), atol=0, rtol=0)
        token_B = said.sequences[:, prompts.shape[1] + step]
        assert torch.equal(found_BV.argmax(-1)[~finished], token_B[~finished])
        assert not torch.equal(logits_BV.softmax(-1), scores_BV.softmax(-1)), "the processor must matter"
        never = torch.ones(VOCABULARY.size, dtype=torch.bool)
        never[VOCABULARY.speech_offset : VOCABULARY.control_offset] = False
        never[VOCABULARY.speech_offset + 5] = True
        assert found_BV[:, never].max() == -torch.inf and found_BV[:, ~never].isfinite().all()
        finished |= torch.isin(token_B, torch.tensor(model.generation_config.eos_token_id))


def test_another_vocabulary_and_longer_sequences_are_refused(folder, monkeypatch, tmp_path):
    processor = load_processor(folder, monkeypatch, False)(None, torch.device("cpu"), False)
    with pytest.raises(ValueError, match=f"but this checkpoint has {VOCABULARY.size}"):
        processor.apply(torch.zeros(2, VOCABULARY.size + 1))
    for name in ("config.json", "vllm_speech_logits.py"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "generation_config.json").write_text(json.dumps({"sequence_bias": [[[1, 2], -5.0]]}))
    with pytest.raises(ValueError, match=r"of the sequence \[1, 2\]"):
        load_processor(tmp_path, monkeypatch, False)(None, torch.device("cpu"), False)


def test_the_file_stands_alone(folder):
    imported = set()
    for node in ast.walk(ast.parse((folder / "vllm_speech_logits.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "vllm"}


def test_a_model_of_text_needs_no_processor(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3]}))
    assert not write_vllm_processor(tmp_path) and len(list(tmp_path.iterdir())) == 1
    assert "--logits-processors vllm_speech_logits:SpeechLogits" in engines_text("transformers", is_text=False)
    assert "vllm serve" in engines_text("transformers", is_text=True)
    assert "SpeechLogits" not in engines_text("transformers", is_text=True)
