"""Stands for an installed CosyVoice: what its ``CosyVoice2`` does with a folder and with the LM in it.

Loading (cosyvoice/cli/cosyvoice.py, class check in utils/class_utils.py) and the LM's call (cli/model.py, ``llm_job``)
are written as upstream's at commit ace7c47; front end, flow and vocoder are stand-ins.
"""

import sys
import types
from collections.abc import Generator
from pathlib import Path

import torch
from hyperpyyaml import load_hyperpyyaml


class Qwen2LM(torch.nn.Module):
    """Upstream's LM class, which its loader looks for."""


class CausalMaskedDiffWithXvec(torch.nn.Module):
    """Stands for the flow; takes its yaml section."""

    def __init__(self, input_size):
        super().__init__()


def ras_sampling(weighted_scores, decoded_tokens, sampling, top_p, win_size):
    """Draws the most probable token; notes what the yaml bound to it."""
    assert (top_p, win_size) == (0.7, 10) and sampling == 25
    return int(weighted_scores.argmax())


def tokens_of(text):
    """One token a word: its length."""
    return torch.tensor([[len(word) for word in text.split()]], dtype=torch.int32)


class CosyVoice2:
    """``CosyVoice2(folder)`` and ``inference_zero_shot``."""

    def __init__(self, model_dir):
        with (Path(model_dir) / "cosyvoice2.yaml").open() as file:
            configs = load_hyperpyyaml(file, overrides={"qwen_pretrain_path": f"{model_dir}/CosyVoice-BlankEN"})
        assert isinstance(configs["llm"], Qwen2LM) and isinstance(configs["flow"], CausalMaskedDiffWithXvec)
        self.sample_rate = configs["sample_rate"]
        self.model = types.SimpleNamespace(llm=configs["llm"])
        weights = torch.load(f"{model_dir}/llm.pt", map_location="cpu", weights_only=True)
        self.model.llm.load_state_dict(weights, strict=True)
        self.model.llm.to("cpu").eval()

    def inference_zero_shot(self, tts_text, prompt_text, prompt_wav, stream=False):
        """Yields the speech tokens where upstream yields the sound of them."""
        prompt_text, prompt_speech = tokens_of(prompt_text), torch.tensor([[1, 2, 3]], dtype=torch.int32)
        arguments = {
            "prompt_text": prompt_text,
            "prompt_text_len": torch.tensor([prompt_text.shape[1]], dtype=torch.int32),
            "prompt_speech_token": prompt_speech,
            "prompt_speech_token_len": torch.tensor([prompt_speech.shape[1]], dtype=torch.int32),
            "embedding": torch.zeros(1, 192),
        }
        if isinstance(tts_text, Generator):
            tokens = self.model.llm.inference_bistream(text=(tokens_of(text) for text in tts_text), **arguments)
        else:
            text = tokens_of(tts_text)
            text_len = torch.tensor([text.shape[1]], dtype=torch.int32)
            tokens = self.model.llm.inference(text=text, text_len=text_len, uuid="1", **arguments)
        yield {"tts_speech": torch.tensor([list(tokens)])}


def installed(monkeypatch):
    """Put the stand-in where ``import cosyvoice`` finds it, and torchaudio, whose ``save`` it returns calls of."""
    contents = {
        "cosyvoice": {},
        "cosyvoice.cli": {},
        "cosyvoice.cli.cosyvoice": {"CosyVoice2": CosyVoice2},
        "cosyvoice.llm": {},
        "cosyvoice.llm.llm": {"Qwen2LM": Qwen2LM},
        "cosyvoice.flow": {},
        "cosyvoice.flow.flow": {"CausalMaskedDiffWithXvec": CausalMaskedDiffWithXvec},
        "cosyvoice.utils": {},
        "cosyvoice.utils.common": {"ras_sampling": ras_sampling},
    }
    saved = {}
    contents["torchaudio"] = {"save": lambda name, sound, rate: saved.update({name: (sound, rate)})}
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        vars(module).update(attributes, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    return saved
