"""No verb deletes or overwrites what it did not write, wherever it is told to write."""

import json
from pathlib import Path

import pytest
from made_run import made_run
from test_export_check import exported, place  # noqa: F401 (place is a fixture)
from tiny_cosyvoice import write_cosyvoice

from mamtra_ray.artifacts import OUTPUTS, check_outputs, write_output
from mamtra_ray.corpus.__main__ import main as corpus
from mamtra_ray.corpus.preparation import check_output_folder
from mamtra_ray.corpus.table import write_corpus
from mamtra_ray.demo_assets.stages import check_folders
from mamtra_ray.errors import InputError
from mamtra_ray.export.checkpoint import check_replaceable
from mamtra_ray.listening_test.__main__ import main as listening_test
from mamtra_ray.teachers import cosyvoice2, load_teacher


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def theirs(tmp_path):
    """A folder of the user's."""
    folder = tmp_path / "theirs"
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "cat.jpg").write_bytes(b"cat")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_what_is_noted_may_be_replaced(tmp_path):
    path = write_output(tmp_path, "a.txt", lambda path: path.write_text("one"))
    write_output(tmp_path, "a.txt", lambda path: path.write_text("two"))
    assert path.read_text() == "two"
    path.write_text("one")  # as if the process had stopped before the file took its place
    write_output(tmp_path, "a.txt", lambda path: path.write_text("three"))
    path.write_text("the user's")
    with pytest.raises(InputError, match=r"a\.txt would be overwritten"):
        write_output(tmp_path, "a.txt", lambda path: path.write_text("four"))
    assert path.read_text() == "the user's"
    (tmp_path / "link.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"link\.txt would be overwritten"):
        check_outputs(tmp_path, ["link.txt"])
    noted = tmp_path / OUTPUTS
    noted.write_text(noted.read_text().replace("a.txt", "b.txt"))
    with pytest.raises(InputError, match=f"{OUTPUTS} is damaged"):
        check_outputs(tmp_path, ["a.txt"])


def test_an_export_replaces_an_unchanged_export_only(place, theirs, tmp_path):  # noqa: F811
    before = content_of(theirs)
    with pytest.raises(InputError, match=r"theirs is there and holds no export \(no layout\.json\)"):
        exported(place, theirs)
    assert content_of(theirs) == before
    (theirs / "layout.json").write_text('{"my": "layout of the garden"}')
    with pytest.raises(InputError, match="is no layout manifest"):
        exported(place, theirs)
    assert content_of(theirs).keys() == before.keys() | {"layout.json"}

    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "empty", tmp_path / "new"):
        exported(place, folder, ce=1.5)
        exported(place, folder, ce=1.25)
        assert json.loads((folder / "layout.json").read_text())["scores"]["ce"] == 1.25
    for name in ("notes.txt", "deep/notes.txt", "README.md"):
        path = tmp_path / "new" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        before = content_of(tmp_path / "new")
        with pytest.raises(InputError, match=f"{name} would be deleted"):
            exported(place, tmp_path / "new")
        assert content_of(tmp_path / "new") == before
        if name != "README.md":
            path.unlink()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    with pytest.raises(InputError, match="link is there"):
        check_replaceable(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is there"):
        check_replaceable(tmp_path / "file")


def test_a_cosyvoice_folder_is_written_into_its_own_only(theirs, tmp_path):
    original = write_cosyvoice(tmp_path / "original")
    model = load_teacher("cosyvoice2", original).model
    before = content_of(theirs)
    with pytest.raises(InputError, match="theirs is there and holds no export"):
        cosyvoice2.write_folder(model, original, theirs)
    assert content_of(theirs) == before
    cosyvoice2.write_folder(model, original, tmp_path / "out")
    cosyvoice2.write_folder(model, original, tmp_path / "out")
    (tmp_path / "out" / "llm.pt").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"llm\.pt would be overwritten"):
        cosyvoice2.write_folder(model, original, tmp_path / "out")
    assert (tmp_path / "out" / "llm.pt").read_bytes() == b"mine"


def test_a_listening_test_goes_into_its_own_folder_only(theirs, tmp_path, capsys):
    run = made_run(tmp_path / "run")
    before = content_of(theirs)
    for arguments in (["--dry-run"], []):
        assert listening_test(["make", "--run", str(run), "--output", str(theirs), *arguments]) == 2
        assert "holds no listening test" in capsys.readouterr().err
    assert content_of(theirs) == before
    test = tmp_path / "test"
    for _ in range(2):
        assert listening_test(["make", "--run", str(run), "--output", str(test)]) == 0
    (test / "responses" / "one.json").write_text("{}")
    page = test / "test.html"
    page.write_text(page.read_text().replace("<title>", "<title>My "))
    before = content_of(test)
    assert listening_test(["make", "--run", str(run), "--output", str(test)]) == 2
    assert "test.html would be overwritten" in capsys.readouterr().err
    assert content_of(test).keys() == before.keys() and content_of(test)["test.html"] == before["test.html"]


def test_a_corpus_goes_into_its_own_folder_only(theirs, tmp_path, capsys):
    (tmp_path / "meta.lst").write_text("a|open the window\n")
    before = content_of(theirs)
    for arguments in (["--dry-run"], []):
        assert corpus(["seed_tts_eval", str(tmp_path / "meta.lst"), "--output", str(theirs), *arguments]) == 2
        assert "which is no corpus" in capsys.readouterr().err
    assert content_of(theirs) == before
    row = {"utterance_id": "u", "text": "a", "text_tokens": [1], "speech_tokens": [1], "split": "train"}
    mine = tmp_path / "mine"
    write_corpus(mine / "part-00000.parquet", [row], tokenizer="demo", made_by={"by": "hand"})
    with pytest.raises(InputError, match=r"part-00000\.parquet, which is no corpus"):
        check_output_folder(mine)
    write_corpus(mine / "part-00000.parquet", [row], tokenizer="demo", made_by={"recordings": "1"})
    check_output_folder(mine)  # what a killed process leaves
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        check_output_folder(tmp_path / "file")


def test_the_demo_is_built_into_its_own_folders_only(theirs, tmp_path):
    with pytest.raises(InputError, match="--work"):
        check_folders(theirs, tmp_path / "new")
    with pytest.raises(InputError, match="--output"):
        check_folders(tmp_path / "new", theirs)
    check_folders(tmp_path / "new", tmp_path / "other")


def test_what_python_compiled_in_an_export_is_no_file_of_the_user_s(place, tmp_path):  # noqa: F811
    """vLLM imports the logits processor from the folder."""
    exported(place, tmp_path / "best")
    compiled = tmp_path / "best" / "__pycache__" / "vllm_speech_logits.cpython-311.pyc"
    compiled.parent.mkdir()
    compiled.write_bytes(b"compiled")
    exported(place, tmp_path / "best", ce=1.5)
    assert not compiled.parent.exists() and (tmp_path / "best" / "vllm_speech_logits.py").exists()
