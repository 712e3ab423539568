"""transformers without those of its parts that only compile, distribute or train.

A third of the time that importing transformers' models takes goes into torch's compiler, its distributed
tensors and SciPy, of which serving calls nothing: a decorator for the compiler, a type to compare with, a
loss for detecting objects (docs/log.md).
"""

import sys
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo"
#: Has a context manager that masks of some models are made in.
_TRACING = "torch._dynamo._trace_wrapped_higher_order_op"


def import_for_serving() -> None:
    """Import what every server stands on, before any other module of ours does: without progress bars, and
    without a sample of when each metric began."""
    import_transformers()
    import prometheus_client
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


def import_transformers() -> None:
    """Import what serves models, where nothing has imported it yet.

    Only while this runs is transformers told that SciPy and torch's distributed package are absent, as they
    are on some machines, and that nothing is to be said to the compiler. Who calls for them later finds them.
    """
    if "transformers.modeling_utils" in sys.modules:
        return
    import torch
    import transformers
    from transformers import utils
    from transformers.utils import import_utils

    with ExitStack() as told:
        define = _defined_once(transformers, import_utils.define_import_structure)
        told.enter_context(_in_place(vars(import_utils), "define_import_structure", define))
        for module in (utils, import_utils):
            told.enter_context(_in_place(vars(module), "is_scipy_available", _no))
            told.enter_context(_in_place(vars(module), "is_torch_distributed_available", _no))
        if _COMPILER not in sys.modules:
            nothing = _NoCompiler(_COMPILER)
            told.enter_context(_in_place(sys.modules, _COMPILER, nothing))
            told.enter_context(_in_place(vars(torch), "_dynamo", nothing))
            told.enter_context(_in_place(sys.modules, _TRACING, _Tracing(_TRACING)))
        # A release that cannot do without them is imported as usual, by whoever needs it.
        with suppress(Exception):
            import transformers.generation.utils
            import transformers.modeling_utils


def _defined_once(package: ModuleType, define: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' `define_import_structure`, without reading the files of all models a second time.

    `transformers` and `transformers.models` both look through 1,700 files for what they define. The first has
    done so when this is called.
    """
    models = Path(package.__file__ or "").with_name("models")
    known = {
        name.removeprefix("models."): set(found)
        for name, found in getattr(package, "_import_structure", {}).items()
        if name.startswith("models.")
    }

    def define_import_structure(place: str | Path, prefix: str | None = None) -> Any:
        if known and prefix is None and Path(place) == models / "__init__.py":
            return {frozenset(): known}
        return define(place, prefix)

    return define_import_structure


class _NoCompiler(ModuleType):
    """A compiler whose decorators change nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _undecorated


class _Tracing(ModuleType):
    """The module of that context manager, which loads the compiler when it is entered."""

    class TransformGetItemToIndex:
        def __enter__(self) -> Any:
            self._real = import_module(_TRACING).TransformGetItemToIndex()
            return self._real.__enter__()

        def __exit__(self, *reason: object) -> Any:
            return self._real.__exit__(*reason)


def _undecorated(*arguments: Any, **_: Any) -> Any:
    """A decorator, used with or without arguments of its own."""
    return arguments[0] if arguments and callable(arguments[0]) else _undecorated


def _no() -> bool:
    return False


@contextmanager
def _in_place(names: MutableMapping[str, Any], name: str, value: object) -> Iterator[None]:
    """`names[name]` as `value`, and as it was before afterwards."""
    before = names.get(name)
    names[name] = value
    try:
        yield
    finally:
        names.pop(name)
        if before is not None:
            names[name] = before
