"""Scores of sound from optional packages: calls, checks, and what is refused instead of left out."""

import sys
import types
from typing import ClassVar

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

from mamtra_ray.config import sections
from mamtra_ray.corpus.table import read_corpus, utterances
from mamtra_ray.errors import InputError
from mamtra_ray.search.__main__ import main as search
from mamtra_ray.speech.demo_codec import load_codec
from mamtra_ray.speech.quality import METRICS, check_packages, metric_from_name

RATE = 16_000


def sound(seed, seconds=0.5, rate=RATE):
    return 0.1 * np.random.default_rng(seed).normal(size=int(rate * seconds)).astype(np.float32)


def module(name, **contents):
    made = types.ModuleType(name)
    vars(made).update(contents)
    return made


@pytest.fixture
def prompt(tmp_path):
    soundfile.write(tmp_path / "prompt.wav", sound(1), RATE, subtype="FLOAT")
    return tmp_path / "prompt.wav"


def test_speaker_similarity_of_transformers_model(tmp_path, prompt):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    head = {"tdnn_dim": (8, 8), "tdnn_kernel": (5, 3), "tdnn_dilation": (1, 1), "xvector_output_dim": 6}
    config = WavLMConfig(**sizes, **convolutions, **positions, **head)
    model = WavLMForXVector(config).eval()
    model.save_pretrained(tmp_path / "wavlm")
    extractor = Wav2Vec2FeatureExtractor()
    extractor.save_pretrained(tmp_path / "wavlm")
    metric = metric_from_name(f"speaker_similarity:{tmp_path / 'wavlm'}")
    scores = metric.score([sound(1), sound(2), sound(3)], RATE, ["a", "b", "c"], [prompt, prompt, None])
    assert scores[0]["speaker_similarity"] == pytest.approx(1, abs=1e-5) and scores[2] == {}
    with torch.no_grad():
        own, other = (
            model(**extractor(sound(seed), sampling_rate=RATE, return_tensors="pt")).embeddings[0] for seed in (2, 1)
        )
    assert scores[1]["speaker_similarity"] == pytest.approx(torch.cosine_similarity(own, other, dim=0).item(), abs=1e-5)


def test_speaker_similarity_of_resemblyzer(monkeypatch, prompt):
    class VoiceEncoder:
        def __init__(self, device, verbose):
            pass

        def embed_utterance(self, waveform):
            assert len(waveform) == RATE // 2
            return np.array([waveform.mean() * 100, 1.0])

    monkeypatch.setitem(sys.modules, "resemblyzer", module("resemblyzer", VoiceEncoder=VoiceEncoder))
    (score,) = metric_from_name("speaker_similarity").score([sound(1, rate=8_000)], 8_000, ["a"], [prompt])
    assert 0 < score["speaker_similarity"] <= 1


def test_utmos_refuses_weights_that_do_not_fit(monkeypatch, tmp_path):
    class Model(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)

    class Score:
        def __init__(self, path):
            self.path = path

        def score(self, waveform):
            assert waveform.shape == (RATE // 2,)
            return torch.tensor([4.25])

    package = module("utmos_pytorch.utmos_torch", UTMOSModel=Model, UTMOSScoreTorch=Score)
    monkeypatch.setitem(sys.modules, "utmos_pytorch", module("utmos_pytorch", utmos_torch=package))
    monkeypatch.setitem(sys.modules, "utmos_pytorch.utmos_torch", package)
    torch.save(Model().state_dict(), tmp_path / "good.pt")
    torch.save({"weight": torch.zeros(2, 2)}, tmp_path / "part.pt")
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    assert metric_from_name(f"utmos:{tmp_path / 'good.pt'}").score([sound(1)], RATE, ["a"], [None]) == [{"utmos": 4.25}]
    with pytest.raises(InputError, match="no UTMOS weights: bias is missing"):
        metric_from_name(f"utmos:{tmp_path / 'part.pt'}")
    with pytest.raises(InputError, match="damaged"):
        metric_from_name(f"utmos:{tmp_path / 'bad.pt'}")
    with pytest.raises(InputError, match="utmos:FILE"):
        metric_from_name("utmos")


class _Versa:
    """VERSA's scorer as far as it matters: it skips with a log line what does not work."""

    loads, returns = {"whisper_wer", "speaker"}, None
    found: ClassVar = {"whisper_wer_equal": 2, "spk_similarity": np.float32(0.5), "ref_text": "x"}

    class registry:  # noqa: N801 - an attribute of theirs
        @staticmethod
        def get_metadata(name):
            known = {"whisper_wer": False, "speaker": True, "pseudo_mos": False}
            return types.SimpleNamespace(requires_reference=known[name]) if name in known else None

    def load_metrics(self, wanted, use_gt, use_gt_text, use_gpu):
        return types.SimpleNamespace(metrics={entry["name"]: None for entry in wanted if entry["name"] in self.loads})

    def score_utterances(self, files, suite, gt_files, text_info, io):
        results = []
        for index, (name, path) in enumerate(files.items()):
            assert soundfile.info(path).samplerate == 24_000 and text_info[name] == f"text {index}"
            assert (gt_files is None) == ("speaker" not in suite.metrics)
            results.append({"key": name, **self.found})
        return self.returns(results) if self.returns else results


@pytest.fixture
def versa(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "versa", module("versa"))
    monkeypatch.setitem(sys.modules, "versa.scorer_shared", module("versa.scorer_shared", VersaScorer=_Versa))

    def load(yaml):
        (tmp_path / "score.yaml").write_text(yaml)
        return metric_from_name(f"versa:{tmp_path / 'score.yaml'}")

    return load


def test_versa_scores_every_utterance(versa, prompt):
    metric = versa("- {name: whisper_wer, model_tag: large-v3}\n- {name: speaker}\n")
    arguments = ([sound(1), sound(2)], 24_000, ["text 0", "text 1"])
    assert metric.score(*arguments, [prompt, prompt]) == [{"whisper_wer_equal": 2.0, "spk_similarity": 0.5}] * 2
    with pytest.raises(InputError, match="needs a prompt"):
        metric.score(*arguments, [prompt, None])
    assert metric.score([], 24_000, [], []) == []


def test_versas_counts_and_answers_are_numbers_and_its_texts_are_not(versa, monkeypatch):
    counts = {"insertions": 3, "deletions": np.int64(0), "words": torch.tensor(7), "frames": np.array([12], np.uint8)}
    answers = {"is_speech": True, "is_music": np.bool_(False)}
    rates = {"wer": 0.5, "similarity": np.float16(0.25), "loss": torch.tensor([1.5])}
    others = {"text": "x", "label": np.str_("3"), "none": None, "pitch": np.zeros(3), "spans": [1], "vad": {"start": 0}}
    monkeypatch.setattr(_Versa, "found", {**counts, **answers, **rates, **others, "curve": torch.zeros(2)})
    (score,) = versa("- {name: whisper_wer}\n").score([sound(1)], 24_000, ["text 0"], [None])
    assert score == {
        **{"insertions": 3.0, "deletions": 0.0, "words": 7.0, "frames": 12.0},
        **{"is_speech": 1.0, "is_music": 0.0},
        **{"wer": 0.5, "similarity": 0.25, "loss": 1.5},
    }
    assert all(type(value) is float for value in score.values())


def test_versa_may_not_leave_anything_out(versa, monkeypatch):
    with pytest.raises(InputError, match="did not load pseudo_mos"):
        versa("- {name: whisper_wer}\n- {name: pseudo_mos}\n")
    with pytest.raises(InputError, match="has no metric 'utmosv9'"):
        versa("- {name: utmosv9}\n")
    for yaml in ("name: speaker", "- speaker", "{"):
        with pytest.raises(InputError, match=r"must be a list|cannot be read"):
            versa(yaml)
    arguments = ([sound(1), sound(2)], 24_000, ["text 0", "text 1"], [None, None])
    for returns, message in {
        (lambda results: results[:1]): "left out 1 of 2",
        (lambda results: [results[0], {"key": results[1]["key"]}]): "gave no spk_similarity for the sentence 'text 1'",
        (lambda results: [{"key": result["key"]} for result in results]): "no number for any",
    }.items():
        monkeypatch.setattr(_Versa, "returns", staticmethod(returns))
        metric = versa("- {name: whisper_wer}\n")
        with pytest.raises(InputError, match=message):
            metric.score(*arguments)
    # Also alone, an utterance must have what the ones before it had.
    monkeypatch.setattr(_Versa, "returns", None)
    metric = versa("- {name: whisper_wer}\n")
    metric.score(*arguments)
    monkeypatch.setattr(_Versa, "returns", staticmethod(lambda results: [{"key": results[0]["key"], "utmos": 3.0}]))
    with pytest.raises(InputError, match="gave no spk_similarity for the sentence 'text 0'"):
        metric.score([sound(1)], 24_000, ["text 0"], [None])


def test_missing_packages_and_names(tmp_path, monkeypatch):
    for package in ("resemblyzer", "speechmos", "utmos_pytorch", "versa", "distillmos"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "x").write_text("- {name: speaker}\n")
    for name in ("speaker_similarity", "dnsmos", f"utmos:{tmp_path / 'x'}", f"versa:{tmp_path / 'x'}", "distillmos"):
        for refuses in (metric_from_name, check_packages):  # a run, and its dry run
            with pytest.raises(InputError, match="pip install"):
                refuses(name)
    check_packages(f"speaker_similarity:{tmp_path}")  # transformers does it
    with pytest.raises(InputError, match="did you mean 'utmos'"):
        metric_from_name("utmo")
    with pytest.raises(InputError, match="does not exist"):
        metric_from_name("utmos:/nowhere.pt")
    assert tuple(METRICS) == sections.METRICS, "what a setting may name"


def test_a_dry_run_names_the_command_that_installs(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "distillmos", None)
    arguments = ["--space", "demo", "--run", str(tmp_path / "run"), "--dry-run", "evaluate.metrics=distillmos"]
    assert search(arguments) == 2
    assert capsys.readouterr().err == (
        "error: evaluate.metrics=distillmos needs the package distillmos, which is not installed: "
        "pip install 'mamtra-ray[quality]'\n"
    )


def test_distillmos_hears_16_khz_one_utterance_at_a_time(monkeypatch):
    class Network(torch.nn.Module):
        def forward(self, sound_BL):
            assert not self.training and len(sound_BL) == 1 and sound_BL.dtype == torch.float32
            return 1 + sound_BL.shape[1] * torch.ones(1, 1) / RATE

    monkeypatch.setitem(sys.modules, "distillmos", module("distillmos", ConvTransformerSQAModel=Network))
    metric = metric_from_name("distillmos")
    for rate in (8_000, RATE, 24_000):
        scores = metric.score([sound(1, 1, rate), sound(2, 2.5, rate)], rate, ["a", "b"], [None, None])
        assert scores == [{"distillmos": 2.0}, {"distillmos": 3.5}]
    with pytest.raises(ValueError, match="no sound"):
        metric.score([np.zeros(RATE, np.float32)], RATE, ["a"], [None])


def test_distillmos_itself(capsys):
    """The package's own network and weights, called as its documentation does, on the demo's speech."""
    distillmos = pytest.importorskip("distillmos", reason="pip install 'mamtra-ray[quality]'", exc_type=ImportError)
    network = distillmos.ConvTransformerSQAModel().eval()
    capsys.readouterr()
    metric = metric_from_name("distillmos")
    assert capsys.readouterr().out == "", "standard output may be a sound's"
    codec, rows = load_codec(), utterances(read_corpus().slice(0, 8))
    spoken = np.concatenate([codec.decode(row.speech_tokens) for row in rows])
    noise = 0.1 * np.random.default_rng(0).normal(size=len(spoken)).astype(np.float32)
    assert len(spoken) > 10 * RATE
    # A part of a window, exactly one, and several that overlap.
    for samples in (RATE // 2, 122_880, 10 * RATE):
        clean, noisy = spoken[:samples], (spoken + noise)[:samples]
        (score,), (under_noise,) = (metric.score([sound], RATE, ["a"], [None]) for sound in (clean, noisy))
        with torch.no_grad():
            assert score["distillmos"] == pytest.approx(network(torch.from_numpy(clean)[None]).item(), abs=1e-5)
        assert 1 <= score["distillmos"] <= 5
        assert samples < 122_880 or under_noise["distillmos"] < score["distillmos"] - 0.1
    # The same sound at 48 kHz, by another resampling; read as 16 kHz it would be another voice.
    fast = scipy.signal.resample(spoken[:122_880], 3 * 122_880).astype(np.float32)
    (heard,), (slow,) = (metric.score([fast], rate, ["a"], [None]) for rate in (3 * RATE, RATE))
    (own,) = metric.score([spoken[:122_880]], RATE, ["a"], [None])
    assert abs(heard["distillmos"] - own["distillmos"]) < 0.1 < abs(slow["distillmos"] - own["distillmos"])
