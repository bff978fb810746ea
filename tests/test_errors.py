"""How a verb ends when Ray itself fails."""

import sys

import pytest
import ray.exceptions

from mamtra_ray import errors
from mamtra_ray.errors import InputError, end_before_last_words, exit_code_2_on_input_error, explain_also
from mamtra_ray.runtime.cluster import lost_by_ray


def ending_with(error: Exception) -> int:
    @exit_code_2_on_input_error
    def main() -> int:
        raise error

    return main()


@pytest.mark.parametrize(
    "error",
    [
        ray.exceptions.ActorDiedError(),
        ray.exceptions.RaySystemError("the raylet\nis gone"),
        ray.exceptions.WorkerCrashedError(),
        ray.exceptions.ObjectLostError("1" * 56, None, ""),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_ray_lost_is_one_sentence_in_every_verb(error, capsys):
    explain_also(lost_by_ray)
    explain_also(lost_by_ray)
    assert ending_with(error) == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.count("\n") == 1
    assert found.err.startswith(f"error: Ray lost a process or a node that this run needs ({type(error).__name__}")
    assert found.err.endswith("goes on where it stopped\n")


def test_a_mistake_of_ours_keeps_its_traceback():
    explain_also(lost_by_ray)
    mistake = ray.exceptions.RayTaskError("f", "a traceback", ZeroDivisionError())
    for error in (ZeroDivisionError(), mistake, mistake.as_instanceof_cause()):
        with pytest.raises(type(error)):
            ending_with(error)


def test_ray_has_ended_before_the_last_line(monkeypatch, capsys):
    """It prints lines of its own as long as it lives."""
    monkeypatch.setattr(errors, "_endings", {})
    end_before_last_words(lambda: print("a worker died", file=sys.stderr))
    assert ending_with(InputError("no space left")) == 2
    assert capsys.readouterr().err.splitlines() == ["a worker died", "error: no space left"]
    monkeypatch.setattr(errors, "_endings", {})
    assert ending_with(InputError("no space left")) == 2
    assert capsys.readouterr().err.splitlines() == ["error: no space left"]
