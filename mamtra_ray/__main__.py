"""``python -m mamtra_ray``: what can be run."""

VERBS = {
    "search": "the whole search: cache, align, probe, trials, finalists, speech, export, report",
    "corpus": "prepare a corpus: LibriTTS, Seed-TTS-eval, CosyVoice shards -> Parquet",
    "teacher_cache": "compute the teacher's outputs once",
    "align": "train one Mamba mixer per layer to its attention",
    "probe": "score layouts by forward passes",
    "tradeoff": "the best layout under a cost bound or a weight on the cost, from the probe's scores",
    "distill": "distil one layout",
    "evaluate": "WER, CER and more of generated speech",
    "export": "write a finalist as a Hugging Face checkpoint",
    "report": "tables, figures and audio of runs",
    "efficiency": "parameters, FLOPs and cache bytes in closed form",
    "listening_test": "a page for a mean opinion score test, and its statistics",
    "teachers.demo": "rebuild the demo's corpus, codec and teacher",
}


def main() -> None:
    """Print the verbs."""
    print("python -m mamtra_ray.<verb> --help\n")
    for verb, what in VERBS.items():
        print(f"  {verb:15} {what}")


if __name__ == "__main__":
    main()
