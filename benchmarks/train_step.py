"""What a distillation step costs, how near the matmul roofline it is, and what takes the rest.

Two students of the layout 1:1 (block beginning): the demo teacher's shape, and a stack of layers of CosyVoice 2's.
A step is Eq. 5 against cached hidden states: forward, backward, AdamW. Beside it the same step written the
obvious way: transformers' own GraniteMoeHybrid with expanded mixers, all logits at once, autograd throughout,
AdamW as it comes.

    python benchmarks/train_step.py            (some minutes on one core)
    python benchmarks/train_step.py --quick    fewer tokens and layers, one round; nothing is written

The roofline is what one large matrix product reaches in the same process. "share of roofline" is the time the
step's matrix products would take at that rate (FLOPs counted by torch's FlopCounterMode) over the step's time. The
parts are timed alone, forward and backward, on inputs of the step's size; "other" is what is left of the step:
embeddings, RoPE, the final norm, and what parts cost each other (negative if they are faster together).
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from measurement import paired, print_table, write_result
from random_models import random_teacher
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from mamtra_ray.efficiency import ARCHITECTURES
from mamtra_ray.layouts import from_strategy
from mamtra_ray.losses import HiddenTargets, cross_entropy, distillation_loss, hidden_mse, skewed_forward_kl
from mamtra_ray.speech_lm.speech_lm import SpeechLM
from mamtra_ray.speech_lm.student import make_student


@dataclass(frozen=True)
class Setting:
    """A student and one batch: B utterances of L positions, of which the last S + 1 are labeled."""

    name: str
    student: SpeechLM
    input_ids_BL: Tensor
    labels_N: Tensor
    first_label: int
    teacher_hidden_ND: Tensor

    def labeled(self, hidden_BLD: Tensor) -> Tensor:
        return hidden_BLD[:, self.first_label :].flatten(0, 1)


def setting(architecture: str, num_layers: int, batch: int, length: int, device: str = "cpu") -> Setting:
    shape = ARCHITECTURES[architecture]
    teacher = random_teacher(shape, num_layers).to(device)
    student = make_student(teacher, from_strategy("block_beginning", num_layers, "1:1"))
    vocabulary, first_label = teacher.vocabulary, length // 8
    generator = torch.Generator().manual_seed(0)
    input_ids_BL = torch.randint(
        vocabulary.speech_offset, vocabulary.control_offset, (batch, length), generator=generator
    ).to(device)
    labels_N = torch.randint(vocabulary.speech_size, (batch * (length - first_label),), generator=generator).to(device)
    with torch.no_grad():
        hidden_ND = teacher.hidden_states(input_ids_BL)[:, first_label:].flatten(0, 1).half()
    return Setting(architecture, student, input_ids_BL, labels_N, first_label, hidden_ND)


def ours(setting: Setting) -> tuple[nn.Module, Callable[[], Tensor]]:
    student = setting.student.train()

    def loss() -> Tensor:
        hidden_ND = setting.labeled(student.hidden_states(setting.input_ids_BL))
        targets = HiddenTargets(setting.teacher_hidden_ND)
        return distillation_loss(hidden_ND, student.head, setting.labels_N, targets).total

    return student, loss


def obvious(setting: Setting) -> tuple[nn.Module, Callable[[], Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        setting.student.save_granite(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train().to(setting.student.device)
    vocabulary = setting.student.vocabulary
    weight_SD = model.lm_head.weight.detach()[vocabulary.speech_offset : vocabulary.control_offset]
    model.requires_grad_(True)
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)

    def loss() -> Tensor:
        output = model.model(input_ids=setting.input_ids_BL, use_cache=False)
        hidden_ND = setting.labeled(output.last_hidden_state)
        teacher_ND = setting.teacher_hidden_ND.float()
        logits_NS, teacher_logits_NS = F.linear(hidden_ND, weight_SD), F.linear(teacher_ND, weight_SD)
        return (
            cross_entropy(logits_NS, setting.labels_N)
            + skewed_forward_kl(teacher_logits_NS, logits_NS)
            + hidden_mse(teacher_ND, hidden_ND)
        )

    return model, loss


def training_step(model: nn.Module, loss: Callable[[], Tensor], fused: bool) -> Callable[[], Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=fused)

    def step() -> Tensor:
        optimizer.zero_grad()
        total = loss()
        total.backward()
        optimizer.step()
        return total.detach()

    return step


def parts_of(setting: Setting) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> (how often it occurs in a step, one forward and backward of it)."""
    student = setting.student
    batch, length = setting.input_ids_BL.shape
    x_BLD = torch.randn(batch, length, student.config.hidden_size, requires_grad=True)
    gradient_BLD = torch.randn_like(x_BLD)
    attention_layer = student.layout.attention_layers[0]
    mamba_layer = student.layout.mamba_layers[0]
    layers = student.body.layers
    inputs = student.body.inputs(x_BLD)

    def both_ways(function: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]

        def run() -> None:
            # As in a step, gradients are written and not added to what is there.
            x_BLD.grad = None
            for parameter in parameters:
                parameter.grad = None
            function(x_BLD).backward(gradient_BLD)

        return run

    def loss() -> None:
        hidden_ND = setting.labeled(x_BLD)
        distillation_loss(
            hidden_ND, student.head, setting.labels_N, HiddenTargets(setting.teacher_hidden_ND)
        ).total.backward()

    trained = [nn.Parameter(tensor.detach().clone()) for tensor in student.parameters() if tensor.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained, lr=0.0, fused=True)
    counts = len(student.layout.attention_layers), len(student.layout.mamba_layers)
    attention = layers[attention_layer].self_attn
    return {
        "attention": (
            counts[0],
            both_ways(lambda x: attention(x, inputs)),
        ),
        "Mamba mixer": (counts[1], both_ways(layers[mamba_layer].mamba)),
        "MLP": (student.config.num_layers, both_ways(layers[0].mlp)),
        "norm and residual": (
            2 * student.config.num_layers,
            both_ways(lambda x: x + layers[0].input_layernorm(x)),
        ),
        "head and losses": (1, loss),
        "optimizer": (1, optimizer.step),
    }


def matmul_rate(size: int = 1024) -> tuple[Callable[[], object], float]:
    """A square float32 product and its FLOPs."""
    a, b = torch.randn(2, size, size).unbind()
    return lambda: a @ b, 2.0 * size**3


def matmul_flops(function: Callable[[], object]) -> float:
    """FLOPs of matrix products and attention; depthwise convolutions are left out (the counter ignores groups)."""
    with FlopCounterMode(display=False) as counter:
        function()
    by_operator = counter.get_flop_counts().get("Global", {})
    return float(sum(flops for operator, flops in by_operator.items() if "conv" not in str(operator)))


def measure(setting: Setting, rounds: int) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(steps beside each other, parts of our step)."""
    models = {"ours": ours(setting), "obvious": obvious(setting)}
    values = {name: loss().item() for name, (_, loss) in models.items()}
    # AdamW's default on the CPU is a loop over single operations; "fused" is one pass.
    steps = {name: training_step(*pair, fused=name == "ours") for name, pair in models.items()}
    product, product_flops = matmul_rate()
    flops = {name: matmul_flops(step) for name, step in steps.items()}
    timings = paired({**steps, "matmul": product}, rounds, baseline="obvious", clock=time.thread_time)
    rate = product_flops / timings["matmul"].median
    tokens = setting.input_ids_BL.numel()
    rows: list[dict[str, object]] = [
        {
            "shape": setting.name,
            "step": name,
            "tokens": tokens,
            "ms": round(1e3 * timings[name].median, 1),
            "time of obvious": round(timings[name].ratio, 2),
            "low": round(timings[name].ratio_low, 2),
            "high": round(timings[name].ratio_high, 2),
            "matmul GFLOP": round(flops[name] / 1e9, 2),
            "share of roofline": round(flops[name] / rate / timings[name].median, 3),
            "loss": round(values[name], 4),
            "tokens/s": round(tokens / timings[name].median),
        }
        for name in steps
    ]
    parts = parts_of(setting)
    part_timings = paired({name: function for name, (_, function) in parts.items()}, rounds, clock=time.thread_time)
    part_rows: list[dict[str, object]] = []
    whole = timings["ours"].median
    for name, (times, function) in parts.items():
        seconds, part_flops = times * part_timings[name].median, times * matmul_flops(function)
        part_rows.append(_part_row(setting.name, name, times, seconds, whole, part_flops, rate))
    rest = whole - sum(float(str(row["ms"])) / 1e3 for row in part_rows)
    part_rows.append(_part_row(setting.name, "other", 1, rest, whole, 0.0, rate))
    print(f"{setting.name}: one {1024} x {1024} product runs at {rate / 1e9:.1f} GFLOP/s")
    return rows, part_rows


def _part_row(
    shape: str, name: str, times: int, seconds: float, whole: float, flops: float, rate: float
) -> dict[str, object]:
    return {
        "shape": shape,
        "part": name,
        "times": times,
        "ms": round(1e3 * seconds, 1),
        "share of step": round(seconds / whole, 3),
        "matmul GFLOP": round(flops / 1e9, 2),
        "share of roofline": round(flops / rate / seconds, 3) if seconds > 0 else 0.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 7; 2 with --quick)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rounds = options.rounds or (2 if options.quick else 7)
    if options.quick:
        settings = [("demo", 4, 4, 120), ("cosyvoice2", 2, 1, 128)]
    else:
        # The demo's batches hold about 1,900 padded tokens; four of CosyVoice 2's 24 layers, one long utterance.
        settings = [("demo", 12, 16, 120), ("cosyvoice2", 4, 1, 768)]
    rows, parts = [], []
    for arguments in settings:
        found, found_parts = measure(setting(*arguments), rounds)
        print_table(found)
        print_table(found_parts)
        rows += found
        parts += found_parts
    if not options.quick:
        write_result("train_step", rows, parts=parts, settings={"rounds": rounds, "threads": 1, "dtype": "float32"})


if __name__ == "__main__":
    main()
