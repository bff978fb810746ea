"""Row formats against what they replace: the teacher's float32 rows, its exact softmax, the exact gradient."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from mamtra_ray.errors import InputError
from mamtra_ray.losses import HiddenTargets, LossWeights, TopKTargets, distillation_loss
from mamtra_ray.teacher_cache.formats import HiddenFormat, QuantizedHiddenFormat, TopKFormat, row_format
from mamtra_ray.teacher_cache.quantizer import calibrate, entropy, quantizer_bytes, read_quantizer, token_context

WIDTH, SPEECH = 24, 300
CPU = torch.device("cpu")


def random_utterances(count: int, seed: int) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.integers(0, SPEECH, random.integers(1, 40)).astype(np.int32) for _ in range(count)]


def random_model(seed: int = 0) -> tuple[nn.Linear, torch.Tensor]:
    """A head and input embeddings (the last row is the separator's)."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(WIDTH, SPEECH).requires_grad_(False)
    head.weight.copy_(torch.randn(SPEECH, WIDTH, generator=generator) * 0.4)
    return head, torch.randn(SPEECH + 1, WIDTH, generator=generator)


def hidden_rows(utterances: list[np.ndarray], seed: int) -> torch.Tensor:
    """Rows as a teacher's: correlated dimensions of falling variance, partly explained by the tokens around."""
    head, embedding = random_model()
    inputs, labels = (torch.from_numpy(ids) for ids in token_context(utterances, SPEECH))
    generator = torch.Generator().manual_seed(100 + seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))
    noise = torch.randn(len(inputs), WIDTH, generator=generator) * torch.logspace(0.5, -1, WIDTH)
    labeled = torch.cat([head.weight, head.weight[:1]])[labels]
    return noise @ mixing * 0.3 + embedding[inputs] + 2 * labeled + 0.7


def as_read_back(rows: list[dict[str, bytes]]) -> dict[str, list[np.ndarray]]:
    return {name: [np.frombuffer(row[name], np.uint8) for row in rows] for name in rows[0]}


@pytest.fixture(scope="module")
def quantized() -> QuantizedHiddenFormat:
    head, embedding = random_model()
    utterances = random_utterances(300, seed=1)
    inputs, labels = (torch.from_numpy(ids) for ids in token_context(utterances, SPEECH))
    ends = torch.cat([head.weight, head.weight[:1]])
    return QuantizedHiddenFormat(calibrate(hidden_rows(utterances, 1), inputs, labels, embedding, ends, bits=3.0))


def test_hidden_rows_are_the_teachers_in_half_precision() -> None:
    utterances = random_utterances(5, seed=0)
    rows = hidden_rows(utterances, 0)
    encoded = HiddenFormat(WIDTH).encode(rows, nn.Identity(), utterances)
    assert [len(row["hidden"]) for row in encoded] == [(len(u) + 1) * WIDTH * 2 for u in utterances]
    decoded = HiddenFormat(WIDTH).decode(as_read_back(encoded), utterances, CPU)
    assert torch.equal(decoded.hidden_ND, rows.half())


def test_context_is_the_token_before_and_after() -> None:
    inputs, labels = token_context([np.array([4, 5, 6]), np.array([9])], speech_size=10)
    assert inputs.tolist() == [10, 4, 5, 6, 10, 9]
    assert labels.tolist() == [4, 5, 6, 10, 9, 10]


def test_quantized_rows_are_off_by_uniform_rounding_noise(quantized: QuantizedHiddenFormat) -> None:
    utterances = random_utterances(80, seed=2)
    rows = hidden_rows(utterances, 2)
    encoded = quantized.encode(rows, nn.Identity(), utterances)
    error = quantized.decode(as_read_back(encoded), utterances, CPU).hidden_ND - rows
    in_basis = error.double() @ quantized.quantizer.basis_DD.double()
    step = quantized.quantizer.step
    assert in_basis.abs().max() <= step / 2 + 1e-4
    # Dimensions much wider than a step have the variance of uniform noise, none has more.
    assert in_basis[:, :4].square().mean().item() == pytest.approx(step**2 / 12, rel=0.1)
    assert in_basis.square().mean().item() < 1.1 * step**2 / 12


def test_decoding_one_utterance_at_a_time_gives_the_same_rows(quantized: QuantizedHiddenFormat) -> None:
    utterances = random_utterances(6, seed=3)
    encoded = quantized.encode(hidden_rows(utterances, 3), nn.Identity(), utterances)
    together = quantized.decode(as_read_back(encoded), utterances, CPU).hidden_ND
    alone = [
        quantized.decode(as_read_back([row]), [u], CPU).hidden_ND for row, u in zip(encoded, utterances, strict=True)
    ]
    torch.testing.assert_close(torch.cat(alone), together)


def test_codes_beyond_a_byte_survive(quantized: QuantizedHiddenFormat) -> None:
    utterances = random_utterances(3, seed=4)
    rows = hidden_rows(utterances, 4)
    inputs, labels = (torch.from_numpy(ids) for ids in token_context(utterances, SPEECH))
    rows[2] += 400 * quantized.quantizer.step * quantized.quantizer.basis_DD[:, 0]
    rows[3] -= 9000 * quantized.quantizer.step * quantized.quantizer.basis_DD[:, 17]
    codes = quantized.quantizer.codes(rows, inputs, labels)
    assert codes.max() > 256 and codes.min() < -8000
    decoded = quantized.decode(as_read_back(quantized.encode(rows, nn.Identity(), utterances)), utterances, CPU)
    torch.testing.assert_close(decoded.hidden_ND, quantized.quantizer.reconstruct(codes, inputs, labels))


def test_calibration_meets_the_entropy_and_the_stored_size_follows(quantized: QuantizedHiddenFormat) -> None:
    utterances = random_utterances(1500, seed=5)
    rows = hidden_rows(utterances, 5)
    inputs, labels = (torch.from_numpy(ids) for ids in token_context(utterances, SPEECH))
    codes = quantized.quantizer.codes(rows, inputs, labels).numpy().astype(np.int64)
    measured = entropy(codes)
    assert measured == pytest.approx(3.0, abs=0.35)
    encoded = quantized.encode(rows, nn.Identity(), utterances)
    stored = sum(
        len(pa.compress(b"".join(r[name] for r in encoded), "zstd", asbytes=True)) for name in quantized.columns
    )
    # Entropy is the least any order-0 coder can take. zstd is near it, less so with this steep spectrum.
    assert measured - 0.1 < stored * 8 / codes.size < measured + 0.75


def test_entropy_is_shannons() -> None:
    codes = np.array([[0, 5], [1, 5], [2, 5], [3, 5]])
    assert entropy(codes) == pytest.approx((2.0 + 0.0) / 2)
    assert entropy(np.array([[-1], [-1], [-1], [7]])) == pytest.approx(-(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25)))


def test_prediction_from_tokens_pays(quantized: QuantizedHiddenFormat) -> None:
    """The same entropy with a much smaller step than without the tables (one constant row each)."""
    head, embedding = random_model()
    utterances = random_utterances(300, seed=1)
    inputs, labels = (torch.from_numpy(ids) for ids in token_context(utterances, SPEECH))
    nothing = torch.zeros_like(inputs), torch.zeros_like(labels)
    ends = torch.cat([head.weight, head.weight[:1]])
    plain = calibrate(hidden_rows(utterances, 1), *nothing, embedding, ends, bits=3.0)
    assert quantized.quantizer.step < 0.7 * plain.step


@pytest.mark.parametrize("distance", [0.3, 1.5])
@pytest.mark.parametrize("ce_weight", [0.0, 1.0])
def test_quantised_gradient_points_where_the_exact_one_does(
    quantized: QuantizedHiddenFormat, distance: float, ce_weight: float
) -> None:
    head, _ = random_model()
    utterances = random_utterances(60, seed=6)
    rows = hidden_rows(utterances, 6)
    labels = torch.from_numpy(token_context(utterances, SPEECH)[1]) % SPEECH
    student = rows + distance * rows.std() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    decoded = quantized.decode(as_read_back(quantized.encode(rows, head, utterances)), utterances, CPU)

    def gradient(targets: HiddenTargets) -> torch.Tensor:
        leaf = student.clone().requires_grad_(True)
        distillation_loss(leaf, head, labels, targets, LossWeights(ce=ce_weight)).total.backward()
        assert leaf.grad is not None
        return leaf.grad.flatten()

    cosine = torch.cosine_similarity(gradient(decoded), gradient(HiddenTargets(rows)), dim=0)
    assert cosine > 0.99


def test_quantizer_file_round_trip_and_damage(quantized: QuantizedHiddenFormat) -> None:
    content = quantizer_bytes(quantized.quantizer)
    again = read_quantizer(content)
    assert again.step == quantized.quantizer.step
    assert torch.equal(again.basis_DD, quantized.quantizer.basis_DD)
    assert quantizer_bytes(again) == content
    with pytest.raises(InputError, match="damaged"):
        read_quantizer(content[:100])


def test_calibration_is_reproducible_and_needs_enough_rows() -> None:
    head, embedding = random_model()
    ends = torch.cat([head.weight, head.weight[:1]])
    utterances = random_utterances(20, seed=8)
    inputs, labels = (torch.from_numpy(ids) for ids in token_context(utterances, SPEECH))
    rows = hidden_rows(utterances, 8)
    one, two = (quantizer_bytes(calibrate(rows, inputs, labels, embedding, ends, 4.0)) for _ in range(2))
    assert one == two
    with pytest.raises(InputError, match="at least 96 positions"):
        calibrate(rows[:95], inputs[:95], labels[:95], embedding, ends, 4.0)


def exact_top_k(logits: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """By brute force in float64: ids, probabilities, and the mass of the rest."""
    probabilities = np.exp(logits.double().numpy())
    probabilities /= probabilities.sum(1, keepdims=True)
    ids = np.argsort(-probabilities, axis=1)[:, :k]
    kept = np.take_along_axis(probabilities, ids, 1)
    return ids, kept, 1 - kept.sum(1)


def test_top_k_rows_against_brute_force() -> None:
    head, _ = random_model()
    utterances = random_utterances(10, seed=9)
    rows = hidden_rows(utterances, 9)
    stored = TopKFormat(16, SPEECH)
    targets = stored.decode(as_read_back(stored.encode(rows, head, utterances)), utterances, CPU)
    ids, kept, tail = exact_top_k(head(rows), 16)
    np.testing.assert_array_equal(np.sort(targets.ids_NK.numpy(), 1), np.sort(ids, 1))
    np.testing.assert_allclose(targets.log_probs_NK.exp().numpy(), kept, atol=0.012)
    np.testing.assert_allclose(targets.tail_log_mass_N.exp().numpy(), tail, atol=0.012)
    assert (targets.tail_log_mass_N <= 0).all()


@pytest.mark.parametrize("distance", [0.3, 1.5])
def test_top_k_gradient_points_where_the_exact_one_does(distance: float) -> None:
    head, _ = random_model()
    utterances = random_utterances(60, seed=10)
    rows = hidden_rows(utterances, 10)
    labels = torch.from_numpy(token_context(utterances, SPEECH)[1]) % SPEECH
    student = rows + distance * rows.std() * torch.randn(rows.shape, generator=torch.Generator().manual_seed(3))
    stored = TopKFormat(16, SPEECH)
    decoded = stored.decode(as_read_back(stored.encode(rows, head, utterances)), utterances, CPU)

    def gradient(targets: HiddenTargets | TopKTargets) -> torch.Tensor:
        leaf = student.clone().requires_grad_(True)
        distillation_loss(leaf, head, labels, targets, LossWeights(ce=0.0, hidden=0.0)).total.backward()
        assert leaf.grad is not None
        return leaf.grad.flatten()

    assert torch.cosine_similarity(gradient(decoded), gradient(HiddenTargets(rows)), dim=0) > 0.98


def test_top_k_of_cosyvoice_2_stays_below_48_bytes() -> None:
    """6,564 classes and ids that follow no pattern: the worst case for the ids' entropy coding."""
    vocabulary = 6564
    generator = torch.Generator().manual_seed(0)
    utterances = [np.zeros(99, np.int32)] * 8
    logits = torch.randn(100 * 8, vocabulary, generator=generator) * 3
    stored = TopKFormat(16, vocabulary)
    rows = stored.encode(logits, nn.Identity(), utterances)
    size = sum(len(pa.compress(b"".join(row[name] for row in rows), "zstd", asbytes=True)) for name in stored.columns)
    assert size / len(logits) < 48


@pytest.mark.parametrize("value", [7e4, float("nan"), float("inf")])
def test_values_beyond_half_precision_are_refused(quantized: QuantizedHiddenFormat, value: float) -> None:
    head, _ = random_model()
    utterances = [np.array([1, 2], np.int32)]
    rows = torch.zeros(3, WIDTH)
    rows[1, 2] = value
    for stored in (HiddenFormat(WIDTH), quantized, TopKFormat(4, SPEECH)):
        with pytest.raises(InputError, match="float16"):
            stored.encode(rows, head, utterances)


def test_more_classes_than_the_head_has_are_refused() -> None:
    with pytest.raises(InputError, match=r"top_k = 300 must be below the 300"):
        row_format({"kind": "topk", "top_k": 300}, WIDTH, SPEECH)
