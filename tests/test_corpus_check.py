"""``corpus check``: what a corpus holds, and whether it is of a teacher's tokenizers."""

import pytest
from tiny_cache import random_rows
from tiny_models import SEQUENCE, transformers_model, write_folder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mamtra_ray.config import TeacherConfig
from mamtra_ray.corpus.__main__ import main
from mamtra_ray.corpus.check import check_text_tokens
from mamtra_ray.corpus.table import read_corpus, write_corpus
from mamtra_ray.errors import InputError
from mamtra_ray.teachers.huggingface import write_format


def write_teacher(folder, letters="somewrd "):
    """A tiny teacher whose tokenizer numbers letters in this order."""
    write_folder(folder, transformers_model())
    vocabulary = {"Ġ" if letter == " " else letter: index for index, letter in enumerate(dict.fromkeys(letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


TOKENS = ["somewrd ".index(letter) for letter in "some words"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_teacher(folder / "teacher")
    write_teacher(folder / "other", " drwemos")
    write_folder(folder / "without", transformers_model())
    rows = [row | {"text_tokens": TOKENS, "speaker": str(index % 7)} for index, row in enumerate(random_rows())]
    write_corpus(folder / "c.parquet", rows, tokenizer="huggingface", made_by={})
    write_corpus(folder / "named.parquet", rows, tokenizer="mine", made_by={})
    write_corpus(folder / "llasa.parquet", rows, tokenizer="llasa", made_by={})
    return folder


def checked(place, corpus, *teacher):
    return main(["check", str(place / corpus), *teacher])


def of(folder):
    return ("teacher.kind=huggingface", f"teacher.path={folder}")


def test_what_it_says(place, capsys):
    assert checked(place, "c.parquet") == 0
    out = capsys.readouterr().out
    rows = random_rows()
    train = [row for row in rows if row["split"] == "train"]
    assert (
        f"train: {len(train)} utterances, 7 speakers, {sum(len(row['speech_tokens']) for row in train):,} speech" in out
    )
    assert "tokenizer huggingface" in out and "test: nothing" in out and "fits" not in out
    assert checked(place, "c.parquet", *of(place / "teacher")) == 0
    assert (
        "fits teacher teacher: 40 of 40 utterances of train, 6 of 6 utterances of validation" in capsys.readouterr().out
    )


def test_too_long_ones_are_counted(place, tmp_path, capsys):
    folder = write_teacher(tmp_path / "short")
    write_format(folder, SEQUENCE, 25.0, (2.0, 20.0), made_by={}, max_length=33)
    assert checked(place, "c.parquet", *of(folder)) == 0
    fitting = [row for row in random_rows() if len(row["speech_tokens"]) + len(TOKENS) + 3 <= 33]
    train = sum(row["split"] == "train" for row in fitting)
    assert f"{train} of 40 utterances of train" in capsys.readouterr().out


def test_a_corpus_of_another_tokenizer_is_refused(place, capsys):
    assert checked(place, "c.parquet", *of(place / "other")) == 2
    assert "has other text tokens than the teacher's tokenizer makes of its text" in capsys.readouterr().err
    assert checked(place, "llasa.parquet", "teacher.kind=demo") == 2
    assert "made with llasa's tokenizers, but teacher.kind is demo" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"made with llasa's tokenizers, but teacher\.kind is cosyvoice2"):
        check_text_tokens(read_corpus(place / "llasa.parquet"), TeacherConfig(kind="cosyvoice2", path=str(place)))
    with pytest.raises(InputError, match=r"of the corpus is no text for the teacher: .*'some'"):
        write_corpus(place / "demo.parquet", random_rows(), tokenizer="demo", made_by={})
        check_text_tokens(read_corpus(place / "demo.parquet"), TeacherConfig())


def test_one_that_is_called_otherwise_is_taken_at_its_word(place):
    assert checked(place, "named.parquet", *of(place / "other")) == 0
    assert checked(place, "c.parquet", *of(place / "without")) == 0, "the folder has no tokenizer to compare with"


def test_a_damaged_or_missing_one(place, tmp_path, capsys):
    assert main(["check", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (tmp_path / "bad.parquet").write_bytes((place / "c.parquet").read_bytes()[:-40])
    assert main(["check", str(tmp_path / "bad.parquet")]) == 2
    assert "damaged" in capsys.readouterr().err
