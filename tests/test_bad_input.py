"""Generated input: whatever is wrong with it is one sentence and exit code 2, and what a dry run accepts holds.

The generator always makes the same examples. What it once found stands in ``FOUND``, which every test run repeats.
"""

import contextlib
import functools
import io
import json
import math
import random
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_cache import random_rows
from tiny_models import transformers_model, write_folder

from mamtra_ray.config import Config, load_config, save_config
from mamtra_ray.corpus.__main__ import main as corpus
from mamtra_ray.corpus.table import read_corpus, utterances, write_corpus
from mamtra_ray.distill.__main__ import main as distill
from mamtra_ray.efficiency.__main__ import main as efficiency
from mamtra_ray.errors import InputError
from mamtra_ray.layouts.candidates import given_candidates
from mamtra_ray.run import checks
from mamtra_ray.search import plan
from mamtra_ray.search.__main__ import main as search
from mamtra_ray.speech_lm.sampling import sampling_of
from mamtra_ray.teacher_cache.formats import format_settings


def outcome(verb, arguments):
    """(exit code, stdout, stderr) of a verb in this process; any exception but argparse's end fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = verb([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            code = stop.code
            assert code == 2 and err.getvalue().startswith("usage:"), err.getvalue()
            return 2, out.getvalue(), err.getvalue().splitlines()[-1] + "\n"
    return code, out.getvalue(), err.getvalue()


def refused_or_accepted(verb, arguments):
    """Whether it was accepted; a refusal is one sentence."""
    code, _, err = outcome(verb, arguments)
    assert code in (0, 2), (arguments, code, err)
    if code == 2:
        assert err.count("\n") == 1 and len(err) < 1000 and err.isprintable() is not None, (arguments, err)
        assert "Traceback" not in err and ("error: " in err), (arguments, err)
    return code == 0


@pytest.fixture(scope="module", autouse=True)
def fast_dry_runs():
    """The demo's corpus is read once, and the machine is not measured."""
    with pytest.MonkeyPatch.context() as patch:
        read = functools.lru_cache(maxsize=4)(read_corpus)
        patch.setattr(checks, "read_corpus", lambda path=None: read(path) if path is None else read_corpus(path))
        patch.setattr(plan, "_matmul_flops_per_second", lambda: 1e9)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    write_folder(folder / "teacher", transformers_model())
    write_corpus(folder / "corpus.parquet", random_rows(), tokenizer="tiny", made_by={})
    return folder


def check_overrides(folder: Path, overrides: list[str]) -> None:
    """A search's dry run with these; where it accepts them, what the run does first with them."""
    if not refused_or_accepted(search, ["--run", folder / "run", "--dry-run", *overrides]):
        return
    config = load_config(None, overrides)
    save_config(config, folder / "config.yaml")
    assert load_config(folder / "config.yaml") == config, "a resumed run reads what the first session had"
    if config.teacher.path is not None or config.teacher.kind != "demo":
        return
    space = checks.search_space(config, 12)
    given = given_candidates(space, config.search.strategies, config.search.layouts)
    assert all(space.meets_constraints(candidate.layout) for candidate in given)
    sampling = sampling_of(config.evaluate, {})
    assert math.isfinite(sampling.temperature)
    assert json.dumps(format_settings(config.cache), allow_nan=False)
    assert json.dumps(config.model_dump(mode="json"), allow_nan=False)


FOUND = [
    ["search.trials=!!int abc"],
    ["search.ratios='²:¹'"],
    ["search.rung_tokens=[0]"],
    ["search.ratios=' '"],
    ["search.ratios=1:1,6:6"],
    ["distill.learning_rate=.inf"],
    ["distill.learning_rate=1e18"],
    ["seed=4294967296"],
    ["search.trials=yes"],
    ["cache.format=topk"],
    ["evaluate.recognizer=whispr"],
    ["evaluate.metrics=utmso"],
    ["evaluate.normalization=sed"],
    ["context_length=100000000000000000000"],
    ["distill.tokens_per_batch=1", "distill.workers=2"],
    ["search.layouts=AMAM"],
    ["search.layouts=AMAMAMAMAMAM"],
    ["teacher.kind=:"],
    ["teacher.kind=x:y", "teacher.path=/", "corpus.path=/"],
    ["corpus.path=\\0"],
    ["evaluate.codec=."],
    ["name='.'"],
]


@pytest.mark.parametrize("overrides", FOUND, ids=" ".join)
def test_what_was_found_once(overrides, tmp_path):
    check_overrides(tmp_path, overrides)


hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def examples(count):
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def flat(content, prefix=""):
    values = {}
    for key, value in content.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return values


KEYS = sorted(flat(Config().model_dump()))
# fmt: off
NUMBERS = [
    "0", "1", "-1", "2", "3", "1e-5", "0.5", "1e18", "1e308", ".inf", "-.inf", ".nan", "4294967296", "0x10", "1_0",
]
# fmt: on
# fmt: off
WORDS = [
    "''", "' '", "null", "~", "true", "no", "[]", "{}", "[0]", "[1, a]", "[[1]]", "{a: 1}", "!!int abc",
    "!!binary x", "2001-99-99", "12:30:45", "&a [*a]", "*b", "\\0", "a\\0b", "\ud800", "\u202e", "x" * 5000,
    "[" * 2000, "1:1", "1:3", "1:0", "0:1", "2:2", "1:1,1:3", "12:0", "\xb2:\xb9", "\u0661:\u0661", "1:1:1",
    "AMAMAMAMAMAM", "MAMAMAMAMAMA", "AAAAAAAAAAAA", "front", "back,front", "importance_wer", "importance_kl,back",
    "demo", "llasa", "huggingface", "causal_lm", "json:load", "/", ".", "..", "~", "/dev/null", "/etc/passwd",
    "s3://x/y", "http://[", "whisper:/", "faster-whisper:.", "versa:/x", "hidden", "topk", "hidden_quantized",
    "final", "final,3", "3,final", "0,1,2", "11", "12", "float32", "bfloat16", "transfer", "aligned", "xavier",
    "cosine", "grid", "random", "tpe", "per_kv_head", "auto", "seed", "whisper_en", "zh",
]
# fmt: on
VALUES = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(WORDS), st.text(max_size=8), st.integers().map(str))
OVERRIDES = st.lists(
    st.one_of(
        st.builds("{}={}".format, st.sampled_from(KEYS), VALUES),
        st.builds("{}={}".format, st.text(max_size=12), VALUES),
        st.text(max_size=20).filter(lambda text: not text.startswith("-")),
    ),
    min_size=1,
    max_size=3,
)


@pytest.mark.slow
def test_generated_overrides(tmp_path):
    @examples(500)
    @given(OVERRIDES)
    def check(overrides):
        check_overrides(tmp_path, overrides)

    check()


@pytest.mark.slow
def test_generated_search_spaces(tmp_path):
    keys = st.sampled_from(KEYS) | st.text(max_size=6)
    scalars = (
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(WORDS[:40])
    )
    values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(max_size=3), scalars, max_size=2)
    shipped = [path.read_bytes() for path in sorted((Path(__file__).parent.parent / "search_spaces").glob("*.yaml"))]

    @examples(250)
    @given(
        st.one_of(
            st.dictionaries(keys, values, max_size=4).map(lambda content: yaml.safe_dump(nested(content)).encode()),
            st.binary(max_size=60),
            st.builds(damaged, st.sampled_from(shipped), st.integers(0, 10**6), st.integers(0, 2)),
        )
    )
    def check(content):
        path = tmp_path / "space.yaml"
        path.write_bytes(content)
        refused_or_accepted(search, ["--space", path, "--run", tmp_path / "run", "--dry-run"])

    check()


def nested(content):
    """``{"a.b": 1}`` -> ``{"a": {"b": 1}}``."""
    tree = {}
    for key, value in content.items():
        first, separator, rest = key.partition(".")
        if separator and isinstance(tree.setdefault(first, {}), dict):
            tree[first][rest] = value
        elif not separator:
            tree[key] = value
    return tree


def damaged(content: bytes, seed: int, how: int) -> bytes:
    """Flip a few bits, cut the end off, or repeat a part."""
    draw = random.Random(seed)
    if how == 0:
        flipped = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        return bytes(flipped)
    cut = draw.randrange(len(content))
    return content[:cut] if how == 1 else content[:cut] + content[cut // 2 :]


@pytest.mark.slow
def test_generated_layouts(tmp_path):
    layouts = st.one_of(
        st.text("AM", max_size=14),
        st.text("AMam :1", max_size=14),
        st.builds("{}:{}".format, st.sampled_from(["back", "front", "middle", "importance_wer", "bck", ""]), VALUES),
        st.text(max_size=6),
    ).filter(lambda text: not text.startswith("-"))

    @examples(150)
    @given(layouts, st.integers(-2, 10**20))
    def check(layout, length):
        refused_or_accepted(distill, ["--run", tmp_path / "run", "--dry-run", f"--layout={layout}"])
        refused_or_accepted(efficiency, ["--system", "demo", f"--layout={layout}", f"--length={length}"])

    check()


@pytest.mark.slow
def test_generated_corpora(tmp_path):
    tokens = st.lists(st.integers(-2, 45) | st.floats() | st.none() | st.integers() | st.text(max_size=2), max_size=4)
    good = st.lists(st.integers(0, 40), min_size=1, max_size=5)
    columns = {
        "utterance_id": st.text(max_size=3) | st.none() | st.integers(),
        "text": st.text(max_size=4) | st.none() | st.binary(max_size=2),
        "text_tokens": good | tokens,
        "speech_tokens": good | tokens | st.none(),
        "split": st.sampled_from(["train", "validation", "test", "dev", "", None]),
    }
    more = {"prompt_speech_tokens": tokens | good, "speaker": st.text(max_size=2) | st.integers(), "speed": st.floats()}
    rows = st.lists(st.fixed_dictionaries(columns, optional=more), max_size=4)

    @examples(200)
    @given(rows)
    def check(content):
        path = tmp_path / "c.parquet"
        path.unlink(missing_ok=True)
        try:
            write_corpus(path, content, tokenizer="x", made_by={})
            found = utterances(read_corpus(path))
        except InputError as error:
            assert "\n" not in str(error)
            return
        for utterance, row in zip(found, content, strict=True):
            for name in ("text_tokens", "speech_tokens", "prompt_speech_tokens"):
                wanted, read = row.get(name), getattr(utterance, name)
                assert (read is None and wanted is None) or read.tolist() == wanted

    check()


@pytest.mark.slow
def test_generated_damage_of_teachers_and_corpora(place, tmp_path):
    files = ["teacher/config.json", "teacher/speech_lm.json", "teacher/model.safetensors", "corpus.parquet"]

    @examples(200)
    @given(st.sampled_from(files), st.integers(0, 10**6), st.integers(0, 2))
    def check(name, seed, how):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(place, tmp_path / "copy")
        path = tmp_path / "copy" / name
        path.write_bytes(damaged(path.read_bytes(), seed, how))
        teacher = ["teacher.kind=huggingface", f"teacher.path={tmp_path / 'copy' / 'teacher'}"]
        refused_or_accepted(corpus, ["check", tmp_path / "copy" / "corpus.parquet", *teacher])

    check()
