"""The corpus file: its content survives, its hash depends on the content only, and what is invalid is named."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mamtra_ray.corpus.table import (
    REQUIRED_COLUMNS,
    Utterance,
    check_vocabulary,
    corpus_identity,
    read_corpus,
    token_counts,
    utterances,
    write_corpus,
)
from mamtra_ray.errors import InputError


def row(index: int, **changes: object) -> dict:
    return {
        "utterance_id": f"u{index}",
        "text": f"größer {index}",
        "text_tokens": [index, 1, 2],
        "speech_tokens": list(range(index + 1)),
        "split": ("train", "validation", "test")[index % 3],
        **changes,
    }


def write(path: Path, rows: list[dict] | pa.Table) -> str:
    return write_corpus(path, rows, tokenizer="words", made_by={"test": 1}).corpus_hash


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        row(0, speaker="ann"),
        row(1),
        row(2, prompt_text="hi", prompt_text_tokens=[5], prompt_speech_tokens=[7, 8]),
    ]
    write(tmp_path / "c.parquet", rows)
    read = utterances(read_corpus(tmp_path / "c.parquet"))
    assert [r.utterance_id for r in read] == ["u0", "u1", "u2"]
    assert [r.text for r in read] == [r["text"] for r in rows]
    assert [r.speech_tokens.tolist() for r in read] == [r["speech_tokens"] for r in rows]
    assert read[0].speaker == "ann" and read[1].speaker is None
    assert read[2].prompt_speech_tokens.tolist() == [7, 8] and read[0].prompt_speech_tokens is None
    assert all(r.text_tokens.dtype == np.int32 for r in read)


def test_utterance_objects_can_be_written_too(tmp_path: Path) -> None:
    same = write(tmp_path / "a.parquet", [row(0), row(1)])
    objects = [Utterance(**{**row(i), "text_tokens": np.array(row(i)["text_tokens"])}) for i in range(2)]
    assert write(tmp_path / "b.parquet", objects) == same


def test_a_split_is_its_utterances_in_stored_order(tmp_path: Path) -> None:
    write(tmp_path / "c.parquet", [row(index) for index in range(12)])
    train = read_corpus(tmp_path / "c.parquet", "train")
    assert train["utterance_id"].to_pylist() == ["u0", "u3", "u6", "u9"]
    assert token_counts(train, "speech_tokens").tolist() == [1, 4, 7, 10]
    assert corpus_identity(train) == corpus_identity(read_corpus(tmp_path / "c.parquet"))


def test_hash_depends_on_content_not_on_files_or_encoding(tmp_path: Path) -> None:
    rows = [row(index) for index in range(30)]
    whole = write(tmp_path / "whole.parquet", rows)
    write(tmp_path / "parts" / "0.parquet", rows[:11])
    write(tmp_path / "parts" / "1.parquet", rows[11:])
    parts = read_corpus(tmp_path / "parts")
    assert corpus_identity(parts).corpus_hash == whole
    assert parts.to_pylist() == read_corpus(tmp_path / "whole.parquet").to_pylist()
    rechunked = pa.concat_tables([parts.slice(0, 7), parts.slice(7, 1), parts.slice(8)])
    assert write(tmp_path / "again.parquet", rechunked) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"text": "x"},
        {"speech_tokens": [1]},
        {"text_tokens": [4, 4]},
        {"split": "test"},
        {"utterance_id": "z"},
        {"speaker": "s"},
    ],
)
def test_hash_changes_with_every_column(tmp_path: Path, change: dict) -> None:
    before = write(tmp_path / "a.parquet", [row(0), row(3)])
    assert write(tmp_path / "b.parquet", [row(0), row(3, **change)]) != before


def test_hash_tells_where_one_row_ends(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", [row(0, speech_tokens=[1, 2]), row(3, speech_tokens=[3])])
    b = write(tmp_path / "b.parquet", [row(0, speech_tokens=[1]), row(3, speech_tokens=[2, 3])])
    assert a != b


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0), row(0)], "'u0' more than once"),
        ([row(0, split="dev")], "'u0' is invalid: its split"),
        ([row(0, speech_tokens=[])], "'u0' is invalid: it has no speech"),
        ([row(0, speech_tokens=[1, -1])], "'u0' is invalid: the negative token -1 in speech_tokens"),
        ([row(0), row(3, prompt_speech_tokens=[2, None])], "'u3' is invalid: a missing token in prompt_speech_tokens"),
        ([row(0), row(3, prompt_text_tokens=[-1])], "'u3' is invalid: the negative token -1 in prompt_text_tokens"),
        ([row(0, speech_tokens=[None])], "'u0' is invalid: a missing token in speech_tokens"),
        ([row(0, speech_tokens=[1.0, 2.7])], "a whole number, not 2.7"),
        ([row(0, text_tokens=[True])], "a whole number, not True"),
        ([row(0, prompt_speech_tokens=[0.5])], "a whole number, not 0.5"),
        ([row(0, text=None)], "text is empty"),
        ([row(0, speed=1.0)], "unknown column 'speed'"),
        ([row(0, speech_tokens="abc")], "speech_tokens"),
        ([row(0, speech_tokens=[1 << 40])], "speech_tokens"),
    ],
)
def test_invalid_rows_are_refused_by_name(tmp_path: Path, rows: list[dict], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write(tmp_path / "c.parquet", rows)
    assert not (tmp_path / "c.parquet").exists()


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    table = pa.table({"utterance_id": ["a"], "text": ["b"]})
    with pytest.raises(InputError, match="lacks the column 'text_tokens'"):
        write(tmp_path / "c.parquet", table)


def test_flipped_bytes_anywhere_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write(path, [row(index) for index in range(20)])
    content = path.read_bytes()
    expected = read_corpus(path).to_pylist()
    random = np.random.default_rng(0)
    for position in random.choice(len(content), 60, replace=False).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        try:
            # A few bits of the footer mean nothing (statistics, unused flags): then the rows must be the same.
            assert read_corpus(path).to_pylist() == expected
        except InputError as error:
            assert str(path) in str(error)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="damaged or no Parquet"):
        read_corpus(path)


def test_changed_rows_under_the_old_metadata_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write(path, [row(0), row(3)])
    table = pq.read_table(path)
    changed = table.set_column(1, "text", pa.array(["other", "words"]))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(InputError, match="do not have the hash"):
        read_corpus(path)


def test_foreign_and_future_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    write(path, [row(0)])
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(InputError, match="is no corpus"):
        read_corpus(path)
    metadata = {**json.loads(table.schema.metadata[b"mamtra_ray"]), "schema_version": 99}
    pq.write_table(table.replace_schema_metadata({b"mamtra_ray": json.dumps(metadata)}), path)
    with pytest.raises(InputError, match="schema version 99"):
        read_corpus(path)


def test_missing_corpus_empty_folder_and_empty_split_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        read_corpus(tmp_path / "none.parquet")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"no \*.parquet"):
        read_corpus(tmp_path / "folder")
    write(tmp_path / "c.parquet", [row(0)])
    with pytest.raises(InputError, match="no utterance in the split 'test'"):
        read_corpus(tmp_path / "c.parquet", "test")
    with pytest.raises(InputError, match="not 'dev'"):
        read_corpus(tmp_path / "c.parquet", "dev")


def test_files_of_two_tokenizers_do_not_mix(tmp_path: Path) -> None:
    write_corpus(tmp_path / "0.parquet", [row(0)], tokenizer="a", made_by={})
    write_corpus(tmp_path / "1.parquet", [row(3)], tokenizer="b", made_by={})
    with pytest.raises(InputError, match="several tokenizers: a, b"):
        read_corpus(tmp_path)


def test_tokens_beyond_the_vocabulary_name_the_utterance(tmp_path: Path) -> None:
    rows = [row(index, text_tokens=[1, 2]) for index in range(6)]
    write(tmp_path / "c.parquet", rows)
    table = read_corpus(tmp_path / "c.parquet")
    chunked = pa.concat_tables([table.slice(0, 2), table.slice(2)])
    check_vocabulary(chunked, text_size=3, speech_size=6)
    with pytest.raises(InputError, match="'u5' has speech token 5"):
        check_vocabulary(chunked, text_size=3, speech_size=5)
    with pytest.raises(InputError, match="'u0' has text token 2"):
        check_vocabulary(chunked, text_size=2, speech_size=6)


def test_hash_is_the_sha256_of_names_lengths_and_values(tmp_path: Path) -> None:
    """Written out in plain Python: another release, or another program, must find the same."""
    rows = [row(0, speech_tokens=[1, 2]), row(3, text="ä b", speech_tokens=[7])]
    digest = hashlib.sha256()
    for name in REQUIRED_COLUMNS:
        kind = str(REQUIRED_COLUMNS[name])
        values, lengths = b"", b""
        for one in rows:
            value = one[name].encode() if isinstance(one[name], str) else np.array(one[name], "<i4").tobytes()
            values += value
            lengths += np.array(len(value) if isinstance(one[name], str) else len(one[name]), "<i4").tobytes()
        digest.update(f"{name}\0{kind}\0{len(rows)}\0".encode())
        digest.update(hashlib.sha256(lengths).digest() + hashlib.sha256(values).digest())
    assert write(tmp_path / "c.parquet", rows) == digest.hexdigest()
