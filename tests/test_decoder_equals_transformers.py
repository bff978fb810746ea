"""Our decoder against transformers' own Qwen2 and Llama, over 200 random small shapes."""

import itertools

import pytest
import torch
from random_decoders import MAX_POSITIONS, VOCABULARY, random_hybrid, random_pair
from transformers import AutoModelForCausalLM

from mamtra_ray.errors import InputError
from mamtra_ray.models.cache import DecoderCache
from mamtra_ray.models.granite import check_representable, write_granite

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


@pytest.mark.parametrize("seeds", GROUPS[::2], ids=str)
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


@pytest.mark.parametrize("seeds", GROUPS[::3], ids=str)
def test_cached_and_padded_hybrids(seeds):
    """No other library computes these: a hybrid's own full forward of each row alone is the measure."""
    for seed in seeds:
        hybrid, ids = random_hybrid(random_pair(seed, torch.float64), seed), ids_of(seed)
        embeds, lengths, position = hybrid.embed_tokens(ids), [LENGTH, 11, 4], torch.arange(LENGTH)
        expected = torch.cat([hybrid(row[None, :n])[0] for row, n in zip(embeds, lengths, strict=True)])
        mask, padded = torch.stack([position >= LENGTH - n for n in lengths]), torch.full_like(embeds, 3.0)
        padded[mask] = torch.cat([row[:n] for row, n in zip(embeds, lengths, strict=True)])
        for cuts in ([0, LENGTH], [0, 7, 8, LENGTH], list(range(LENGTH + 1))):
            cache = DecoderCache()
            parts = [hybrid(padded[:, a:b], mask[:, :b], cache) for a, b in itertools.pairwise(cuts)]
            difference = torch.cat(parts, 1)[mask] - expected
            assert difference.abs().max() <= 1e-9, f"seed {seed}, {len(cuts) - 1} parts"


def test_hybrids_equal_granite_moe_hybrid_through_the_export(tmp_path):
    compared = 0
    vocabulary = {"text_size": 20, "speech_size": 26, "control_size": 4, "eos_id": 25, "stop_ids": (25,)}
    for seed in range(200, 260):
        pair = random_pair(seed)
        hybrid, ids, folder = random_hybrid(pair, seed), ids_of(seed), tmp_path / str(seed)
        tensors = {f"body.{name}": tensor for name, tensor in hybrid.state_dict().items()}
        tensors["head.weight"] = pair.head_VD[20:46].clone()
        try:
            check_representable(hybrid.config)
        except InputError:
            with pytest.raises(InputError, match=r"do not make a multiple of the model width.*--format native"):
                write_granite(folder, hybrid.config, tensors, vocabulary)
            continue
        write_granite(folder, hybrid.config, tensors, vocabulary)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
        expected = hybrid(hybrid.embed_tokens(ids)) @ tensors["head.weight"].T
        found = theirs(ids, use_cache=False).logits[..., 20:46]
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), f"seed {seed}"
        compared += 1
    assert compared >= 30
