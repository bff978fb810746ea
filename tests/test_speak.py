"""Text to sound: the same tokens and sound as generation and codec give, while it is spoken, in files and in a pipe."""

import re
import shlex
import struct
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from made_run import finalist_row

from mamtra_ray import efficiency
from mamtra_ray.artifacts import write_checked_json
from mamtra_ray.config import TeacherConfig, load_config, save_config
from mamtra_ray.corpus.table import write_corpus
from mamtra_ray.export.checkpoint import export_student
from mamtra_ray.layouts import Layout
from mamtra_ray.run.names import BEST, CONFIG, EXPORTED_LAYOUT, FINALISTS, distilled_student, student_folder
from mamtra_ray.run.rows import FinalistRow, write_table
from mamtra_ray.speak.__main__ import main as speak
from mamtra_ray.speak.models import Chosen
from mamtra_ray.speak.prompts import prompt_of_utterance
from mamtra_ray.speak.speaker import Speaker, Stack, load_speaker
from mamtra_ray.speak.threads import SMALL_MODEL, use_threads
from mamtra_ray.speech import tokenizer as tk
from mamtra_ray.speech.demo_codec import load_codec, mel_inverse
from mamtra_ray.speech.demo_stream import BLOCK_TOKENS, decode_stream, reach_of
from mamtra_ray.speech_lm.generate import Sampling, generate
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher
from mamtra_ray.teachers.demo import tokenize_text
from mamtra_ray.teachers.outline import architecture_of

TEXT = "open the letter behind the bridge on friday"
BEST_ONE, OTHER, DISTILLED = "AMAAAAAAAAAA", "AAAAAAMAAAAA", "AMAMAMAMAMAM"
README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def teacher():
    return load_teacher("demo")


@pytest.fixture(scope="module")
def stack():
    return Stack.of(load_config(None))


@pytest.fixture(scope="module")
def runs(teacher, tmp_path_factory):
    """A folder with ``runs/demo``: two finalists, the first one exported, and a student of ``distill``."""
    folder = tmp_path_factory.mktemp("place")
    run = folder / "runs" / "demo"
    run.mkdir(parents=True)
    save_config(load_config(None), run / CONFIG)
    for layout in (BEST_ONE, OTHER):
        make_student(teacher.model, layout).save(student_folder(run, layout))
    make_student(teacher.model, DISTILLED).save(distilled_student(run))
    rows = [finalist_row(OTHER, alarm="stops at once in 20 % of the sentences"), finalist_row(BEST_ONE)]
    write_table(run / FINALISTS, rows, FinalistRow)
    write_checked_json(run / BEST / EXPORTED_LAYOUT, {"kind": "layout", "schema_version": 1, "layout": BEST_ONE})
    return folder


@pytest.fixture
def place(runs, tmp_path, monkeypatch):
    """The working directory: ``runs`` is there, whatever is written is this test's."""
    (tmp_path / "runs").symlink_to(runs / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def samples_of(path):
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def expected_tokens(model, teacher, text, seed, sampling):
    ids = tokenize_text(text)
    bounds = teacher.length_bounds(ids)
    return generate(model, [teacher.sequence.prompt(ids)], [bounds], sampling, [seed])[0]


@pytest.mark.parametrize("temperature", ["0", "null"])
def test_a_sentence_is_what_generation_and_codec_give(teacher, temperature, monkeypatch):
    monkeypatch.setattr("mamtra_ray.speak.speaker.content_hash", lambda content: "0000002a")
    stack = Stack.of(load_config(None, [f"evaluate.temperature={temperature}"]))
    student = make_student(teacher.model, BEST_ONE).eval()
    speaker = Speaker("student", student, stack)
    sampling = Sampling(temperature=0.0 if temperature == "0" else 0.8, top_k=25, top_p=0.8)
    expected = expected_tokens(student, teacher, TEXT, 42, sampling)
    speech = speaker.say(TEXT)
    assert (speech.tokens, speech.stopped) == (expected.tokens, expected.stopped)
    assert len(speech.tokens) > 20 and speech.sample_rate == 16_000
    assert np.array_equal(speech.waveform, load_codec().decode(expected.tokens))
    streamed = speaker.stream(TEXT)
    waveforms = list(streamed)
    assert tuple(streamed.tokens) == expected.tokens and len(waveforms) > 1
    assert sum(map(len, waveforms)) == len(speech.waveform) == streamed.samples


def test_the_cache_is_the_one_of_the_closed_form_and_does_not_grow_in_mamba_layers(teacher, stack):
    architecture = architecture_of(teacher, "per_query_head")
    held = {}
    for letters in ("M" * 12, "AM" * 6, "A" * 12):
        student = make_student(teacher.model, letters).eval()
        for text in ("watch the camera", TEXT):
            speaking = Speaker(letters, student, stack).stream(text)
            for _ in speaking:
                pass
            held[letters, text] = speaking.cache_bytes
            closed = efficiency.cache_bytes(architecture, Layout(letters), speaking.positions)
            assert speaking.cache_bytes == closed
            assert speaking.positions >= len(speaking.tokens)
    short, long = (held["M" * 12, text] for text in ("watch the camera", TEXT))
    assert short == long
    assert held["AM" * 6, "watch the camera"] < held["AM" * 6, TEXT]


def test_a_stream_has_the_frames_of_the_whole_and_begins_before_the_end():
    codec, tokens = load_codec(), expected_speech()
    taken = []

    def coming():
        for token in tokens:
            taken.append(token)
            yield token

    stream = decode_stream(codec, coming())
    first = next(stream)
    assert len(taken) == BLOCK_TOKENS + reach_of(codec) < len(tokens)
    sound = np.concatenate([first, *stream])
    whole = codec.decode(tokens)
    assert len(sound) == len(whole) and np.abs(sound).max() <= 1
    magnitude_FT = (codec.decode_mel(tokens).exp() @ mel_inverse()).clamp_min(0).T

    def distance(waveform):
        """Of its spectrum from the frames, relative."""
        found_FT = tk.stft(torch.from_numpy(waveform)).abs()
        wanted_FT = magnitude_FT[:, : found_FT.shape[1]]
        return float((found_FT - wanted_FT).norm() / wanted_FT.norm())

    assert distance(sound) < 1.1 * distance(whole)
    # Of a sound that is no more than the right frames in the wrong places it is far away.
    assert distance(np.roll(sound, 4000)) > 3 * distance(whole)


def test_blocks_do_not_depend_on_what_comes_later_and_see_all_that_matters():
    codec, tokens = load_codec(), expected_speech()
    reach = reach_of(codec)
    one, other = decode_stream(codec, tokens), decode_stream(codec, [*tokens[: BLOCK_TOKENS + reach], *[7] * 30])
    assert np.array_equal(next(one), next(other))
    whole_TM = codec.decode_mel(tokens)

    def window(context):
        """Frames of tokens 30 to 40 from so many tokens to either side."""
        return codec.decode_mel(tokens[30 - context : 40 + context])[4 * context : 4 * context + 40]

    assert torch.allclose(window(reach), whole_TM[120:160], atol=1e-4)
    assert not torch.allclose(window(reach - 1), whole_TM[120:160], atol=1e-4)


def test_a_short_utterance_is_decoded_whole():
    codec, tokens = load_codec(), expected_speech()[:20]
    (sound,) = decode_stream(codec, tokens)
    assert np.array_equal(sound, codec.decode(tokens))


def expected_speech():
    """Speech tokens of the longest test sentence of the demo corpus."""
    from mamtra_ray.corpus.table import read_corpus

    return max(read_corpus(None, "test")["speech_tokens"].to_pylist(), key=len)


def test_teacher_and_found_layout_are_compared(place, capsys):
    (place / "text.txt").write_text(f"{TEXT}\n\nwatch the camera\n")
    arguments = ["--run", "runs/demo", "--compare", "--file", "text.txt", "--output", "out"]
    assert speak(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["teacher", BEST_ONE]
    stack = Stack.of(load_config(None))
    for line, chosen in zip(lines[2:], ("teacher", BEST_ONE), strict=True):
        folder = None if chosen == "teacher" else Path("runs/demo/finalists") / chosen / "student"
        speaker = Speaker.of(Chosen(chosen, folder), stack)
        spoken = [speaker.say(text) for text in (TEXT, "watch the camera")]
        sound = samples_of(line.split()[-1])
        pause = np.zeros(4800, np.float32)
        expected = np.concatenate([spoken[0].waveform, pause, spoken[1].waveform])
        assert np.array_equal(sound, np.round(expected * 32767).astype("<i2"))
        cells = line.split()
        assert float(cells[1]) == pytest.approx(len(sound) / 16_000 - 0.3, abs=0.051)
        assert f"{max(one.cache_bytes for one in spoken):,}" in cells


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ([], [BEST_ONE]),
        (["--all"], ["teacher", OTHER, BEST_ONE]),
        (["--layout", OTHER, "--compare"], ["teacher", OTHER]),
        (["--layout", DISTILLED], [DISTILLED]),
        (["--student", "runs/demo/student", "--compare"], ["teacher", DISTILLED]),
        (["--teacher"], ["teacher"]),
    ],
)
def test_which_models_speak(place, capsys, arguments, names):
    assert speak([*arguments, "watch", "the camera", "--dry-run"]) == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == names
    assert not (place / "speech").exists()


def test_an_exported_checkpoint_speaks_by_the_command_on_its_card(place, teacher):
    student = Path("runs/demo/finalists") / OTHER / "student"
    export_student(student, place / "exported", finalist_row(OTHER), teacher, TeacherConfig(kind="demo"))
    card = (place / "exported" / "README.md").read_text()
    (command,) = re.findall(r"python -m mamtra_ray\.speak (.*)", card)
    arguments = shlex.split(command.replace("PATH", str(place / "exported")).replace("YOUR TEXT", TEXT))
    assert speak(arguments) == 0
    said = load_speaker("runs/demo", layout=OTHER).say(TEXT)
    assert len(said.tokens) > 20
    assert np.array_equal(samples_of("speech.wav"), np.round(said.waveform * 32767).astype("<i2"))


def test_a_model_that_cannot_speak_is_named_and_the_others_are_heard(place, teacher, capsys, monkeypatch):
    diverged = make_student(teacher.model, BEST_ONE)
    with torch.no_grad():
        diverged.body.norm.weight[0] = torch.nan
    diverged.save(place / "diverged")
    assert speak(["--student", "diverged", "watch the camera"]) == 2
    assert f"{BEST_ONE}" in (error := capsys.readouterr().err) and "not finite" in error
    assert speak(["--student", "diverged", "--teacher", "watch the camera"]) == 0
    said = capsys.readouterr()
    assert "alarm: " in said.err and "not finite" in said.err
    assert [line.split()[0] for line in said.out.splitlines()[2:]] == ["teacher"]
    assert [path.name for path in Path("speech").glob("*.wav")] == ["watch_the_camera-teacher.wav"]
    monkeypatch.setattr("mamtra_ray.speak.speaker.drawn", lambda *_: iter(()))
    assert speak(["--teacher", "open the window"]) == 2
    assert "teacher said nothing" in capsys.readouterr().err
    assert len(list(Path("speech").glob("*.wav"))) == 1


def test_an_alarm_of_what_speaks_is_said(place, capsys):
    assert speak(["--layout", OTHER, "watch the camera", "--output", "a.wav"]) == 0
    assert f"alarm: {OTHER} stops at once in 20 %" in capsys.readouterr().err
    assert len(samples_of(place / "a.wav")) > 8000


def test_what_the_user_has_is_not_overwritten(place, capsys):
    path = place / "friday.wav"
    path.write_bytes(b"mine")
    command = ["--teacher", "--output", str(path), TEXT]
    for dry in (["--dry-run"], []):
        assert speak([*command, *dry]) == 2
        assert "friday.wav would be overwritten" in capsys.readouterr().err
    assert path.read_bytes() == b"mine"
    path.unlink()
    assert speak(command) == speak(command) == 0
    # Another text gets another file.
    assert speak(["--teacher", "watch the camera"]) == speak(["--teacher", "open the window"]) == 0
    assert len(list((place / "speech").glob("*.wav"))) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["open the lettr"], r"does not know the word 'lettr': did you mean 'letter'\? .*57 words .*demo_grammar\.py"),
        (["--file", "bad.txt"], r"line 2: the demo teacher does not know the word 'hello'"),
        (["--file", "nowhere.txt"], r"--file nowhere\.txt cannot be read"),
        (["watch the camera", "--file", "bad.txt"], "the text or --file"),
        (["--run", "nowhere", "watch the camera"], "nowhere holds no run"),
        (["--layout", "M" * 12, "watch the camera"], "MMMMMMMMMMMM is no finalist of runs/demo"),
        (["--student", "text", "watch the camera"], "text holds no saved student"),
        (["--compare", "--output", "-", "watch the camera"], "takes the sound of one model, not of 2"),
        (["--compare", "--output", "x.wav", "watch the camera"], "x.wav is one file, and 2 models"),
        (["--raw", "watch the camera"], "--raw is for samples"),
        (["--speaker", "joe", "watch the camera"], "names no speakers"),
        (["--prompt", "nobody", "watch the camera"], "no utterance is called 'nobody'"),
        (["--prompt-audio", "a.wav", "watch the camera"], "--prompt-text"),
        (["evaluate.temperatur=1", "watch the camera"], "unknown key 'evaluate.temperatur'"),
        (["teacher.kind=causal_lm", "teacher.path=.", "corpus.path=.", "evaluate.sentences=0", "a"], "nothing to hear"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_sentence(place, capsys, arguments, sentence):
    (place / "bad.txt").write_text("watch the camera\nhello\n")
    (place / "text").mkdir()
    assert speak(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line)
    assert not (place / "speech").exists()


def test_a_student_of_another_teacher_is_refused(place, teacher, capsys):
    from tiny_models import SEQUENCE, transformers_model, write_folder

    write_folder(place / "other", transformers_model())
    other = load_teacher("huggingface", place / "other")
    assert other.sequence == SEQUENCE
    make_student(other.model, "AMAM").save(place / "tiny")
    assert speak(["--student", "tiny", "watch the camera"]) == 2
    assert "another vocabulary than the teacher demo" in capsys.readouterr().err


def test_a_prompt_stands_before_text_and_speech(place, teacher, stack):
    rows = [
        {"utterance_id": "a", "text": "open", "text_tokens": [3, 4], "speech_tokens": [5, 6, 7], "split": "test"},
        {"utterance_id": "b", "text": "x", "text_tokens": [1], "speech_tokens": [2], "split": "test"}
        | {"prompt_text": "y", "prompt_text_tokens": [8], "prompt_speech_tokens": [9, 10]},
    ]
    write_corpus(place / "corpus.parquet", rows, tokenizer="demo", made_by={"test": True})
    config = load_config(None, [f"evaluate.corpus={place / 'corpus.parquet'}"])
    ids = tokenize_text(TEXT)
    for name, text, speech in (("a", [3, 4], [5, 6, 7]), ("b", [8], [9, 10])):
        prompt = teacher.sequence.prompt(ids, text, speech)
        (expected,) = generate(teacher.model, [prompt], [teacher.length_bounds(ids)])
        greedy = Speaker("teacher", teacher.model, Stack.of(load_config(None, ["evaluate.temperature=0"])))
        assert greedy.say(TEXT, prompt_of_utterance(config, name)).tokens == expected.tokens


def test_a_recording_is_a_prompt(place, stack, capsys):
    from mamtra_ray.speak.prompts import prompt_of_recording
    from mamtra_ray.speech.demo_codec import write_wav

    codec, tokens = load_codec(), expected_speech()
    write_wav(place / "voice.wav", codec.decode(tokens))
    prompt = prompt_of_recording(load_config(None), place / "voice.wav", "open", tokenize_text("open"))
    assert list(prompt.text_tokens) == tokenize_text("open")
    heard = codec.encode(samples_of(place / "voice.wav").astype(np.float32) / 32768)
    assert list(prompt.speech_tokens) == heard.tolist() and prompt.voice.audio == place / "voice.wav"


def test_a_pipe_gets_sound_alone_and_ray_is_not_there(place):
    code = (
        "import sys\n"
        "from mamtra_ray.speak.__main__ import main\n"
        "code = main(sys.argv[1:])\n"
        "print('with ray' if 'ray' in sys.modules else 'without ray', file=sys.stderr)\n"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "--student", "runs/demo/student", "--output", "-"]
    found = subprocess.run(command, input=f"{TEXT}\nwatch the camera\n".encode(), capture_output=True, check=True)
    header, sound = found.stdout[:44], np.frombuffer(found.stdout[44:], "<i2")
    assert header[:4] == b"RIFF" and header[8:16] == b"WAVEfmt " and header[36:40] == b"data"
    assert struct.unpack("<HHIIHH", header[20:36]) == (1, 1, 16_000, 32_000, 2, 16)
    speaker = load_speaker(student="runs/demo/student")
    spoken = [np.concatenate(list(speaker.stream(text))) for text in (TEXT, "watch the camera")]
    assert len(sound) == sum(map(len, spoken)) + 4800
    assert np.array_equal(sound[: len(spoken[0])], np.round(spoken[0] * 32767).astype("<i2"))
    errors = found.stderr.decode()
    assert DISTILLED in errors and "without ray" in errors


def test_a_codec_that_needs_the_whole_sentence_says_so(place, capsys, monkeypatch):
    class WholeVocoder:
        sample_rate = 16_000

        def decode(self, tokens, voice=None):
            return load_codec().decode(tokens)

    monkeypatch.setattr("mamtra_ray.speak.speaker.vocoder_of_teacher", lambda *_: WholeVocoder())
    assert speak(["--teacher", "--stream", "watch the camera", "--output", "whole.wav"]) == 0
    assert "Whole needs a whole sentence at once" in capsys.readouterr().err
    assert len(samples_of(place / "whole.wav")) > 8000


def test_the_example_of_the_readme_works_word_for_word(place, capsys):
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "load_speaker" in block]
    lines = [line for line in block.splitlines() if line and not line.startswith("from ")]
    assert len(lines) <= 10
    exec(compile(block, "README.md", "exec"), {})
    said = load_speaker("runs/demo").say(TEXT)
    assert np.array_equal(samples_of("friday.wav"), np.round(said.waveform * 32767).astype("<i2"))
    assert f"cache {said.cache_bytes:,} bytes" in capsys.readouterr().out
    assert Path("tomorrow.pcm").stat().st_size > 16_000


def test_the_command_of_the_readme_is_understood(place, capsys):
    (command,) = re.findall(r"python -m mamtra_ray\.speak (--run runs/demo --compare) \"(.*)\"", README)
    assert speak([*command[0].split(), command[1], "--dry-run"]) == 0
    assert "speech" in capsys.readouterr().out


@pytest.fixture
def three_threads():
    """torch's own number in this test."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_a_small_model_speaks_with_one_thread_unless_told_otherwise(place, capsys, monkeypatch):
    said = ["--teacher", "watch the camera"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert speak([*said, "--output", "a.wav"]) == 0 and torch.get_num_threads() == 3
    assert speak([*said, "--output", "b.wav", "--threads", "2"]) == 0 and torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert speak([*said, "--output", "c.wav"]) == 0 and torch.get_num_threads() == 1
    capsys.readouterr()
    for dry in ([], ["--dry-run"]):
        assert speak([*said, "--output", "d.wav", "--threads", "0", *dry]) == 2
        assert capsys.readouterr().err == "error: --threads 0: at least 1\n"


@pytest.mark.usefixtures("three_threads")
def test_a_large_model_has_torchs_own_number_of_threads():
    use_threads(SMALL_MODEL, None, {})
    assert torch.get_num_threads() == 3
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        use_threads(1, None, {name: "3"})
        assert torch.get_num_threads() == 3
    use_threads(1, None, {"OMP_NUM_THREADS": ""})
    assert torch.get_num_threads() == 1
    use_threads(SMALL_MODEL, 2, {"OMP_NUM_THREADS": "3"})
    assert torch.get_num_threads() == 2
