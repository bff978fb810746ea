"""Corpora of text: rows against the text itself, splits by file, what is left out, and the verb."""

import gzip
import json
import subprocess
import sys

import pytest
from text_models import END, text_model, text_tokenizer, write_text_folder

from mamtra_ray.corpus.table import read_corpus, utterances, write_corpus
from mamtra_ray.corpus.text import Document, TextSettings, find_files, packed_rows, paragraph_rows, split_documents
from mamtra_ray.errors import InputError

SEPARATOR = -7


@pytest.mark.parametrize("row_tokens", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("lengths", [(1,), (2, 3), (5, 1, 4), (6,), (3, 3)])
def test_packed_rows_are_the_stream_and_predict_every_token_once(lengths, row_tokens):
    documents = [[100 * index + token for token in range(length)] for index, length in enumerate(lengths)]
    stream = [token for tokens in documents for token in (*tokens, SEPARATOR)]
    rows = packed_rows(iter(documents), SEPARATOR, row_tokens)
    assert [token for tokens, _ in rows for token in tokens] == stream[:-1]
    assert {len(tokens) for tokens, _ in rows[:-1]} <= {row_tokens}
    # The labels of a row are its tokens and then the next one, see SequenceFormat.training_example.
    position = 0
    for tokens, following in rows:
        assert [*tokens, following] == stream[position : position + len(tokens) + 1]
        position += len(tokens)


def test_rows_of_paragraphs():
    tokenize = lambda text: [ord(character) for character in text]  # noqa: E731
    text = "\n\none\n  two\n\n\n \nthree\n"
    assert paragraph_rows(text, tokenize, END, 100) == [
        (tokenize("one\n  two"), ord("\n")),
        (tokenize("three"), END),
    ]
    assert paragraph_rows(text, tokenize, END, 4) == [
        (tokenize("one\n"), ord(" ")),
        (tokenize("  tw"), ord("o")),
        (tokenize("o"), ord("\n")),
        (tokenize("thre"), ord("e")),
        (tokenize("e"), END),
    ]
    assert paragraph_rows(" \n", tokenize, END, 4) == []


def test_splits_are_of_whole_files_and_follow_from_the_seed():
    documents = [Document(f"file {index}", "text") for index in range(20)]
    splits = {
        seed: {
            split: [one.name for one in own]
            for split, own in split_documents(documents, TextSettings(validation_share=0.25, seed=seed)).items()
        }
        for seed in (0, 1)
    }
    again = split_documents(documents, TextSettings(validation_share=0.25, seed=0))
    assert [one.name for one in again["train"]] == splits[0]["train"]
    for names in splits.values():
        assert len(names["validation"]) == 5 and len(names["train"]) == 15
        assert {*names["validation"], *names["train"]} == {one.name for one in documents}
    assert set(splits[0]["validation"]) != set(splits[1]["validation"])
    few = split_documents(documents[:2], TextSettings(validation_share=0.01))
    assert len(few["validation"]) == len(few["train"]) == 1
    with pytest.raises(InputError, match="at least two files"):
        split_documents(documents[:1], TextSettings())


def test_files_of_folders_once(tmp_path):
    for name in ("a.py", "b/c.py", "b/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = find_files([tmp_path, tmp_path / "a.py"], "**/*.py")
    assert [file.name for file in found] == ["a.py", "c.py"]
    with pytest.raises(InputError, match="does not exist"):
        find_files([tmp_path / "x"])
    with pytest.raises(InputError, match=r"matches '\*\*/\*.md'"):
        find_files([tmp_path], "**/*.md")


@pytest.fixture
def place(tmp_path):
    write_text_folder(tmp_path / "model", text_model())
    for index in range(8):
        # The name of a special token in a text is text.
        (tmp_path / f"{index}.txt").write_text(f"abc {index}\n\n" * (4 + index) + "<|im_end|>" * (index % 2))
    (tmp_path / "zipped.txt.gz").write_bytes(gzip.compress(b"packed abc"))
    (tmp_path / "same.txt").write_text((tmp_path / "3.txt").read_text())
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    return tmp_path


FILES = [*(f"{index}.txt" for index in range(8)), "zipped.txt.gz", "same.txt", "empty.txt", "binary.txt"]
MODEL = ("teacher.kind=causal_lm", "teacher.path=model", "evaluate.sentences=0")


def verb(place, *arguments):
    command = [sys.executable, "-m", "mamtra_ray.corpus", "text", *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True)


def test_the_verb_from_files_to_rows(place):
    done = verb(place, *FILES, "--output", "corpus", "--row-tokens", "16", "--validation", "0.3", *MODEL, "seed=4")
    assert done.returncode == 0 and "left out: 3 files" in done.stdout, done.stderr
    tokenizer = text_tokenizer()
    documents = {}
    for name in FILES[:8]:
        documents[name] = (place / name).read_text()
    documents["zipped.txt.gz"] = "packed abc"
    lengths = {name: len(tokenizer(text, split_special_tokens=True).input_ids) + 1 for name, text in documents.items()}
    assert any("<|im_end|>" in text for text in documents.values())
    rows = {split: utterances(read_corpus(place / "corpus", split)) for split in ("train", "validation")}
    held_out = {line.split("/")[-1] for line in reported(place)["validation_files"]}
    assert len(held_out) == 3 and held_out < set(lengths)
    for split, names in (("validation", held_out), ("train", set(lengths) - held_out)):
        # The last end is a label only.
        assert sum(len(row.speech_tokens) for row in rows[split]) == sum(lengths[name] for name in names) - 1
        ends = sum(int((row.speech_tokens == END).sum()) for row in rows[split])
        assert ends == len(names) - 1
        assert all(row.text == tokenizer.decode(row.speech_tokens) for row in rows[split])
        assert all(len(row.text_tokens) == 0 and row.next_token is not None for row in rows[split])
    again = verb(place, *FILES, "--output", "corpus", "--row-tokens", "16", "--validation", "0.3", *MODEL, "seed=4")
    assert again.returncode == 0 and again.stdout == done.stdout
    other = verb(place, *FILES, "--output", "corpus", "--row-tokens", "17", *MODEL)
    assert other.returncode == 2 and "made with another row tokens" in other.stderr


def reported(place):
    return json.loads((place / "corpus" / "report.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["x.txt"], "x.txt does not exist"),
        (["0.txt"], "at least two files"),
        ([*FILES, "--cut", "lines"], "--cut 'lines'"),
        ([*FILES, "--row-tokens", "0"], "--row-tokens must be at least 1"),
        ([*FILES, "--validation", "1"], "between 0 and 1"),
        ([*FILES, "teacher.kind=demo"], "corpus text is for a teacher of text, not 'demo'"),
    ],
)
def test_bad_arguments_are_one_sentence(place, arguments, sentence):
    done = verb(place, *MODEL, *arguments, "--output", "corpus")
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
    assert not (place / "corpus" / "report.json").exists()


def test_a_dry_run_counts_and_writes_nothing(place):
    done = verb(place, *FILES, "--output", "corpus", "--dry-run", *MODEL)
    assert done.returncode == 0 and done.stdout.startswith("9 documents of ") and not (place / "corpus").exists()


def test_rows_with_and_without_text_tokens_are_no_corpus(tmp_path):
    rows = [
        {"utterance_id": f"{index}", "text": "", "text_tokens": tokens, "speech_tokens": [1], "split": "train"}
        for index, tokens in enumerate(([], [3]))
    ]
    with pytest.raises(InputError, match="it has no text_tokens"):
        write_corpus(tmp_path / "mixed.parquet", rows, tokenizer="test", made_by={})
    rows[1]["text_tokens"], rows[1]["next_token"] = [], 5
    with pytest.raises(InputError, match="row 0: next_token is empty"):
        write_corpus(tmp_path / "some.parquet", rows, tokenizer="test", made_by={})
