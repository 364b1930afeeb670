"""The journals of all ranks -> what NCCL would not forgive: operations that do not match, and
waiting in a circle.

A kernel of a communicator starts when all before it on its stream are done, and so is what the host
had enqueued to compute; it ends together with its partners' kernels. (NCCL buffers small messages,
which would hide faults.) The first use of a communicator is a meeting of its hosts. If these
dependencies have a circle, the ranks hang.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.rehearsal.journal import Entry, HostWait, Operation, Wait

Streams = Literal["pairs", "groups", "one"]
"""pairs: a stream for each group and for each pair that sends unbatched (torch's lazy mode).
groups: one for each group (its eager mode). one: a single hardware queue for all
(CUDA_DEVICE_MAX_CONNECTIONS=1)."""
Node = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Communicator:
    group: str
    ranks: tuple[int, ...]
    is_pair: bool


def problems(journals: Sequence[Sequence[Entry]], *, streams: Streams = "pairs") -> list[str]:
    """What is wrong; empty if nothing is. journals: of the ranks, in rank order."""
    calls: dict[Communicator, dict[int, list[Operation]]] = defaultdict(lambda: defaultdict(list))
    for rank, journal in enumerate(journals):
        for entry in journal:
            if isinstance(entry, Operation):
                calls[_communicator(rank, entry)][rank].append(entry)
    found = [
        text
        for communicator, by_rank in calls.items()
        for text in _mismatches(communicator, by_rank)
    ]
    return found or _circle(_dependencies(journals, _kernels(calls), streams))


def communicators(journal: Sequence[Entry], rank: int) -> set[Communicator]:
    """What this rank has opened: NCCL makes a communicator when it is used first, which blocks its
    hosts, without a time limit, until all of them are there.
    """
    return {_communicator(rank, entry) for entry in journal if isinstance(entry, Operation)}


def queued_behind(journal: Sequence[Entry], rank: int) -> dict[str, set[str]]:
    """Step -> places of operations that are waited for at once, although the communicator is still
    busy with earlier ones that nothing waits for yet.
    """
    found: dict[str, set[str]] = defaultdict(set)
    running: dict[Communicator, dict[int, Operation]] = defaultdict(dict)
    for entry, following in zip(journal, [*journal[1:], None], strict=True):
        if isinstance(entry, Wait):
            for operations in running.values():
                operations.pop(entry.number, None)
        elif isinstance(entry, Operation):
            others = running[_communicator(rank, entry)]
            if following == Wait(entry.number) and others:
                earlier = next(iter(others.values()))
                found[entry.step].add(
                    f"{entry.kind} at {entry.where}, behind {earlier.kind} at {earlier.where}"
                )
            others[entry.number] = entry
    return dict(found)


def _communicator(rank: int, operation: Operation) -> Communicator:
    if operation.peer is None:
        return Communicator(operation.group, operation.ranks, is_pair=False)
    return Communicator(
        operation.group, (min(rank, operation.peer), max(rank, operation.peer)), is_pair=True
    )


def _kernels(
    calls: Mapping[Communicator, Mapping[int, Sequence[Operation]]],
) -> dict[tuple[int, int], Node]:
    """(rank, number) -> the kernel that all partners of the operation share."""
    return {
        (rank, operation.number): ("kernel", communicator, index)
        for communicator, by_rank in calls.items()
        for rank, operations in by_rank.items()
        for index, operation in enumerate(operations)
    }


def _mismatches(
    communicator: Communicator, by_rank: Mapping[int, Sequence[Operation]]
) -> list[str]:
    counts = {rank: len(by_rank[rank]) for rank in communicator.ranks}
    found = (
        [f"{communicator}: operations by rank {counts}"] if len(set(counts.values())) > 1 else []
    )
    for index in range(min(counts.values())):
        operations = {rank: by_rank[rank][index] for rank in communicator.ranks}
        if why := _mismatch(communicator, operations):
            found.append(
                "\n    ".join(
                    [
                        f"{communicator}, operation {index}: {why}",
                        *(f"rank {r}: {op}" for r, op in operations.items()),
                    ]
                )
            )
    return found


def _mismatch(communicator: Communicator, operations: Mapping[int, Operation]) -> str:
    """Why these operations of its ranks, which NCCL takes for one, are not."""
    kinds = {operation.kind for operation in operations.values()}
    if communicator.is_pair and kinds != {"send", "recv"}:
        return f"both {kinds}"
    if not communicator.is_pair and len(kinds) > 1:
        return f"different kinds {kinds}"
    if len({operation.dtype for operation in operations.values()}) > 1:
        return "different dtypes"
    check = CHECKS.get(next(iter(kinds)))
    if check is not None:
        return check(communicator.ranks, operations)
    return (
        "different sizes"
        if len({operation.elements for operation in operations.values()}) > 1
        else ""
    )


def _all_to_all(ranks: Sequence[int], operations: Mapping[int, Operation]) -> str:
    for i, one in enumerate(ranks):
        for j, other in enumerate(ranks):
            sent, received = operations[one].sent, operations[other].received
            if sent and received and sent[j] != received[i]:
                return f"rank {one} sends {sent[j]} to {other}, which expects {received[i]}"
    return ""


def _batch(ranks: Sequence[int], operations: Mapping[int, Operation]) -> str:
    for rank, operation in operations.items():
        for kind, peer, elements in operation.messages:
            partner = ("recv" if kind == "send" else "send", rank, elements)
            if partner not in operations[peer].messages:
                return (
                    f"rank {rank} has a {kind} of {elements} with {peer}, which has no partner "
                    "for it"
                )
    return ""


def _broadcast(ranks: Sequence[int], operations: Mapping[int, Operation]) -> str:
    if len({operation.elements for operation in operations.values()}) > 1:
        return "different sizes"
    return (
        "different sources"
        if len({operation.source for operation in operations.values()}) > 1
        else ""
    )


CHECKS: Mapping[str, Callable[[Sequence[int], Mapping[int, Operation]], str]] = {
    "all_to_all": _all_to_all,
    "batch": _batch,
    "broadcast": _broadcast,
}


def _dependencies(
    journals: Sequence[Sequence[Entry]], kernels: Mapping[tuple[int, int], Node], streams: Streams
) -> dict[Node, set[Node]]:
    """Node -> what waits for it. Nodes: kernels, meetings, and moments of each rank's host and
    computing stream.
    """
    waiting: dict[Node, set[Node]] = defaultdict(set)
    for rank, journal in enumerate(journals):
        _Rank(rank, kernels, streams, waiting).follow(journal)
    return waiting


class _Rank:
    """One rank's part of the dependencies."""

    def __init__(
        self,
        rank: int,
        kernels: Mapping[tuple[int, int], Node],
        streams: Streams,
        waiting: dict[Node, set[Node]],
    ) -> None:
        self._rank, self._kernels, self._streams, self._waiting = rank, kernels, streams, waiting
        self._host: Node = ("host", rank, 0)
        self._computing: Node = ("computing", rank, 0)
        self._last: dict[object, Node] = {}
        self._met: set[Communicator] = set()

    def follow(self, journal: Sequence[Entry]) -> None:
        for moment, entry in enumerate(journal, 1):
            if isinstance(entry, HostWait):
                self._host = self._after(
                    self._host, self._computing, new=("host", self._rank, moment)
                )
            elif isinstance(entry, Wait):
                kernel = self._kernels[self._rank, entry.number]
                self._computing = self._after(
                    self._computing, kernel, new=("computing", self._rank, moment)
                )
            else:
                self._enqueue(entry, moment)

    def _enqueue(self, operation: Operation, moment: int) -> None:
        communicator = _communicator(self._rank, operation)
        if communicator not in self._met:
            self._met.add(communicator)
            meeting: Node = ("meeting", communicator)
            self._waiting[self._host].add(meeting)
            self._host = self._after(meeting, new=("host", self._rank, moment))
        kernel = self._kernels[self._rank, operation.number]
        stream = {"pairs": communicator, "groups": communicator.group, "one": ""}[self._streams]
        before = [self._last[stream]] if stream in self._last else []
        self._last[stream] = self._after(self._host, self._computing, *before, new=kernel)

    def _after(self, *nodes: Node, new: Node) -> Node:
        for node in nodes:
            self._waiting[node].add(new)
        return new


def _circle(waiting: Mapping[Node, set[Node]]) -> list[str]:
    """The nodes of one circle, if there is one."""
    before: dict[Node, set[Node]] = defaultdict(set)
    for node, others in waiting.items():
        for other in others:
            before[other].add(node)
    left = {node: len(before[node]) for node in {*waiting, *before}}
    free = [node for node, count in left.items() if not count]
    while free:
        node = free.pop()
        del left[node]
        for other in waiting.get(node, ()):
            left[other] -= 1
            if not left[other]:
                free.append(other)
    if not left:
        return []
    path = [next(iter(left))]
    while (node := next(each for each in before[path[-1]] if each in left)) not in path:
        path.append(node)
    nodes = [str(each) for each in path[path.index(node) :] if each[0] != "computing"]
    return [f"waiting in a circle: {' <- '.join(nodes)}"[:1000]]
