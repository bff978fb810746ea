"""Tasks spread over Ray actors: the one form of it that the probe and the evaluation use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import ray

from mamtra_ray.errors import InputError

Task = TypeVar("Task")
RESTARTS = 3
"""How often Ray starts an actor again whose process or node died, and its task with it."""


class ActorPool:
    """Actors of one class that take tasks as they become free.

    ``ray.util.ActorPool`` gives a task to an actor that still waits for a CPU or loads its model, where it lies while
    others are idle; this one asks each actor for ``prepare()`` first.

    Args:
        actor_class: a plain class; ``prepare()`` loads what takes long. (Errors of ``__init__`` reach the driver
            without their type.)
        arguments: of its ``__init__``.
        options: for ``ray.remote``.
        size: actors at most.
    """

    def __init__(self, actor_class: type, arguments: tuple[Any, ...], options: dict[str, Any], size: int) -> None:
        if size < 1:
            raise InputError(f"no worker fits into the cluster: it needs {options}, there is {ray.cluster_resources()}")
        remote: Any = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **options)(actor_class)
        self._start = lambda: remote.remote(*arguments)
        self._size = size
        self._actors: list[Any] = []

    def __enter__(self) -> ActorPool:
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def map_unordered(self, call: Callable[[Any, Task], Any], tasks: Iterable[Task]) -> Iterator[tuple[Task, Any]]:
        """Yield ``(task, result)`` in the order in which they finish; ``call(actor, task)`` submits one.

        Raises:
            InputError: as an actor or a task raised it, without Ray's traceback.
        """
        waiting: deque[Task] = deque(tasks)
        unfinished = len(waiting)
        self._grow(unfinished)
        running: dict[Any, tuple[Any, Sequence[Task]]] = {actor.prepare.remote(): (actor, ()) for actor in self._actors}
        while unfinished:
            (reference,), _ = ray.wait(list(running), num_returns=1)
            actor, done = running.pop(reference)
            result = result_of(reference)
            if waiting:
                following = waiting.popleft()
                running[call(actor, following)] = (actor, (following,))
            for task in done:
                unfinished -= 1
                yield task, result

    def _grow(self, useful: int) -> None:
        while len(self._actors) < min(self._size, useful):
            self._actors.append(self._start())


def result_of(reference: Any) -> Any:
    """What a Ray task returned; an :class:`InputError` of its own is raised as it was, without Ray's traceback."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise type(error.cause)(str(error.cause)) from None
        raise
