"""A search small enough for tests: a random teacher of four layers and a random corpus."""

from pathlib import Path

import numpy as np
import yaml
from tiny_models import VOCABULARY, transformers_model, write_folder

from mamtra_ray.config import Config, load_config
from mamtra_ray.corpus.table import write_corpus


def write_search_space(folder: Path, **changes: object) -> Path:
    """Write teacher, corpus and ``space.yaml`` into ``folder``; ``changes`` are ``section__key=value``."""
    write_folder(folder / "teacher", transformers_model("qwen2"))
    generator = np.random.default_rng(0)
    rows = [
        {
            "utterance_id": f"{split}-{index}",
            "text": "a b",
            "text_tokens": generator.integers(0, VOCABULARY.text_size, generator.integers(2, 6)).tolist(),
            "speech_tokens": generator.integers(0, VOCABULARY.eos_id, generator.integers(5, 30)).tolist(),
            "split": split,
        }
        for split, count in (("train", 60), ("validation", 10), ("test", 4))
        for index in range(count)
    ]
    write_corpus(folder / "corpus.parquet", rows, tokenizer="tiny", made_by={"test": True})
    space: dict[str, dict[str, object]] = {
        "student": {},
        "teacher": {"kind": "huggingface", "path": str(folder / "teacher")},
        "corpus": {"path": str(folder / "corpus.parquet")},
        "align": {"tokens": 400, "tokens_per_batch": 200, "learning_rate": 6e-3},
        "probe": {"num_layouts": 0},
        "search": {"trials": 3, "strategies": ["back"], "rung_tokens": [300, 600], "reduction_factor": 2},
        "distill": {
            "tokens": 600,
            "tokens_per_batch": 200,
            "learning_rate": 1e-3,
            "schedule": "cosine",
            "checkpoint_every_tokens": 300,
            "workers": 2,
        },
        "evaluate": {"sentences": 0},
    }
    for name, value in changes.items():
        section, key = name.split("__")
        space[section][key] = value
    (folder / "space.yaml").write_text(yaml.safe_dump(space))
    return folder / "space.yaml"


def tiny_config(folder: Path, **changes: object) -> Config:
    """:func:`write_search_space`, read back."""
    return load_config(write_search_space(folder, **changes))
