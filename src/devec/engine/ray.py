"""Ray as the engine: the same calls, on the workers of a cluster. The only module that imports ray.

Calls are top-level functions with arguments that can be sent (paths, names, frozen choices). A call whose worker dies
is made again elsewhere, which is safe because a call writes the same bytes to the same place every time; an error that
a call raises is raised here, as it is.
"""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from devec.core.errors import RefusedError, UsageError

R = TypeVar("R")

RETRIES = 3
"""Times that a call is made again after its worker was lost."""

QUEUED = 4
"""Calls under way per worker: enough that none waits for the driver, few enough that an error stops soon."""


PATIENCE = 10.0
"""Seconds that an error or Ctrl-C waits for calls under way to end; they do at once, but in a long product."""


class Cluster:
    """A connection to Ray: to the cluster at ``address``, or to one that lives on this machine while it is open."""

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--executor ray needs the package ray", remedy="Install devec[ray].") from None
        self._ray: Any = ray
        self._workers = workers
        self._mine = not ray.is_initialized()
        if not self._mine:
            return
        local: dict[str, Any] = {} if address else {"num_cpus": workers, "include_dashboard": False}
        try:
            # Workers do what the driver does: one BLAS thread each, the driver's own import path.
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=False,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}},
                **local,
            )
        except Exception as error:
            raise RefusedError(
                "no Ray cluster could be reached" if address else "Ray did not start on this machine",
                values={"address": address or "local", "reason": _first_line(error)},
                remedy="Check --address and that the cluster runs the same versions, or use --executor threads.",
            ) from error

    def __enter__(self) -> Cluster:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mine:
            self._ray.shutdown()

    def map(self, function: Callable[..., R], calls: Sequence[tuple[Any, ...]]) -> Iterator[R]:
        """``function(*call)`` of every call, as they are finished."""
        ray = self._ray
        remote = ray.remote(max_retries=RETRIES, num_cpus=1)(_call)
        name = f"{function.__module__}.{function.__qualname__}"
        at_once = QUEUED * max(self._workers or int(ray.cluster_resources().get("CPU", 1)), 1)
        waiting: list[Any] = []
        left = iter(calls)
        try:
            while True:
                while len(waiting) < at_once and (call := next(left, None)) is not None:
                    waiting.append(remote.remote(name, call))
                if not waiting:
                    return
                ready, waiting = ray.wait(waiting, num_returns=1)
                yield self._result(ready[0])
        finally:
            self._end(waiting)

    def _end(self, waiting: list[Any]) -> None:
        """Call off what is under way and see it end: a call that runs on writes into a folder that is being removed."""
        if waiting:
            for reference in waiting:
                self._ray.cancel(reference, force=False)
            self._ray.wait(waiting, num_returns=len(waiting), timeout=PATIENCE)

    def _result(self, reference: Any) -> Any:
        ray = self._ray
        try:
            found = ray.get(reference)
        except ray.exceptions.RayTaskError:
            raise
        except ray.exceptions.RayError as error:
            raise RefusedError(
                f"a worker of the cluster was lost more than {RETRIES} times", values={"reason": _first_line(error)},
                remedy="Look at the cluster (memory?).", passing=True,
            ) from error
        if isinstance(found, _Raised):
            raise found.error
        return found


@dataclass(frozen=True)
class _Raised:
    """An error of a call, sent back as a value: Ray would print those that nobody waits for any more."""

    error: Exception


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """In a worker: find the function by its dotted name and call it."""
    from importlib import import_module

    from devec.linalg.numerics import one_blas_thread

    module, _, attribute = name.rpartition(".")
    try:
        with one_blas_thread():
            return getattr(import_module(module), attribute)(*arguments)
    except Exception as error:
        error.add_note(f"In a worker of the cluster:\n{traceback.format_exc()}")  # tracebacks are not sent
        return _Raised(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
