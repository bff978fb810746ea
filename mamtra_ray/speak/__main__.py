"""Verb ``speak``: text to sound, with the teacher, what a run found, any finalist or any saved student."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mamtra_ray.errors import InputError, exit_code_2_on_input_error

if TYPE_CHECKING:
    import numpy as np

    from mamtra_ray.speak.models import Chosen, Settings
    from mamtra_ray.speak.prompts import Prompt
    from mamtra_ray.speak.speaker import Speaking, Stack
    from mamtra_ray.teachers.text import TextTokenizer

_SETTING = re.compile(r"[a-z_]+(\.[a-z_]+)*=")
_DESCRIPTION = """Say a text with a model: the best layout of a run, unless something else is asked for. Needs no Ray. :

    python -m mamtra_ray.speak --run runs/demo "open the letter behind the bridge on friday"
    python -m mamtra_ray.speak --run runs/demo --compare --file sentences.txt     a file of each model, and a table
    python -m mamtra_ray.speak --student runs/mine/student "watch the camera"     what distill made
    echo "watch the camera" | python -m mamtra_ray.speak --teacher --output - | aplay
"""


@exit_code_2_on_input_error
def main(arguments: list[str] | None = None) -> int:
    """Command line of the verb."""
    options = _parser().parse_intermixed_args(arguments)
    overrides = [word for word in options.words if _SETTING.match(word)]
    piped = options.output == Path("-")
    if options.raw and not piped:
        raise InputError("--raw is for samples on standard output: add --output -")

    from mamtra_ray.speak.models import choose, settings_of

    settings = settings_of(options.space, options.run, overrides, options.student)
    chosen = choose(
        settings.run,
        layouts=options.layout,
        students=options.student,
        teacher=options.teacher or options.compare or options.all,
        all_finalists=options.all,
    )
    if options.compare and chosen[1:] == [] and not options.all:
        chosen += choose(settings.run)
    if piped and len(chosen) > 1:
        raise InputError(f"--output - takes the sound of one model, not of {len(chosen)}")
    sentences = _sentences(options, [word for word in options.words if word not in overrides])
    sound = sys.stdout.buffer if piped else None
    # Standard output is the sound's then, whatever another library has to say.
    with contextlib.redirect_stdout(sys.stderr) if piped else contextlib.nullcontext():
        _speak(options, settings, chosen, sentences, sound)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mamtra_ray.speak",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="TEXT", help="what to say (default: a sentence a line from standard input)")
    add("--file", type=Path, help="a text file, one sentence a line")
    add("--run", type=Path, metavar="DIR", help="run folder (default: that of --student, else runs/<name>)")
    add("--space", metavar="FILE_OR_NAME", help="settings of the teacher without a run (default: demo)")
    add("--layout", action="append", default=[], help="a finalist of the run in place of its best; may be repeated")
    add("--student", type=Path, action="append", default=[], metavar="FOLDER", help="a saved student or an export")
    add("--teacher", action="store_true", help="the teacher")
    add("--compare", action="store_true", help="the teacher beside the others: a file each, and a table")
    add("--all", action="store_true", help="compare the teacher and all finalists")
    add("--output", type=Path, metavar="PATH", help="a .wav file, a folder (default: speech), or - for standard output")
    add("--raw", action="store_true", help="with --output -: 16-bit samples without a WAV header")
    add("--stream", action="store_true", help="write sound as it comes, if the codec can; - does so always")
    add("--prompt", metavar="ID", help="continue the voice of an utterance of the corpus")
    add("--speaker", metavar="NAME", help="continue the voice of a speaker of the corpus")
    add("--prompt-audio", type=Path, metavar="FILE", help="continue the voice of a recording; with --prompt-text")
    add("--prompt-text", metavar="TEXT", help="what is said in it")
    add("--threads", type=int, metavar="N", help="of the CPU (default: OMP_NUM_THREADS, else 1 for a small model)")
    add("--dry-run", action="store_true", help="check text, models and output, print the plan, do nothing")
    parser.epilog = "key=value among the words is a setting, such as evaluate.temperature=0.5 or evaluate.codec=FOLDER."
    return parser


def _sentences(options: argparse.Namespace, words: Sequence[str]) -> list[str]:
    """One a line, blank ones left out."""
    if options.file is not None and words:
        raise InputError("give the text or --file, not both")
    if options.file is not None:
        try:
            text = options.file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--file {options.file} cannot be read: {error}") from None
    elif words:
        text = " ".join(words)
    else:
        if sys.stdin.isatty():
            print("one sentence a line; Ctrl-D ends the text", file=sys.stderr)
        text = sys.stdin.read()
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not sentences:
        raise InputError("there is no text to say: give it as argument, with --file or on standard input")
    return sentences


def _speak(
    options: argparse.Namespace,
    settings: Settings,
    chosen: Sequence[Chosen],
    sentences: Sequence[str],
    sound: object,
) -> None:
    from mamtra_ray.artifacts import check_outputs
    from mamtra_ray.speak.sound import output_names
    from mamtra_ray.teachers.text import text_tokenizer

    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads}: at least 1")
    source = settings.config.teacher
    tokenize = text_tokenizer(source.kind, Path(source.path) if source.path else None)
    for number, sentence in enumerate(sentences, 1):
        _check_sentence(tokenize, sentence, number if len(sentences) > 1 else None)
    folder, names = Path(), ["-"]
    if sound is None:
        folder, names = output_names(options.output, [one.name for one in chosen], sentences[0])
        check_outputs(folder, names)
    prompt = _prompt(options, settings, tokenize)
    if options.dry_run:
        for one, name in zip(chosen, names, strict=True):
            print(f"{one.name}: {len(sentences)} to say, into {folder / name if sound is None else name}")
        return

    from mamtra_ray.speak.sound import SilentError
    from mamtra_ray.speak.speaker import Speaker, Speaking, Stack
    from mamtra_ray.speak.threads import use_threads
    from mamtra_ray.speech_lm.generation_check import NonFiniteLogitsError

    stack = Stack.of(settings.config)
    use_threads(sum(part.numel() for part in stack.teacher.model.parameters()), options.threads)
    in_blocks = options.stream or sound is not None
    if in_blocks and not stack.streams:
        print(f"{_codec_name(stack)} needs a whole sentence at once: sound comes sentence by sentence", file=sys.stderr)
    rows = []
    for one, name in zip(chosen, names, strict=True):
        if one.alarm:
            print(f"alarm: {one.name} {one.alarm}", file=sys.stderr)
        try:
            speaker = Speaker.of(one, stack)
            if len(chosen) > 1:
                speaker.say(sentences[0], prompt)  # what is measured beside others is no first time
            speaking = [Speaking(speaker, text, prompt, in_blocks) for text in sentences]
            _write(speaking, stack, folder, name, sound, options.raw)
        except (NonFiniteLogitsError, SilentError) as error:
            if len(chosen) == 1:
                raise
            print(f"alarm: {error}", file=sys.stderr)
            continue
        rows.append(_row(one.name, speaking, str(folder / name)))
        _warn(one.name, speaking)
    if not rows:
        raise InputError("none of the models said anything")
    print(_table(rows))


def _write(speaking: Sequence[Speaking], stack: Stack, folder: Path, name: str, sound: object, is_raw: bool) -> None:
    from mamtra_ray.artifacts import write_output
    from mamtra_ray.speak.sound import SilentError, with_pauses, write_file, write_stream

    rate = stack.vocoder.sample_rate

    def waveforms() -> Iterator[np.ndarray]:
        yield from with_pauses(speaking, rate)
        if not any(one.samples for one in speaking):
            raise SilentError(f"{speaking[0].speaker.name} said nothing: it stopped at once in every sentence")

    if sound is None:
        write_output(folder, name, lambda path: write_file(path, waveforms(), rate))
    else:
        write_stream(sound, waveforms(), rate, header=not is_raw)  # type: ignore[arg-type]


def _check_sentence(tokenize: TextTokenizer, sentence: str, number: int | None) -> None:
    try:
        tokenize(sentence)
    except InputError as error:
        raise InputError(f"line {number}: {error}" if number else str(error)) from None


def _prompt(options: argparse.Namespace, settings: Settings, tokenize: TextTokenizer) -> Prompt:
    from mamtra_ray.speak.prompts import NO_PROMPT, prompt_of_recording, prompt_of_speaker, prompt_of_utterance

    if sum(bool(value) for value in (options.prompt, options.speaker, options.prompt_audio)) > 1:
        raise InputError("give one voice to continue: --prompt, --speaker or --prompt-audio")
    if bool(options.prompt_audio) != bool(options.prompt_text):
        raise InputError("--prompt-audio and --prompt-text belong together: a recording, and what is said in it")
    if options.prompt:
        return prompt_of_utterance(settings.config, options.prompt)
    if options.speaker:
        return prompt_of_speaker(settings.config, options.speaker)
    if options.prompt_audio:
        text = options.prompt_text
        return prompt_of_recording(settings.config, options.prompt_audio, text, tokenize(text))
    return NO_PROMPT


def _codec_name(stack: Stack) -> str:
    return type(stack.vocoder).__name__.removesuffix("Vocoder").strip("_")


def _warn(name: str, speaking: Sequence[Speaking]) -> None:
    for number, one in enumerate(speaking, 1):
        if not one.stopped:
            print(f"warning: {name} did not stop by itself in sentence {number}", file=sys.stderr)
        elif not one.samples:
            print(f"warning: {name} said nothing in sentence {number}", file=sys.stderr)


def _row(name: str, speaking: Sequence[Speaking], where: str) -> list[str]:
    sound = sum(one.seconds for one in speaking)
    token_seconds = sum(one.token_seconds for one in speaking)
    work = token_seconds + sum(one.sound_seconds for one in speaking)
    tokens = sum(len(one.tokens) for one in speaking)
    longest = max(speaking, key=lambda one: one.positions)
    first = next((one.first_sound_seconds for one in speaking if one.first_sound_seconds is not None), 0.0)
    return [
        name, f"{sound:.1f}", f"{work / sound:.3f}", f"{tokens / token_seconds:.0f}", f"{first:.2f}",
        f"{longest.cache_bytes:,}", str(longest.positions), where,
    ]  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> str:
    from mamtra_ray.runtime.progress import table

    header = ["model", "sound s", "real-time factor", "tokens/s", "first sound s", "cache bytes", "at tokens", "file"]
    return table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
