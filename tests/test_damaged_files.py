"""A flipped bit in any file that a run leaves and reads again is named, or changes nothing that is read."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import finalist_row, made_run
from tiny_cache import cache_without_ray, tiny_config
from tiny_models import transformers_model, write_folder

from mamtra_ray.align.mixer_library import LibraryManifest, load_library, read_library_manifest, save_library
from mamtra_ray.artifacts import read_manifest, write_manifest
from mamtra_ray.config import TeacherConfig, load_config
from mamtra_ray.corpus.table import corpus_identity, read_corpus
from mamtra_ray.errors import InputError
from mamtra_ray.evaluate.race import Race
from mamtra_ray.evaluate.results import read_rows, write_rows
from mamtra_ray.evaluate.run_scores import read_race, write_race
from mamtra_ray.export.checkpoint import export_student
from mamtra_ray.layouts import Layout
from mamtra_ray.listening_test.opinion_scores import KEY, SCORES, OpinionScore, read_key, read_scores, write_scores
from mamtra_ray.listening_test.page import choose_stimuli, make_test
from mamtra_ray.run import names
from mamtra_ray.run.folder import exported_layout, read_architecture, read_audio_index, read_reference, read_run
from mamtra_ray.run.identity import check_identity
from mamtra_ray.run.journal import CURVE_KEY, Journal, read_journal
from mamtra_ray.run.rows import CurvePoint, FinalistRow, ProbeRow, TrialRow, read_table
from mamtra_ray.runtime.environment import ENVIRONMENT, note_session
from mamtra_ray.runtime.progress import Costs
from mamtra_ray.runtime.training import STATE_MANIFEST, Position, read_state, save_state
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teacher_cache.manifest import complete_manifest, read_shard
from mamtra_ray.teacher_cache.storage import Storage
from mamtra_ray.teachers import load_teacher

MADE_BY = {"teacher": "t"}
Reader = Callable[[], Any]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[Path, Reader]]:
    """By name: a file, and what reads it in a run (``repr`` of the result is compared)."""
    base = tmp_path_factory.mktemp("files")
    run = made_run(base / "run")
    check_identity(run, "teacher", "corpus")
    note_session(run)
    write_race(run, Race({"AMMA": "worse"}, {"AMMA": 40}), "e")
    found: dict[str, tuple[Path, Reader]] = {
        "config.yaml": (run / names.CONFIG, lambda: load_config(run / names.CONFIG)),
        "identity.json": (run / names.IDENTITY, lambda: check_identity(run, "teacher", "corpus")),
        "architecture.json": (run / names.ARCHITECTURE, lambda: read_architecture(run)),
        "reference.json": (run / names.REFERENCE, lambda: read_reference(run)),
        "race.json": (run / names.RACE, lambda: read_race(run, "e")),
        "costs.json": (run / names.COSTS, lambda: vars(Costs(run / names.COSTS))),
        "environment.json": (run / ENVIRONMENT, lambda: read_manifest(run / ENVIRONMENT, "environment", 1)),
        "index.json": (run / names.AUDIO_INDEX, lambda: read_audio_index(run)),
        "sound.wav": (next((run / names.AUDIO).rglob("*.wav")), lambda: read_audio_index(run)),
        "best/layout.json": (run / names.BEST / names.EXPORTED_LAYOUT, lambda: exported_layout(run / names.BEST)),
    }
    for name, kind in {
        names.TRIALS: TrialRow,
        names.PROBE: ProbeRow,
        names.CURVES: CurvePoint,
        names.FINALISTS: FinalistRow,
    }.items():
        found[name] = (run / name, lambda name=name, kind=kind: read_table(run / name, kind))

    curves = base / "curves" / names.CURVES
    curves.parent.mkdir()
    points = [CurvePoint(Layout("AM"), "t", 0, step, 10 * step, 1.0 / step, 0.5, float("nan"), 0.0) for step in (1, 2)]
    Journal(curves, CurvePoint, CURVE_KEY).append(points)
    found["curves.jsonl"] = (curves.with_suffix(".jsonl"), lambda: read_journal(curves, CurvePoint, CURVE_KEY))

    rows = [
        {"utterance_id": f"u{index}", "evaluation_hash": "e", "hypothesis": "天 b", "wer": 0.1} for index in range(3)
    ]
    write_rows(base / "evaluated", "AM", rows)
    found["evaluation rows"] = (
        base / "evaluated" / "evaluation" / "AM.jsonl",
        lambda: read_rows(base / "evaluated", "AM"),
    )
    result = base / "result.json"
    write_manifest(result, "finalist", 2, MADE_BY, report={"ce": 1.5})
    found["result.json"] = (result, lambda: read_manifest(result, "finalist", 2))

    write_folder(base / "teacher", transformers_model())
    teacher = load_teacher("huggingface", base / "teacher")
    student = make_student(teacher.model, "AMMA")
    student.save(base / "student")
    for name in ("config.json", "model.safetensors"):
        found[f"student/{name}"] = (
            base / "student" / name,
            lambda: (SpeechLM.load(base / "student").fingerprint(), SpeechLM.load(base / "student").config),
        )
    source = TeacherConfig(kind="huggingface", path=str(base / "teacher"))
    export_student(base / "student", base / "export", finalist_row("AMMA"), teacher, source)
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        found[f"export/{name}"] = (
            base / "export" / name,
            lambda: SpeechLM.load_granite(base / "export").fingerprint(),
        )

    state = {"a": torch.randn(7, 5), "b": {"step": 3}}
    save_state(base / "state", state, Position(5, 1, 0, 1), MADE_BY, seconds=1.5)
    states = [path for path in (base / "state").iterdir() if path.is_file()]
    assert {path.name for path in states} >= {STATE_MANIFEST}
    for path in states:
        found[f"state/{'manifest' if path.suffix == '.json' else 'tensors'}"] = (
            path,
            lambda: read_state(base / "state", MADE_BY)[:2],
        )

    library = LibraryManifest({0: 1.5}, {0: 1.0}, {0: 0.5}, 100, 3, 1.5, 1)
    save_library(base / "library", {0: {"x": torch.randn(5)}}, MADE_BY, library)
    for path in (base / "library").iterdir():
        found[f"library/{path.name}"] = (
            path,
            lambda: (
                read_library_manifest(base / "library", MADE_BY),
                load_library(base / "library", teacher_fingerprint="t"),
            ),
        )

    config = tiny_config(base / "cached")
    cache_without_ray(config, base / "cache")
    storage = Storage.of(base / "cache")

    def cache() -> list[Any]:
        manifest = complete_manifest(storage)
        return [manifest, *(read_shard(storage, name, shard).to_pylist() for name, shard in manifest.shards.items())]

    for name in ("manifest.json", "validation-00000.parquet"):
        found[f"cache/{name}"] = (base / "cache" / name, cache)
    path = Path(config.corpus.path)
    found["corpus.parquet"] = (path, lambda: (read_corpus(path).to_pylist(), corpus_identity(read_corpus(path))))

    make_test(choose_stimuli([read_run(run)], None, None, seed=3), base / "test")
    write_scores(base / "test", "id", [OpinionScore("teacher", 4.5, 0.1, 3, 4, 12, None, None)])
    found["listening test key"] = (base / "test" / KEY, lambda: read_key(base / "test"))
    found["listening test scores"] = (base / "test" / SCORES, lambda: read_scores(base / "test"))
    return found


NAMES = [
    *("config.yaml", "identity.json", "architecture.json", "reference.json", "costs.json", "environment.json"),
    *("race.json", "index.json", "sound.wav", "best/layout.json", "trials.parquet", "probe.parquet", "curves.parquet"),
    *("finalists.parquet", "curves.jsonl", "evaluation rows", "result.json", "student/config.json"),
    *("student/model.safetensors", "export/config.json", "export/model.safetensors", "export/generation_config.json"),
    *("state/manifest", "state/tensors", "library/manifest.json", "library/mixers.safetensors", "cache/manifest.json"),
    *("cache/validation-00000.parquet", "corpus.parquet", "listening test key", "listening test scores"),
]


def flips(files, name: str, count: int) -> int:
    """Flip ``count`` bits, one after the other; how many were noticed."""
    path, read = files[name]
    content, draw, noticed = path.read_bytes(), random.Random(name), 0
    before = repr(read())
    places = {(draw.randrange(len(content)), draw.randrange(8)) for _ in range(count)}
    try:
        for position, bit in sorted(places):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                after = repr(read())
            except InputError as error:
                noticed += 1
                assert "\n" not in str(error) and len(str(error)) < 1500, str(error)
                assert path.name in str(error) or path.parent.name in str(error), str(error)
            else:
                assert after == before, f"bit {bit} of byte {position} of {name} changes what is read, without a word"
    finally:
        path.write_bytes(content)
    return noticed


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_is_named_or_changes_nothing(files, name):
    noticed = flips(files, name, 25)
    if name not in ("export/generation_config.json", "export/config.json", "config.yaml"):
        # Blanks of JSON, names of unused columns and the like may change nothing; most of a file matters.
        assert noticed >= 5


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_flipped_bits(files, name):
    flips(files, name, 600)


def test_every_kind_of_file_is_here(files):
    assert sorted(files) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_off_is_named(files, name):
    path, read = files[name]
    content, before = path.read_bytes(), repr(read())
    try:
        for share in (0, 0.3, 0.9):
            path.write_bytes(content[: int(share * len(content))])
            try:
                # A journal that a crash has cut off has lost a line that nobody was told to be there; sentences that
                # no file has any more are spoken again.
                assert name in ("curves.jsonl", "evaluation rows") or repr(read()) == before
            except InputError as error:
                assert "\n" not in str(error)
    finally:
        path.write_bytes(content)


def test_a_checksum_is_of_what_a_reader_finds(tmp_path):
    write_manifest(tmp_path / "a.json", "kind", 1, {}, by_layer={2: 1.0, 10: float(3)}, pair=(1, 2))
    content = read_manifest(tmp_path / "a.json", "kind", 1)
    assert content["by_layer"] == {"2": 1.0, "10": 3.0} and content["pair"] == [1, 2]
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(json.dumps(json.loads(text)))
    assert read_manifest(tmp_path / "a.json", "kind", 1) == content, "written in another way"
    (tmp_path / "a.json").write_text(text.replace("3.0", "3.5"))
    with pytest.raises(InputError, match=r"a\.json is damaged"):
        read_manifest(tmp_path / "a.json", "kind", 1)
    del content["checksum"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="has no checksum"):
        read_manifest(tmp_path / "a.json", "kind", 1)
