"""Our decoder against transformers' own Qwen2 and Llama, over 200 random small shapes."""

import itertools

import pytest
import torch
from random_decoders import MAX_POSITIONS, VOCABULARY, random_pair

from mamtra_ray.models.cache import DecoderCache

GROUPS = [range(first, first + 20) for first in range(0, 200, 20)]
LENGTH = 19


def ids_of(seed, rows=3, length=LENGTH):
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("seeds", GROUPS, ids=str)
def test_full_forward(seeds):
    for seed in seeds:
        ids = ids_of(seed, length=LENGTH if seed % 2 else MAX_POSITIONS + 5)  # beyond it "dynamic" stretches
        single = random_pair(seed)
        hidden = single.ours(single.ours.embed_tokens(ids))
        assert torch.equal(hidden @ single.head_VD.T, single.theirs(ids).logits), f"float32, seed {seed}"
        double = random_pair(seed, torch.float64)
        difference = double.ours(double.ours.embed_tokens(ids)) - double.theirs.model(ids).last_hidden_state
        assert difference.abs().max() <= 1e-12, f"float64, seed {seed}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    for seed in range(40):
        pair, ids = random_pair(seed, dtype), ids_of(seed)
        found, expected = pair.ours(pair.ours.embed_tokens(ids)), pair.theirs.model(ids).last_hidden_state
        assert torch.equal(found, expected), f"seed {seed}"


@pytest.mark.parametrize("seeds", GROUPS, ids=str)
def test_padded_and_cached(seeds):
    """Padding on either side, the whole prompt at once, in two parts, and one position at a time."""
    for seed in seeds:
        pair, ids = random_pair(seed, torch.float64), ids_of(seed)
        embeds = pair.ours.embed_tokens(ids)
        lengths = [LENGTH, 11, 4]
        expected = [pair.theirs.model(row[None, :n]).last_hidden_state[0] for row, n in zip(ids, lengths, strict=True)]
        for side in ("left", "right"):
            position = torch.arange(LENGTH)
            real = [position < n if side == "right" else position >= LENGTH - n for n in lengths]
            mask, padded = torch.stack(real), torch.full_like(embeds, 3.0)
            padded[mask] = torch.cat([row[:n] for row, n in zip(embeds, lengths, strict=True)])
            for cuts in ([0, LENGTH], [0, 7, LENGTH], list(range(LENGTH + 1))):
                cache = DecoderCache()
                parts = [pair.ours(padded[:, a:b], mask[:, :b], cache) for a, b in itertools.pairwise(cuts)]
                difference = torch.cat(parts, 1)[mask] - torch.cat(expected)
                assert difference.abs().max() <= 1e-10, f"seed {seed}, {side}, {len(cuts) - 1} parts"
