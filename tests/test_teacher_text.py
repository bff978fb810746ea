"""Text tokenizers of the teachers, from the files their folders have."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mamtra_ray.corpus.table import read_corpus, utterances
from mamtra_ray.errors import InputError
from mamtra_ray.teachers.demo_grammar import tokenize_text
from mamtra_ray.teachers.text import save_text_tokenizer, text_tokenizer


def write_blank_en(folder):
    """``CosyVoice-BlankEN`` as it is published: vocabulary, merges and configuration, no tokenizer.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
    vocabulary = {token: index for index, token in enumerate([*alphabet, *["".join(pair) for pair in merges]])}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(len(vocabulary) + index): {"content": token, **plain} for index, token in enumerate(special)}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "add_prefix_space": False,
                "added_tokens_decoder": added,
                "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "model_max_length": 32768,
                "tokenizer_class": "Qwen2Tokenizer",
            }
        )
    )
    return vocabulary


def test_cosyvoice_adds_its_special_tokens_behind_qwens(tmp_path):
    vocabulary = write_blank_en(tmp_path / "CosyVoice-BlankEN")
    tokenize = text_tokenizer("cosyvoice2", tmp_path)
    assert tokenize("hello") == [vocabulary["hello"]]
    # Upstream writes 151646 for it into its code: the first id after Qwen's own three special tokens.
    first = len(vocabulary) + 3
    assert tokenize("<|endofprompt|>") == [first]
    assert tokenize("hello[breath]<strong>hello</strong>") == [
        vocabulary["hello"], first + 1, first + 2, vocabulary["hello"], first + 3
    ]  # fmt: skip
    assert tokenize("[mn]") == [first + 16] and tokenize("<|im_end|>") == [first - 1]


def test_other_teachers_use_the_tokenizer_of_their_folder(tmp_path):
    inner = Tokenizer(models.WordLevel({"<s>": 0, "hello": 1, "there": 2}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(tmp_path)
    assert text_tokenizer("llasa", tmp_path)("hello there") == [1, 2]
    assert text_tokenizer("huggingface", tmp_path)("there") == [2]


def test_demo_and_unusable_folders(tmp_path):
    assert text_tokenizer("demo", None)("open the window") == tokenize_text("open the window")
    with pytest.raises(InputError, match="CosyVoice-BlankEN has no tokenizer"):
        text_tokenizer("cosyvoice2", tmp_path)
    for kind, path in (("llama", tmp_path), ("llasa", None)):
        with pytest.raises(InputError, match=r"no text tokenizer without teacher\.path"):
            text_tokenizer(kind, path)


def test_an_exported_model_has_its_teachers_tokenizer(tmp_path):
    write_blank_en(tmp_path / "cosyvoice" / "CosyVoice-BlankEN")
    text = "hello[breath] hello<|endofprompt|>"
    assert save_text_tokenizer("cosyvoice2", tmp_path / "cosyvoice", tmp_path / "exported")
    saved = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids = saved(text, add_special_tokens=False)["input_ids"]
    assert ids == text_tokenizer("cosyvoice2", tmp_path / "cosyvoice")(text)

    assert save_text_tokenizer("demo", None, tmp_path / "demo")
    saved = AutoTokenizer.from_pretrained(tmp_path / "demo")
    for utterance in utterances(read_corpus(None, "test"))[:50]:
        assert saved(utterance.text, add_special_tokens=False)["input_ids"] == list(utterance.text_tokens)
    with pytest.raises(Exception, match="WordLevel"):
        saved("antidisestablishmentarianism")

    (tmp_path / "model alone").mkdir()
    assert not save_text_tokenizer("huggingface", tmp_path / "model alone", tmp_path / "none")
    assert not (tmp_path / "none").exists()
