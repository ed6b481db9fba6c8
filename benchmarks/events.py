"""Jobs on a cluster, event by event: stations with queues, and admission by memory.

A job passes its stages one after another; a stage occupies one server of a station for a time. A station of scope
"cluster" exists once (the coordinator, a shared file system), one of scope "node" on every node. Queues are first come,
first served. A job is admitted, in order, to the node with the fewest jobs in flight whose memory holds it. Nothing is
random: the same jobs give the same times.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal, NamedTuple

LONGEST, MEMORY = "longest job", "memory"


class Stage(NamedTuple):
    station: str
    seconds: float


@dataclass(frozen=True)
class Job:
    """``memory`` is held from admission to the end; ``needs`` are positions of earlier jobs that must end first."""

    name: str
    stages: tuple[Stage, ...]
    memory: float = 0.0
    needs: tuple[int, ...] = ()


@dataclass(frozen=True)
class Station:
    servers: int
    scope: Literal["cluster", "node"] = "node"


@dataclass(frozen=True)
class Outcome:
    """``busy`` server-seconds of each station over the whole cluster, ``servers`` how many there are of it; ``longest``
    the seconds of the longest job with what it needs, alone on the cluster; ``refused`` the seconds during which the
    next job waited for memory and for nothing else."""

    makespan: float
    longest: float
    refused: float
    busy: Mapping[str, float]
    servers: Mapping[str, int]
    peak_memory: float
    ended: tuple[float, ...]

    def utilisation(self, station: str) -> float:
        return self.busy[station] / (self.servers[station] * self.makespan) if self.makespan else 0.0

    def bound(self, station: str) -> float:
        """Seconds that this station alone needs: no schedule is shorter."""
        return self.busy[station] / self.servers[station]

    @property
    def least(self) -> float:
        """A bound on any schedule: the station that needs longest, or the longest job."""
        return max(self.longest, *(self.bound(name) for name in self.busy))

    @property
    def bottleneck(self) -> str:
        """What holds the makespan up: the station or the longest job whose own time comes nearest to it; memory, if
        they take less than 3/4 of it and jobs were refused for half of it."""
        station = max(self.busy, key=self.bound)
        if self.least < 0.75 * self.makespan and self.refused > 0.5 * self.makespan:
            return MEMORY
        return station if self.bound(station) >= self.longest else LONGEST


@dataclass
class _Queue:
    free: int
    waiting: deque[int] = field(default_factory=deque)


def simulate(
    jobs: Sequence[Job], stations: Mapping[str, Station], *, nodes: int = 1, memory: float = float("inf"),
    in_flight: int = 64,
) -> Outcome:
    """Run ``jobs`` on ``nodes`` nodes with ``memory`` each, at most ``in_flight`` jobs a node at a time.

    Raises ValueError for a job that no node can hold, and for one that needs a later job.
    """  # fmt: skip
    alone: list[float] = []
    for i, job in enumerate(jobs):
        if job.memory > memory:
            raise ValueError(f"{job.name} needs {job.memory:.3g} bytes and a node has {memory:.3g}: cut it into groups")
        if any(need >= i for need in job.needs):
            raise ValueError(f"{job.name} needs a job that does not come before it")
        alone.append(sum(s.seconds for s in job.stages) + max((alone[need] for need in job.needs), default=0.0))
    queues = {
        (name, node): _Queue(s.servers)
        for name, s in stations.items()
        for node in range(nodes if s.scope == "node" else 1)
    }
    run = _Run(jobs, stations, queues, nodes, memory, in_flight)
    run.everything()
    busy = dict.fromkeys(stations, 0.0)
    for job in jobs:
        for stage in job.stages:
            busy[stage.station] += stage.seconds
    servers = {name: s.servers * (nodes if s.scope == "node" else 1) for name, s in stations.items()}
    return Outcome(
        max(run.ended, default=0.0), max(alone, default=0.0), run.refused, busy, servers, run.peak, tuple(run.ended)
    )


class _Run:
    def __init__(
        self, jobs: Sequence[Job], stations: Mapping[str, Station], queues: dict[tuple[str, int], _Queue],
        nodes: int, memory: float, in_flight: int,
    ) -> None:  # fmt: skip
        self.jobs, self.stations, self.queues = jobs, stations, queues
        self.memory, self.in_flight = memory, in_flight
        self.held, self.flying = [0.0] * nodes, [0] * nodes
        self.peak = self.refused = 0.0
        self.refused_since: float | None = None
        self.home = [-1] * len(jobs)
        self.stage = [-1] * len(jobs)
        self.ended = [-1.0] * len(jobs)
        self.unmet = [len(job.needs) for job in jobs]
        self.dependants: dict[int, list[int]] = {}
        for i, job in enumerate(jobs):
            for need in job.needs:
                self.dependants.setdefault(need, []).append(i)
        self.ready = deque(i for i, count in enumerate(self.unmet) if not count)
        self.events: list[tuple[float, int, int]] = []
        self.sequence = 0

    def everything(self) -> None:
        self.admit(0.0)
        while self.events:
            now, _, i = heappop(self.events)
            self.leave(i, now)
            self.proceed(i, now)
            self.admit(now)

    def admit(self, now: float) -> None:
        while self.ready:
            need = self.jobs[self.ready[0]].memory
            limit = self.memory - need
            fitting = [n for n, held in enumerate(self.held) if held <= limit and self.flying[n] < self.in_flight]
            if not fitting:
                if self.refused_since is None and min(self.flying) < self.in_flight:
                    self.refused_since = now
                return
            if self.refused_since is not None:
                self.refused += now - self.refused_since
                self.refused_since = None
            node, i = min(fitting, key=self.flying.__getitem__), self.ready.popleft()
            self.home[i] = node
            self.held[node] += need
            self.flying[node] += 1
            self.peak = max(self.peak, self.held[node])
            self.proceed(i, now)

    def proceed(self, i: int, now: float) -> None:
        """To the next stage, or out."""
        self.stage[i] += 1
        if self.stage[i] == len(self.jobs[i].stages):
            self.ended[i] = now
            self.held[self.home[i]] -= self.jobs[i].memory
            self.flying[self.home[i]] -= 1
            for other in self.dependants.get(i, ()):
                self.unmet[other] -= 1
                if not self.unmet[other]:
                    self.ready.appendleft(other)  # what is half done goes before what has not begun
            return
        queue = self.queue(i)
        if queue.free:
            self.start(i, queue, now)
        else:
            queue.waiting.append(i)

    def queue(self, i: int) -> _Queue:
        name = self.jobs[i].stages[self.stage[i]].station
        return self.queues[name, self.home[i] if self.stations[name].scope == "node" else 0]

    def start(self, i: int, queue: _Queue, now: float) -> None:
        queue.free -= 1
        self.sequence += 1
        heappush(self.events, (now + self.jobs[i].stages[self.stage[i]].seconds, self.sequence, i))

    def leave(self, i: int, now: float) -> None:
        queue = self.queue(i)
        queue.free += 1
        if queue.waiting:
            self.start(queue.waiting.popleft(), queue, now)
