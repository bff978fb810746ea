"""The search-space file: strict keys, overrides, ratios as people write them."""

from pathlib import Path

import pytest
from mamtra_ray.search.candidates import check_budgets

from mamtra_ray.config import Config, explain, load_config, save_config
from mamtra_ray.errors import InputError


def test_demo_file_holds_the_defaults():
    """An installed wheel has no search_spaces/ folder; it must run the same demo."""
    assert load_config(Path(__file__).parent.parent / "search_spaces" / "demo.yaml") == Config()


@pytest.mark.parametrize("space", sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml")), ids=str)
def test_every_shipped_search_space_is_valid(space):
    layers = {"demo": 12, "cosyvoice2": 24, "paper_grid": 24, "llasa_1b": 16}[space.stem]
    check_budgets(load_config(space).search, layers)


def test_overrides_win_and_survive_saving(tmp_path):
    config = load_config(None, ["search.ratios=1:1,1:3", "distill.learning_rate=1e-5", "search.keep_attention=0"])
    assert config.search.ratios == ("1:1", "1:3")
    assert config.distill.learning_rate == pytest.approx(1e-5)
    assert config.search.keep_attention == (0,)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_ratio_is_not_a_base_60_number(tmp_path):
    (tmp_path / "space.yaml").write_text("search:\n  ratios: [1:3]\n")
    assert load_config(tmp_path / "space.yaml").search.ratios == ("1:3",)


def test_hash_depends_on_the_named_sections_only():
    base, changed = load_config(None), load_config(None, ["distill.tokens=7"])
    assert base.hash_of("cache", "teacher") == changed.hash_of("cache", "teacher")
    assert base.hash_of("distill") != changed.hash_of("distill")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("search.trails=4", "did you mean 'trials'"),
        ("serch.trials=4", "did you mean 'search'"),
        ("search.strategies=frnt", "did you mean 'front'"),
        ("search.ratios=1-1", "whole numbers"),
        ("search.trials=-1", "greater than 0"),
        ("search.trials=many", "search.trials = 'many'"),
        ("search.rung_tokens=[4, 2]", "must ascend"),
        ("trials", "key=value"),
        ("name.x=3", "is no section"),
        ("search.trials=[", "no YAML"),
    ],
)
def test_bad_override_is_one_sentence(override, sentence):
    with pytest.raises(InputError) as caught:
        load_config(None, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_contradictory_layers():
    with pytest.raises(InputError, match="layer 3 stands in both"):
        load_config(None, ["search.keep_attention=[1, 3]", "search.always_mamba=[3]"])


@pytest.mark.parametrize("content", [None, "- a list\n", "a: [\n"])
def test_bad_file(tmp_path, content):
    path = tmp_path / "space.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"space\.yaml"):
        load_config(path)


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["distill.hidden_layers=3"], "layer 3, which cache.layers does not keep"),
        (["distill.hidden_layers=[]"], "at least 1"),
        (["distill.hidden_layers=first"], "embedding_levels"),
        (["cache.layers=-1"], "counted from 0"),
        (["cache.layers=2,2"], "different layers"),
        (["cache.layers=2", "cache.format=topk"], "cache.format hidden"),
    ],
)
def test_levels_of_the_embedding_loss_must_be_in_the_cache(overrides, problem):
    with pytest.raises(InputError, match=problem):
        load_config(None, overrides)
    config = load_config(None, ["cache.layers=3,5", "distill.hidden_layers=final,5"])
    assert config.cache.layers == (3, 5) and config.distill.hidden_layers == ("final", 5)


def test_every_key_is_explained():
    text = explain()
    assert "search.trials" not in text and "trials = " in text
    assert "None\n" not in text and ": None" not in text
