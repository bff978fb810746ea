"""A CosyVoice 2 folder with random weights: the real one's files and key layout, small."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

TEXT, CODES, WIDTH, LAYERS = 40, 30, 32, 4

YAML = """\
# comments and tags that only hyperpyyaml reads
__set_seed1: !apply:random.seed [1986]
sample_rate: 24000
qwen_pretrain_path: ''

llm: !new:cosyvoice.llm.llm.Qwen2LM
    llm_input_size: 896
    llm: !new:cosyvoice.llm.llm.Qwen2Encoder
        pretrain_path: !ref <qwen_pretrain_path>
    sampling: !name:cosyvoice.utils.common.ras_sampling
        top_p: 0.7
        win_size: 10

flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec
    input_size: 512
"""


def qwen(seed: int = 0) -> Qwen2ForCausalLM:
    """The Qwen2 that upstream keeps as ``llm.model``, its lm_head tied to the text table."""
    config = Qwen2Config(
        vocab_size=TEXT,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model.eval()


def upstream_state(model: Qwen2ForCausalLM, seed: int = 1) -> dict[str, torch.Tensor]:
    """The state dict of upstream's ``Qwen2LM``: Qwen's under ``llm.model``, and four modules of its own."""
    generator = torch.Generator().manual_seed(seed)
    own = {
        "llm_embedding.weight": (2, WIDTH),
        "llm_decoder.weight": (CODES + 3, WIDTH),
        "llm_decoder.bias": (CODES + 3,),
        "speech_embedding.weight": (CODES + 3, WIDTH),
    }
    state = {f"llm.model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    return state | {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in own.items()}


def write_cosyvoice(folder: Path, seed: int = 0, **extra: object) -> Path:
    """``llm.pt``, ``CosyVoice-BlankEN/config.json``, the yaml and a stand-in for the other files."""
    folder.mkdir(parents=True, exist_ok=True)
    model = qwen(seed)
    torch.save(upstream_state(model) | extra, folder / "llm.pt")
    model.config.save_pretrained(folder / "CosyVoice-BlankEN")
    (folder / "cosyvoice2.yaml").write_text(YAML)
    (folder / "campplus.onnx").write_bytes(b"speaker encoder")
    return folder
