"""Batches out of the object store: the right rows, every utterance once, the same for every process."""

import dataclasses
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from tiny_cache import cache_without_ray, random_rows, tiny_config
from tiny_models import SEQUENCE

from mamtra_ray.config import Config
from mamtra_ray.corpus.selection import drawn
from mamtra_ray.corpus.table import read_corpus, utterances
from mamtra_ray.errors import InputError
from mamtra_ray.losses import IGNORE, HiddenTargets, LossWeights, TopKTargets, distillation_loss
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teacher_cache.batches import _prefetched, batches, batches_holding, padding_waste, plan_epoch
from mamtra_ray.teacher_cache.manifest import CacheManifest, write_manifest
from mamtra_ray.teacher_cache.shared import SharedCache, share_cache
from mamtra_ray.teacher_cache.storage import Storage
from mamtra_ray.teachers import load_teacher

TESTS = Path(__file__).parent


def planned_cache(num_utterances: int = 400, num_blocks: int = 1, window_blocks: int = 1) -> SharedCache:
    """Lengths without content: enough to plan epochs. About as long as sentences of speech."""
    random = np.random.default_rng(0)
    return SharedCache(
        manifest=CacheManifest({}, 4, 8, True, {}),
        split="train",
        blocks=(None,) * num_blocks,
        block_of_row=np.sort(random.integers(0, num_blocks, num_utterances)).astype(np.int32),
        row_in_block=np.zeros(num_utterances, np.int32),
        num_text=random.integers(5, 30, num_utterances).astype(np.int32),
        num_speech=random.integers(40, 300, num_utterances).astype(np.int32),
        num_bytes=0,
        window_blocks=window_blocks,
        quantizer=None,
    )


def epoch(shared: SharedCache, **options: int) -> list[list[int]]:
    arguments = {"tokens_per_batch": 2_000, "seed": 0, "epoch": 0, **options}
    return [rows.tolist() for window in plan_epoch(shared, SEQUENCE, **arguments) for rows in window]


def sequence_lengths(shared: SharedCache) -> np.ndarray:
    return shared.num_text + shared.num_speech + len(SEQUENCE.prefix) + len(SEQUENCE.separator)


# -- the plan of an epoch ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_blocks", "window_blocks"), [(1, 1), (7, 7), (7, 2)])
def test_every_utterance_comes_once_in_batches_of_the_asked_size(num_blocks: int, window_blocks: int) -> None:
    shared = planned_cache(num_blocks=num_blocks, window_blocks=window_blocks)
    plan = epoch(shared)
    assert sorted(row for rows in plan for row in rows) == list(range(400))
    lengths = sequence_lengths(shared)
    assert max(lengths[rows].max() * len(rows) for rows in plan) <= 2_000


def test_padding_is_below_five_percent() -> None:
    shared = planned_cache(4_000)
    lengths = sequence_lengths(shared)
    plan = epoch(shared)
    waste = 1 - lengths.sum() / sum(lengths[rows].max() * len(rows) for rows in plan)
    assert waste < 0.05
    assert padding_waste(shared, SEQUENCE, tokens_per_batch=2_000) == pytest.approx(waste)


def test_an_utterance_longer_than_a_batch_is_a_batch_of_its_own() -> None:
    shared = planned_cache(20)
    assert sorted(epoch(shared, tokens_per_batch=10)) == [[row] for row in range(20)]


def test_same_seed_and_epoch_give_the_same_batches_and_others_do_not() -> None:
    shared = planned_cache()
    first = epoch(shared)
    assert epoch(shared) == first
    for other in ({"epoch": 1}, {"seed": 1}):
        changed = epoch(shared, **other)
        assert changed != first
        # Not only another order: other utterances share a batch.
        assert {frozenset(rows) for rows in changed} != {frozenset(rows) for rows in first}


def test_lengths_come_in_random_order() -> None:
    shared = planned_cache(2_000)
    longest = [int(sequence_lengths(shared)[rows].max()) for rows in epoch(shared)]
    correlation = np.corrcoef(np.arange(len(longest)), longest)[0, 1]
    assert abs(correlation) < 0.3


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_share_the_batches_of_one_process(world_size: int) -> None:
    shared = planned_cache(3_000, num_blocks=6, window_blocks=2)
    alone = epoch(shared)
    ranks = [epoch(shared, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [sorted(itertools.chain(*parts)) for parts in zip(*ranks, strict=True)] == [sorted(rows) for rows in alone]
    lengths = sequence_lengths(shared)
    work = np.array([[lengths[rows].max() if rows else 0 for rows in rank] for rank in ranks])
    full = [len(rows) >= world_size for rows in alone]
    assert (work.max(0) / work.clip(1).min(0))[full].mean() < 1.15


def test_a_batch_of_fewer_utterances_than_ranks_has_no_part_for_some() -> None:
    shared = planned_cache(2)
    ranks = [epoch(shared, tokens_per_batch=10_000, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(len(rank[0]) for rank in ranks) == [0, 0, 1, 1]


def test_how_many_batches_hold_so_many_tokens() -> None:
    shared = planned_cache()
    lengths, plan = sequence_lengths(shared), epoch(shared)
    for tokens in (1, 5_000, 50_000, 10**9):
        count = batches_holding(shared, SEQUENCE, tokens, tokens_per_batch=2_000, seed=0, epoch=0)
        held = [int(lengths[rows].sum()) for rows in plan]
        assert sum(held[: count - 1]) < tokens and (sum(held[:count]) >= tokens or count == len(plan))


def test_windows_use_few_blocks_at_a_time() -> None:
    shared = planned_cache(num_blocks=9, window_blocks=3)
    plan = plan_epoch(shared, SEQUENCE, tokens_per_batch=2_000, seed=0, epoch=0)
    used = [set(shared.block_of_row[np.concatenate(window)].tolist()) for window in plan]
    assert [len(blocks) for blocks in used] == [3, 3, 3]
    assert set.union(*used) == set(range(9))
    other = plan_epoch(shared, SEQUENCE, tokens_per_batch=2_000, seed=0, epoch=1)
    assert used != [set(shared.block_of_row[np.concatenate(window)].tolist()) for window in other]


# -- content -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Config, Path, CacheManifest]]:
    """Caches of the same teacher and corpus in two formats."""
    caches = {}
    for kind in ("hidden", "topk"):
        folder = tmp_path_factory.mktemp(kind)
        config = tiny_config(folder, format=kind, top_k=40)
        caches[kind] = (config, folder / "cache", cache_without_ray(config, folder / "cache"))
    return caches


def shared_of(made: dict, kind: str = "hidden", **options: object) -> SharedCache:
    _, folder, manifest = made[kind]
    return share_cache(
        folder, teacher_fingerprint=manifest.made_by["teacher"], corpus_hash=manifest.made_by["corpus"], **options
    )


def test_batches_are_the_padded_training_examples(ray_cluster: None, made: dict) -> None:
    config = made["hidden"][0]
    expected = {}
    for utterance in utterances(read_corpus(config.corpus.path, "train")):
        ids, labels = SEQUENCE.training_example(utterance.text_tokens.tolist(), utterance.speech_tokens.tolist())
        expected[tuple(ids.tolist())] = labels.tolist()
    shared = shared_of(made)
    assert shared.num_utterances == 40 and shared.labeled_positions == shared.speech_tokens + 40
    seen = []
    for batch in batches(shared, SEQUENCE, tokens_per_batch=150, seed=0, epoch=0):
        assert batch.input_ids_BL.dtype == batch.labels_BL.dtype == torch.int64
        assert batch.num_padded == batch.input_ids_BL.numel()
        assert batch.num_real == int(batch.attention_mask_BL.sum())
        assert batch.num_tokens == int((batch.labels_BL != IGNORE).sum()) == len(batch.teacher_targets.hidden_ND)
        for ids, mask, labels in zip(batch.input_ids_BL, batch.attention_mask_BL, batch.labels_BL, strict=True):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
            assert (ids[~mask] == 0).all() and (labels[~mask] == IGNORE).all()
            seen.append(tuple(ids[mask].tolist()))
            assert labels[mask].tolist() == expected[seen[-1]]
    assert sorted(seen) == sorted(expected)


def test_a_rank_without_a_part_computes_something_that_does_not_count(ray_cluster: None, made: dict) -> None:
    for kind in ("hidden", "topk"):
        shared = shared_of(made, kind, split="validation")
        options = {"tokens_per_batch": 40, "seed": 0, "epoch": 0, "world_size": 3}
        ranks = [list(batches(shared, SEQUENCE, rank=rank, **options)) for rank in range(3)]
        steps = list(zip(*ranks, strict=True))
        assert sum(batch.num_tokens for rank in ranks for batch in rank) == shared.labeled_positions
        assert any(batch.num_tokens == 0 for step in steps for batch in step)
        for step in steps:
            assert {batch.step_tokens for batch in step} == {sum(batch.num_tokens for batch in step)}
            assert all(torch.equal(batch.host_labels_BL, batch.labels_BL) for batch in step)
        for batch in (batch for step in steps for batch in step if batch.num_tokens == 0):
            assert len(batch.input_ids_BL) == 1 and not batch.attention_mask_BL.any()
            assert (batch.labels_BL == IGNORE).all()
            targets = batch.teacher_targets
            assert len(targets.hidden_ND if kind == "hidden" else targets.ids_NK) == 0


def test_skipping_batches_goes_on_exactly_there(ray_cluster: None, made: dict) -> None:
    shared = shared_of(made)
    options = {"tokens_per_batch": 150, "seed": 3, "epoch": 2, "rank": 1, "world_size": 2}
    whole = list(batches(shared, SEQUENCE, **options))
    for skip in (0, 1, len(whole) - 1, len(whole), len(whole) + 5):
        rest = list(batches(shared, SEQUENCE, skip_batches=skip, **options))
        assert [batch.step_tokens for batch in rest] == [batch.step_tokens for batch in whole[skip:]]
        assert len(rest) == max(0, len(whole) - skip)
        for one, two in zip(rest, whole[skip:], strict=True):
            assert torch.equal(one.input_ids_BL, two.input_ids_BL)
            assert torch.equal(one.teacher_targets.hidden_ND, two.teacher_targets.hidden_ND)


def test_token_limit_and_validation_split(ray_cluster: None, made: dict) -> None:
    config = made["hidden"][0]
    for split, limit in (("train", 333), ("train", 1), ("validation", None)):
        shared = shared_of(made, split=split, max_tokens=limit)
        rows = utterances(drawn(read_corpus(config.corpus.path, split), config.corpus.seed, limit))
        assert shared.num_speech.tolist() == [len(row.speech_tokens) for row in rows]
        assert shared.num_text.tolist() == [len(row.text_tokens) for row in rows]


def test_distilling_from_the_cache_is_distilling_with_the_teacher(ray_cluster: None, made: dict) -> None:
    """Step by step the same losses, with the teacher's rows from float16 storage or computed on the spot."""
    config = made["hidden"][0]
    teacher = load_teacher(config.teacher.kind, config.teacher.path).model
    shared = shared_of(made)
    losses: dict[str, list[list[float]]] = {}
    for source in ("cache", "online"):
        student = make_student(teacher, "AMAM")
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
        losses[source] = []
        for number in range(2):
            for batch in batches(shared, SEQUENCE, tokens_per_batch=150, seed=0, epoch=number):
                labeled_BL = batch.labels_BL != IGNORE
                targets = batch.teacher_targets
                if source == "online":
                    with torch.no_grad():
                        targets = HiddenTargets(teacher.hidden_states(batch.input_ids_BL)[labeled_BL])
                hidden_ND = student.hidden_states(batch.input_ids_BL)[labeled_BL]
                terms = distillation_loss(hidden_ND, student.head, batch.labels_BL[labeled_BL], targets, LossWeights())
                optimizer.zero_grad()
                terms.total.backward()
                optimizer.step()
                losses[source].append([float(terms.ce), float(terms.kl), float(terms.hidden)])
    cached, online = np.array(losses["cache"]), np.array(losses["online"])
    assert len(cached) > 10 and cached[-1].sum() < cached[0].sum()
    np.testing.assert_allclose(cached, online, rtol=2e-3)


def test_layers_that_the_cache_keeps(ray_cluster: None, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, layers=[3, 1])
    manifest = cache_without_ray(config, tmp_path / "cache")
    teacher = load_teacher(config.teacher.kind, config.teacher.path).model
    shared = shared_of({"layers": (config, tmp_path / "cache", manifest)}, "layers")
    for batch in batches(shared, SEQUENCE, tokens_per_batch=150, seed=0, epoch=0):
        labeled_BL = batch.labels_BL != IGNORE
        with torch.no_grad():
            hidden_BLD, outputs = teacher.hidden_states(batch.input_ids_BL, return_layers=True)
        assert set(batch.teacher_targets.layers_ND) == {1, 3}
        expected = {"final": hidden_BLD, 1: outputs[1], 3: outputs[3]}
        found = {"final": batch.teacher_targets.hidden_ND, **batch.teacher_targets.layers_ND}
        for level, values_BLD in expected.items():
            torch.testing.assert_close(found[level].float(), values_BLD[labeled_BL], atol=1e-3, rtol=1e-3)


def test_top_k_batches_hold_the_teachers_probabilities(ray_cluster: None, made: dict) -> None:
    config = made["topk"][0]
    teacher = load_teacher(config.teacher.kind, config.teacher.path).model
    batch = next(batches(shared_of(made, "topk"), SEQUENCE, tokens_per_batch=150, seed=0, epoch=0))
    assert isinstance(batch.teacher_targets, TopKTargets)
    with torch.no_grad():
        exact = teacher(batch.input_ids_BL)[batch.labels_BL != IGNORE].softmax(-1)
    kept = batch.teacher_targets.log_probs_NK.exp()
    torch.testing.assert_close(kept, exact.gather(1, batch.teacher_targets.ids_NK), atol=0.012, rtol=0)


# -- trust and sharing ---------------------------------------------------------------------------------------


def test_foreign_unfinished_and_damaged_caches_are_refused(ray_cluster: None, made: dict, tmp_path: Path) -> None:
    _, folder, manifest = made["hidden"]
    good = {"teacher_fingerprint": manifest.made_by["teacher"], "corpus_hash": manifest.made_by["corpus"]}
    with pytest.raises(InputError, match="another teacher"):
        share_cache(folder, **{**good, "teacher_fingerprint": "0"})
    with pytest.raises(InputError, match="another corpus"):
        share_cache(folder, **{**good, "corpus_hash": "0"})
    with pytest.raises(InputError, match="no split 'test'"):
        share_cache(folder, **good, split="test")
    with pytest.raises(InputError, match="does not exist: make the cache"):
        share_cache(tmp_path, **good)
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged = bytearray((tmp_path / "train-00002.parquet").read_bytes())
    damaged[1000] ^= 1
    (tmp_path / "train-00002.parquet").write_bytes(damaged)
    with pytest.raises(InputError, match=r"^teacher cache .*train-00002.parquet is damaged"):
        share_cache(tmp_path, **good)
    write_manifest(Storage.of(tmp_path), dataclasses.replace(manifest, complete=False))
    with pytest.raises(InputError, match="is not finished"):
        share_cache(tmp_path, **good)


def test_a_handle_is_small_and_works_in_another_process(ray_cluster: None, made: dict) -> None:
    shared = shared_of(made)
    # Ray sends a block of less than 100 kB along with its reference, so these tiny ones do not count.
    assert len(ray.cloudpickle.dumps(dataclasses.replace(shared, blocks=()))) < 5_000
    expected = [batch.labels_BL.tolist() for batch in batches(shared, SEQUENCE, tokens_per_batch=300, seed=1, epoch=0)]

    @ray.remote
    def labels(handle: SharedCache) -> list:
        return [batch.labels_BL.tolist() for batch in batches(handle, SEQUENCE, tokens_per_batch=300, seed=1, epoch=0)]

    assert ray.get(labels.remote(shared)) == expected


def test_prefetching_keeps_order_and_errors() -> None:
    assert list(_prefetched(iter(range(20)))) == list(range(20))

    def failing():
        yield 1
        raise InputError("broken")

    received = []
    with pytest.raises(InputError, match="broken"):
        for item in _prefetched(failing()):
            received.append(item)
    assert received == [1]
    endless = _prefetched(iter(int, 1))
    assert next(endless) == 0
    endless.close()


SMALL_STORE = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa, ray
from mamtra_ray.teacher_cache.manifest import *
from mamtra_ray.teacher_cache.storage import Storage
from mamtra_ray.teacher_cache.batches import _Column, batches
from mamtra_ray.teacher_cache.shared import share_cache
from tiny_models import SEQUENCE

WIDTH, ROWS, SHARDS = 512, 100, 16
storage = Storage.of(sys.argv[1])
made_by = {"teacher": "t", "tokenizer": "k", "corpus": "c", "format": {"kind": "hidden"}}
shards, random = {}, np.random.default_rng(0)
for number in range(SHARDS):
    rows = []
    for index in range(ROWS):
        speech = random.integers(0, 38, 60 + index % 40).astype("<i4")
        hidden = np.full((len(speech) + 1, WIDTH), number * ROWS + index, np.float16)
        rows.append({"utterance_id": f"{number}-{index}", "text_tokens": np.array([index % 30], "<i4").tobytes(),
                     "speech_tokens": speech.tobytes(), "num_text": 1, "num_speech": len(speech),
                     "hidden": hidden.tobytes()})
    plan = PlannedShard("train", number * ROWS, ROWS, sum(row["num_speech"] for row in rows))
    content = encode_shard(shard_table(rows, ["hidden"]), made_by, plan, "none")
    storage.write(plan.name(ROWS), content)
    shards[plan.name(ROWS)] = finished_shard(plan, content)
write_manifest(storage, CacheManifest(made_by, WIDTH, ROWS, True, shards))
ray.init(address="local", num_cpus=1, object_store_memory=80 << 20, include_dashboard=False, log_to_driver=False)
shared = share_cache(sys.argv[1], teacher_fingerprint="t", corpus_hash="c")
assert shared.num_bytes > 1.5 * (80 << 20), shared.num_bytes
assert 1 <= shared.window_blocks < len(shared.blocks)
one, two = (_Column(ray.get(shared.blocks[0])["hidden"]) for _ in range(2))
assert np.shares_memory(one.data, two.data) and not one.data.flags.writeable, "mapped, not copied"
del one, two
for epoch in range(2):
    seen = []
    for batch in batches(shared, SEQUENCE, tokens_per_batch=5_000, seed=0, epoch=epoch):
        values = batch.teacher_targets.hidden_ND
        assert (values == values[:, :1]).all()
        seen += values[:, 0].unique().tolist()
    assert sorted(seen) == list(range(SHARDS * ROWS)), len(seen)
print("all rows seen twice")
"""


@pytest.mark.slow
def test_data_larger_than_the_object_store(tmp_path: Path) -> None:
    """Nearly 130 MB through a store of 80 MB; also that processes map the blocks instead of copying them."""
    process = subprocess.run(
        [sys.executable, "-c", SMALL_STORE, str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
    )
    assert "all rows seen twice" in process.stdout, process.stdout + process.stderr


def test_rows_of_the_tiny_corpus_differ() -> None:
    """The tests above tell utterances apart by their ids."""
    assert len({tuple(row["text_tokens"] + row["speech_tokens"]) for row in random_rows()}) == 46
