"""How many requests one server may have in flight: additive increase, multiplicative decrease."""

from dataclasses import dataclass, field

DECREASE = 0.5
STEPS = 16  # replies to a full window add bound / STEPS: from nothing back to the bound in 16 round trips, however large it is
SLOWER = 3.0
JUDGED_REPLIES = 16
JUDGED_S = 0.5  # replies that take less on average are slowed by this machine as easily as by the server


@dataclass(slots=True)
class Pace:
    """How fast a server wrote over some replies. load: mean requests in flight beside each."""

    seconds: float = 0.0
    size: int = 0
    loads: float = 0.0
    replies: int = 0

    @property
    def load(self) -> float:
        return self.loads / self.replies

    @property
    def throughput(self) -> float:
        """Bytes per second of the whole server: what each reply got, times how many shared it."""
        return self.load * self.size / max(self.seconds, 1e-9)


@dataclass(slots=True)
class Window:
    """Starts at the bound, because a recipe's `concurrency` is somebody's knowledge of the servers, and because a reply may
    take half an hour: climbing to 256 one round trip at a time would take a day.

    Falls by half on a refusal (429), a server error, a time-out, a broken connection; once for all that was sent before the
    fall, or a thousand refusals of one burst would close it. Falls also on latency: when the server writes SLOWER times
    fewer bytes a second than it did, with at least as much asked of it. Judged by throughput, not by a reply's seconds: more
    requests at once make each slower and all of them faster, and long outputs take long.
    """

    bound: int
    in_flight: int = 0
    limit: float = field(init=False)
    fell_at: float = field(init=False, default=float("-inf"))
    _best: Pace | None = field(init=False, default=None)
    _now: Pace = field(init=False, default_factory=Pace)

    def __post_init__(self) -> None:
        self.limit = float(self.bound)

    @property
    def size(self) -> int:
        return max(1, int(self.limit))

    @property
    def room(self) -> int:
        return self.size - self.in_flight

    def answered(self, sent_at: float, now: float, size: int) -> None:
        """A reply of `size` bytes came. Times: one clock, seconds. Called before it leaves in_flight."""
        self.limit = min(float(self.bound), self.limit + max(1.0, self.bound / STEPS) / self.limit)
        if sent_at < self.fell_at:
            return  # it waited among the many that the server has been relieved of since
        pace = self._now
        pace.seconds, pace.size = pace.seconds + now - sent_at, pace.size + size
        pace.loads, pace.replies = pace.loads + self.in_flight, pace.replies + 1
        if pace.replies >= max(JUDGED_REPLIES, self.size):
            self._judge(pace, now)

    def complained(self, sent_at: float, now: float) -> None:
        """The server refused, failed or stayed silent."""
        if sent_at >= self.fell_at:
            self.limit = max(1.0, self.limit * DECREASE)
            self.fell_at, self._best, self._now = now, None, Pace()

    def _judge(self, pace: Pace, now: float) -> None:
        self._now = Pace()
        if self._best is None or pace.throughput > self._best.throughput:
            self._best = pace
        elif self._slower(pace, self._best):
            self.complained(now, now)

    def _slower(self, pace: Pace, best: Pace) -> bool:
        as_full = pace.load >= 0.9 * best.load
        return as_full and pace.throughput * SLOWER < best.throughput and pace.seconds >= JUDGED_S * pace.replies
