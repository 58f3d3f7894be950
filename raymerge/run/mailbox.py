"""What workers on any node tell the driver while it waits for them: an actor on the driver's node takes it in."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

# Between two looks for what has come.
LOOK_SECONDS = 0.2


class Mailbox:
    """Letters in the order they came. Workers put them, the driver takes them."""

    def __init__(self) -> None:
        self._letters: list[Any] = []

    def put(self, letter: Any) -> None:
        self._letters.append(letter)

    def take(self) -> list[Any]:
        """All that has come since the last call."""
        letters, self._letters = self._letters, []
        return letters


@contextmanager
def open_mailbox(receive: Callable[[Any], None]) -> Iterator[Any]:
    """The handle of a mailbox, for workers; `receive` is called for each letter, in a thread, until the end."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    box = ray.remote(num_cpus=0, scheduling_strategy=here)(Mailbox).remote()
    over = Event()

    def listen() -> None:
        ended = False
        while not ended:
            ended = over.wait(LOOK_SECONDS)
            for letter in ray.get(box.take.remote()):
                receive(letter)

    thread = Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield box
    finally:
        over.set()
        thread.join()
        ray.kill(box)
