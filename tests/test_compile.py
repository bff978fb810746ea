"""`distill.compile`: the same training, the same names, and a refusal where there is no compiler."""

import pytest
import torch
from test_training import CONFIG, CPU, make_batch, student_of, teacher  # noqa: F401 (a fixture)

from mamtra_ray.distill import compilation
from mamtra_ray.distill.training import Distillation
from mamtra_ray.errors import InputError
from mamtra_ray.runtime import compiler
from mamtra_ray.speech_lm.speech_lm import SpeechLM


def trained(teacher, tmp_path, **changes):  # noqa: F811
    """Losses and weights after three steps of other lengths each, with a stop after the second."""
    batches = [make_batch(teacher, lengths, seed) for seed, lengths in enumerate([(9, 4), (5, 7, 6), (12,)])]
    config = CONFIG.model_copy(update=changes)
    first = Distillation(student_of(teacher), config, 100, CPU)
    curve = [first.step(batch).read() for batch in batches[:2]]
    first.save(tmp_path)
    second = Distillation(student_of(teacher), config, 100, CPU)
    second.load(tmp_path)
    curve.append(second.step(batches[2]).read())
    held_out = second.validate(lambda: batches)
    second.save(tmp_path)
    return curve, held_out, SpeechLM.load(tmp_path / "student").state_dict()


@pytest.mark.slow
# Inductor imports a module of torch's own that is deprecated.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
@pytest.mark.parametrize(("backend", "is_checkpointed"), [("eager", False), ("aot_eager", True), ("inductor", False)])
def test_a_compiled_training_is_the_same_training(teacher, tmp_path, monkeypatch, backend, is_checkpointed):  # noqa: F811
    monkeypatch.setattr(compilation, "BACKEND", backend)
    curve, held_out, weights = trained(teacher, tmp_path / "plain")
    torch.compiler.reset()
    compiled = trained(teacher, tmp_path / "compiled", compile=True, activation_checkpointing=is_checkpointed)
    for point, other in zip(curve, compiled[0], strict=True):
        assert other == pytest.approx(point, rel=1e-4)
    assert (compiled[1].ce, compiled[1].kl) == pytest.approx((held_out.ce, held_out.kl), rel=1e-4)
    assert list(compiled[2]) == list(weights), "names and their order"
    for name, weight in weights.items():
        torch.testing.assert_close(compiled[2][name], weight, rtol=0, atol=1e-3, msg=name)


def test_layers_are_compiled_and_the_scan_is_not(teacher, monkeypatch):  # noqa: F811
    seen: list[torch.fx.GraphModule] = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(compilation, "BACKEND", backend)
    torch.compiler.reset()
    plain = Distillation(student_of(teacher), CONFIG, 100, CPU)
    training = Distillation(student_of(teacher), CONFIG.model_copy(update={"compile": True}), 100, CPU)
    counts = []
    for lengths in ((9, 4), (5, 7, 6), (12, 3), (8, 8, 8, 8), (7, 3, 2, 9, 4), (15, 11), (6, 2, 10)):
        batch = make_batch(teacher, lengths, 0)
        assert training.step(batch).read() == pytest.approx(plain.step(batch).read(), rel=1e-4)
        counts.append(len(seen))
    assert 3 <= counts[0] <= 6, "of an attention layer, and two of a Mamba layer; others where an input has no gradient"
    assert counts[-1] == counts[3] <= counts[0] + 2, "other lengths soon need no other graphs"
    assert not any("bmm" in str(node.target) for graph in seen for node in graph.graph.nodes)


def test_without_a_compiler_it_is_refused_in_a_sentence(teacher, monkeypatch):  # noqa: F811
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(compiler.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match=r"distill.compile=true needs a C\+\+ compiler, and there is no g\+\+"):
        Distillation(student_of(teacher), CONFIG.model_copy(update={"compile": True}), 100, CPU)
    with pytest.raises(InputError, match="needs a C compiler, and there is no gcc or clang"):
        compiler.check_compiler(is_cuda=True)
    monkeypatch.undo()
    monkeypatch.setattr(compiler.sysconfig, "get_path", lambda _: "/nowhere")
    with pytest.raises(InputError, match="Python's headers"):
        compiler.check_compiler(is_cuda=False)
