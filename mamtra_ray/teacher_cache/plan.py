"""What a teacher cache will hold, before it is made (``--dry-run``)."""

from __future__ import annotations

from mamtra_ray.config import Config
from mamtra_ray.corpus.table import first_rows_within, token_counts
from mamtra_ray.run.checks import CheckedInputs


def cache_plan(config: Config, inputs: CheckedInputs) -> str:
    """A sentence: positions, form, about how many bytes, where; and another one if utterances are too long."""
    cache, positions = config.cache, 0
    limits = ((inputs.train, config.corpus.train_tokens), (inputs.validation, config.corpus.validation_tokens))
    for table, limit in limits:
        counts = token_counts(table, "speech_tokens")
        counts = counts if limit is None else counts[: first_rows_within(counts, limit)]
        positions += int(counts.sum()) + len(counts)
    width = inputs.architecture.hidden_size
    bytes_per_token = {
        "hidden": 2 * width * (1 + len(cache.layers)),
        "topk": 3 * cache.top_k,
        "hidden_quantized": cache.bits / 8 * width,
    }[cache.format]
    where = cache.location or "shared/ beside the run folder"
    return (
        f"teacher {inputs.teacher.name} over {positions:,} positions, kept as {cache.format}: "
        f"about {positions * bytes_per_token / 1e6:,.1f} MB in {where}{left_out_note(inputs)}"
    )


def left_out_note(inputs: CheckedInputs) -> str:
    """What to say about utterances that are too long for the teacher, on a line of its own; empty without any."""
    if not inputs.left_out:
        return ""
    return f"\nleft out: {inputs.left_out:,} utterances longer than the teacher's {inputs.teacher.max_length:,} tokens"
