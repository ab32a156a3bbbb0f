"""Whether a request can be answered by its deadline, judged by what is ahead of it.

One that cannot is refused at once: its caller can ask elsewhere or later, and no time goes into
answers that nobody waits for. What is ahead is every request that was let in and is not answered,
from its decoding on; how long that takes follows from how long such work took lately.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from serve.jobs import Job, OverloadedError

# Of the time that a request has, the share that may be spent by the estimate. The rest is for what
# the estimate does not see: the way to the caller, and batches that take longer than most.
HEADROOM = 0.8
DECODE_S = 0.002  # a first guess: a JPEG of 12 kB takes 1 ms of a core
MEMORY = 32  # batches, or pictures decoded, after which a pace is mostly what was seen since
MOST_SLOWDOWN = 3.0


class Pace:
    """Seconds that a picture takes, as seen lately.

    Args:
        seconds: What it is taken to be at first.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def see(self, seconds: float) -> None:
        """A picture took so long. One that stood still says little of the next."""
        self.seconds += (min(seconds, MOST_SLOWDOWN * self.seconds) - self.seconds) / MEMORY


class Admission:
    """The requests that were let in and are not answered yet.

    `admit` is called by one thread; requests leave from any.

    Args:
        weight_of: A task's fair share relative to others.
        max_waiting: Requests that may wait; one more is refused.
        batch_cost: What fits into a batch, in pictures.
        picture_s: Time that one picture takes in such a batch; 0 refuses nobody for the time.
        decode_threads: Pictures that are decoded at once.
    """

    def __init__(
        self,
        weight_of: Callable[[str], float],
        *,
        max_waiting: int,
        batch_cost: float,
        picture_s: float,
        decode_threads: int,
    ) -> None:
        self._weight_of, self._max_waiting = weight_of, max_waiting
        self._batch_cost, self._decode_threads = batch_cost, decode_threads
        self._run_pace, self._decode_pace = Pace(picture_s), Pace(DECODE_S)
        self._jobs: dict[Job, None] = {}
        self.arrived = 0.0  # what asked to be let in since the start, in pictures
        self.decoded, self.decoded_s = 0.0, 0.0  # pictures since the start, and how long they took

    def __contains__(self, job: Job) -> bool:
        return job in self._jobs

    @property
    def num_waiting(self) -> int:
        """Requests of which nothing has run yet."""
        return sum(not job.cost_taken for job in list(self._jobs))

    @property
    def waiting(self) -> float:
        """What was let in and has not run yet, in pictures."""
        return sum((max(0.0, job.cost - job.cost_taken) for job in list(self._jobs)), 0.0)

    @property
    def run_s(self) -> float:
        """Time that a picture takes lately in a batch."""
        return self._run_pace.seconds

    def admit(self, job: Job, *, num_inputs: int, cost: float) -> None:
        """Let a request in, until it is answered, refused or given up by its caller.

        Args:
            cost: What it costs in all, in pictures.

        Raises:
            OverloadedError: too many wait, or what is ahead takes longer than it has time.
        """
        self.arrived += cost
        num_waiting = self.num_waiting
        if num_waiting >= self._max_waiting:
            raise OverloadedError(f"{num_waiting} requests wait already; try again shortly.")
        job.num_inputs, job.cost = num_inputs, cost
        # With nothing ahead it is let in whatever the estimate, so that the pace is always learnt.
        if self._jobs:
            self._refuse_late(job)
        self._jobs[job] = None
        job.done.add_done_callback(lambda _: self._jobs.pop(job, None))

    def change_trunk(self, *, batch_cost: float, picture_s: float) -> None:
        """Another trunk runs from here on, at a pace of its own; see the class."""
        self._batch_cost, self._run_pace = batch_cost, Pace(picture_s)

    def see_run(self, cost: float, seconds: float) -> None:
        """A batch of this cost took so long, with all that lies between it and the next."""
        a_picture_s = seconds / cost
        # A picture takes longest in a small batch, so one of those can only show that it is faster.
        if cost >= self._batch_cost / 2 or a_picture_s < self._run_pace.seconds:
            self._run_pace.see(a_picture_s)

    def see_decoding(self, seconds: float) -> None:
        """A picture took so long to decode."""
        self.decoded += 1
        self.decoded_s += seconds
        self._decode_pace.see(seconds)

    def _refuse_late(self, job: Job) -> None:
        left_s, wait_s = job.deadline_s - time.monotonic(), self._estimate_s(job)
        if wait_s > HEADROOM * left_s:
            raise OverloadedError(
                f"What waits here takes about {wait_s:.2g} s, and this request has {left_s:.2g} s; "
                "try again later.",
                retry_after_s=math.ceil(wait_s),
            )

    def _estimate_s(self, job: Job) -> float:
        """Until its answer: the decoders and the engine work at once, whoever is slower decides."""
        jobs = list(self._jobs)
        num_undecoded = sum(other.num_inputs for other in jobs if not len(other.inputs))
        decode_s = self._decode_pace.seconds
        undecoded_s = num_undecoded * decode_s / self._decode_threads
        own_s = 0.0 if len(job.inputs) else job.num_inputs * decode_s
        return max(undecoded_s, self._pictures_until(job, jobs) * self._run_pace.seconds) + own_s

    def _pictures_until(self, job: Job, jobs: list[Job]) -> float:
        """What runs until this request has, at most, in pictures.

        Of its own tasks that is what is due before it; of others it is everything, or no more than
        what the fair shares allow them meanwhile.
        """
        mine, others, weights = job.cost, 0.0, dict[tuple[str, ...] | None, float]()
        for other in jobs:
            left = max(0.0, other.cost - other.cost_taken)
            if other.tasks != job.tasks:
                others += left
                weights[other.tasks] = self._weight(other)
            elif other.deadline_s <= job.deadline_s:
                mine += left
        all_shares = 1 + sum(weights.values()) / self._weight(job)
        is_busy = any(other.cost_taken for other in jobs)
        return min(mine + others, mine * all_shares) + is_busy * self._batch_cost

    def _weight(self, job: Job) -> float:
        return self._weight_of(job.tasks[0]) if job.tasks else 1.0
