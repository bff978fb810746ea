"""CosyVoice 2: its folder read, its sequences, and students written back for CosyVoice's own code."""

import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch
from made_run import finalist_row
from tiny_cosyvoice import CODES, LAYERS, TEXT, WIDTH, qwen, upstream_state, write_cosyvoice
from torch.nn.functional import embedding, linear
from transformers import Qwen2Config, Qwen2ForCausalLM

from mamtra_ray import teachers
from mamtra_ray.config import load_config, save_config
from mamtra_ray.errors import InputError
from mamtra_ray.export.__main__ import main
from mamtra_ray.layouts import Layout
from mamtra_ray.losses import IGNORE
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.run.names import CONFIG, FINALISTS, student_folder
from mamtra_ray.run.rows import FinalistRow, write_table
from mamtra_ray.speech_lm.generate import GREEDY, Sampling, generate
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import cosyvoice2_drop_in, load_teacher
from mamtra_ray.teachers.cosyvoice2 import (
    bistream_example,
    expected_shapes,
    sequence_of,
    vocabulary_of,
    write_folder,
)
from mamtra_ray.teachers.cosyvoice2_drop_in import HybridLM, repetition_aware

GUIDE = Path(__file__).parent.parent / "docs" / "cosyvoice2.md"
TEXT_TOKENS, SPEECH_TOKENS = [3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8]
EMPTY = torch.zeros(1, 0, dtype=torch.int32)


@pytest.fixture
def folder(tmp_path):
    return write_cosyvoice(tmp_path / "CosyVoice2-tiny", epoch=3, step=4000)


@pytest.fixture
def teacher(folder):
    return load_teacher("cosyvoice2", folder)


def upstream_logits(text, speech):
    """Upstream's forward pass by hand: own tables, transformers' Qwen2, own head."""
    model = qwen()
    state = upstream_state(model)
    embeds = [
        state["llm_embedding.weight"][:1],
        embedding(torch.tensor(text), state["llm.model.model.embed_tokens.weight"]),
        state["llm_embedding.weight"][1:],
        embedding(torch.tensor(speech, dtype=torch.int64), state["speech_embedding.weight"]),
    ]
    with torch.no_grad():
        hidden = model(inputs_embeds=torch.cat(embeds)[None], output_hidden_states=True).hidden_states[-1][0]
    return linear(hidden, state["llm_decoder.weight"], state["llm_decoder.bias"])


def test_teacher_equals_upstream(teacher):
    input_ids, labels = teacher.sequence.training_example(TEXT_TOKENS, SPEECH_TOKENS)
    assert labels.tolist() == [IGNORE] * 6 + SPEECH_TOKENS + [CODES]
    with torch.no_grad():
        logits = teacher.model(input_ids[None])[0]
    torch.testing.assert_close(logits, upstream_logits(TEXT_TOKENS, SPEECH_TOKENS), rtol=1e-4, atol=1e-5)
    assert teacher.tokens_per_second == 25 and teacher.length_bounds(TEXT_TOKENS) == (10, 100)
    assert teacher.model.vocabulary.stop_ids == (CODES, CODES + 1, CODES + 2)
    assert Sampling(**teacher.sampling) == Sampling(top_p=0.8, top_k=25, repetition_window=10)


def test_every_tensor_of_the_released_model_is_named():
    config = DecoderConfig(
        Layout("A" * 24), 151936, 896, 4864, 14, 2, 64, 1e-6, {"rope_type": "default", "rope_theta": 1e6}, 32768, True
    )
    shapes = expected_shapes(config, 6564)
    with torch.device("meta"):
        body = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=151936,
                hidden_size=896,
                intermediate_size=4864,
                num_hidden_layers=24,
                num_attention_heads=14,
                num_key_value_heads=2,
                tie_word_embeddings=True,
            )
        ).state_dict()
    # Upstream's class holds this model as llm.model beside two tables and a head with a bias.
    own = {name for name in shapes if not name.startswith("llm.model.")}
    assert own == {"llm_embedding.weight", "speech_embedding.weight", "llm_decoder.weight", "llm_decoder.bias"}
    expected = {f"llm.model.{name}": tuple(tensor.shape) for name, tensor in body.items()}
    assert {name: shape for name, shape in shapes.items() if name not in own} == expected
    assert (len(expected), len(shapes)) == (291, 295)
    # The unique parameters of the released model; its lm_head repeats the text table.
    lm_head = math.prod(shapes.pop("llm.model.lm_head.weight"))
    assert sum(math.prod(shape) for shape in shapes.values()) == 505_803_812
    assert lm_head == 151936 * 896
    assert vocabulary_of(151936, 6564).stop_ids == (6561, 6562, 6563)


def test_tiny_checkpoint_has_the_same_names():
    config = DecoderConfig(
        Layout("A" * LAYERS), TEXT, WIDTH, 48, 4, 2, 8, 1e-6, {"rope_type": "default", "rope_theta": 1e6}, 32, True
    )
    found = {name: tuple(tensor.shape) for name, tensor in upstream_state(qwen()).items()}
    assert found == expected_shapes(config, CODES + 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm.model.model.layers.2.self_attn.k_proj.bias": None}, "layers.2.self_attn.k_proj.bias is missing$"),
        ({"llm.model.lm_head.weight": None}, r"llm\.model\.lm_head\.weight is missing$"),
        ({"speaker.weight": torch.zeros(2)}, "speaker.weight is unknown$"),
        ({"llm_decoder.bias": torch.zeros(5)}, r"llm_decoder.bias has shape \(5,\), expected \(33,\)"),
        ({"llm_decoder.bias": None, "x": torch.zeros(1)}, r"llm_decoder.bias is missing \(and 1 more problems\)"),
        ({"speech_embedding.weight": None}, "no CosyVoice 2 LM"),
        ({"optimizer": "adam"}, "optimizer is no tensor"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named(folder, change, message):
    state = torch.load(folder / "llm.pt", weights_only=True) | change
    torch.save({name: value for name, value in state.items() if value is not None}, folder / "llm.pt")
    with pytest.raises(InputError, match=message):
        load_teacher("cosyvoice2", folder)


def test_damaged_and_missing_files(folder, tmp_path):
    with pytest.raises(InputError, match=r"llm\.pt is missing"):
        load_teacher("cosyvoice2", tmp_path)
    (folder / "llm.pt").write_bytes((folder / "llm.pt").read_bytes()[:1000])
    with pytest.raises(InputError, match="damaged"):
        load_teacher("cosyvoice2", folder)


def upstream_bistream(text, speech):
    """Upstream's block construction, literally: inputs as names, targets with -1."""
    inputs, targets = ["sos"], [-1]
    for j in range(math.ceil((len(text) + 1) / 5)):
        this_text, this_speech = text[j * 5 : (j + 1) * 5], speech[j * 15 : (j + 1) * 15]
        if len(this_text) == 5:
            assert len(this_speech) == 15
            targets += [-1] * 4 + this_speech + [CODES + 2]
            inputs += [("text", token) for token in this_text] + [("speech", token) for token in this_speech]
        else:
            targets += [-1] * len(this_text) + speech[j * 15 :] + [CODES]
            inputs += [("text", token) for token in this_text] + ["task"]
            inputs += [("speech", token) for token in speech[j * 15 :]]
    return inputs, targets


@pytest.mark.parametrize("num_text", [1, 4, 5, 7, 10, 12])
def test_bistream_sequence_equals_upstream(num_text):
    draw = random.Random(num_text)
    text = [draw.randrange(TEXT) for _ in range(num_text)]
    speech = [draw.randrange(CODES) for _ in range(3 * num_text + 1 + draw.randrange(20))]
    vocabulary = vocabulary_of(TEXT, CODES + 3)
    input_ids, labels = bistream_example(sequence_of(vocabulary), text, speech)
    inputs, targets = upstream_bistream(text, speech)
    ids = {"sos": vocabulary.control_offset, "task": vocabulary.control_offset + 1}
    offsets = {"text": 0, "speech": vocabulary.speech_offset}
    assert input_ids.tolist() == [ids[i] if isinstance(i, str) else offsets[i[0]] + i[1] for i in inputs]
    assert labels.tolist() == [IGNORE if target == -1 else target for target in targets]
    with pytest.raises(InputError, match="too few"):
        bistream_example(sequence_of(vocabulary), text, speech[: 3 * num_text])


def test_generation_with_a_prompt_equals_recomputing_everything(teacher):
    """Greedy decoding with the cache, one step at a time, against a full forward pass for every token."""
    prompt_text, prompt_speech = [7, 8], [1, 2, 3, 4]
    prompt = teacher.sequence.prompt(TEXT_TOKENS, prompt_text, prompt_speech)
    (result,) = generate(teacher.model, [prompt], [(6, 12)], GREEDY)
    expected = []
    while len(expected) < 12:
        logits = upstream_logits(prompt_text + TEXT_TOKENS, prompt_speech + expected)[-1].clone()
        if len(expected) < 6:
            logits[CODES:] = -math.inf
        token = int(logits.argmax())
        if token >= CODES:
            break
        expected.append(token)
    assert list(result.tokens) == expected and len(expected) >= 6


def test_an_all_attention_student_is_the_original_file(folder, teacher, tmp_path):
    student = make_student(teacher.model, "A" * LAYERS)
    write_folder(student, folder, tmp_path / "out")
    original = torch.load(folder / "llm.pt", weights_only=True)
    written = torch.load(tmp_path / "out" / "llm.pt", weights_only=True)
    assert list(written) == [name for name in original if name not in ("epoch", "step")]
    for name, tensor in written.items():
        assert tensor.dtype == original[name].dtype and torch.equal(tensor, original[name]), name
    assert (tmp_path / "out" / "campplus.onnx").read_bytes() == b"speaker encoder"
    assert (tmp_path / "out" / "cosyvoice2.yaml").read_text() == (folder / "cosyvoice2.yaml").read_text()
    assert load_teacher("cosyvoice2", tmp_path / "out").fingerprint == teacher.fingerprint
    for inside in (folder, folder / "student"):
        with pytest.raises(InputError, match="another one"):
            write_folder(student, folder, inside)


def test_a_folder_may_be_written_again_with_another_student(folder, teacher, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for layout in ("AMAM", "AAAA", "MMAA"):
        student = make_student(teacher.model, layout)
        write_folder(student, folder, tmp_path / "out")
        assert load_teacher("cosyvoice2", tmp_path / "out").fingerprint == student.fingerprint()
        is_hybrid = "HybridLM" in (tmp_path / "out" / "cosyvoice2.yaml").read_text()
        assert is_hybrid == (layout != "AAAA") == (tmp_path / "out" / "hybrid_llm.json").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    # Older copies of the released folder have their yaml under the first version's name, which upstream's class for
    # the second does not read.
    (folder / "cosyvoice2.yaml").rename(folder / "cosyvoice.yaml")
    write_folder(student, folder, tmp_path / "old")
    assert "HybridLM" in (tmp_path / "old" / "cosyvoice2.yaml").read_text()
    assert not (tmp_path / "old" / "cosyvoice.yaml").exists()


def test_half_precision_stays_half_precision(folder, tmp_path):
    state = torch.load(folder / "llm.pt", weights_only=True)
    halves = {name: value.half() for name, value in state.items() if isinstance(value, torch.Tensor)}
    torch.save(halves, folder / "llm.pt")
    write_folder(load_teacher("cosyvoice2", folder).model, folder, tmp_path / "out")
    written = torch.load(tmp_path / "out" / "llm.pt", weights_only=True)
    assert all(torch.equal(written[name], halves[name]) and written[name].dtype == torch.half for name in halves)


@pytest.fixture
def hybrid_folder(folder, teacher, tmp_path):
    write_folder(make_student(teacher.model, "AMAM"), folder, tmp_path / "hybrid")
    return tmp_path / "hybrid"


def test_a_hybrid_folder_loads_again_and_names_our_class(hybrid_folder, teacher):
    student = make_student(teacher.model, "AMAM")
    assert load_teacher("cosyvoice2", hybrid_folder).fingerprint == student.fingerprint()
    yaml = (hybrid_folder / "cosyvoice2.yaml").read_text()
    assert "mamtra_ray.teachers.cosyvoice2_drop_in.HybridLM" in yaml and "Qwen2LM" not in yaml
    assert "sampling: !name:cosyvoice.utils.common.ras_sampling" in yaml and "top_p: 0.7" in yaml
    assert yaml.startswith("# comments") and "flow: !new:cosyvoice.flow.flow.CausalMaskedDiffWithXvec" in yaml
    (hybrid_folder / "hybrid_llm.json").unlink()
    with pytest.raises(InputError, match="no CosyVoice 2 LM"):
        load_teacher("cosyvoice2", hybrid_folder)


def test_hyperpyyaml_builds_the_drop_in(hybrid_folder):
    """Upstream reads the yaml with hyperpyyaml and then loads ``llm.pt`` strictly into what it built."""
    hyperpyyaml = pytest.importorskip("hyperpyyaml")
    text = (hybrid_folder / "cosyvoice2.yaml").read_text()
    own_part = text[text.index("qwen_pretrain_path") : text.index("    sampling:")]
    loaded = hyperpyyaml.load_hyperpyyaml(
        own_part, overrides={"qwen_pretrain_path": str(hybrid_folder / "CosyVoice-BlankEN")}
    )
    assert isinstance(loaded["llm"], HybridLM)
    loaded["llm"].load_state_dict(torch.load(hybrid_folder / "llm.pt", weights_only=True), strict=True)


def test_the_code_of_the_guide_speaks_through_cosyvoice(hybrid_folder, teacher, monkeypatch):
    """The guide's blocks, as they stand there, against CosyVoice's own loading and calls."""
    pytest.importorskip("hyperpyyaml")
    import upstream_cosyvoice

    saved = upstream_cosyvoice.installed(monkeypatch)
    # Imported anew, beside a CosyVoice, whose LM class it then inherits; afterward as before.
    monkeypatch.setattr(teachers, "cosyvoice2_drop_in", cosyvoice2_drop_in)
    monkeypatch.delitem(sys.modules, "mamtra_ray.teachers.cosyvoice2_drop_in")
    monkeypatch.chdir(hybrid_folder.parent)
    hybrid_folder.rename("CosyVoice2-hybrid")
    whole, into_a_loaded_one = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    names: dict = {}
    exec(whole, names)
    prompt = teacher.sequence.prompt([5, 6], [4, 3, 6, 5], [1, 2, 3])  # lengths of the guide's words
    student = make_student(teacher.model, "AMAM")
    (expected,) = generate(student, [prompt], [(4, 40)], GREEDY)
    sound, rate = saved["hello_0.wav"]
    assert tuple(sound[0].tolist()) == expected.tokens and rate == 24_000 and len(expected.tokens) >= 4
    first = names["tts"].model.llm
    exec(into_a_loaded_one, names)
    second = names["tts"].model.llm
    assert second is not first and isinstance(second, upstream_cosyvoice.Qwen2LM)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    pieces = (piece for piece in ("a stream of", "words that", "comes"))
    (chunk,) = names["tts"].inference_zero_shot(pieces, "What the prompt says.", "prompt.wav")
    assert 0 < chunk["tts_speech"].shape[1] <= 6 * 20


def greedy(log_probabilities, decoded, _):
    return int(log_probabilities.argmax())


def tensors(tokens):
    return torch.tensor([tokens], dtype=torch.int32)


def drop_in(folder, sampling):
    lm = HybridLM(folder / "CosyVoice-BlankEN", sampling)
    lm.load_state_dict(torch.load(folder / "llm.pt", weights_only=True))
    return lm


def test_drop_in_speaks_like_batched_generation(hybrid_folder, teacher):
    student = make_student(teacher.model, "AMAM")
    prompt = teacher.sequence.prompt(TEXT_TOKENS, [7, 8], [1, 2, 3])
    (expected,) = generate(student, [prompt], [teacher.length_bounds(TEXT_TOKENS)], GREEDY)
    stream = drop_in(hybrid_folder, greedy).inference(
        tensors(TEXT_TOKENS), None, tensors([7, 8]), None, tensors([1, 2, 3]), None, None
    )
    assert tuple(stream) == expected.tokens
    assert [next(HybridLM.from_folder(hybrid_folder, "cpu").inference(
        tensors(TEXT_TOKENS), None, EMPTY, None, EMPTY, None, None)) for _ in range(2)]  # fmt: skip


@pytest.mark.parametrize("num_prompt_speech", [0, 8, 15])
def test_text_stream_follows_the_training_sequence(hybrid_folder, teacher, num_prompt_speech):
    """Teacher-forced: along the training sequence of what was spoken, each greedy choice is the streamed token."""

    def greedy_within_the_block(log_probabilities, decoded, _):
        log_probabilities[CODES + 2] = -math.inf
        return int(log_probabilities.argmax())

    lm = drop_in(hybrid_folder, greedy_within_the_block)
    text = [5, 4, 3, 2, 1, 0, 9, 8, 7, 6, 5, 4, 3]
    prompt_text, prompt_speech = ([1, 2, 3, 4, 6], list(range(num_prompt_speech))) if num_prompt_speech else ([], [])
    pieces = (tensors(text[index : index + 2]) for index in range(0, len(text), 2))
    spoken = list(lm.inference_bistream(pieces, tensors(prompt_text), None, tensors(prompt_speech), None, None))
    assert len(spoken) > 15
    all_text, all_speech = prompt_text + text, prompt_speech + spoken
    blocks = len(all_text) // 5
    input_ids, labels = bistream_example(teacher.sequence, all_text, all_speech)
    with torch.no_grad():
        logits = lm.model(input_ids[None])[0]
    logits[:, CODES + 1 :] = -math.inf
    final = len(labels) - (len(all_speech) - 15 * blocks) - 1
    logits[:final, CODES] = -math.inf
    checked = 0
    for position, label in enumerate(labels[:-1].tolist()):
        if label != IGNORE and label < CODES and position > num_prompt_speech + 6:
            assert int(logits[position].argmax()) == label, position
            checked += 1
    assert checked > 15


def test_repetition_aware_draws_what_is_likely_and_new():
    torch.manual_seed(0)
    log_probabilities = torch.tensor([0.9, 0.06, 0.04]).log()
    assert {repetition_aware(log_probabilities, [], 25) for _ in range(50)} == {0}
    assert {repetition_aware(log_probabilities, [2, 0, 1], 25) for _ in range(200)} == {1, 2}


def test_export_of_a_finalist(folder, teacher, tmp_path, capsys):
    run = tmp_path / "run"
    save_config(
        load_config(None, ["teacher.kind=cosyvoice2", f"teacher.path={folder}", f"corpus.path={tmp_path}"]),
        run / CONFIG,
    )
    write_table(run / FINALISTS, [finalist_row("AMAM")], FinalistRow)
    student = make_student(teacher.model, "AMAM")
    student.save(student_folder(run, "AMAM"))
    arguments = ["--run", str(run), "--layout", "AMAM", "--format", "cosyvoice2", "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert load_teacher("cosyvoice2", tmp_path / "out").fingerprint == student.fingerprint()
    save_config(load_config(), run / CONFIG)
    assert main(arguments) == 2
    assert "is 'demo'" in capsys.readouterr().err


@pytest.mark.gpu
def test_drop_in_on_a_gpu_says_the_same(hybrid_folder):
    arguments = tensors(TEXT_TOKENS), None, EMPTY, None, EMPTY, None, None
    speech = []
    for device in ("cpu", "cuda"):
        lm = HybridLM.from_folder(hybrid_folder, device)
        lm.sampling = greedy
        speech.append(list(lm.inference(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in arguments))))
    assert speech[0] == speech[1]
