# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""A model of how jobs take, lend, hand over and lose slots, small enough to be explored whole.

A state is what the kernel knows (free tokens, berths with their tokens and locks, bells) and where
each process stands. ``Model.steps`` lists every state that one process can reach by its next
indivisible action, so a search over it visits all interleavings. SIGKILL is one more action, which
any job may meet in any state.

Each rule of the model names the code that it was read from: ``RULES`` below, and a test looks
whether that code still says so. The rules can be switched off one by one, to show that the search
would find what they are there for.

What is left out: finite timeouts (such a submit or wait gives up by itself, so nobody can wait
for it for ever), callbacks, and several threads in one job. Those are left to the tests with real
processes.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, Optional

if TYPE_CHECKING:
    from collections.abc import Iterator

# Where a process stands. ABSENT, DEAD (killed) and GONE (exited after its answer) do nothing.
ABSENT, RUN, TAKE, UNTIL, START, REGAIN, WAIT, LENT, RETURN, ANSWER, ANSWERED, GONE, DEAD = range(
    13
)
_CALLS = frozenset((RUN, TAKE, UNTIL, REGAIN, WAIT, LENT))  # where it reaps its children
_ENDED = frozenset((ANSWERED, GONE, DEAD))
PHASES = (
    *("absent", "run", "take", "until", "start", "regain", "wait", "lent"),
    *("return", "answer", "answered", "gone", "dead"),
)

NONE = -1
ALL = -2  # a process that waits for all its children, at its end

#: Rule -> (module and function, a line of it), for the test that compares them with the source.
RULES = {
    "take a free token": ("_admission.Admission.take", "lease = crew.try_take()"),
    "lend if there is none, in map, too": (
        "_admission.Admission._wait_to_take",
        "if lease is None and lends: lease = own.lend_to_child()",
    ),
    "never before a deadline": (
        "_admission.Admission._wait_to_take",
        "lends = deadline is None and own.attach(slots)",
    ),
    "or leave it for the first result": (
        "_admission.Admission._wait_to_take",
        "until._outcome is not None",
    ),
    "lend in a berth of its own": ("_slots._lease.Lease.relocated", "self.section.relocate("),
    "ring if there is nothing to lend": (
        "_admission.Admission._wait_to_take",
        "return not own.consumes or not reactor.lends_below() or own.heard()",
    ),
    "hush when it is over": ("_admission.Admission._wait_to_take", "bell.hush()"),
    "ring the nearest job with a slot": (
        "_slots._own.OwnSlot.bell_for_child",
        "if not self.consumes: return self._outer_bell",
    ),
    "sweep while waiting for a token": (
        "_admission.Admission._wait_to_take",
        "on_tick=slots.sweep",
    ),
    "hold a slot before submit returns": ("_shared.Shared.start", "self.admission.regain()"),
    "regain from the pool": ("_admission.Admission.regain", "own.lease = slots.try_take()"),
    "sweep while regaining": ("_admission.Admission.regain", "on_tick=slots.sweep"),
    "ring when no child will bring a slot, or when rung": (
        "_admission.Admission.regain",
        "return not reactor.lends_below() or own.heard()",
    ),
    "lend in wait if told to or rung": (
        "_admission.Admission._wait",
        "lend = can_lend and (self._lends(future) or own.heard())",
    ),
    "lend into the pool": ("_admission.Admission._wait_lending", "mine.release()"),
    "claim the child's slot": ("_admission.Admission._wait_lending", "reactor.claimed |= claimed"),
    "pass the bell on": (
        "_admission.Admission._wait_lending",
        "if own.heard(): bell.ring()",
    ),
    "regain after waiting": ("_admission.Admission._wait_lending", "self.regain()"),
    "keep a child's slot": ("_reactor.Reactor._slot_back", "own.lease = lease"),
    "leave what it has returned itself": ("_reactor.Reactor._slot_back", "lease.abandon()"),
    "a dead child's slot is ours if it is there": (
        "_reactor.Reactor._slot_back",
        "mine = lease.reclaim() if frame is None else not frame.flags & RETURNED",
    ),
    "wait for all at the end": ("_ending.finish_jobs", "wait_for_all()"),
    "return a slot that is not the first": ("_slots._own.OwnSlot.returned", "lease.release()"),
    "answer last": ("_worker._main._end", "send_frame(channel, kind, text, payload"),
}


class Rules(NamedTuple):
    """Which of the rules that can be removed hold."""

    lend_in_submit: bool = True
    bell: bool = True
    sweep: bool = True
    # A slot is lent in a berth of its own, whose lock is shared by lender and borrower alone.
    # Without this the lender's submitter shares it, too, and a dead borrower's token stays locked.
    fresh_berth: bool = True
    regain: bool = True  # a lender waits until it holds a slot again
    # Who is blocked without a slot, and has no child that will bring one, rings; without this only
    # jobs that came without a slot do.
    all_ring: bool = True
    pass_on: bool = True  # a job that has lent, and hears its bell, rings the next one


class Job(NamedTuple):
    """What a job is to do: its children, in order, and how it goes about them."""

    parent: int
    kids: tuple[int, ...]
    consume: int
    style: str
    lend: bool


class Process(NamedTuple):
    """One process: where it stands, and its part in what was submitted to it."""

    phase: int = ABSENT
    submitted: int = 0  # so many of its children
    waited: int = 0  # for so many of them
    waits_for: int = NONE  # a child, or ALL
    own: int = NONE  # the berth of the slot that it holds
    own_is_first: bool = False
    hand: int = NONE  # the berth that its next child will run on
    rang: bool = False
    flight: int = NONE  # its submitter's lease: a berth; NONE when unlocked or let go
    settled: bool = False  # its submitter knows how it ended
    returned: bool = False  # its answer says that it has returned its slot itself


class Berth(NamedTuple):
    """A token in use, and the processes (a bit each) that share its lock."""

    token: bool
    holders: int


class State(NamedTuple):
    """All there is. A berth with a token that nobody locks is counted in ``stray``."""

    free: int
    stray: int
    berths: tuple[Berth, ...]
    bells: tuple[int, ...]
    processes: tuple[Process, ...]


class Broken(AssertionError):
    """An invariant does not hold."""


class Model:
    """All that can happen to one tree of jobs on one pool. Process 0 is the program, not a job."""

    def __init__(
        self, jobs: tuple[Job, ...], slots: int, rules: Optional[Rules] = None, kills: int = 0
    ) -> None:
        self.jobs = jobs
        self.slots = slots
        self.rules = rules or Rules()
        self.kills = kills

    def initial(self) -> State:
        count = len(self.jobs)
        processes = (Process(RUN), *(Process() for _ in range(count - 1)))
        return State(self.slots, 0, (), (0,) * count, processes)

    def steps(self, state: State) -> Iterator[State]:
        """Every state that is one action away, SIGKILL left out."""
        for me, process in enumerate(state.processes):
            if process.phase in _CALLS:
                for kid in self.jobs[me].kids:
                    child = state.processes[kid]
                    if child.phase in _ENDED and not child.settled:
                        yield _canonical(self._reap(state, me, kid))
            for after in self._actions(state, me, process):
                yield after if after.berths is state.berths else _canonical(after)

    def killings(self, state: State) -> Iterator[State]:
        """Every state that one SIGKILL makes of this one."""
        dead = sum(process.phase == DEAD for process in state.processes)
        if dead >= self.kills:
            return
        for me, process in enumerate(state.processes):
            if me and process.phase not in (ABSENT, GONE, DEAD):
                phase = GONE if process.phase == ANSWERED else DEAD
                yield _canonical(self._vanish(state, me, phase))

    def is_final(self, state: State) -> bool:
        """Whether every process has ended; children of a killed one may never have begun."""
        return all(process.phase in (ABSENT, GONE, DEAD) for process in state.processes)

    def check(self, state: State) -> None:
        """I1 and I2."""
        tokens = state.free + state.stray + sum(berth.token for berth in state.berths)
        if tokens != self.slots:
            raise Broken(f"{tokens} tokens of {self.slots}")
        running = [
            me
            for me, process in enumerate(state.processes)
            if process.phase == RUN and self.jobs[me].consume
        ]
        if len(running) > self.slots:
            raise Broken(f"{len(running)} jobs run on {self.slots} slots")
        if self.rules.regain:
            for me in running:
                own = state.processes[me].own
                if own == NONE or not state.berths[own].token:
                    raise Broken(f"job {me} runs without a slot")
                if not state.berths[own].holders >> me & 1:
                    raise Broken(f"job {me} runs on a slot that it does not lock")

    # What one process does next

    def _actions(self, state: State, me: int, process: Process) -> Iterator[State]:
        phase = process.phase
        if phase == RUN:
            yield self._run(state, me, process)
        elif phase in (TAKE, UNTIL):
            yield from self._take(state, me, process)
        elif phase == START:
            yield self._start(state, me, process)
        elif phase == REGAIN:
            yield from self._regain(state, me, process)
        elif phase in (WAIT, LENT):
            yield from self._wait(state, me, process)
        elif phase == RETURN:
            yield self._return(state, me, process)
        elif phase == ANSWER:
            yield _with(state, me, phase=ANSWERED)
        elif phase == ANSWERED:
            yield self._vanish(state, me, GONE)

    def _run(self, state: State, me: int, process: Process) -> State:
        """Make the next call. The styles are ways to write a job; "map" is ``Jobserver.map``."""
        job, done, waited = self.jobs[me], process.submitted, process.waited
        more = done < len(job.kids)
        if job.style == "chain" and waited < done:
            return _with(state, me, phase=WAIT, waits_for=job.kids[waited])
        if job.style == "map" and more and waited < done:
            return _with(state, me, phase=UNTIL, waits_for=job.kids[waited])
        if more:
            if self.jobs[job.kids[done]].consume:
                return _with(state, me, phase=TAKE)
            return _with(state, me, phase=START)  # consume=0 asks for no slot
        if job.style != "drop" and waited < done:
            return _with(state, me, phase=WAIT, waits_for=job.kids[waited])
        return _with(state, me, phase=WAIT, waits_for=ALL)

    def _take(self, state: State, me: int, process: Process) -> Iterator[State]:
        head = process.waits_for if process.phase == UNTIL else NONE
        if head != NONE and state.processes[head].settled:
            # The next input can wait: the first result is there to be yielded.
            if process.rang:
                state = self._hush(_with(state, me, rang=False), me)
            yield _with(state, me, phase=RUN, waits_for=NONE, waited=process.waited + 1)
            return
        if process.own == NONE:
            yield from self._ring(state, me, process)
        if state.free:
            taken, berth = _park(state, me)
            if process.rang:
                taken = self._hush(taken, me)
            yield _with(taken, me, phase=START, hand=berth, rang=False, waits_for=NONE)
            return
        if process.own != NONE and self.rules.lend_in_submit:
            yield self._lend(state, me, process)
        yield from self._sweep(state)

    def _lend(self, state: State, me: int, process: Process) -> State:
        own = process.own
        if not self.rules.fresh_berth:
            return _with(
                state, me, phase=START, hand=own, own=NONE, own_is_first=False, waits_for=NONE
            )
        # The token moves to the new berth in one call; then the old one is unlocked for all.
        berths = list(state.berths)
        berths[own] = Berth(False, 0)
        berths.append(Berth(True, 1 << me))
        state = state._replace(berths=tuple(berths))
        return _with(
            state,
            me,
            phase=START,
            hand=len(berths) - 1,
            own=NONE,
            own_is_first=False,
            waits_for=NONE,
        )

    def _start(self, state: State, me: int, process: Process) -> State:
        job = self.jobs[me]
        kid = job.kids[process.submitted]
        berth = process.hand
        if berth != NONE:
            berths = list(state.berths)
            token, holders = berths[berth]
            berths[berth] = Berth(token, holders | 1 << kid)
            state = state._replace(berths=tuple(berths))
        state = _with(state, kid, phase=RUN, own=berth, own_is_first=berth != NONE, flight=berth)
        lent = bool(me) and job.consume and process.own == NONE and self.rules.regain
        return _with(
            state,
            me,
            phase=REGAIN if lent else RUN,
            hand=NONE,
            submitted=process.submitted + 1,
        )

    def _regain(self, state: State, me: int, process: Process) -> Iterator[State]:
        if process.own != NONE:  # a child's
            yield self._go_on(state, me, process)
        elif state.free:
            state, berth = _park(state, me)
            yield _with(state, me, own=berth)
        else:
            alone = self.rules.all_ring and not self._promised(state, me)
            if alone or (self.rules.pass_on and state.bells[me]):
                yield from self._ring(state, me, process)
            yield from self._sweep(state)

    def _promised(self, state: State, me: int) -> bool:
        """Whether a child is in flight that will bring a slot."""
        return any(
            self.jobs[kid].consume
            and state.processes[kid].phase != ABSENT
            and not state.processes[kid].settled
            for kid in self.jobs[me].kids
        )

    def _ring(self, state: State, me: int, process: Process) -> Iterator[State]:
        bell = self._bell(me)
        if bell and self.rules.bell and not process.rang:
            yield _with(_rung(state, bell, 1), me, rang=True)

    def _wait(self, state: State, me: int, process: Process) -> Iterator[State]:
        job, kid = self.jobs[me], process.waits_for
        over = (
            all(
                state.processes[one].settled or state.processes[one].phase == ABSENT
                for one in job.kids
            )
            if kid == ALL
            else state.processes[kid].settled
        )
        if over:
            if process.phase == LENT and process.own == NONE and self.rules.regain:
                yield _with(state, me, phase=REGAIN)
            else:
                yield self._go_on(state, me, process)
        elif process.phase == WAIT and process.own != NONE:
            if job.lend or state.bells[me]:
                lent = _release(state, process.own, me)
                yield _with(lent, me, phase=LENT, own=NONE, own_is_first=False)
        elif process.phase == LENT and state.bells[me]:
            if process.own != NONE:  # of a child; there are others yet to wait for
                lent = _release(state, process.own, me)
                yield _with(lent, me, own=NONE, own_is_first=False)
            elif self.rules.pass_on:
                yield from self._ring(state, me, process)

    def _go_on(self, state: State, me: int, process: Process) -> State:
        """Leave a call."""
        if process.rang:
            state = self._hush(_with(state, me, rang=False), me)
        if process.waits_for == ALL:
            return _with(state, me, phase=RETURN)
        waited = process.waited + (process.waits_for != NONE)
        return _with(state, me, phase=RUN, waits_for=NONE, waited=waited)

    def _return(self, state: State, me: int, process: Process) -> State:
        if not (me and self.jobs[me].consume) or process.own_is_first:
            return _with(state, me, phase=ANSWER)
        if process.own != NONE:
            state = _release(state, process.own, me)
        return _with(state, me, phase=ANSWER, own=NONE, returned=True)

    def _reap(self, state: State, me: int, kid: int) -> State:
        process, child = state.processes[me], state.processes[kid]
        state = _with(state, kid, settled=True, flight=NONE)
        berth = child.flight
        if berth == NONE:
            return state
        if child.phase == DEAD:
            # If it still had its slot, and nobody else shares the lock, that is ours at once.
            token, holders = state.berths[berth]
            if not token or holders & ~(1 << me) or not self.rules.sweep:
                return _let_go(state, berth, me)
        if child.phase != DEAD and child.returned:
            state = _let_go(state, berth, me)
        elif self._keeps(me, process, kid):
            # Without fresh berths it may be the very one that the job came with.
            state = _with(state, me, own=berth, own_is_first=berth == process.flight)
        else:
            state = _release(state, berth, me)
        return state

    def _keeps(self, me: int, process: Process, kid: int) -> bool:
        if not me or not self.jobs[me].consume or process.own != NONE:
            return False
        if process.phase == REGAIN:
            return True
        return process.phase == LENT and process.waits_for in (kid, ALL)

    def _sweep(self, state: State) -> Iterator[State]:
        if state.stray and self.rules.sweep:
            yield state._replace(free=state.free + state.stray, stray=0)

    def _bell(self, me: int) -> int:
        """The nearest job above that has a slot; 0 where there is none."""
        above = self.jobs[me].parent
        while above and not self.jobs[above].consume:
            above = self.jobs[above].parent
        return above

    def _hush(self, state: State, me: int) -> State:
        bell = self._bell(me)
        return _rung(state, bell, -1) if state.bells[bell] else state

    def _vanish(self, state: State, me: int, phase: int) -> State:
        """The kernel drops the process's share in every lock."""
        berths = tuple(Berth(token, holders & ~(1 << me)) for token, holders in state.berths)
        state = state._replace(berths=berths)
        return _with(state, me, phase=phase, own=NONE, hand=NONE, own_is_first=False)


# States are values: each of these returns a new one


def _with(state: State, me: int, **changes: Any) -> State:
    processes = list(state.processes)
    processes[me] = processes[me]._replace(**changes)
    return state._replace(processes=tuple(processes))


def _park(state: State, me: int) -> tuple[State, int]:
    """``try_take``: a free token into a berth that ``me`` has locked."""
    berths = (*state.berths, Berth(True, 1 << me))
    return state._replace(free=state.free - 1, berths=berths), len(berths) - 1


def _release(state: State, berth: int, me: int) -> State:
    """``Lease.release``: the token into the pool, and the lock dropped for all who share it."""
    berths = list(state.berths)
    token, holders = berths[berth]
    if not token:
        raise Broken(f"process {me} releases an empty berth")
    if not holders >> me & 1:
        raise Broken(f"process {me} releases what it does not hold")
    berths[berth] = Berth(False, 0)
    return state._replace(free=state.free + 1, berths=tuple(berths))


def _let_go(state: State, berth: int, me: int) -> State:
    """``Lease.abandon``: close without moving anything."""
    berths = list(state.berths)
    token, holders = berths[berth]
    berths[berth] = Berth(token, holders & ~(1 << me))
    return state._replace(berths=tuple(berths))


def _rung(state: State, bell: int, change: int) -> State:
    bells = list(state.bells)
    bells[bell] += change
    return state._replace(bells=tuple(bells))


def _canonical(state: State) -> State:
    """Forget berths that nobody locks, and number the rest in the order in which they are named."""
    stray = state.stray
    names: dict[int, int] = {NONE: NONE}
    kept: list[Berth] = []
    for number, berth in enumerate(state.berths):
        if not berth.holders:
            stray += berth.token
            names[number] = NONE
    processes = []
    for process in state.processes:
        for number in (process.own, process.hand, process.flight):
            if number not in names:
                names[number] = len(kept)
                kept.append(state.berths[number])
        own, hand, flight = (
            names[number] for number in (process.own, process.hand, process.flight)
        )
        if (own, hand, flight) != (process.own, process.hand, process.flight):
            process = process._replace(own=own, hand=hand, flight=flight)  # noqa: PLW2901
        processes.append(process)
    # Locked, though no lease names it: held on to by a process that will not use it again.
    rest = sorted(b for n, b in enumerate(state.berths) if b.holders and n not in names)
    return State(state.free, stray, (*kept, *rest), state.bells, tuple(processes))


class Found(NamedTuple):
    """What a search has found: how much there is, and the first way to get stuck, if any."""

    states: int
    final: int
    stuck: Optional[list[State]]  # the way to it
    endless: bool  # some order of actions never ends


def explore(model: Model) -> Found:
    """Visit every state that can be reached; raises Broken where an invariant does not hold."""
    first = model.initial()
    came_from: dict[State, Optional[State]] = {first: None}
    order = [first]
    steps_to: dict[State, int] = {first: 0}  # how many steps (not kills) lead into a state
    after: list[list[State]] = []
    final = 0
    stuck: Optional[State] = None
    for state in order:
        model.check(state)
        steps = list(model.steps(state))
        after.append(steps)
        if not steps:
            if model.is_final(state):
                final += 1
            elif stuck is None:
                stuck = state
        for following in (*steps, *model.killings(state)):
            if following not in came_from:
                came_from[following] = state
                steps_to[following] = 0
                order.append(following)
        for following in steps:
            steps_to[following] += 1
    return Found(len(order), final, _way(came_from, stuck), _has_cycle(order, after, steps_to))


def _way(came_from: dict[State, Optional[State]], end: Optional[State]) -> Optional[list[State]]:
    if end is None:
        return None
    way = []
    state: Optional[State] = end
    while state is not None:
        way.append(state)
        state = came_from[state]
    return way[::-1]


def _has_cycle(order: list[State], after: list[list[State]], steps_to: dict[State, int]) -> bool:
    """Take away, again and again, what no step leads to; what is left at last is a cycle."""
    following = dict(zip(order, after))
    loose = [state for state in order if not steps_to[state]]
    taken = 0
    while loose:
        taken += 1
        for state in following[loose.pop()]:
            steps_to[state] -= 1
            if not steps_to[state]:
                loose.append(state)
    return taken < len(order)


def show(way: list[State]) -> str:
    """A way to get stuck, in words: one line for each state."""
    lines = []
    for state in way:
        stands = []
        for me, process in enumerate(state.processes):
            word = f"{me}:{PHASES[process.phase]}"
            if process.waits_for not in (NONE, ALL):
                word += f"({process.waits_for})"
            if process.own != NONE:
                word += "*"
            stands.append(word)
        lines.append(f"free={state.free} stray={state.stray} " + " ".join(stands))
    return "\n".join(lines)


# Which trees there are


def forests(count: int) -> Iterator[tuple[int, ...]]:
    """Every forest of ``count`` jobs that differs from the others in more than the order of
    siblings, as the parent (0: the program) of each job 1, 2, ...
    """
    for shape in _forests(count, count):
        parents: list[int] = []
        _number(shape, 0, parents)
        yield tuple(parents)


def _forests(count: int, largest: int) -> Iterator[tuple]:  # type: ignore[type-arg]
    """Sorted by size, so that of two orders of siblings only one comes."""
    if not count:
        yield ()
        return
    for size in range(min(count, largest), 0, -1):
        for children in _forests(size - 1, size - 1):
            for rest in _forests(count - size, size):
                if rest and _size(rest[0]) == size and rest[0] > children:
                    continue
                yield (children, *rest)


def _size(tree: tuple) -> int:  # type: ignore[type-arg]
    return 1 + sum(_size(child) for child in tree)


def _number(trees: tuple, parent: int, parents: list[int]) -> None:  # type: ignore[type-arg]
    for tree in trees:
        parents.append(parent)
        _number(tree, len(parents), parents)


def programs(
    parents: tuple[int, ...], styles: tuple[str, ...] = ("batch", "chain", "map", "drop")
) -> Iterator[tuple[Job, ...]]:
    """All jobs of a forest that go about it in one style, with every choice of consume and lend."""
    count = len(parents) + 1
    kids = [tuple(k for k in range(1, count) if parents[k - 1] == j) for j in range(count)]
    for style, lend in product(styles, (False, True)):
        # What map submits takes a slot, always.
        choices = [(1,)] * (count - 1) if style == "map" else [(1, 0)] * (count - 1)
        for consumes in product(*choices):
            yield tuple(
                Job(([0, *parents])[j], kids[j], ([0, *consumes])[j], style, lend)
                for j in range(count)
            )
