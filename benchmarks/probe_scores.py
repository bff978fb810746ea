"""Which score of an undistilled layout ranks layouts best by the words that are heard after distillation?

    python benchmarks/probe_scores.py            about 20 minutes on one core
    python benchmarks/probe_scores.py --quick    2 layouts of each budget, few sentences; nothing written

Takes the layouts and their WERs after distillation from benchmarks/results/proxy_quality_demo.json and scores the same
layouts, with aligned mixers and nothing distilled, in many ways: on held-out speech (means, parts of the positions,
tails), on what the teacher or the student says freely, by a recognizer, and with a library that was aligned four times
as long. Spearman correlation of each score with the WER inside each budget, and by how much it differs from that of the
probe's KL, with 95 % intervals of 2,000 bootstrap samples of the layouts.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from measurement import LONG_DEMO, print_table, write_result
from scipy.stats import spearmanr
from torch import Tensor

from mamtra_ray.align.mixer_library import load_library
from mamtra_ray.align.phase import make_library
from mamtra_ray.corpus.selection import drawn
from mamtra_ray.corpus.table import Utterance, read_corpus, utterances
from mamtra_ray.evaluate.evaluation import evaluation_settings
from mamtra_ray.evaluate.worker import Chunk, EvaluationWorker
from mamtra_ray.losses import IGNORE
from mamtra_ray.run.open_run import open_run
from mamtra_ray.run.session import start_session
from mamtra_ray.speech.wer import word_error_rate
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teacher_cache.phase import make_cache
from mamtra_ray.teachers.teacher import Teacher

RESULT = Path(__file__).parent / "results" / "proxy_quality_demo.json"
PROBE = "KL (the probe)"
_SENTENCES_PER_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Position:
    """What one predicted token says, one entry per position of an utterance (N,)."""

    kl_N: Tensor
    """KL(teacher || student), nats."""
    reverse_kl_N: Tensor
    ce_N: Tensor
    """-log p of the student for the token that follows."""
    teacher_ce_N: Tensor
    entropy_N: Tensor
    """Of the teacher, nats."""
    differs_N: Tensor
    """Whether the two would say another token."""


@torch.no_grad()
def positions(teacher: Teacher, student: SpeechLM, texts: Sequence[Any], speech: Sequence[Any]) -> list[Position]:
    """Teacher and student on the same sequences, utterance by utterance."""
    found = []
    for text, tokens in zip(texts, speech, strict=True):
        ids_L, labels_L = teacher.sequence.training_example(list(text), list(tokens))
        at = labels_L != IGNORE
        log_p, log_q = (torch.log_softmax(model(ids_L[None])[0, at].double(), -1) for model in (teacher.model, student))
        label_N1 = labels_L[at][:, None]
        found.append(
            Position(
                (log_p.exp() * (log_p - log_q)).sum(-1),
                (log_q.exp() * (log_q - log_p)).sum(-1),
                -log_q.gather(1, label_N1)[:, 0],
                -log_p.gather(1, label_N1)[:, 0],
                -(log_p.exp() * log_p).sum(-1),
                (log_p.argmax(-1) != log_q.argmax(-1)).double(),
            )
        )
    return found


def held_out_scores(found: Sequence[Position], probe_tokens: int) -> dict[str, float]:
    """Scores on recorded speech."""
    kl, reverse, ce, _, entropy, differs = (
        torch.cat([getattr(position, field.name) for position in found]) for field in dataclasses.fields(Position)
    )
    return {
        PROBE: float(kl[:probe_tokens].mean()),
        "CE": float(ce[:probe_tokens].mean()),
        "KL, all held-out tokens": float(kl.mean()),
        "KL(student || teacher)": float(reverse.mean()),
        "other most likely token": float(differs.mean()),
        "KL where the teacher doubts (upper quarter)": float(kl[entropy >= entropy.quantile(0.75)].mean()),
        "KL where the teacher is sure (lower half)": float(kl[entropy <= entropy.median()].mean()),
        "KL, 95th percentile": float(kl.quantile(0.95)),
        "largest KL of an utterance": float(torch.stack([position.kl_N.max() for position in found]).mean()),
    }


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Levenshtein."""
    row = np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        change = row[:-1] + (np.asarray(b) != x)
        best = np.minimum(row[1:] + 1, change)
        row = np.concatenate([[i], best])
        row = np.minimum.accumulate(row - np.arange(len(row))) + np.arange(len(row))
    return int(row[-1])


def spoken(worker: EvaluationWorker, student: SpeechLM | None, sentences: Sequence[Utterance]) -> list[dict[str, Any]]:
    """What is generated greedily and heard, in the order of ``sentences``."""
    with tempfile.TemporaryDirectory() as folder:
        if student is not None:
            student.save(Path(folder) / "student")
        rows: dict[str, dict[str, Any]] = {}
        for first in range(0, len(sentences), _SENTENCES_PER_BATCH):
            batch = tuple(sentences[first : first + _SENTENCES_PER_BATCH])
            model = None if student is None else Path(folder) / "student"
            made, _, _ = worker.run(Chunk("teacher" if student is None else "student", model, batch, frozenset()))
            rows |= {row["utterance_id"]: row for row in made}
    return [rows[sentence.utterance_id] for sentence in sentences]


def free_running_scores(
    teacher: Teacher,
    student: SpeechLM,
    sentences: Sequence[Utterance],
    by_teacher: Sequence[dict[str, Any]],
    by_student: Sequence[dict[str, Any]],
) -> dict[str, float]:
    """Scores on what teacher and student say without being led."""
    texts = [sentence.text_tokens.tolist() for sentence in sentences]
    own, led = ([row["speech_tokens"] for row in rows] for rows in (by_student, by_teacher))
    at_own, at_led = (positions(teacher, student, texts, speech) for speech in (own, led))
    distance = sum(edit_distance(a, b) for a, b in zip(own, led, strict=True)) / sum(map(len, led))
    said = [row["hypothesis"] for row in by_student]
    return {
        "KL on the teacher's own speech": float(torch.cat([p.kl_N for p in at_led]).mean()),
        "KL on the student's own speech": float(torch.cat([p.kl_N for p in at_own]).mean()),
        "teacher's CE of the student's own speech": float(torch.cat([p.teacher_ce_N for p in at_own]).mean()),
        "speech tokens unlike the teacher's (edit distance)": distance,
        "WER undistilled": word_error_rate([sentence.text for sentence in sentences], said).wer,
    }


def correlations(rows: Sequence[dict[str, Any]], names: Sequence[str], samples: int = 2_000) -> list[dict[str, Any]]:
    """Spearman of every score with the WER, by budget, and its difference to the probe's."""
    found = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        of_budget = [row for row in rows if row["budget"] == budget]
        values = {name: np.array([row[name] for row in of_budget]) for name in (*names, "WER")}
        rng, drawn = np.random.default_rng(0), []
        while len(drawn) < samples:
            sample = rng.integers(len(of_budget), size=len(of_budget))
            if all(np.ptp(column[sample]) > 0 for column in values.values()):
                drawn.append(sample)
        for name in names:
            value = float(spearmanr(values[name], values["WER"]).statistic)
            resampled = {
                score: np.array([spearmanr(values[score][s], values["WER"][s]).statistic for s in drawn])
                for score in {name, PROBE}
            }
            low, high = np.quantile(resampled[name], [0.025, 0.975])
            less, more = np.quantile(resampled[name] - resampled[PROBE], [0.025, 0.975])
            found.append(
                {"budget": budget, "score": name, "Spearman with WER": value, "95 % low": low, "95 % high": high}
                | {"difference low": less, "difference high": more}
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 layouts of each budget; nothing is written")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/proxy_quality_demo"), help="run folder, as of proxy_quality"
    )
    options = parser.parse_args()
    distilled = json.loads(RESULT.read_text())["rows"]
    num_sentences = 64
    if options.quick:
        distilled, num_sentences = [*distilled[:2], *distilled[-2:]], 4
    run = open_run(None, options.run, LONG_DEMO)
    config, session = run.config, start_session(run, ("cache", "align", "scores"), None)
    libraries = {}
    for name, factor in (("", 1), (", aligned 4 times as long", 1 if options.quick else 4)):
        longer = config.align.model_copy(update={"tokens": factor * config.align.tokens})
        own = dataclasses.replace(session, config=session.config.model_copy(update={"align": longer}))
        folder = make_library(own, *make_cache(own))
        assert folder is not None
        libraries[name] = load_library(folder, teacher_fingerprint=session.teacher.fingerprint)
    teacher = session.teacher
    validation = read_corpus(config.corpus.path, "validation")
    held_out = utterances(drawn(validation, config.corpus.seed, config.corpus.validation_tokens))
    texts, speech = [x.text_tokens.tolist() for x in held_out], [x.speech_tokens.tolist() for x in held_out]
    worker = EvaluationWorker(evaluation_settings(config, session.shared_teacher))
    by_teacher = spoken(worker, None, held_out[:num_sentences])
    rows = []
    with session.screen.phase("scores", f"{len(distilled)} layouts"):
        for done, known in enumerate(distilled):
            row = {name: known[name] for name in ("budget", "layout", "from", "WER", "final CE")}
            for name, mixers in libraries.items():
                student = make_student(teacher.model, known["layout"], "aligned", mixers).eval()
                scores = held_out_scores(positions(teacher, student, texts, speech), config.probe.validation_tokens)
                if name:
                    scores = {PROBE + name: scores["KL, all held-out tokens"]}
                else:
                    own_speech = spoken(worker, student, held_out[:num_sentences])
                    scores |= free_running_scores(teacher, student, held_out[:num_sentences], by_teacher, own_speech)
                row |= scores
            rows.append(row)
            session.screen.count(done + 1, len(distilled), "layouts")
    names = [name for name in rows[0] if name not in ("budget", "layout", "from", "WER")]
    found = correlations(rows, names)
    print_table(found)
    if not options.quick:
        write_result("probe_scores", found, layouts=rows, tokens=sum(map(len, speech)), sentences=num_sentences)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
