"""Scores of sound from optional packages: calls, checks, and what is refused instead of left out."""

import sys
import types

import numpy as np
import pytest
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor, WavLMConfig, WavLMForXVector

from mamtra_ray.errors import InputError
from mamtra_ray.speech.quality import METRICS, metric_from_name

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
            results.append({"key": name, "whisper_wer_equal": 2, "spk_similarity": np.float32(0.5), "ref_text": "x"})
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
    for package in ("resemblyzer", "speechmos", "utmos_pytorch", "versa"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "x").write_text("- {name: speaker}\n")
    for name in ("speaker_similarity", "dnsmos", f"utmos:{tmp_path / 'x'}", f"versa:{tmp_path / 'x'}"):
        with pytest.raises(InputError, match="install"):
            metric_from_name(name)
    with pytest.raises(InputError, match="did you mean 'utmos'"):
        metric_from_name("utmo")
    with pytest.raises(InputError, match="does not exist"):
        metric_from_name("utmos:/nowhere.pt")
    assert set(METRICS) == {"speaker_similarity", "utmos", "dnsmos", "versa"}
