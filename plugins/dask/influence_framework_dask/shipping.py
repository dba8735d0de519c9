"""What every worker holds once, such as the fitted model, and references to it in all else that is sent."""

from __future__ import annotations

import io
import pickle
import threading
import uuid
import weakref
from dataclasses import dataclass, field
from typing import Any

import cloudpickle
from distributed import Client, Worker, WorkerPlugin
from torch import Tensor

from influence_framework.errors import InvalidInputError
from influence_framework.fitted import Fitted

WORK = threading.RLock()
"""Held while a process computes: the model, and PyTorch's choice of kernels, are shared by its threads."""


@dataclass
class _Held:
    content: bytes
    holders: int = 0
    value: Any = None
    opened: bool = False


_held: dict[str, _Held] = {}
_tokens: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
_guard = threading.RLock()


def token_of(thing: Any) -> str:
    """A name for this very object, the same as long as it lives."""
    with _guard:
        return _tokens.setdefault(thing, uuid.uuid4().hex)


def resolve(token: str) -> Any:
    """The object of that name in this process, made when it is first asked for.

    Raises:
        InvalidInputError: It was not sent here.
    """
    with WORK:
        held = _held.get(token)
        if held is None:
            raise InvalidInputError(
                "The model is not on this worker: make the calculator with client=... of the cluster that "
                "computes, and keep model and client until it is done."
            )
        if not held.opened:
            held.value, held.opened = loads(held.content), True
        return held.value


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes a name in place of a fitted model."""

    def __init__(self, file: io.BytesIO, whole: Any) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.whole = whole
        self.models: dict[str, Fitted] = {}

    def persistent_id(self, thing: Any) -> str | None:
        """Its name, where ``thing`` is a fitted model inside of what is sent."""
        if not isinstance(thing, Fitted) or thing is self.whole:
            return None
        token = token_of(thing)
        self.models[token] = thing
        return token

    def reducer_override(self, thing: Any) -> Any:
        """How ``thing`` is pickled: a view without the rest of what it is a view of."""
        if type(thing) is Tensor and thing.untyped_storage().nbytes() > thing.numel() * thing.element_size():
            return thing.detach().clone().__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        return super().reducer_override(thing)


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, token: Any) -> Any:
        """The object of that name."""
        return resolve(token)


def dumps(thing: Any) -> tuple[bytes, dict[str, Fitted]]:
    """``thing`` as bytes, and the fitted models within it that stand there by name."""
    file = io.BytesIO()
    pickler = _Pickler(file, thing)
    pickler.dump(thing)
    return file.getvalue(), pickler.models


def loads(content: bytes) -> Any:
    """What :func:`dumps` wrote."""
    return _Unpickler(io.BytesIO(content)).load()


class Held(WorkerPlugin):
    """Has every worker, present and future ones, hold an object; the scheduler keeps it for those to come."""

    def __init__(self, token: str, content: bytes) -> None:
        self.token = token
        self.content = content
        self.name = f"influence-{token}"

    def setup(self, worker: Worker) -> None:
        """Keep it."""
        with _guard:
            _held.setdefault(self.token, _Held(self.content)).holders += 1

    def teardown(self, worker: Worker) -> None:
        """Let go of it; several workers may share this process."""
        with _guard:
            held = _held.get(self.token)
            if held is not None:
                held.holders -= 1
                if held.holders <= 0:
                    del _held[self.token]


_shipped: weakref.WeakKeyDictionary[Client, set[str]] = weakref.WeakKeyDictionary()


def ship(client: Client, thing: Any) -> str:
    """Send ``thing``, and the fitted models within it, to every worker, unless they were sent; its name.

    It stays there until ``thing`` or the client is gone, or :func:`recall` is called.
    """
    token = token_of(thing)
    shipped = _shipped.setdefault(client, set())
    if token in shipped:
        return token
    content, models = dumps(thing)
    for model in models.values():
        ship(client, model)
    client.register_plugin(Held(token, content))
    shipped.add(token)
    weakref.finalize(thing, _release, weakref.ref(client), token).atexit = False
    return token


def recall(client: Client, token: str) -> None:
    """Have every worker let go of the object of that name."""
    shipped = _shipped.get(client, set())
    if token in shipped:
        shipped.discard(token)
        if client.status == "running":
            client.unregister_worker_plugin(f"influence-{token}")


def _release(reference: weakref.ref[Client], token: str) -> None:
    """:func:`recall` from wherever garbage is collected, the client's own thread included: without waiting."""
    client = reference()
    if client is None or token not in _shipped.get(client, set()):
        return
    _shipped[client].discard(token)
    if client.status == "running" and client.loop is not None:
        client.loop.add_callback(_unregister, client, f"influence-{token}")


async def _unregister(client: Client, name: str) -> None:
    if client.scheduler is not None:
        await client.scheduler.unregister_worker_plugin(name=name)


@dataclass(frozen=True, eq=False)
class Reference:
    """An object that tasks refer to: itself in this process, the one held under its name in another."""

    token: str
    thing: Any = field(default=None, repr=False)

    @classmethod
    def to(cls, thing: Any, client: Client | None) -> Reference:
        """A reference that workers of ``client`` can resolve."""
        return cls(token_of(thing) if client is None else ship(client, thing), thing)

    def resolve(self) -> Any:
        """The object."""
        return resolve(self.token) if self.thing is None else self.thing

    def __reduce__(self) -> tuple[type[Reference], tuple[str]]:
        return Reference, (self.token,)

    def __dask_tokenize__(self) -> str:
        return self.token
