"""The search-space file: strict keys, overrides, ratios as people write them, values that fit each other."""

from pathlib import Path

import pytest
import yaml

from mamtra_ray.config import Config, explain, load_config, save_config
from mamtra_ray.config.files import RENAMED, SHIPPED_SPACES
from mamtra_ray.config.sections import EvaluateConfig
from mamtra_ray.errors import InputError
from mamtra_ray.run.checks import search_space
from mamtra_ray.speech.quality import METRICS
from mamtra_ray.speech.wer import NORMALIZATIONS

SPACES = sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))

# What a shipped space leaves to the defaults. A key that appears here is one that somebody has thought about for that
# model: decide about a new one in the file, or add it here.
NEUTRAL = [
    *("seed", "context_length", "corpus.seed", "resources.cpus_per_worker", "resources.gpus_per_worker"),
    *(f"cache.{key}" for key in ("location", "top_k", "layers", "utterances_per_shard", "actors")),
    *("student.state_sharing", "align.precision", "probe.importance_sentences", "search.objectives"),
    *("evaluate.race_sentences", "search.loggers", "search.learning_rate", "search.tokens_per_batch"),
    *(f"search.{key}" for key in ("layouts", "sampler", "keep_attention", "always_mamba", "cost", "workers_per_trial")),
    "distill.pretrained_learning_rate_factor",
    *(f"distill.{key}" for key in ("warmup_fraction", "weight_decay", "max_grad_norm", "ce_weight", "kl_weight")),
    *("distill.hidden_weight", "distill.hidden_layers", "distill.kl_skew", "distill.fully_shard", "align.fully_shard"),
    "teacher.cpu_offload",
    *(f"distill.{key}" for key in ("micro_batch_tokens", "activation_checkpointing", "loss_chunk_tokens", "compile")),
    *("evaluate.language", "evaluate.metrics", "evaluate.audio_examples"),
    # How the teacher's own system samples.
    *("evaluate.temperature", "evaluate.top_p", "evaluate.top_k", "evaluate.repetition_aware"),
]
SET_BY_DEMO24 = ("evaluate.temperature", "distill.pretrained_learning_rate_factor", "search.learning_rate")
SET_BY_SMOLLM2 = (*("cache.utterances_per_shard", "distill.pretrained_learning_rate_factor", "search.learning_rate"),)
SET_BY_COSYVOICE2 = (
    *("search.objectives", "search.learning_rate", "search.tokens_per_batch"),
    "evaluate.race_sentences",
)
INHERITED = {
    "demo": [
        *(key for key in NEUTRAL if key not in ("evaluate.temperature", "distill.pretrained_learning_rate_factor")),
        *("teacher.path", "corpus.path", "cache.format", "cache.bits", "student.initialization", "align.workers"),
        *("search.finalists", "distill.precision", "evaluate.corpus", "evaluate.recognizer", "evaluate.codec"),
    ],
    "demo24": [
        *(key for key in NEUTRAL if key not in SET_BY_DEMO24),
        *("teacher.path", "corpus.path", "cache.format", "cache.bits", "student.initialization", "align.workers"),
        *("search.finalists", "distill.precision", "evaluate.corpus", "evaluate.recognizer", "evaluate.codec"),
    ],
    "cosyvoice2": [
        *(key for key in NEUTRAL if key not in SET_BY_COSYVOICE2),
        *("student.initialization", "evaluate.codec"),
    ],
    "llasa_1b": [
        *NEUTRAL,
        *("corpus.train_tokens", "student.initialization", "search.finalists"),
        "evaluate.corpus",
    ],
    "paper_grid": [
        *(key for key in NEUTRAL if key != "search.sampler"),
        *("search.finalists", "search.reduction_factor", "distill.precision"),
        *("probe.validation_tokens", "search.sentences", "evaluate.codec"),
    ],
    "smollm2": [
        *(key for key in NEUTRAL if key not in SET_BY_SMOLLM2),
        *("cache.format", "cache.bits", "student.initialization", "align.workers", "search.finalists"),
        *("search.sentences", "distill.workers", "distill.precision"),
        *(f"evaluate.{key}" for key in ("corpus", "recognizer", "codec", "normalization")),
    ],
}


def flat(content: dict, prefix: str = "") -> dict:
    values = {}
    for key, value in content.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


@pytest.mark.parametrize("space", SPACES, ids=lambda path: path.stem)
def test_every_shipped_search_space_is_valid_and_says_what_matters(space):
    layers = {"demo": 12, "demo24": 24, "cosyvoice2": 24, "paper_grid": 24, "llasa_1b": 16, "smollm2": 30}[space.stem]
    assert search_space(load_config(space), layers).num_layers == layers
    said = set(flat(yaml.safe_load(space.read_text())))
    inherited = [key for key in flat(Config().model_dump()) if key not in said]
    assert sorted(inherited) == sorted(set(INHERITED[space.stem]))


def test_a_real_teacher_inherits_no_number_of_the_demo():
    """All of the corpus, not its first nine speakers."""
    for name in ("cosyvoice2", "llasa_1b", "paper_grid"):
        config = load_config(name)
        assert config.corpus.train_tokens in (None, config.distill.tokens)
    assert Config().corpus.train_tokens is None and Config().evaluate.normalization != "demo"


def test_shipped_spaces_are_found_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("cosyvoice2").name == "cosyvoice2"
    assert load_config().name == "demo"
    with pytest.raises(InputError, match="did you mean 'cosyvoice2'"):
        load_config("cosyvoice")
    assert sorted(file.stem for file in SHIPPED_SPACES.glob("*.yaml")) == sorted(path.stem for path in SPACES)


def test_paths_mean_the_same_wherever_a_worker_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(
        None,
        [
            "teacher.path=models/mine",
            "corpus.path=~/corpus",
            "cache.location=cache",
            "evaluate.corpus=corpora/test",
            "evaluate.recognizer=whisper:models/whisper",
            "evaluate.metrics=speaker_similarity:models/wavlm,dnsmos",
            "evaluate.codec=codec",
        ],
    )
    assert config.teacher.path == str(tmp_path / "models/mine")
    assert config.corpus.path == str(Path("~/corpus").expanduser())
    assert config.cache.location == str(tmp_path / "cache")
    assert config.evaluate.corpus == str(tmp_path / "corpora/test")
    assert config.evaluate.recognizer == f"whisper:{tmp_path / 'models/whisper'}"
    assert config.evaluate.metrics == (f"speaker_similarity:{tmp_path / 'models/wavlm'}", "dnsmos")
    assert config.evaluate.codec == str(tmp_path / "codec")
    save_config(config, tmp_path / "config.yaml")
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(None, ["cache.location=s3://bucket/cache"]).cache.location == "s3://bucket/cache"


def test_overrides_win_and_survive_saving(tmp_path):
    config = load_config(None, ["search.ratios=1:1,1:3", "distill.learning_rate=1e-5", "search.keep_attention=0"])
    assert config.search.ratios == ("1:1", "1:3")
    assert config.distill.learning_rate == pytest.approx(1e-5)
    assert config.search.keep_attention == (0,)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    # Other readers know YAML 1.1, in which an unquoted 1:3 is the number 63.
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["search"]["ratios"] == ["1:1", "1:3"]


def test_a_ratio_is_not_a_base_60_number(tmp_path):
    (tmp_path / "space.yaml").write_text("search:\n  ratios: [1:3]\n")
    assert load_config(tmp_path / "space.yaml").search.ratios == ("1:3",)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("search.trails=4", "did you mean 'trials'"),
        ("serch.trials=4", "did you mean 'search'"),
        ("search.strategies=frnt", "did you mean 'front'"),
        ("search.ratios=1-1", "whole numbers"),
        ("search.layouts=AMXM", "A (attention) and M (mamba), not 'AMXM'"),
        ("search.layouts=AM,AM", "layouts has AM twice"),
        ("search.layouts=1", "search.layouts = 1"),
        ("search.ratios=2:2", "write 1:1"),
        ("search.ratios=1:1,6:6", "write 1:1"),
        ("search.ratios=' '", "at least 1"),
        ("search.ratios='²:¹'", "whole numbers"),
        ("search.ratios=1:1,1:1", "twice"),
        ("search.trials=-1", "greater than 0"),
        ("search.trials=many", "search.trials = 'many'"),
        ("search.trials=yes", "search.trials = 'yes'"),
        ("search.trials=true", "not true or false"),
        ("search.trials=1e18", "search.trials = 1e+18"),
        ("search.trials=!!int abc", "no YAML"),
        ("search.trials=!!float abc", "no YAML"),
        ("search.trials=!!bool maybe", "no YAML"),
        ("search.trials=2001-99-99", "no YAML"),
        ("search.trials=" + "[" * 5000, "no YAML"),
        ("search.rung_tokens=[40000, 20000]", "must ascend"),
        ("search.rung_tokens=[0]", "greater than 0"),
        ("search.rung_tokens=[8000, 8001]", "1 tokens apart, closer than one batch"),
        ("search.rung_tokens=[]", "at least 1"),
        ("distill.learning_rate=1e18", "less than or equal to 1"),
        ("distill.learning_rate=.inf", "finite"),
        ("distill.learning_rate=.nan", "finite"),
        ("distill.workers=501", "leaves a worker without a token"),
        ("search.tokens_per_batch=7000", "search.tokens_per_batch=7,000"),
        ("align.tokens_per_batch=0", "greater than 0"),
        ("seed=-1", "greater than or equal to 0"),
        ("seed=4294967296", "less than 4294967296"),
        ("context_length=100000000000000000000", "context_length"),
        ("cache.format=topk", "distill.hidden_weight=0"),
        ("evaluate.recognizer=whispr:x", "did you mean 'whisper'"),
        ("evaluate.recognizer=whisper", "whisper:FOLDER"),
        ("evaluate.language=Chinese", "evaluate.language = 'Chinese'"),
        ("evaluate.metrics=utmso", "did you mean 'utmos'"),
        ("evaluate.normalization=sed", "'seed'"),
        ("teacher.kind=llasa", "teacher.path"),
        ("teacher.path=' '", "a path is expected"),
        ("name=../other", "name of a folder"),
        ("trials", "key=value"),
        ("name.x=3", "is no section"),
        ("search.trials=[", "no YAML"),
        ("search=3", "must be a section"),
    ],
)
def test_bad_override_is_one_sentence(override, sentence):
    with pytest.raises(InputError) as caught:
        load_config(None, [override])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_teacher_of_ones_own_needs_a_corpus_of_ones_own():
    with pytest.raises(InputError, match=r"corpus\.path: it has no packaged corpus"):
        load_config(None, ["teacher.kind=huggingface", "teacher.path=models/mine"])


def test_contradictory_layers():
    with pytest.raises(InputError, match="layer 3 stands in both"):
        load_config(None, ["search.keep_attention=[1, 3]", "search.always_mamba=[3]"])


@pytest.mark.parametrize(
    "content", [None, "", "- a list\n", "a: [\n", "seed: 1\nseed: 2\n", "seed: !!int abc\n", "\x00"]
)
def test_bad_file(tmp_path, content):
    path = tmp_path / "space.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"space\.yaml") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["nul\0.yaml", "x" * 5000 + ".yaml", "/dev/null/space.yaml", ""])
def test_bad_file_name(name):
    with pytest.raises(InputError) as caught:
        load_config(name or " .yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_key_of_an_earlier_version_says_what_it_is_called_now(old, new):
    assert new in flat(Config().model_dump())
    with pytest.raises(InputError, match=f"{old} is called {new} since version"):
        load_config(None, [f"{old}=1"])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["distill.hidden_layers=3"], "layer 3, which cache.layers does not keep"),
        (["distill.hidden_layers=[]"], "at least 1"),
        (["distill.hidden_layers=first"], "hidden_layers"),
        (["cache.layers=-1"], "greater than or equal to 0"),
        (["cache.layers=2,2"], "different layers"),
        (["cache.layers=2", "cache.format=topk"], "cache.format hidden"),
    ],
)
def test_layers_of_the_embedding_loss_must_be_in_the_cache(overrides, problem):
    with pytest.raises(InputError, match=problem):
        load_config(None, overrides)
    config = load_config(None, ["cache.layers=3,5", "distill.hidden_layers=final,5"])
    assert config.cache.layers == (3, 5) and config.distill.hidden_layers == ("final", 5)


def test_names_that_are_checked_early_are_those_that_exist():
    """The configuration knows them without importing what they stand for."""
    assert set(EvaluateConfig.model_fields["normalization"].annotation.__args__) == set(NORMALIZATIONS)
    for name in METRICS:
        EvaluateConfig(metrics=(name,))


def test_every_key_is_explained():
    text = explain()
    lines = text.splitlines()
    keys = [key.split(".")[-1] for key in flat(Config().model_dump())]
    assert sum(" = " in line and line.rstrip().endswith(")") for line in lines) == len(keys)
    assert "None" not in text
    for said in (
        "format = hidden   (hidden | hidden_quantized | topk)",
        "trials = 32   (whole number > 0",
        "ratios = [1:1]   (list of: text at least 1)",
        "repetition_aware = none   (true or false or none)",
    ):
        assert said in text, said
