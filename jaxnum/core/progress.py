"""Progress of compiled loops through a throttled host callback. Off by default."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kernels_pallas import checks


class Progress(NamedTuple):
    """One report: `step` of at most `max_steps`, the `residual` then, and whether the run is over (`done`)."""

    step: int
    max_steps: int
    residual: float
    done: bool


Hook = Callable[[Progress], object]

# A loop reports at most this many times, so that the callback costs a fast solver little ...
_REPORTS = 100
# ... and a hook is called at most this often, so that a slow terminal does not hold the device back.
_SECONDS = 0.1


def resolve(function: str, progress: Any) -> Hook | None:
    """The hook of an argument `progress`: None, "text", "tqdm" or a callable that takes a `Progress`."""
    if progress is None or callable(progress):
        return progress
    checks.choice(function, "progress", progress, (None, "text", "tqdm"))
    return _HOOKS[progress]


def announce(hook: Hook | None, max_steps: int) -> None:
    """Say from the host that a run begins, before anything is compiled."""
    if hook is not None:
        hook(Progress(0, max_steps, float("nan"), False))


def report(hook: Hook | None, step: jax.Array, max_steps: int, residual: jax.Array, done: jax.Array) -> None:
    """Report from compiled code, on every (max_steps / 100)-th step and at the end. Does nothing without a hook.

    Under vmap every lane reports for itself; hooks see the lanes interleaved.
    """
    if hook is None:
        return
    every = max(1, max_steps // _REPORTS)

    def call() -> None:
        jax.debug.callback(_Throttled.of(hook), step, max_steps, residual, done)

    jax.lax.cond((step % every == 0) | done, call, lambda: None)


class _Throttled:
    """Passes the first and the last report on, and between them at most one each `_SECONDS`."""

    _known: dict[Hook, _Throttled] = {}

    def __init__(self, hook: Hook):
        self._hook = hook
        self._last = 0.0
        self._lock = threading.Lock()

    @classmethod
    def of(cls, hook: Hook) -> _Throttled:
        return cls._known.setdefault(hook, cls(hook))

    def __call__(self, step: Any, max_steps: Any, residual: Any, done: Any) -> None:
        with self._lock:
            now = time.monotonic()
            if not (int(step) == 0 or bool(done) or now - self._last >= _SECONDS):
                return
            self._last = now
            self._hook(Progress(int(step), int(max_steps), float(residual), bool(done)))


def _text(report: Progress) -> None:
    state = "done" if report.done else ("starting" if report.residual != report.residual else "running")
    line = f"{state}: step {report.step} of at most {report.max_steps}, residual {report.residual:.3e}"
    sys.stderr.write(f"\r{line:<78}" + ("\n" if report.done else ""))
    sys.stderr.flush()


class _Tqdm:
    """One bar at a time; a finished run closes it, so lanes of a batch share one bar."""

    def __init__(self) -> None:
        self._bar: Any = None

    def __call__(self, report: Progress) -> None:
        from tqdm.auto import tqdm

        if self._bar is None:
            self._bar = tqdm(total=report.max_steps, unit="step")
        self._bar.n = max(self._bar.n, report.step)
        self._bar.set_postfix_str(f"residual {report.residual:.2e}", refresh=False)
        self._bar.refresh()
        if report.done:
            self._bar.close()
            self._bar = None


_HOOKS: dict[str, Hook] = {"text": _text, "tqdm": _Tqdm()}
