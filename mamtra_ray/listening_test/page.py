"""A blind test of naturalness made from runs, and its mean opinion scores.

``make`` writes one offline page with the audio of several systems in it, in a new random order for every listener and
without any system's name; listeners send back the JSON file it saves. The same test is written for webMUSHRA.
``score`` reads what came back. The key (which clip is which system) is a separate file that stays with you.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mamtra_ray.artifacts import content_hash, file_hash, write_manifest
from mamtra_ray.errors import InputError, nearest_name
from mamtra_ray.listening_test.files import write_test_page, write_webmushra
from mamtra_ray.listening_test.opinion_scores import (
    KEY,
    SCHEMA_VERSION,
    OpinionScore,
    opinion_scores,
    read_key,
    read_ratings,
    write_scores,
)
from mamtra_ray.run.folder import Run
from mamtra_ray.run.names import AUDIO, CODEC, TEACHER
from mamtra_ray.runtime.progress import table

RESPONSES = "responses"


@dataclass(frozen=True)
class Stimulus:
    """One clip of the test; ``clip`` is the meaningless name that listeners' files carry."""

    clip: str
    system: str
    utterance_id: str
    text: str
    file: Path


def systems_of(runs: Sequence[Run]) -> dict[str, tuple[Run, str]]:
    """Systems that can be compared: (run, name in its audio) by display name.

    What students are compared with (recordings, codec, teacher) comes from the first run that has it; a student is
    called by its layout, with its run's name before it when there are several runs.
    """
    systems: dict[str, tuple[Run, str]] = {}
    for name in (CODEC, TEACHER):
        for run in runs:
            if name in run.audio.systems:
                systems.setdefault(name, (run, name))
    for run in runs:
        for name in run.audio.systems:
            if name not in (CODEC, TEACHER):
                systems[f"{run.name}/{name}" if len(runs) > 1 else name] = (run, name)
    return systems


def choose_stimuli(
    runs: Sequence[Run], systems: Sequence[str] | None, utterances: int | None, seed: int
) -> list[Stimulus]:
    """Every chosen system's rendition of the same randomly drawn utterances.

    Args:
        runs: where the audio is.
        systems: display names; ``None`` takes what students are compared with, and every run's exported student.
        utterances: how many to draw; ``None`` takes all that every system has spoken.
        seed: of the drawing and of the clips' names.

    Raises:
        InputError: unknown or fewer than two systems, or no utterance that all of them have.
    """
    available = systems_of(runs)
    if not available:
        raise InputError(f"no audio in {', '.join(str(run.path) for run in runs)} (evaluate.audio_examples was 0)")
    for name in systems or ():
        if name not in available:
            raise InputError(f"no system {name!r} in these runs: {nearest_name(name, available)}")
    chosen = list(systems) if systems else _default_systems(available)
    if len(chosen) < 2:
        raise InputError(f"a listening test compares at least two systems; these runs have {', '.join(chosen)}")
    files = {name: _files_of(*available[name]) for name in chosen}
    common = sorted(set.intersection(*(set(found) for found in files.values())))
    if not common:
        raise InputError(f"no utterance was spoken by all of {', '.join(chosen)}")
    # The texts must agree too: runs on different corpora may use the same ids.
    texts = {utterance_id: {_text(available[name][0], utterance_id) for name in chosen} for utterance_id in common}
    common = [utterance_id for utterance_id in common if len(texts[utterance_id]) == 1]
    if not common:
        raise InputError("the runs speak different texts under the same utterance ids; they are of different corpora")
    randomness = random.Random(seed)
    drawn = sorted(randomness.sample(common, min(utterances or len(common), len(common))))
    names = _clip_names(len(drawn) * len(chosen), randomness)
    return [
        Stimulus(names.pop(), name, utterance_id, min(texts[utterance_id]), files[name][utterance_id])
        for name in chosen
        for utterance_id in drawn
    ]


def check_test_folder(stimuli: Sequence[Stimulus], output: Path) -> str:
    """The test's id, for a folder that is empty or holds the same test.

    Raises:
        InputError: ``output`` holds another test, or something else.
    """
    test_id = content_hash([[s.clip, s.system, s.utterance_id, file_hash(s.file)] for s in stimuli])
    if (output / KEY).is_file():
        if read_key(output)["test_id"] != test_id:
            raise InputError(f"{output} holds another listening test; choose another --output")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there and holds no listening test (no {KEY}); choose another --output")
    return test_id


def make_test(stimuli: Sequence[Stimulus], output: Path, *, clips_per_listener: int | None = None) -> str:
    """Write the page, the webMUSHRA export and the key into ``output``; returns the test's id.

    Raises:
        InputError: ``output`` holds another test, whose responses would no longer fit, or something else than a test.
    """
    test_id = check_test_folder(stimuli, output)
    clips = {s.clip: {"system": s.system, "utterance_id": s.utterance_id, "text": s.text} for s in stimuli}
    systems = list(dict.fromkeys(stimulus.system for stimulus in stimuli))
    made_by = {"files": sorted({str(stimulus.file) for stimulus in stimuli})}
    write_manifest(
        output / KEY, "listening_test", SCHEMA_VERSION, made_by, test_id=test_id, systems=systems, clips=clips
    )
    # By clip name, so that the order in the page's source tells nothing.
    files = {stimulus.clip: stimulus.file for stimulus in sorted(stimuli, key=lambda s: s.clip)}
    limit = min(clips_per_listener or len(files), len(files))
    write_test_page(output, test_id, files, limit)
    write_webmushra(output, test_id, files, limit)
    (output / RESPONSES).mkdir(exist_ok=True)
    return test_id


def score_test(folder: Path, files: Sequence[Path] = ()) -> list[OpinionScore]:
    """Scores from ``files`` (default: all of ``responses/``), also written to ``mean_opinion_scores.json``."""
    key = read_key(folder)
    found = sorted(files or [*(folder / RESPONSES).glob("*.json"), *(folder / RESPONSES).glob("*.csv")])
    if not found:
        raise InputError(f"no responses in {folder / RESPONSES}: put the listeners' JSON files or lss.csv there")
    scores = opinion_scores(read_ratings(found, key), key["systems"])
    write_scores(folder, key["test_id"], scores)
    return scores


def scores_table(scores: Sequence[OpinionScore]) -> str:
    """One line per system: mean with interval, counts, paired difference to the first system."""
    rows = [
        [
            score.system,
            _with_half_width(score.mean, score.half_width),
            score.listeners,
            score.utterances,
            score.ratings,
            "" if score.difference is None else _with_half_width(score.difference, score.difference_half_width, "+"),
        ]
        for score in scores
    ]
    header = ["system", "MOS", "listeners", "utterances", "ratings", f"minus {scores[0].system}" if scores else ""]
    return table(header, rows)


def _with_half_width(value: float, half: float | None, sign: str = "") -> str:
    return f"{value:{sign}.2f}" + (" (no interval: one listener or utterance)" if half is None else f" +- {half:.2f}")


def _default_systems(available: dict[str, tuple[Run, str]]) -> list[str]:
    references = [name for name in (TEACHER,) if name in available]
    students = [name for name, (run, system) in available.items() if system == str(run.best_layout)]
    return references + (students or [name for name in available if name not in (CODEC, TEACHER)])


def _files_of(run: Run, system: str) -> dict[str, Path]:
    return {clip.utterance_id: run.path / AUDIO / clip.file for clip in run.audio.clips if clip.system == system}


def _text(run: Run, utterance_id: str) -> str:
    return run.audio.texts[utterance_id]


def _clip_names(count: int, randomness: random.Random) -> list[str]:
    names: set[str] = set()
    while len(names) < count:
        names.add(f"c{randomness.getrandbits(32):08x}")
    shuffled = sorted(names)
    randomness.shuffle(shuffled)
    return shuffled
