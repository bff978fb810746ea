"""The how-to for another speech model: its code block is run, on a model with the id order it describes."""

import re
from pathlib import Path

import pytest
import torch
from tiny_models import transformers_model

from mamtra_ray.errors import InputError
from mamtra_ray.speech_lm.generate import GREEDY, generate
from mamtra_ray.speech_lm.student import make_student
from mamtra_ray.teachers import load_teacher

GUIDE = Path(__file__).parent.parent / "docs" / "new_teacher.md"


def test_the_module_of_the_guide_reads_its_model(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert len(source.splitlines()) < 50
    (tmp_path / "guide_teacher.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for kind in ("qwen2", "llama"):
        # Six ids more than text and codes: real vocabularies are padded to a round number.
        upstream = transformers_model(kind, vocab_size=70)
        upstream.save_pretrained(tmp_path / kind)
        teacher = load_teacher("guide_teacher:load", tmp_path / kind)

        input_ids, labels = teacher.sequence.training_example([4, 5, 6], [0, 23, 7])
        assert input_ids.tolist() == [36, 4, 5, 6, 37, 40, 63, 47] and labels.tolist()[-4:] == [0, 23, 7, 24]
        with torch.no_grad():
            theirs = upstream(input_ids[None]).logits[0]
            torch.testing.assert_close(
                teacher.model(input_ids[None])[0], theirs[:, [*range(40, 64), 38]], rtol=1e-4, atol=1e-5
            )
        prompt = teacher.sequence.prompt([4, 5, 6])
        for model in (teacher.model, make_student(teacher.model, "AMAM")):
            (result,) = generate(model, [prompt], [teacher.length_bounds([4, 5, 6])], GREEDY)
            assert 6 <= len(result.tokens) <= 90 and max(result.tokens) < 24


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("no_such_module:load", r"cannot be imported \(No module named 'no_such_module'\).*PYTHONPATH"),
        ("json:load_teacher", "has no attribute 'load_teacher'; expected is MODULE:FUNCTION"),
        ("math:pi", "is no function but float"),
        ("builtins:print", "must return a Teacher, not NoneType"),
        (":load", "Empty module name|cannot be imported"),
        ("json:", "expected is MODULE:FUNCTION"),
        ("guide", "MODULE:FUNCTION of your own"),
    ],
)
def test_what_is_no_loader_is_one_sentence(tmp_path, kind, problem):
    with pytest.raises(InputError, match=problem) as caught:
        load_teacher(kind, tmp_path)
    assert "\n" not in str(caught.value)
