"""``distill.learning_rate`` or ``search.learning_rate: auto``: the best rate of some short trainings of one layout.

Rates stand half a decade apart. Three are tried first; while the best one is the lowest or the highest of those tried,
the next one beyond it is. The score is Eq. 5 on the validation split, without its embedding loss: CE and KL with the
weights of the training. A rate at which the training diverges has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import ray

from mamtra_ray.artifacts import read_manifest_of, write_manifest
from mamtra_ray.config import DistillConfig
from mamtra_ray.distill.job import DistillData, DistillJob, student_made_by
from mamtra_ray.distill.workers import distill
from mamtra_ray.errors import DivergedError, InputError
from mamtra_ray.layouts import Layout
from mamtra_ray.run.session import Session
from mamtra_ray.runtime.actor_pool import result_of
from mamtra_ray.runtime.device import device_of_this_process
from mamtra_ray.runtime.progress import table

FILE = "learning_rate.json"
FIRST_RATES = (-9, -8, -7)
"""In half decades: 3.2e-5, 1e-4 and 3.2e-4."""
LOWEST, HIGHEST = -12, -4
"""1e-6 and 1e-2: nothing beyond is tried."""
_KIND, _SCHEMA_VERSION = "learning rate", 1


@dataclass(frozen=True)
class RateScore:
    """Held-out scores of one short training, nats per token; None where it diverged."""

    half_decades: int
    """The rate is 10 to the power of half of this."""
    ce: float | None
    kl: float | None
    ce_start: float | None
    kl_start: float | None
    seconds: float

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        return rate_of(self.half_decades)


def rate_of(half_decades: int) -> float:
    """Half decades as a learning rate of two digits: -7 -> 3.2e-4."""
    return float(f"{10 ** (half_decades / 2):.1e}")


def objective(settings: DistillConfig, ce: float | None, kl: float | None) -> float:
    """What a rate is judged by: lower is better; infinite for a training that diverged."""
    if ce is None or kl is None or not (math.isfinite(ce) and math.isfinite(kl)):
        return math.inf
    # With neither term (the embedding loss alone, Table 4) CE still says whether the student got better.
    return settings.ce_weight * ce + settings.kl_weight * kl if settings.ce_weight or settings.kl_weight else ce


def next_rates(values: Mapping[int, float]) -> list[int]:
    """Which rates to try next, in half decades; none once the best one has a worse one on either side.

    Args:
        values: the objective by half decades, of all that were tried.
    """
    if missing := [rate for rate in FIRST_RATES if rate not in values]:
        return missing
    best = min(values, key=lambda rate: (values[rate], rate))
    if not math.isfinite(values[best]):
        beyond = min(values) - 1
    elif best == min(values):
        beyond = best - 1
    elif best == max(values):
        beyond = best + 1
    else:
        return []
    return [beyond] if LOWEST <= beyond <= HIGHEST else []


@ray.remote(max_retries=2)
def _score_of_rate(job: DistillJob, half_decades: int) -> RateScore:
    settings = job.settings.model_copy(update={"learning_rate": rate_of(half_decades)})
    device = device_of_this_process()
    try:
        *_, (report, _) = distill(replace(job, settings=settings), device)
    except DivergedError:
        return RateScore(half_decades, None, None, None, None, 0.0)
    return RateScore(half_decades, report.ce, report.kl, report.ce_start, report.kl_start, report.seconds)


def with_learning_rate(session: Session, data: DistillData, layout: Layout) -> Session:
    """The session with a number wherever a learning rate of the distillation is ``auto``; else the same one.

    What was tried is kept in the run folder, so a resumed run trains with the rate that it began with.

    Args:
        session: of the run.
        data: what trainings share.
        layout: is trained, up to the tokens of the first rung.

    Raises:
        InputError: the training diverged at every rate.
    """
    config, folder = session.config, session.folder
    if "auto" not in (config.distill.learning_rate, config.search.learning_rate):
        return session
    of_trials = config.distill_of_trials
    settings = of_trials if of_trials.learning_rate == "auto" else config.distill
    made_by = student_made_by(data, config.student, settings, config.seed)
    made_by |= {"tokens": str(config.search.rung_tokens[0])}
    scores = read_scores(folder, made_by)
    job = DistillJob(layout, settings, config.student, data, config.search.rung_tokens[:1], config.seed)
    values = {score.half_decades: objective(settings, score.ce, score.kl) for score in scores}
    with session.screen.phase("learning rate", f"{layout} for {config.search.rung_tokens[0]:,} tokens each"):
        while rates := next_rates(values):
            tried = ", ".join(f"{rate_of(rate):g}" for rate in rates)
            session.screen.now(f"training with the rates {tried}, each from the same start")
            # One that was stopped between two of these tries the missing ones only.
            running = [_score_of_rate.options(**session.worker.options()).remote(job, rate) for rate in rates]
            for task in running:
                score: RateScore = result_of(task)
                scores.append(score)
                values[score.half_decades] = objective(settings, score.ce, score.kl)
                write_scores(folder, made_by, layout, scores)
            session.screen.say(
                f"    {len(scores)} rates tried, best so far {rate_of(min(values, key=values.__getitem__)):g}"
            )
        best = chosen(settings, scores)
        key = "distill.learning_rate" if config.distill.learning_rate == "auto" else "search.learning_rate"
        session.screen.say("\n".join(report_lines(settings, scores, best, key)))
    measured = {
        name: section.model_copy(update={"learning_rate": best.rate})
        for name, section in (("distill", config.distill), ("search", config.search))
        if section.learning_rate == "auto"
    }
    return replace(session, config=config.model_copy(update=measured))


def chosen(settings: DistillConfig, scores: Sequence[RateScore]) -> RateScore:
    """The best rate.

    Raises:
        InputError: the training diverged at all of them.
    """
    best = min(scores, key=lambda score: (objective(settings, score.ce, score.kl), score.half_decades))
    if best.ce is None:
        rates = ", ".join(f"{score.rate:g}" for score in sorted(scores, key=lambda score: score.half_decades))
        raise InputError(f"learning_rate=auto: the training diverged at every rate tried ({rates})")
    return best


def report_lines(
    settings: DistillConfig, scores: Sequence[RateScore], best: RateScore, key: str = "distill.learning_rate"
) -> list[str]:
    """A table of what was tried, and what follows for the setting ``key``."""
    rows = [["start", f"{best.ce_start:.4f}", f"{best.kl_start:.4f}"]]
    for score in sorted(scores, key=lambda score: score.half_decades):
        diverged = score.ce is None or score.kl is None
        rows.append([f"{score.rate:g}", *(["diverged", ""] if diverged else [f"{score.ce:.4f}", f"{score.kl:.4f}"])])
    lines = [table(["learning rate", "CE", "KL"], rows), f"    {key}={best.rate:g}"]
    if objective(settings, best.ce, best.kl) > objective(settings, best.ce_start, best.kl_start):
        lines.append(
            "    warning: at every rate the student is worse than before its training; the first rung may be too "
            "short (search.rung_tokens) or the batches too large (distill.tokens_per_batch)"
        )
    return lines


def write_scores(folder: Path, made_by: Mapping[str, str], layout: Layout, scores: Sequence[RateScore]) -> None:
    """Write ``learning_rate.json``."""
    rows = [asdict(score) for score in scores]
    write_manifest(folder / FILE, _KIND, _SCHEMA_VERSION, made_by, layout=str(layout), scores=rows)


def read_scores(folder: Path, made_by: Mapping[str, str]) -> list[RateScore]:
    """What this run has tried so far with these settings.

    Raises:
        InputError: a damaged file.
    """
    path = folder / FILE
    manifest = read_manifest_of(path, _KIND, _SCHEMA_VERSION, made_by)
    if manifest is None:
        return []
    try:
        return [RateScore(**score) for score in manifest["scores"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} holds no scores of learning rates: {error}") from None
