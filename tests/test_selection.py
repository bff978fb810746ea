"""Which utterances are used: a random part of all speakers, and none that the teacher was not trained for."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pytest

from mamtra_ray.config import load_config
from mamtra_ray.corpus.selection import drawn, fitting, usable
from mamtra_ray.corpus.table import read_corpus, token_counts, write_corpus
from mamtra_ray.errors import InputError


def corpus_of(folder, speakers, length=lambda index: 150):
    """Utterances in the order of their speakers, as LibriTTS lists them."""
    rows = [
        {
            "utterance_id": str(index),
            "text": "a",
            "text_tokens": [1, 2],
            "speech_tokens": np.zeros(length(index), np.int32),
            "split": "train",
            "speaker": speaker,
        }
        for index, speaker in enumerate(speakers)
    ]
    write_corpus(folder / "c.parquet", rows, tokenizer="tiny", made_by={})
    return read_corpus(folder / "c.parquet", "train")


@pytest.mark.parametrize("space", ["cosyvoice2", "llasa_1b"])
def test_a_space_uses_all_of_a_corpus_and_a_limit_all_speakers(space, tmp_path):
    speakers, each = 100, 12
    table = corpus_of(tmp_path, [str(speaker) for speaker in range(speakers) for _ in range(each)])
    config = load_config(space)
    used = drawn(table, config.corpus.seed, config.corpus.train_tokens)
    assert len(used) == speakers * each, "no inherited limit"
    used = drawn(table, config.corpus.seed, 150 * 350)
    counts = Counter(used["speaker"].to_pylist())
    assert len(used) == 350 and set(counts.values()) == {3, 4} and len(counts) == speakers
    places = sorted(int(name) for name in used["utterance_id"].to_pylist())
    assert places != sorted(int(name) for name in drawn(table, 1, 150 * 350)["utterance_id"].to_pylist())
    # Not the first utterances of each speaker either: each of the twelve places is taken about equally often.
    taken = Counter(place % each for place in places)
    assert len(taken) == each and max(taken.values()) < 60


def test_a_longer_part_begins_with_a_shorter_one(tmp_path):
    table = corpus_of(tmp_path, list("aaaabbbc") * 5, length=lambda index: 1 + index % 7)
    longest = drawn(table, 3)["utterance_id"].to_pylist()
    assert sorted(longest) == sorted(table["utterance_id"].to_pylist())
    for limit in (1, 5, 40, 70):
        part = drawn(table, 3, limit)
        assert part["utterance_id"].to_pylist() == longest[: len(part)]
        assert len(part) == 1 or token_counts(part, "speech_tokens").sum() <= limit
        assert token_counts(drawn(table, 3).slice(0, len(part) + 1), "speech_tokens").sum() > limit


@pytest.mark.parametrize("speakers", [[None] * 40, [None, "a"] * 20])
def test_rows_without_a_speaker(speakers, tmp_path):
    table = corpus_of(tmp_path, speakers)
    order = drawn(table, 0)["utterance_id"].to_pylist()
    assert order != table["utterance_id"].to_pylist() and len(set(order)) == 40
    several = pa.concat_tables([table.slice(0, 9), table.slice(9)])
    assert drawn(several, 0)["utterance_id"].to_pylist() == order, "however it is cut into chunks"


def test_what_is_longer_than_the_teacher_is_left_out(tmp_path):
    table = corpus_of(tmp_path, ["a", "b"] * 10, length=lambda index: 10 + index)
    kept = fitting(table, "train", overhead=3, longest=20)
    # 3 + 2 text tokens + at most 15 of speech
    assert token_counts(kept, "speech_tokens").tolist() == [10, 11, 12, 13, 14, 15]
    assert fitting(table, "train", 3, None) is table
    assert len(usable(table, "train", 3, 20, seed=0)) == 6
    with pytest.raises(
        InputError, match=r"every utterance of the split 'train' is longer than the teacher's 14 tokens"
    ):
        fitting(table, "train", 3, 14)
