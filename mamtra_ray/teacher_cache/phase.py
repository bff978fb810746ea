"""The teacher cache as a phase of a run: once for all runs, then in the object store for all trials of this one."""

from __future__ import annotations

from mamtra_ray.artifacts import content_hash
from mamtra_ray.run.session import Session
from mamtra_ray.teacher_cache.batches import padding_waste
from mamtra_ray.teacher_cache.build import build_cache, cache_made_by
from mamtra_ray.teacher_cache.shared import SharedCache, share_cache


def cache_location(session: Session) -> str:
    """``cache.location``, or the folder named by the cache's identity beside the run folders."""
    config = session.config
    if config.cache.location is not None:
        return config.cache.location
    teacher = session.teacher
    made_by = cache_made_by(
        config.cache, teacher.fingerprint, session.corpus, seed=config.corpus.seed, longest=teacher.max_length
    )
    return str(session.shared / f"cache-{content_hash(made_by)}")


def make_cache(session: Session, *, repair: bool = False) -> tuple[SharedCache, SharedCache]:
    """The teacher's outputs of the train and validation splits."""
    config, folder = session.config, cache_location(session)
    with session.screen.phase("cache", f"the teacher's outputs, by Ray Data, into {folder}"):
        build_cache(
            config.cache,
            config.corpus.model_copy(update={"path": config.corpus_path}),
            folder,
            teacher=session.teacher,
            shared_teacher=session.shared_teacher,
            worker=session.worker,
            repair=repair,
            on_progress=lambda done, total: session.screen.count(done, total, "tokens"),
            on_note=lambda note: session.screen.say(f"    {note}"),
            on_activity=session.screen.now,
        )
        session.screen.now("reading the cache into the object store")
        train, validation = (
            share_cache(
                folder,
                teacher_fingerprint=session.teacher.fingerprint,
                corpus_hash=session.corpus.corpus_hash,
                split=split,
                max_tokens=limit,
            )
            for split, limit in (("train", config.corpus.train_tokens), ("validation", config.corpus.validation_tokens))
        )
        size = config.distill.tokens_per_batch
        waste = padding_waste(train, session.teacher.sequence, tokens_per_batch=size)
        session.screen.say(f"    {train.num_utterances:,} sequences, {waste:.1%} padding in {size:,}-token batches")
        session.screen.costs.add("cache", padding=f"{waste:.2%}")
    return train, validation
