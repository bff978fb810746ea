"""A flipped bit anywhere in what a search has left is named when it is used again, or changes none of its results."""

import random
import shutil
from pathlib import Path

import pytest
from test_kill_matrix import place, results, space, uninterrupted  # noqa: F401  (fixtures)

from mamtra_ray.artifacts import file_hash
from mamtra_ray.report.__main__ import main as report
from mamtra_ray.search.__main__ import main as search

# Ray's, Tune's, Optuna's and TensorBoard's own files are never read again; a lock is empty.
NOT_OURS = ("tune", "tensorboard", "optuna.journal", ".lock", "writer.lock", "checkpoint_manager_snapshot.json")
NOT_OURS = (*NOT_OURS, ".validate_storage_marker")


def files_of_the_run(runs: Path) -> list[Path]:
    """One of every kind: of the sounds, figures and tables the first."""
    kinds = {}
    for path in sorted(path.relative_to(runs) for path in runs.rglob("*") if path.is_file() and path.stat().st_size):
        if not set(path.parts) & set(NOT_OURS):
            folder = path.parts[:2] if path.parts[1] in ("audio", "finalists", "report") else path.parts[:-1]
            kinds.setdefault((folder, path.suffix if path.parts[1] in ("audio", "report") else path.name), path)
    return list(kinds.values())


def flip(path: Path, randomness: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[randomness.randrange(len(content))] ^= 1 << randomness.randrange(8)
    path.write_bytes(content)


def exported(run: Path) -> dict[str, str]:
    return {name: file_hash(run / "best" / name) for name in ("model.safetensors", "config.json")}


@pytest.mark.slow
def test_a_flipped_bit_is_named_or_changes_nothing(uninterrupted, tmp_path, ray_cluster, capfd):  # noqa: F811
    expected = results(uninterrupted / "whole"), exported(uninterrupted / "whole")
    randomness = random.Random(0)
    kinds = files_of_the_run(uninterrupted)
    assert len(kinds) > 30
    harmless, unnamed = [], []
    for file in kinds:
        runs = tmp_path / "runs"
        shutil.rmtree(runs, ignore_errors=True)
        shutil.copytree(uninterrupted, runs)
        flip(runs / file, randomness)
        for verb, arguments in ((report, []), (search, ["--resume"])):
            capfd.readouterr()
            code = verb([*arguments, "--run", str(runs / "whole")])
            said = capfd.readouterr().err.strip().splitlines()[-1:]
            if code == 2:
                if not said[0].startswith("error: ") or not {file.name, file.parent.name} & set(words_of(said[0])):
                    unnamed.append((file, said))
                break
        else:
            assert (results(runs / "whole"), exported(runs / "whole")) == expected, file
            harmless.append(str(file))
    assert unnamed == []
    # What a search makes anew, or never reads again once its students are finished.
    print("\nflips without a consequence:", *harmless, sep="\n  ")


def words_of(sentence: str) -> list[str]:
    """The parts of all paths and names in it."""
    return sentence.replace("/", " ").replace(":", " ").replace(",", " ").replace("'", " ").split()
