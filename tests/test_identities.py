"""An artifact's identity: what changes its bytes, and nothing else."""

from types import SimpleNamespace

import pytest

from mamtra_ray.align.alignment import library_made_by
from mamtra_ray.config import AlignConfig, CacheConfig, DistillConfig, StudentConfig
from mamtra_ray.corpus.table import CorpusIdentity
from mamtra_ray.distill.job import DistillData, student_made_by
from mamtra_ray.teacher_cache.build import cache_made_by


def shared(format_=None, speech_tokens=100, selection=0):
    """What identities read of a shared cache."""
    manifest = SimpleNamespace(made_by={"corpus": "c", "format": format_ or {"kind": "hidden"}, "selection": selection})
    return SimpleNamespace(manifest=manifest, speech_tokens=speech_tokens)


def made_by(config, teacher, corpus, seed=0, longest=None):
    return cache_made_by(config, teacher, corpus, seed=seed, longest=longest)


def cache(**settings):
    return made_by(CacheConfig(**settings), "teacher", CorpusIdentity("corpus", "tokenizer"))


@pytest.mark.parametrize(
    "settings", [{"actors": 3}, {"utterances_per_shard": 7}, {"top_k": 3}, {"bits": 5.0}, {"location": "/x"}]
)
def test_a_cache_is_the_same(settings):
    assert cache(**settings) == cache()


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({"format": "topk"}, {"top_k": 3}),
        ({"format": "hidden_quantized"}, {"bits": 5.0}),
        ({"format": "hidden"}, {"layers": (1,)}),
    ],
)
def test_a_cache_is_another_one(settings, more):
    assert cache(**settings) != cache(**settings, **more) != cache()
    assert cache() != made_by(CacheConfig(), "another teacher", CorpusIdentity("corpus", "tokenizer"))
    assert cache() != made_by(CacheConfig(), "teacher", CorpusIdentity("another corpus", "tokenizer"))
    assert cache() != made_by(CacheConfig(), "teacher", CorpusIdentity("corpus", "tokenizer"), seed=1)
    assert cache() != made_by(CacheConfig(), "teacher", CorpusIdentity("corpus", "tokenizer"), longest=64)


def library(config=None, sharing="per_query_head", data=None, seed=0):
    return library_made_by(config or AlignConfig(), sharing, "teacher", data or shared(), seed)


def test_a_mixer_library_depends_on_what_its_weights_depend_on():
    assert library(AlignConfig(workers=4)) == library(), "workers share a batch: equal but for rounding"
    assert library(data=shared({"kind": "topk", "top_k": 4})) == library(), (
        "alignment reads tokens, not the teacher's rows"
    )
    others = [
        library(AlignConfig(tokens=7)),
        library(AlignConfig(learning_rate=0.5)),
        library(sharing="per_kv_head"),
        library(data=shared(speech_tokens=7)),
        library(data=shared(selection=1)),
        library(seed=1),
    ]
    assert all(other != library() for other in others)


def student(settings=None, start=None, seed=0, train=None, made_by=None):
    data = DistillData(
        SimpleNamespace(fingerprint="t"), train or shared(), shared(), "folder", made_by or {"library": "a"}
    )
    return student_made_by(data, start or StudentConfig(), settings or DistillConfig(), seed)


def test_a_student_depends_on_what_its_weights_depend_on():
    same = [
        student(DistillConfig(workers=4)),
        student(DistillConfig(checkpoint_every_tokens=7)),
        # Rounding only.
        student(DistillConfig(micro_batch_tokens=100)),
        student(DistillConfig(micro_batch_tokens="auto")),
        student(DistillConfig(activation_checkpointing=True)),
        student(DistillConfig(loss_chunk_tokens=7)),
        student(DistillConfig(compile=True)),
        student(DistillConfig(fully_shard=True)),
        student(DistillConfig(tokens=7)),  # said beside it: trials and finalists end elsewhere
    ]
    assert all(one == student() for one in same)
    others = [
        student(DistillConfig(learning_rate=0.5)),
        student(DistillConfig(kl_weight=0.5)),
        student(DistillConfig(precision="bfloat16")),
        student(start=StudentConfig(state_sharing="per_kv_head")),
        student(seed=1),
        student(train=shared(speech_tokens=7)),
        student(train=shared({"kind": "topk", "top_k": 4})),
        student(made_by={"library": "b"}),
    ]
    assert all(one != student() for one in others)
    transferred = StudentConfig(initialization="transfer")
    assert student(start=transferred) == student(start=transferred, made_by={"library": "b"}), "no library is used"
