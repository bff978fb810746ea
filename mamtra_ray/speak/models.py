"""Which models speak: the teacher, what a run found, any of its finalists, any saved student. Loads no weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mamtra_ray.artifacts import read_json
from mamtra_ray.config import Config, load_config
from mamtra_ray.errors import InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.run.distilled import distilled_layout, saved_layout
from mamtra_ray.run.folder import exported_layout
from mamtra_ray.run.names import BEST, CONFIG, FINALISTS, TEACHER, distilled_student, student_folder
from mamtra_ray.run.open_run import open_run
from mamtra_ray.run.rows import FinalistRow, read_table

if TYPE_CHECKING:
    from mamtra_ray.speech_lm.speech_lm import SpeechLM

_PARENTS = 3
"""A finalist's student lies in RUN/finalists/LAYOUT/student."""


@dataclass(frozen=True)
class Chosen:
    """A model by name; ``folder`` is None for the teacher."""

    name: str
    folder: Path | None
    alarm: str | None = None
    """What the evaluation found wrong with it."""


@dataclass(frozen=True)
class Settings:
    """What models speak with, and the run that they are from, if there is one."""

    config: Config
    run: Path | None


def settings_of(
    space: str | None = None, run: Path | None = None, overrides: Sequence[str] = (), students: Sequence[Path] = ()
) -> Settings:
    """Settings of ``--run`` or ``--space``; else of the run in which the first student lies; else of ``runs/<name>``.

    Raises:
        InputError: as :func:`mamtra_ray.run.open_run.open_run`, ``run`` is no run, or the teacher writes text.
    """
    if run is None and space is None and students:
        run = _run_around(students[0])
    if run is None:
        config = load_config(space, overrides)
        usual = Path("runs") / config.name
        run = usual if not students and (usual / CONFIG).is_file() else None
    if run is not None and not (run / CONFIG).is_file():
        raise InputError(f"{run} holds no run (it has no {CONFIG})")
    config = open_run(None, run, overrides).config if run and space is None else load_config(space, overrides)
    if not config.teacher.speaks:
        raise InputError(f"teacher.kind={config.teacher.kind} writes text: there is nothing to hear")
    return Settings(config, run)


def _run_around(folder: Path) -> Path | None:
    parents = list(folder.absolute().parents)[:_PARENTS]
    return next((parent for parent in parents if (parent / CONFIG).is_file()), None)


def choose(
    run: Path | None,
    *,
    layouts: Sequence[str] = (),
    students: Sequence[Path] = (),
    teacher: bool = False,
    all_finalists: bool = False,
) -> list[Chosen]:
    """The models asked for; where nothing is, what the run found.

    Args:
        run: folder of the run; None without one.
        layouts: of finalists, or of the run's distilled student.
        students: folders of saved students, or of exported checkpoints.
        teacher: whether the teacher is among them; it comes first.
        all_finalists: whether all finalists are.

    Raises:
        InputError: nothing there, an unknown layout, or two models of one name.
    """
    chosen = [Chosen(TEACHER, None)] if teacher else []
    if all_finalists:
        finalists = _finalists(_needed(run, "all finalists"))
        if not finalists:
            raise InputError(f"{run} has no finalists: run the search to its end first")
        chosen += finalists.values()
    chosen += [_of_layout(_needed(run, f"layout {layout}"), layout) for layout in layouts]
    chosen += [Chosen(_name_of(folder), folder) for folder in students]
    if not chosen:
        chosen = [found(_needed(run, "the best layout"))]
    chosen = list(dict.fromkeys(chosen))
    names = [one.name for one in chosen]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"two of the models are called {repeated!r}, and each gets a file of its name: ask for one")
    return chosen


def found(run: Path) -> Chosen:
    """The exported finalist of a search, or the student of ``distill``.

    Raises:
        InputError: the run has neither yet.
    """
    layout = exported_layout(run / BEST)
    if layout is not None:
        finalist = _finalists(run).get(str(layout))
        return finalist or Chosen(str(layout), run / BEST)
    if (distilled := distilled_layout(run)) is not None:
        return Chosen(str(distilled), distilled_student(run))
    known = ", ".join(_finalists(run)) or "none yet"
    raise InputError(f"{run} has found no best layout yet: give --layout (finalists: {known}), --student or --teacher")


def _of_layout(run: Path, text: str) -> Chosen:
    layout = str(Layout.from_string(text))
    finalists = _finalists(run)
    if layout in finalists:
        return finalists[layout]
    if str(distilled_layout(run)) == layout:
        return Chosen(layout, distilled_student(run))
    raise InputError(f"{layout} is no finalist of {run} (finalists: {', '.join(finalists) or 'none yet'})")


def _finalists(run: Path) -> dict[str, Chosen]:
    alarms = {str(row.layout): row.alarm for row in read_table(run / FINALISTS, FinalistRow)}
    names = sorted(path.parent.name for path in run.glob("finalists/*/student"))
    names = [*(name for name in alarms if name in names), *(name for name in names if name not in alarms)]
    return {name: Chosen(name, student_folder(run, name), alarms.get(name)) for name in names}


def _needed(run: Path | None, what: str) -> Path:
    if run is None:
        raise InputError(f"{what} of which run? give --run DIR, or --student FOLDER, or --teacher")
    return run


def _name_of(folder: Path) -> str:
    """The layout of a saved student or exported checkpoint."""
    return str(exported_layout(folder) or saved_layout(folder))


def read_student(folder: Path, device: str = "cpu") -> SpeechLM:
    """A saved student, or an exported checkpoint of either form, in evaluation mode.

    Raises:
        InputError: missing, damaged or foreign files.
    """
    from mamtra_ray.speech_lm.speech_lm import SpeechLM

    content = read_json(folder / "config.json")
    if isinstance(content, dict) and content.get("kind") == "speech_lm":
        return SpeechLM.load(folder, device=device).eval()
    return SpeechLM.load_granite(folder, device=device).eval()
