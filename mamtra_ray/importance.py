"""How much every layer's attention matters, for the paper's data-driven placement (Table 1, "Importance").

The paper names the criteria (cosine similarity, WER) without their formulas. We read them as the works that it builds
on do: cosine of a layer's input and output (ShortGPT), and the words lost when one layer alone is changed (SPADE, arXiv
2509.20802), which here means replaced by its aligned mixer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mamtra_ray.artifacts import content_hash, file_hash, read_manifest, write_manifest
from mamtra_ray.config import Config
from mamtra_ray.evaluate import evaluate_systems
from mamtra_ray.layouts import Layout
from mamtra_ray.mixer_library import MANIFEST, load_library
from mamtra_ray.probe_pool import ProbePool
from mamtra_ray.run_folder import TEACHER
from mamtra_ray.shared_cache import SharedCache
from mamtra_ray.teachers.base import Teacher, make_student

KIND, SCHEMA_VERSION = "layer importance", 1


def layer_importance(
    config: Config,
    folder: Path,
    criterion: str,
    *,
    teacher: Teacher,
    library: Path,
    validation: SharedCache,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """One score per layer, higher = keep its attention; Ray must be initialised.

    Kept in ``importance_<criterion>.json`` of the run folder and reused while teacher, library and settings fit.

    Args:
        config: sections probe, search, student, and for the criterion wer also corpus and evaluate.
        folder: run folder.
        criterion: of ``config.IMPORTANCE_CRITERIA``. ``wer``: words lost when the layer is replaced; ``cosine``: how
            far the layer turns its input; ``kl``: KL divergence to the teacher when it is replaced.
        teacher, library, validation: as for :func:`~mamtra_ray.probe.probe_masks`.
        on_progress: called with (done, total) in units of the criterion (layouts or utterances).
    """
    spoken = config.evaluate.model_copy(update={"sentences": config.probe.importance_sentences, "audio_examples": 0})
    made_by = {
        "teacher": teacher.fingerprint,
        "library": file_hash(library / MANIFEST),
        "corpus": validation.manifest.made_by["corpus"],
        "settings": content_hash([config.probe.validation_tokens, spoken.model_dump() if criterion == "wer" else {}]),
    }
    path = folder / f"importance_{criterion}.json"
    if path.exists():
        content = read_manifest(path, KIND, SCHEMA_VERSION)
        if content["made_by"] == made_by:
            return [float(score) for score in content["scores"]]
    report = on_progress or (lambda _done, _total: None)
    singles = single_replacements(teacher.model.config.num_layers)
    if criterion == "wer":
        scores = _words_lost(config.model_copy(update={"evaluate": spoken}), folder, teacher, library, report)
    else:
        with ProbePool(config, folder, teacher, library, validation) as pool:
            if criterion == "cosine":
                scores = pool.cosine_importance()
            else:
                for done in pool.score([layout for layout in singles if layout not in pool.rows]):
                    report(done, len(singles))
                scores = [pool.rows[layout].kl for layout in singles]
    report(len(singles), len(singles))
    write_manifest(path, KIND, SCHEMA_VERSION, made_by, criterion=criterion, scores=scores)
    return scores


def single_replacements(num_layers: int) -> list[Layout]:
    """The layouts with one Mamba layer, first layer first."""
    every = range(num_layers)
    return [Layout.from_attention_layers(set(every) - {layer}, num_layers) for layer in every]


def _words_lost(
    config: Config, folder: Path, teacher: Teacher, library: Path, report: Callable[[int, int], None]
) -> list[float]:
    """WER with one layer replaced minus the teacher's, on the same sentences; layers that lose equally many words
    are told apart by nothing (a ranking then takes the earlier one)."""
    mixers = load_library(library, teacher_fingerprint=teacher.fingerprint)
    singles = single_replacements(teacher.model.config.num_layers)
    systems: dict[str, Path | None] = {}
    for layout in singles:
        student = folder / "importance" / str(layout)
        if not (student / "config.json").exists():
            make_student(teacher.model, layout, "aligned", mixers, config.student.state_sharing).save(student)
        systems[str(layout)] = student
    evaluations = evaluate_systems(config, systems, folder / "importance", on_progress=report)
    return [evaluations[str(layout)].wer - evaluations[TEACHER].wer for layout in singles]
