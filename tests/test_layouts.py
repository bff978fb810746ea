"""Layouts against the layer sets the paper's project page shows, and against direct definitions."""

import itertools

import pytest

from mamtra_ray.errors import InputError
from mamtra_ray.layouts import STRATEGIES, Layout, from_strategy, num_attention_layers


def test_string_round_trip_and_views():
    layout = Layout.from_string("AMMA")
    assert str(layout) == "AMMA"
    assert (layout.num_layers, layout.attention_layers, layout.mamba_layers) == (4, (0, 3), (1, 2))
    assert layout.ratio == "1:1"
    assert Layout.from_attention_layers([3, 0], 4) == layout
    assert hash(layout) == hash(Layout("AMMA"))
    with pytest.raises(AttributeError):
        layout.letters = "MMMM"


@pytest.mark.parametrize(
    ("letters", "ratio"), [("AAAA", "1:0"), ("MMMM", "0:1"), ("AMMM", "1:3"), ("AAMMAAMM", "1:1"), ("AAMMM", "2:3")]
)
def test_ratio(letters, ratio):
    assert Layout(letters).ratio == ratio


def test_the_papers_published_sets():
    assert from_strategy("block_beginning", 24, "1:1").attention_layers == tuple(range(0, 24, 2))
    assert from_strategy("block_beginning", 24, "1:3").attention_layers == (0, 4, 8, 12, 16, 20)
    importance = [0.0] * 24
    for rank, layer in enumerate((0, 16, 8, 11)):
        importance[layer] = 10.0 - rank
    assert from_strategy("importance", 24, "1:5", importance).attention_layers == (0, 8, 11, 16)
    assert from_strategy("importance", 24, "1:11", importance).attention_layers == (0, 16)


@pytest.mark.parametrize(
    ("strategy", "letters"),
    [
        ("block_beginning", "AMMMAMMM"),
        ("block_end", "MMMAMMMA"),
        ("front", "AAMMMMMM"),
        ("middle", "MMMAAMMM"),
        ("back", "MMMMMMAA"),
        ("sandwich", "AMMMMMMA"),
    ],
)
def test_strategies_place_attention_where_their_name_says(strategy, letters):
    assert str(from_strategy(strategy, 8, "1:3")) == letters


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_keeps_the_requested_number(strategy):
    for num_layers, ratio in itertools.product((12, 24), ("1:1", "1:2", "1:3", "1:5", "1:11", "2:1", "1:0", "0:1")):
        layout = from_strategy(strategy, num_layers, ratio, importance=range(num_layers))
        assert len(layout.attention_layers) == num_attention_layers(num_layers, ratio)
        assert layout.ratio == ratio


def test_importance_ties_keep_the_earlier_layer():
    assert str(from_strategy("importance", 4, "1:1", [1, 1, 1, 1])) == "AAMM"


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Layout("AXM"), "A (attention) and M (mamba)"),
        (lambda: Layout(""), "non-empty"),
        (lambda: from_strategy("frnt", 4, "1:1"), "did you mean 'front'"),
        (lambda: from_strategy("front", 16, "1:5"), "does not fit 16 layers"),
        (lambda: from_strategy("front", 4, "1-1"), "whole numbers"),
        (lambda: from_strategy("importance", 4, "1:1", [1.0]), "one score per layer"),
        (lambda: Layout.from_attention_layers([4], 4), "layer 4 does not exist"),
    ],
)
def test_bad_input_is_one_sentence(call, sentence):
    with pytest.raises(InputError) as caught:
        call()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
