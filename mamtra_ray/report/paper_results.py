"""The paper's published numbers, to be shown beside a run's own (arXiv 2603.12342).

Tables 3 and 4 are copied from the paper's text. Figures 3 to 5 carry no numbers in the text; these were read
from the vector figures of the authors' project page (mamtratts.github.io), whose layer boxes also give the
attention layers that were kept.
"""

from __future__ import annotations

from dataclasses import dataclass

RATIOS = ("1:1", "1:3", "1:5", "1:11")


@dataclass(frozen=True)
class Table3Row:
    """Rates in percent, FLOPs in 1e12; ``None`` where the table is empty. Two test sets: Seed-TTS, LibriTTS."""

    model: str
    ratio: str | None
    strategy: str | None
    tflop: float | None
    nmos: float
    nmos_half_width: float
    seed_utmos: float
    seed_similarity: float
    seed_wer: float
    libritts_utmos: float
    libritts_similarity: float
    libritts_wer: float


TABLE_3 = (
    Table3Row("Ground truth", None, None, None, 3.93, 0.15, 3.52, 1.00, 1.47, 4.14, 1.00, 1.85),
    Table3Row("Llasa-1B", "1:0", None, 4.53, 3.64, 0.19, 4.13, 0.46, 3.54, 4.30, 0.40, 3.07),
    Table3Row("CosyVoice 2", "1:0", None, 1.78, 3.68, 0.16, 4.15, 0.66, 2.03, 4.35, 0.74, 2.04),
    Table3Row("Zonos-v0.1", "1:3", "block_beginning", 7.32, 3.18, 0.18, 3.63, 0.67, 3.42, 3.96, 0.72, 3.37),
    Table3Row("MamTra", "1:1", "block_beginning", 1.64, 3.66, 0.16, 4.16, 0.72, 2.28, 4.35, 0.75, 2.26),
    Table3Row("MamTra", "1:3", "block_beginning", 1.57, 3.65, 0.16, 4.14, 0.72, 3.26, 4.35, 0.75, 2.99),
    Table3Row("MamTra", "1:5", "wer", 1.54, 3.65, 0.16, 4.13, 0.72, 2.53, 4.36, 0.75, 2.28),
    Table3Row("MamTra", "1:11", "wer", 1.52, 3.27, 0.18, 4.15, 0.72, 3.99, 4.37, 0.75, 4.08),
)

TABLE_4 = (
    # components, WER %, CER %, speaker similarity, UTMOS (MamTra 1:1 after 15 epochs)
    ("all", 3.48, 2.86, 0.72, 4.16),
    ("without ce", 6.70, 4.32, 0.72, 4.15),
    ("without logits", 6.13, 3.46, 0.72, 4.15),
    ("without embedding", 5.63, 3.26, 0.72, 4.15),
)

FIGURE_3_MEMORY_GB = {"MamTra 1:1": 5.0, "Zonos-v0.1": 6.1, "CosyVoice 2": 7.6, "Llasa-1B": 12.9}

FIGURE_4 = {
    # strategy: (CE in nats, WER in percent) at each of RATIOS, after 15 epochs, Seed-TTS-eval
    "block_beginning": ((3.86, 3.99), (3.90, 6.44), (4.20, 108.63), (4.21, 112.11)),
    "block_end": ((4.60, 133.27), (4.52, 122.27), (4.40, 128.60), (4.48, 119.00)),
    "back": ((4.20, 114.65), (4.24, 100.97), (4.21, 109.59), (4.18, 102.70)),
    "middle": ((4.30, 118.54), (4.23, 104.14), (4.20, 103.61), (4.31, 118.03)),
    "front": ((4.05, 34.70), (4.40, 122.02), (4.48, 124.28), (4.40, 123.56)),
    "wer": ((3.92, 10.94), (3.91, 8.30), (3.92, 8.62), (3.94, 8.77)),
    "cosine": ((3.95, 13.12), (3.96, 12.87), (4.20, 104.06), (4.31, 119.40)),
    "sandwich": ((3.97, 31.11), (4.06, 57.94), (3.92, 14.02), (4.39, 120.27)),
}

FIGURE_5_LENGTHS = (256, 512, 1024, 1536, 2048, 3072, 4096)
FIGURE_5_CONSTANT_MB = {"1:1": 2.97, "1:3": 4.46, "1:5": 4.96, "1:11": 5.45}
FIGURE_5_GROWTH_AT_4096_MB = {"1:1": 50.72, "1:3": 25.76, "1:5": 17.43, "1:11": 9.11}
"""Cache in float32, 1e6 bytes: the fixed Mamba states, and what 4,096 tokens add to them (linear in between)."""

ATTENTION_LAYERS_KEPT = {
    "1:1": tuple(range(0, 24, 2)),
    "1:3": tuple(range(0, 24, 4)),
    "1:5": (0, 8, 11, 16),
    "1:11": (0, 16),
}
"""0-based, of 24: the layouts of Table 3."""


def figure_4_points() -> list[dict[str, object]]:
    """The 32 configurations as rows: strategy, ratio, ce (nats), wer (a fraction, as everywhere here)."""
    return [
        {"strategy": strategy, "ratio": ratio, "ce": ce, "wer": wer / 100}
        for strategy, points in FIGURE_4.items()
        for ratio, (ce, wer) in zip(RATIOS, points, strict=True)
    ]
