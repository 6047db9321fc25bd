"""Count what the backend compiles, through JAX's public monitoring events."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration: float, **_: object) -> None:
    global _count
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextmanager
def count_compiles() -> Iterator[Callable[[], int]]:
    """Yields a function that says how many programs have been compiled since the block began."""
    start = _count
    yield lambda: _count - start
