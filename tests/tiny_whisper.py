"""A random Whisper folder of the form transformers saves, which hears strings of the letters a to e."""

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

_CONTROLS = ("endoftext", "startoftranscript", "en", "transcribe", "translate")
_CONTROLS += ("startofprev", "nospeech", "notimestamps")


def write_tiny_whisper(folder: Path, seed: int = 0) -> Path:
    """Weights, generation config, tokenizer and feature extractor; multilingual like large-v3."""
    tokenizer = WhisperTokenizer(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    timestamps = [f"<|{index * 0.02:.2f}|>" for index in range(1501)]
    tokenizer.add_tokens([*[f"<|{name}|>" for name in _CONTROLS], *timestamps], special_tokens=True)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in _CONTROLS}
    ends = {name: ids["endoftext"] for name in ("eos_token_id", "pad_token_id", "bos_token_id")}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        num_mel_bins=16,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_source_positions=1500,
        max_target_positions=32,
        decoder_start_token_id=ids["startoftranscript"],
        **ends,
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and parameter.dim() > 1:
                parameter.normal_(0, 0.4)
    letters = set(tokenizer.convert_tokens_to_ids(list("abcde") + ["Ġ"]))
    settings = model.generation_config
    # As in the files of real Whisper models; otherwise loading would make it anew from config.json.
    settings._from_model_config = False
    settings.is_multilingual = True
    # Chinese is another token that the model knows.
    settings.lang_to_id = {"<|en|>": ids["en"], "<|zh|>": ids["translate"]}
    settings.task_to_id = {name: ids[name] for name in ("transcribe", "translate")}
    settings.no_timestamps_token_id = ids["notimestamps"]
    settings.prev_sot_token_id = ids["startofprev"]
    settings.max_length = 20
    settings.begin_suppress_tokens = [ids["endoftext"]]
    settings.suppress_tokens = sorted(set(range(len(tokenizer))) - letters - {ids["endoftext"]})
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=16), tokenizer).save_pretrained(folder)
    return folder
