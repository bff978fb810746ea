"""The last choice as a race: further sentences go to the finalists that those heard so far do not tell apart.

After every round a finalist is out whose WER, on the sentences that both have said, is above the leader's with an
interval of the paired difference wholly above zero. The number of sentences doubles from round to round. What is left
when the budget is spent is not told apart by hearing, and the held-out CE chooses among it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from mamtra_ray.evaluate.results import Evaluation, compare

Hear = Callable[[Sequence[str], int], Mapping[str, Evaluation]]
"""Systems and a number of sentences -> their evaluations on so many of the first sentences."""


@dataclass(frozen=True)
class Race:
    """How it ended."""

    lost: Mapping[str, str]
    """Why, for every system that is out."""
    sentences: Mapping[str, int]
    """How many each has said, those before the race included."""


def run_race(
    groups: Sequence[Collection[str]],
    heard: Mapping[str, Evaluation],
    hear: Hear,
    most: int,
) -> Race:
    """Race the systems of every group against each other.

    Args:
        groups: systems that compete, such as the finalists of each ratio without an alarm.
        heard: what was heard of them before, on the same sentences.
        hear: lets systems say more.
        most: sentences that a system says at most, those before the race included.
    """
    evaluations = dict(heard)
    lost: dict[str, str] = {}
    while True:
        running = [[system for system in group if system not in lost] for group in groups]
        for group in running:
            lost |= _lost(group, evaluations)
        left = [[system for system in group if system not in lost] for group in running]
        again = [system for group in left if len(group) > 1 for system in group]
        said = max((evaluations[system].sentences for system in again), default=most)
        if said >= most:
            break
        more = hear(again, min(2 * said, most))
        if all(more[system].sentences <= evaluations[system].sentences for system in again):
            break  # there are no further sentences
        evaluations |= more
    systems = [system for group in groups for system in group]
    return Race(lost, {system: evaluations[system].sentences for system in systems})


def _lost(group: Sequence[str], evaluations: Mapping[str, Evaluation]) -> dict[str, str]:
    if len(group) < 2:
        return {}
    leader = min(group, key=lambda system: (evaluations[system].wer.value, system))
    lost = {}
    for system in group:
        if system == leader:
            continue
        difference = compare(evaluations[system], evaluations[leader]).difference
        if difference.low > 0:
            words = f"{100 * difference.value:+.1f} points [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
            lost[system] = f"{words} of WER over {leader} on {evaluations[leader].sentences} sentences"
    return lost
