"""What a worker of a cluster does with a call, without a cluster: the laws of the engine start one."""

from __future__ import annotations

import pickle
import sys

import pytest
import torch

from devec.core.errors import DevecError, InputError, RefusedError, UsageError
from devec.engine.ray import Cluster, _call, _Raised


def double(x: int) -> int:
    return 2 * x


def threads() -> int:
    return torch.get_num_threads()


def refuse(text: str) -> None:
    raise InputError(text, tensor="w", values={"then": (1, 2), "now": 3}, file="x.bin", remedy="Mend it.", passing=True)


def break_down() -> None:
    raise ZeroDivisionError("one over nothing")


def test_a_call_is_found_by_its_dotted_name_and_has_one_blas_thread() -> None:
    assert _call(f"{__name__}.double", (21,)) == 42
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert _call(f"{__name__}.threads", ()) == 1 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_error_comes_back_as_a_value_and_whole() -> None:
    """As a value, because Ray prints errors of calls that nobody waits for any more."""
    sent = pickle.loads(pickle.dumps(_call(f"{__name__}.refuse", ("the file ends",))))
    assert isinstance(sent, _Raised) and isinstance(sent.error, InputError)
    with pytest.raises(InputError) as raised:
        refuse("the file ends")
    assert sent.error.line() == raised.value.line() and sent.error.exit_code == 3 and sent.error.passing


def test_a_bug_in_a_worker_comes_back_with_its_traceback() -> None:
    sent = pickle.loads(pickle.dumps(_call(f"{__name__}.break_down", ())))
    assert isinstance(sent.error, ZeroDivisionError)
    assert "In a worker of the cluster" in sent.error.__notes__[0] and "in break_down" in sent.error.__notes__[0]


@pytest.mark.parametrize("kind", DevecError.__subclasses__())
def test_every_error_of_devec_can_be_sent(kind: type[DevecError]) -> None:
    error = kind("what", tensor="w", values={"a": 1}, file="f", remedy="Do.", passing=True)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is kind and vars(back) == vars(error) and str(back) == str(error)


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"needs the package ray.*devec\[ray\]"):
        Cluster()


def test_a_cluster_that_is_not_there_is_refused() -> None:
    ray = pytest.importorskip("ray")

    def refuse_to_start(**_: object) -> None:
        raise ConnectionError("no route\nand more")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", refuse_to_start)
        patch.setattr(ray, "is_initialized", lambda: False)
        with pytest.raises(RefusedError, match=r"no Ray cluster could be reached: address = 1\.2\.3\.4:6379") as error:
            Cluster("1.2.3.4:6379")
        assert "no route" in str(error.value) and "and more" not in str(error.value)
