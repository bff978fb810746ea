"""Verb ``compare``: the students of several runs side by side, with paired tests over the same sentences."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mamtra_ray.errors import InputError, exit_code_2_on_input_error

if TYPE_CHECKING:
    from mamtra_ray.compare.heard import Heard, Pair


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.compare",
        description="Students of several runs side by side, with paired tests over the sentences that all said.",
    )
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run folder of search or distill, evaluated")
    parser.add_argument("--all", action="store_true", help="all finalists (default: each run's best and distilled one)")
    parser.add_argument("--json", action="store_true", help="rates and pairs as JSON instead of tables")
    options = parser.parse_args(arguments)
    if not options.runs:
        raise InputError("which runs? give at least one run folder, usually two or more")

    from mamtra_ray.compare.heard import heard_in, pairs_of
    from mamtra_ray.run.folder import read_runs

    heard = heard_in(read_runs(options.runs), all_finalists=options.all)
    pairs = pairs_of(heard)
    if options.json:
        print(json.dumps({"systems": [_content(one) for one in heard], "pairs": [_pair(one) for one in pairs]}))
        return 0
    print(f"{heard[0].evaluation.sentences} sentences, {heard[0].evaluation.normalization} normalization\n")
    print(_systems_table(heard))
    if pairs:
        print(f"\n{_pairs_table(pairs)}")
    if len(pairs) > 1:
        print(f"\n{len(pairs)} pairs: with 95 % intervals one in twenty is told apart by chance")
    for one in heard:
        if one.row is not None and one.row.alarm:
            print(f"alarm: {one.name} {one.row.alarm}")
    return 0


def _systems_table(heard: Sequence[Heard]) -> str:
    from mamtra_ray.runtime.progress import table

    rows = []
    for one in heard:
        paired = one.evaluation.difference_to_teacher
        rows.append(
            [
                one.run,
                one.system,
                one.row.layout.ratio if one.row else "",
                f"{one.row.tokens:,}" if one.row else "",
                f"{one.row.ce:.3f}" if one.row else "",
                f"{one.row.cache_bytes / 1e6:.2f}" if one.row else "",
                str(one.evaluation.wer),
                f"{one.evaluation.cer:.2%}",
                _difference(paired.difference) if paired else "",
            ]
        )
    return table(["run", "system", "ratio", "tokens", "CE", "cache MB", "WER [95 %]", "CER", "WER - teacher"], rows)


def _pairs_table(pairs: Sequence[Pair]) -> str:
    from mamtra_ray.runtime.progress import table

    rows = [
        [one.a.name, one.b.name, _difference(one.paired.difference), f"{one.paired.probability_a_not_worse:.0%}"]
        + [f"the first is {one.verdict}" if one.verdict != "not told apart" else one.verdict]
        for one in pairs
    ]
    return table(["first", "second", "WER first - second", "first not worse", "95 %"], rows)


def _difference(rate: Any) -> str:
    return f"{rate.value:+.2%} [{rate.low:+.2%}, {rate.high:+.2%}]"


def _content(one: Heard) -> dict[str, Any]:
    summary = one.evaluation.summary()
    scores = {key: summary[key] for key in ("wer", "cer", "sentences", "metrics", "difference_to_teacher")}
    return {"run": one.run, "system": one.system, "ce": one.row.ce if one.row else None, **scores}


def _pair(one: Pair) -> dict[str, Any]:
    difference = one.paired.difference
    return {
        "first": one.a.name,
        "second": one.b.name,
        "difference": [difference.value, difference.low, difference.high],
        "first_not_worse": one.paired.probability_a_not_worse,
        "verdict": one.verdict,
    }


if __name__ == "__main__":
    sys.exit(main())
