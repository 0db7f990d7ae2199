"""What one training step allocates, multiplies and sends, observed operation by operation.

The meter stands where torch dispatches its operations, below autograd, so that it sees fake tensors on a process group
that does not exist and real tensors on real ranks alike: a plan's figures and a run's come from one instrument. Memory
is that of tensor storages, from the operation that makes one to the last reference; what a kernel uses in between is
not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]  # no public way
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_EXCHANGING = frozenset({"c10d", "_c10d_functional", "fsdp"})
"""Namespaces of operations that send, or that pack and unpack what is sent."""

_KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "all_reduce": "all_reduce",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "reduce_": "reduce",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "all_to_all_single": "all_to_all",
}
"""Operations that move data, by what the field calls them; barriers move none."""


Use = Literal["activations", "exchange", "gradients"]
USES: tuple[Use, ...] = get_args(Use)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One message of a kind among a group of ranks.

    Attributes:
        kind: ``all_gather``, ``reduce_scatter``, ``all_reduce``, ``broadcast``, ``reduce`` or ``all_to_all``.
        ranks: who takes part, by global rank.
        message_bytes: the whole tensor: what every rank has after a gather, and before a scatter.
    """

    kind: str
    ranks: tuple[int, ...]
    message_bytes: int


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What a meter saw.

    Attributes:
        most: by use, the most memory that it held at once. ``activations`` are what is saved for backward and what one
            operation hands the next, gradients of parameters among it until they are exchanged or freed; ``exchange``
            are gathered parameters and buffers of reductions; ``gradients`` are those that stay until the update.
        at_peak: by use, what it held when all together held most.
        besides_gradients: by other uses, what it held when these together held most.
        left_bytes: what is still there of what the step made.
        flops: of matrix products, convolutions and attention, 2 a multiply-add, recomputation included.
        collectives: messages by kind, group and size, with how many there were.
    """

    most: Mapping[Use, int]
    at_peak: Mapping[Use, int]
    besides_gradients: Mapping[Use, int]
    left_bytes: int
    flops: int
    collectives: Counter[Collective]

    @property
    def peak_bytes(self) -> int:
        """Most memory that the step's own tensors held at once."""
        return sum(self.at_peak.values())


class Counts(NamedTuple):
    """What was computed and sent: floating-point operations, and messages with how many there were."""

    flops: int
    collectives: Counter[Collective]

    def since(self, earlier: Counts) -> Counts:
        """What of it came after ``earlier``."""
        return Counts(self.flops - earlier.flops, self.collectives - earlier.collectives)


def bytes_by_kind(collectives: Mapping[Collective, float]) -> dict[str, float]:
    """Bytes of messages by kind."""
    totals: dict[str, float] = {}
    for collective, times in collectives.items():
        totals[collective.kind] = totals.get(collective.kind, 0) + collective.message_bytes * times
    return totals


class StepMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """A context that meters everything computed in it; tensors that existed before do not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._timeline: list[tuple[int, int]] = []  # (storage, change of its bytes), in order
        self._live: dict[int, tuple[int, int]] = {}  # address of a storage to its number and size
        self._older: set[int] = set()  # addresses of storages that were there before, or are only borrowed
        self._uses: dict[int, Use] = {}  # by number of a storage, where it is not activations
        self._flops = 0
        self._collectives: Counter[Collective] = Counter()
        self._numbered = 0

    def __enter__(self) -> Self:
        self._resize = torch.UntypedStorage.resize_
        meter, resize = self, self._resize

        def observed(storage: torch.UntypedStorage, size: int) -> Any:
            # FSDP frees and restores gathered parameters by resizing their storage, which is no operation.
            before = storage.nbytes()
            result = resize(storage, size)
            meter._change(storage, before)
            return result

        torch.UntypedStorage.resize_ = observed  # type: ignore[method-assign,assignment]  # while the context lasts
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]  # as it was
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch's

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operation and note what it did."""
        if func is torch.ops.prim.device.default:
            return func(*args)  # most of what autograd asks of fake tensors, and nothing is computed
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it splits into operations on shards, which come here one by one
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        for tensor in given:
            if isinstance(tensor, nn.Parameter):
                self._use(tensor, "exchange")  # a parameter that is there for a while has been gathered
            address = tensor.untyped_storage()._cdata
            if address not in self._live and address not in self._older:
                self._remember(tensor.untyped_storage())
        result = func(*args, **kwargs)
        made = _tensors(result)
        for tensor in made:
            self._register(tensor.untyped_storage())
        formula = _flops_formula(func._overloadpacket)
        if formula is not None:
            self._flops += formula(*args, **kwargs, out_val=result)
        if func.namespace in _EXCHANGING:
            self._exchange(func, args, [*given, *made])
        return result

    def counts(self) -> Counts:
        """Return what was computed and sent so far."""
        return Counts(self._flops, Counter(self._collectives))

    def readings(self) -> Readings:
        """Return what was seen so far."""
        now: dict[Use, int] = dict.fromkeys(USES, 0)
        most, at_peak, besides = dict(now), dict(now), dict(now)
        for number, change in self._timeline:
            use = self._uses.get(number, "activations")
            now[use] += change
            most[use] = max(most[use], now[use])
            if sum(now.values()) > sum(at_peak.values()):
                at_peak = dict(now)
            if now["activations"] + now["exchange"] > besides["activations"] + besides["exchange"]:
                besides = dict(now) | {"gradients": 0}
        return Readings(
            most=most,
            at_peak=at_peak,
            besides_gradients=besides,
            left_bytes=sum(now.values()),
            flops=self._flops,
            collectives=Counter(self._collectives),
        )

    def keep(self, gradients: Iterable[Tensor]) -> None:
        """Tell which tensors are gradients that stay until the update, once they are there."""
        for tensor in gradients:
            self._use(tensor, "gradients")

    def _register(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now to its end, if this step made it."""
        address = storage._cdata
        if address in self._live or address in self._older:
            return
        self._timeline.append((self._follow(storage, storage.nbytes()), storage.nbytes()))

    def _follow(self, storage: torch.UntypedStorage, size: int) -> int:
        """Number a storage of this size, and follow it to its end."""
        number, self._numbered = self._numbered, self._numbered + 1
        self._live[storage._cdata] = (number, size)
        weakref.finalize(storage, self._end, storage._cdata)
        return number

    def _remember(self, storage: torch.UntypedStorage) -> None:
        """Leave a storage that was there before out of account, until its address may be another's."""
        self._older.add(storage._cdata)
        weakref.finalize(storage, self._older.discard, storage._cdata)

    def _change(self, storage: torch.UntypedStorage, before: int) -> None:
        """Count what a storage grows or shrinks by; one that was there before is a gathered parameter's."""
        address, size = storage._cdata, storage.nbytes()
        if address not in self._live:
            self._older.discard(address)
            self._uses[self._follow(storage, before)] = "exchange"
        number, _ = self._live[address]
        self._live[address] = (number, size)
        self._timeline.append((number, size - before))

    def _end(self, address: int) -> None:
        number, size = self._live.pop(address)
        self._timeline.append((number, -size))

    def _exchange(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        for tensor in tensors:
            self._use(tensor, "exchange")
        kind = _KINDS.get(func._overloadpacket.__name__)
        if kind is not None:
            self._collectives[_collective(kind, args)] += 1

    def _use(self, tensor: Tensor, use: Use) -> None:
        entry = self._live.get(tensor.untyped_storage()._cdata)
        if entry is not None:
            self._uses[entry[0]] = use


def _collective(kind: str, args: tuple[Any, ...]) -> Collective:
    """Describe a message by the arguments of its operation: a gather's result and a scatter's source are the larger."""
    parts = [sum(map(_bytes, _tensors(part))) for part in args]
    return Collective(kind=kind, ranks=_ranks(args), message_bytes=max(parts))


def _ranks(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Find the process group among an operation's arguments: an object, or its name where it comes last."""
    for part in args:
        if isinstance(part, torch.ScriptObject) and "ProcessGroup" in str(part._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(part)))
    return tuple(dist.get_process_group_ranks(_resolve_process_group(args[-1])))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(values: Any) -> list[Tensor]:
    """Tensors that have memory, or pretend to: fake ones do, bare meta ones do not."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return [tensor for tensor in tensors if isinstance(tensor, FakeTensor) or tensor.device.type != "meta"]


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *unused: Any, **ignored: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]  # torch's


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *unused: Any, **ignored: Any
) -> int:
    shapes = (gradient.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]  # torch's


_ATTENTION_ON_THE_CPU: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Kernels that torch's own table of formulas lacks."""


def _flops_formula(operation: Any) -> Any:
    """Find how an operation's FLOPs are counted; models register their own operations whenever they are imported."""
    return flop_registry.get(operation) or _ATTENTION_ON_THE_CPU.get(operation)
