"""What a teacher cache's folder already holds of what is wanted: intact, missing, damaged and foreign shards."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mamtra_ray.errors import InputError
from mamtra_ray.teacher_cache.manifest import (
    CacheManifest,
    PlannedShard,
    Shard,
    damage_report,
    is_foreign,
    shard_problem,
    unlisted_shard,
)
from mamtra_ray.teacher_cache.storage import Storage

_OWN_NAME = re.compile(r"(train|validation)-\d{5,}\.parquet")


@dataclass(frozen=True)
class Inventory:
    """Shards by name.

    Attributes:
        intact: verified now, listed or not.
        missing: to be computed.
        problems: what is wrong with damaged and foreign files, as half sentences.
        obsolete: files to delete before the manifest becomes complete.
    """

    intact: Mapping[str, Shard]
    missing: Mapping[str, PlannedShard]
    problems: Mapping[str, str]
    obsolete: tuple[str, ...]


def take_inventory(storage: Storage, manifest: CacheManifest, wanted: Mapping[str, PlannedShard]) -> Inventory:
    """Verify every shard in the folder against the manifest and the plan.

    Shards that the manifest lists beyond ``wanted`` (a cache of more utterances) are kept. A shard that a
    stopped job wrote after its manifest was written is checked by its own metadata.
    """
    planned = dict(wanted)
    for name, shard in manifest.shards.items():
        if name not in planned or shard.utterances >= planned[name].utterances:
            planned[name] = _plan_of(shard)
    intact: dict[str, Shard] = {}
    problems: dict[str, str] = {}
    for name, shard in manifest.shards.items():
        # A split's last shard that has to grow is computed again, whatever state it is in.
        if planned[name] != _plan_of(shard):
            continue
        problem = shard_problem(storage, name, shard)
        if problem is None:
            intact[name] = shard
        else:
            problems[name] = problem
    obsolete = []
    for name in storage.names():
        if name in manifest.shards or not name.endswith(".parquet"):
            continue
        foreign = manifest.complete or not _OWN_NAME.fullmatch(name)
        if foreign:
            problems[name] = "is not in its manifest"
            obsolete.append(name)
        elif name not in planned:
            obsolete.append(name)
        elif (unlisted := unlisted_shard(storage, name, manifest.shards_made_by, planned[name])) is not None:
            intact[name] = unlisted
    missing = {name: part for name, part in planned.items() if name not in intact}
    return Inventory(intact, missing, problems, tuple(obsolete))


def check_unowned_folder(storage: Storage) -> None:
    """Before a first manifest is written: nothing here may be overwritten or deleted that no teacher cache wrote.

    Raises:
        InputError: names Parquet files of somebody else's.
    """
    foreign = [
        name
        for name in storage.names()
        if name.endswith(".parquet") and (not _OWN_NAME.fullmatch(name) or is_foreign(storage, name))
    ]
    if foreign:
        named = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise InputError(f"{storage} is no teacher cache but holds Parquet files ({named}): give another folder")


def opened(
    storage: Storage, manifest: CacheManifest, wanted: Mapping[str, PlannedShard], repair: bool
) -> tuple[CacheManifest, Mapping[str, PlannedShard]]:
    """The manifest of the intact shards, and the shards to be computed; foreign files are deleted on repair.

    Raises:
        InputError: damaged, missing or foreign shards, all named, without ``repair``.
    """
    inventory = take_inventory(storage, manifest, wanted)
    if inventory.problems and not repair:
        raise InputError(damage_report(storage, inventory.problems))
    for name in inventory.obsolete:
        storage.delete(name)
    complete = manifest.complete and not inventory.missing
    return dataclasses.replace(manifest, shards=dict(inventory.intact), complete=complete), inventory.missing


def _plan_of(part: PlannedShard) -> PlannedShard:
    return PlannedShard(part.split, part.first, part.utterances, part.speech_tokens)
