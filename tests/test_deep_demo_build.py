"""The build of the deep demo teacher at its tiny scale, with stand-ins for the voice and for the recognizer."""

import copy
import dataclasses
import json

import pyarrow.parquet as pq
import pytest
import torch
from test_demo_build import OneSentence, beep, beep_ends

from mamtra_ray.artifacts import file_hash
from mamtra_ray.assets import demo_asset
from mamtra_ray.demo_assets import deep_stages
from mamtra_ray.demo_assets import language_model as demo_lm
from mamtra_ray.demo_assets.build import SCALES
from mamtra_ray.demo_assets.clauses import BANDS, Clause, Place, draw_clauses, join_clauses, joined_word_ends
from mamtra_ray.demo_assets.growing import grow
from mamtra_ray.demo_assets.joined_corpus import draw_joined, speak_clauses, timed_examples
from mamtra_ray.demo_assets.stages import build_all
from mamtra_ray.errors import InputError

SETTINGS = deep_stages.SCALES["tiny"]
COUNTS = {"train": SETTINGS.train, "validation": SETTINGS.validation, "test": SETTINGS.test}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo of the tiny scale, to grow the deep teacher from."""
    folder = tmp_path_factory.mktemp("demo")
    build_all(
        SCALES["tiny"], folder / "work", folder / "out", "beep", lambda: beep, lambda: beep_ends, 1, OneSentence()
    )
    return folder / "out"


def build(folder, demo, settings=SETTINGS):
    return deep_stages.build_deep(
        settings,
        folder / "work",
        folder / "out",
        "beep",
        lambda: beep,
        lambda: beep_ends,
        recognizer=OneSentence(),
        demo=demo,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory, demo):
    folder = tmp_path_factory.mktemp("deep")
    return folder, build(folder, demo)


def test_clauses_end_as_their_place_asks():
    assert Clause("and then open the window", Place.MIDDLE).spoken == "And then open the window,"
    assert Clause("open the window", Place.FIRST).spoken == "Open the window,"
    assert Clause("then open the window", Place.LAST).spoken == "Then open the window."


def test_no_two_splits_share_a_clause_and_the_first_clauses_stay():
    few, many = (draw_clauses({"train": count, "test": 50}, 3) for count in (100, 200))
    assert many["train"][:100] == few["train"]

    def without_connector(clause):
        words = clause.text.split()
        return tuple(words[sum(word in ("and", "then") for word in words[:2]) :])

    train, test = ({without_connector(clause) for clause in many[split]} for split in ("train", "test"))
    assert (len(train), len(test)) == (200, 50)
    assert not train & test


def test_sentences_have_the_lengths_of_their_bands_and_begin_and_end_properly():
    clauses = draw_clauses({"train": 400}, 5)["train"]
    sentences = join_clauses(clauses, dict.fromkeys(BANDS, 10), 0)
    assert len({sentence.text for sentence in sentences}) == 50
    for number, sentence in enumerate(sentences):
        assert len(sentence.text.split()) in BANDS[number // 10]
        assert len(set(sentence.clauses)) == len(sentence.clauses)
        places = [clauses[clause].place for clause in sentence.clauses]
        if len(places) == 1:
            assert places == [Place.WHOLE]
        else:
            assert (places[0], places[-1]) == (Place.FIRST, Place.LAST)
            assert set(places[1:-1]) <= {Place.MIDDLE}


def test_too_few_clauses_are_refused():
    with pytest.raises(InputError, match="20 clauses do not make 500 sentences of 1 to 9 words"):
        join_clauses(draw_clauses({"train": 20}, 5)["train"], {BANDS[0]: 500}, 0)


def test_the_full_build_has_its_sentences():
    settings = deep_stages.SCALES["full"]
    counts = {"train": settings.train, "validation": settings.validation, "test": settings.test}
    splits = draw_joined(counts, settings.seed)
    assert [len(split.texts) for split in splits.values()] == [sum(count.sentences) for count in counts.values()]
    assert len({text for split in splits.values() for text in split.texts}) == sum(
        sum(count.sentences) for count in counts.values()
    )
    lengths = [len(text.split()) for text in splits["test"].texts]
    assert [sum(length in band for length in lengths) for band in BANDS] == [200] * 5
    assert (min(lengths), max(lengths)) == (1, 62)


def test_joined_words_end_where_the_joined_sound_says(tmp_path, built):
    """Every word of the stand-in voice lasts 0.1 s, so word ends and tokens of a sentence are known beforehand."""
    joined = draw_joined(COUNTS, SETTINGS.seed)["train"]
    shards = speak_clauses("train", joined, built[0] / "work", "beep", lambda: beep, 1)
    ends = [beep_ends(clause.spoken) for clause in joined.clauses]
    (corpus,) = (built[0] / "work").glob("sentences-train-*.parquet")
    rows = timed_examples("train", joined, shards, ends, corpus)
    assert len(rows) == len(joined.sentences)
    for sentence, row in zip(joined.sentences, rows, strict=True):
        words = len(sentence.text.split())
        assert row.word_ends == pytest.approx([0.1 * (number + 1) for number in range(words)])
        # 1600 samples a word, a frame every 160 and one more at the end, 4 frames a token.
        assert [len(phase) for phase in row.phases] == [(10 * words + 1 - phase) // 4 for phase in range(4)]


def test_word_ends_are_shifted_by_the_clauses_before():
    assert joined_word_ends([[0.2, 0.5], [0.1], [0.3]], [0.6, 0.25, 1.0]) == pytest.approx([0.2, 0.5, 0.7, 1.15])


def test_a_grown_teacher_nearly_computes_what_the_trained_one_does():
    """A pair differs from its layer by how the first half changes what the second reads: by the square of its size."""
    shape = SCALES["tiny"].teacher
    sequence = demo_lm.sequence_format(32)
    trained = demo_lm.new_teacher(sequence, dataclasses.replace(shape, seed=4)).eval()
    input_ids = torch.randint(sequence.vocabulary.size, (2, 40))

    def hidden(model):
        with torch.inference_mode():
            return model.model(input_ids).last_hidden_state

    differences = []
    for scale in (0.2, 0.1):
        small = copy.deepcopy(trained)
        with torch.no_grad():
            for layer in small.model.layers:
                layer.self_attn.o_proj.weight *= scale
                layer.mlp.down_proj.weight *= scale
        grown = grow(small, sequence, dataclasses.replace(shape, num_layers=4)).eval()
        differences.append((hidden(grown) - hidden(small)).norm())
    assert differences[1] > 0
    assert differences[0] / differences[1] == pytest.approx(4, rel=0.15)


def test_a_longer_teacher_computes_what_the_trained_one_does():
    shape = SCALES["tiny"].teacher
    sequence = demo_lm.sequence_format(32)
    trained = demo_lm.new_teacher(sequence, dataclasses.replace(shape, seed=4)).eval()
    longer = grow(trained, sequence, dataclasses.replace(shape, max_length=512)).eval()
    input_ids = torch.randint(sequence.vocabulary.size, (2, 40))
    with torch.inference_mode():
        assert torch.equal(longer(input_ids).logits, trained(input_ids).logits)
    assert longer.generation_config.max_length == longer.config.max_position_embeddings == 512
    with pytest.raises(InputError, match="of 2 layers grows to 4, not to 6"):
        grow(trained, sequence, dataclasses.replace(shape, num_layers=6))


def test_constant_steps_lie_between_warm_up_and_fall():
    plain = dataclasses.replace(SCALES["tiny"].teacher, cycles=(100,))
    held = dataclasses.replace(plain, constant_steps=30)
    rates = [[demo_lm._schedule(step, settings) for step in range(1, settings.steps + 1)] for settings in (plain, held)]
    assert len(rates[1]) == 130
    assert rates[1] == rates[0][:4] + [1.0] * 30 + rates[0][4:]


def test_all_assets_are_there_and_fit_together(built):
    folder, measured = built
    out = folder / "out"
    names = json.loads((out / "manifest.json").read_text())["files"]
    assert {"corpus.parquet", "teacher/model.safetensors", "measured.json"} <= set(names)
    for name in names:
        assert demo_asset(name, out) == out / name
    rows = pq.read_table(out / "corpus.parquet").to_pylist()
    splits = [row["split"] for row in rows]
    assert [splits.count(split) for split in ("train", "validation", "test")] == [12, 4, 4]
    assert len({row["text"] for row in rows}) == len(rows)
    assert list(measured["bands"]) == ["1-9 words", "10-19 words", "20-29 words"]
    for band in measured["bands"].values():
        assert set(band["systems"]) == {"codec", "teacher greedy"}
        assert band["sentences"] == 1
    assert json.loads((out / "teacher" / "config.json").read_text())["num_hidden_layers"] == 4


def test_a_second_build_does_nothing_again(built, demo, monkeypatch):
    folder, measured = built
    monkeypatch.setattr(demo_lm, "speech_loss", None)
    monkeypatch.setattr(deep_stages, "speak_with_transformers", None)
    assert build(folder, demo)["bands"] == measured["bands"]


def test_a_stopped_build_goes_on_to_the_same_teacher(built, demo, tmp_path, monkeypatch):
    folder, _ = built
    real, calls = demo_lm.speech_loss, []

    def stop_in_the_second_training(*args):
        calls.append(args)
        # Six steps and the scoring of two checkpoints in the first training; the second stands at its fifth step.
        if len(calls) > 13:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(demo_lm, "speech_loss", stop_in_the_second_training)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, demo)
    steps = [torch.load(path, weights_only=True)["step"] for path in (tmp_path / "work").glob("training-*.pt")]
    assert sorted(steps) == [3, 6]
    monkeypatch.setattr(demo_lm, "speech_loss", real)
    build(tmp_path, demo)
    model = ("out", "teacher", "model.safetensors")
    assert file_hash(tmp_path.joinpath(*model)) == file_hash(folder.joinpath(*model))


def test_a_band_that_costs_too_many_words_stops_the_build(built, demo, tmp_path):
    import shutil

    class HearsCodecOnly(OneSentence):
        name = "hears codec only"
        calls = 0

        def transcribe(self, waveforms):
            self.calls += 1
            return ["open"] * len(waveforms) if self.calls == 1 else ["no " * 20] * len(waveforms)

    shutil.copytree(built[0] / "work", tmp_path / "work")
    with pytest.raises(InputError, match="gate 'teacher greedy - codec, 1-9 words' does not hold"):
        deep_stages.build_deep(
            dataclasses.replace(SETTINGS, gated=True),
            tmp_path / "work",
            tmp_path / "out",
            "beep",
            lambda: beep,
            lambda: beep_ends,
            recognizer=HearsCodecOnly(),
            demo=demo,
        )
    assert not (tmp_path / "out").exists()


def test_plan_names_what_is_found(built):
    lines = deep_stages.plan(built[0] / "work").splitlines()
    assert all(not line.endswith("nothing") for line in lines[1:])
