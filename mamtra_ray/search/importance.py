"""How much every layer's attention matters, for the paper's data-driven placement (Table 1, "Importance").

The paper names the criteria (cosine similarity, WER) without their formulas. We read them as the works that it builds
on do: cosine of a layer's input and output (ShortGPT), and the words lost when one layer alone is changed (SPADE, arXiv
2509.20802), which here means replaced by its aligned mixer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mamtra_ray.align.mixer_library import MANIFEST, load_library
from mamtra_ray.artifacts import content_hash, file_hash, read_manifest, write_manifest
from mamtra_ray.config import Config
from mamtra_ray.evaluate.evaluation import evaluate_systems
from mamtra_ray.layouts import Layout
from mamtra_ray.probe.pool import ProbeData, ProbePool
from mamtra_ray.run.names import TEACHER
from mamtra_ray.runtime.resources import WorkerResources
from mamtra_ray.speech_lm.student import make_student

KIND, SCHEMA_VERSION = "layer importance", 1


def layer_importance(
    criterion: str,
    config: Config,
    folder: Path,
    data: ProbeData,
    worker: WorkerResources,
    *,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[float]:
    """One score per layer, higher = keep its attention; Ray must be initialized.

    Kept in ``importance_<criterion>.json`` of the run folder and reused while teacher, library and settings fit.

    Args:
        criterion: of ``config.IMPORTANCE_CRITERIA``. ``wer``: words lost when the layer is replaced; ``cosine``: how
            far the layer turns its input; ``kl``: KL divergence to the teacher when it is replaced.
        config: section probe, and for the criterion wer also corpus and evaluate.
        folder: run folder.
        data: teacher, library and held-out tokens.
        worker: what an actor asks Ray for.
        on_progress: called with (done, total) in units of the criterion (layouts or utterances).
    """
    spoken = config.evaluate.model_copy(update={"sentences": config.probe.importance_sentences, "audio_examples": 0})
    of_speech = (
        [spoken.model_dump(exclude={"race_sentences"}), config.seed, config.corpus.seed] if criterion == "wer" else []
    )
    made_by = {
        "teacher": data.teacher.fingerprint,
        "library": file_hash(data.library / MANIFEST),
        "corpus": data.validation.manifest.made_by["corpus"],
        "settings": content_hash([data.validation_tokens, of_speech]),
    }
    path = folder / f"importance_{criterion}.json"
    if path.exists():
        content = read_manifest(path, KIND, SCHEMA_VERSION)
        if content["made_by"] == made_by:
            return [float(score) for score in content["scores"]]
    singles = single_replacements(data.teacher.load().model.config.num_layers)
    if criterion == "wer":
        spoken_config = config.model_copy(update={"evaluate": spoken})
        scores = _words_lost(singles, spoken_config, folder / "importance", data, worker, on_progress)
    else:
        with ProbePool(data, folder, worker) as pool:
            if criterion == "cosine":
                scores = pool.cosine_importance()
            else:
                for done in pool.score([layout for layout in singles if layout not in pool.rows]):
                    on_progress(done, len(singles))
                scores = [pool.rows[layout].kl for layout in singles]
    on_progress(len(singles), len(singles))
    write_manifest(path, KIND, SCHEMA_VERSION, made_by, criterion=criterion, scores=scores)
    return scores


def single_replacements(num_layers: int) -> list[Layout]:
    """The layouts with one Mamba layer, first layer first."""
    every = range(num_layers)
    return [Layout.from_attention_layers(set(every) - {layer}, num_layers) for layer in every]


def _words_lost(
    singles: Sequence[Layout],
    config: Config,
    folder: Path,
    data: ProbeData,
    worker: WorkerResources,
    on_progress: Callable[[int, int], None],
) -> list[float]:
    """WER with one layer replaced minus the teacher's, on the same sentences; layers that lose equally many words
    are told apart by nothing (a ranking then takes the earlier one)."""
    teacher = data.teacher.load()
    mixers = load_library(data.library, teacher_fingerprint=teacher.fingerprint)
    systems: dict[str, Path | None] = {}
    for layout in singles:
        make_student(teacher.model, layout, "aligned", mixers, data.state_sharing).save(folder / str(layout))
        systems[str(layout)] = folder / str(layout)
    evaluations = evaluate_systems(
        config, systems, folder, teacher=data.teacher, worker=worker, on_progress=on_progress
    )
    return [evaluations[str(layout)].wer.value - evaluations[TEACHER].wer.value for layout in singles]
