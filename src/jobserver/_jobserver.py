# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The public Jobserver: a handle that validates, gates, submits, maps and closes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from multiprocessing.context import BaseContext
from types import TracebackType
from typing import TYPE_CHECKING, Any, Callable, Literal, Optional, TypeVar, Union

from ._check import (
    Env,
    check_args,
    check_callable,
    check_consume,
    check_env,
    check_kwargs,
    check_optional_callable,
    deadline_of,
)
from ._commands import Commands
from ._future import Future
from ._shared import Canary, Shared
from ._signals import Deferred, deferred
from ._slots._announce import check_style
from ._slots._held import current_slot
from ._slots._lease import Lease
from ._worker._task import Task

if TYPE_CHECKING:
    from ._map import Plan

T = TypeVar("T")
_Unchanged = type(...)
_NOTHING: dict[str, Any] = {}  # the default of kwargs, never changed
PreexecFn = Callable[[], Any]
SleepFn = Callable[[], Optional[float]]


class Jobserver(Commands):
    """
    One pool of slots for a program and everything it starts.

    Args:
        context: None for the platform's default start method, ``"fork"``, ``"spawn"``,
            ``"forkserver"``, or a ``multiprocessing`` context.
        slots: How many jobs may run at once; None for as many as this process may use CPUs, or for
            those of the outer ``make -j``. At least 4,096 work. Slots in use keep descriptors open:
            up to a quarter of RLIMIT_NOFILE (256 slots of the usual 1,024) each survives any
            SIGKILL; beyond that, raise the limit, or a slot is lost with a holder that is killed.
        env: Default for every submission, see ``submit``.
        preexec_fn: Default for every submission, see ``submit``.
        sleep_fn: Default for every submission, see ``submit``.
        lend: With True, a job lends its slot also while it waits for its children.
        max_tasks_per_child: How many jobs a worker process runs at most: 1 for a fresh process for
            each job, None for any number, one after the other ("warm" workers).
        makeflags: With True, or with a style (see ``child_env``), MAKEFLAGS in each job's
            environment offer the slots to commands that the job starts. All styles but ``"fifo"``
            need descriptors: start such commands with ``close_fds=False``.

    Raises:
        TypeError, ValueError: A malformed argument.
        OSError: Too few descriptors for so many slots.
    """

    def __init__(
        self,
        context: Union[str, BaseContext, None] = None,
        slots: Optional[int] = None,
        *,
        env: Env = (),
        preexec_fn: Optional[PreexecFn] = None,
        sleep_fn: Optional[SleepFn] = None,
        lend: bool = False,
        max_tasks_per_child: Optional[int] = 1,
        makeflags: Union[bool, str] = False,
    ) -> None:
        self._set_defaults(check_env(env), preexec_fn, sleep_fn, lend, makeflags)
        self._bind(Shared.create(context, slots, max_tasks_per_child))

    @classmethod
    def from_env(
        cls,
        context: Union[str, BaseContext, None] = None,
        *,
        env: Env = (),
        preexec_fn: Optional[PreexecFn] = None,
        sleep_fn: Optional[SleepFn] = None,
        lend: bool = False,
        max_tasks_per_child: Optional[int] = 1,
        makeflags: Union[bool, str] = False,
    ) -> Jobserver:
        """
        Join the pool of the make, ninja, cargo or ``jobserver run`` that started this process.

        Where ``Jobserver()`` would go on with a pool of its own, this raises.

        Args:
            context: As in the constructor, like all that follow.
            env: See ``submit``.
            preexec_fn: See ``submit``.
            sleep_fn: See ``submit``.
            lend: With True, a job lends its slot also while it waits for its children.
            max_tasks_per_child: How many jobs a worker process runs at most.
            makeflags: With True, MAKEFLAGS in each job's environment offer the slots on.

        Raises:
            jobserver.makeflags.MakeflagsError: There is no such pool, or it cannot be joined; the
                module has a subclass for each way in which the environment can be wrong.
            TypeError, ValueError: A malformed argument.
        """
        joined = cls.__new__(cls)
        joined._set_defaults(check_env(env), preexec_fn, sleep_fn, lend, makeflags)
        joined._bind(Shared.join(context, max_tasks_per_child))
        return joined

    def _set_defaults(
        self,
        env: dict[str, Optional[str]],
        preexec_fn: Optional[PreexecFn],
        sleep_fn: Optional[SleepFn],
        lend: bool,
        makeflags: Union[bool, str],
    ) -> None:
        check_optional_callable("preexec_fn", preexec_fn)
        check_optional_callable("sleep_fn", sleep_fn)
        if not isinstance(lend, bool):
            raise TypeError(f"lend must be a bool, not {type(lend).__name__}")
        if not isinstance(makeflags, (bool, str)):
            raise TypeError(f"makeflags must be a bool or str, not {type(makeflags).__name__}")
        self._env = env
        self._preexec_fn = preexec_fn
        self._sleep_fn = sleep_fn
        self._lend = lend
        style = "auto" if isinstance(makeflags, bool) else makeflags
        self._makeflags = check_style(style) if makeflags is not False else None

    def _bind(self, shared: Shared) -> None:
        self._shared = shared
        self._canary: Canary = shared.canary()

    @property
    def context(self) -> BaseContext:
        """The ``multiprocessing`` context whose start method is used."""
        return self._shared.context

    def __call__(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Short for ``submit(fn=fn, args=args, kwargs=kwargs)``."""
        return self.submit(fn, args=args, kwargs=kwargs)

    def submit(
        self,
        fn: Callable[..., T],
        *,
        args: Iterable[Any] = (),
        kwargs: Mapping[str, Any] = _NOTHING,
        consume: int = 1,
        env: Optional[Env] = None,
        preexec_fn: Optional[PreexecFn] = None,
        sleep_fn: Optional[SleepFn] = None,
        timeout: Optional[float] = None,
    ) -> Future[T]:
        """
        Run ``fn(*args, **kwargs)`` in a worker process, once a slot is free.

        Finished jobs are reaped, their slots returned and their callbacks issued before and while
        this waits.

        Args:
            fn: What to call.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            consume: How many slots the job holds while it runs: 1, or 0 to start at once.
            env: Changes to the worker's ``os.environ``, made before fn; a mapping or pairs of name
                and value, where a value of None unsets the name.
            preexec_fn: Called in the worker just before fn; may return a context manager, which
                then wraps fn and may suppress its exception (the result is then None). Any other
                value that it returns means nothing.
            sleep_fn: Called here before a slot is taken: returns None to let the work in, or how
                many seconds to sleep before it is asked again.
            timeout: How many seconds to wait at most; None for as long as it takes.

        Raises:
            Blocked: No slot in time; nothing has started.
            CallbackRaised: A callback failed; nothing has started, and the call may be made again.
            TypeError: A malformed argument, or one that cannot be pickled though the start method
                needs it to be.
            ValueError: An argument out of range.
            RuntimeError: The Jobserver is closed.
            OSError: The system refuses another process or descriptor; nothing is left behind.
        """
        # A call of ours costs as much as many a job's share of all this, and under fork the page of
        # each function is copied for each job. So what is as it mostly is goes without.
        check_callable("fn", fn)
        if type(args) is not tuple:
            args = check_args(args)
        named = {} if kwargs is _NOTHING else check_kwargs(kwargs)
        changes, preexec = self._env, self._preexec_fn
        if env is not None or preexec_fn is not None or self._makeflags is not None:
            changes, preexec = self._worker_side(env, preexec_fn)
        if type(consume) is not int or consume != 1:
            check_consume(consume)
        gate = self._sleep_fn
        if sleep_fn is not None:
            check_callable("sleep_fn", sleep_fn)
            gate = sleep_fn
        deadline = None if timeout is None else deadline_of(timeout)
        shared = self._shared
        admission = shared.admission
        shared.refuse_closed()
        task = Task(fn, args, named, changes, preexec)
        taken: list[Lease] = []
        # Once for all steps; code of the user's runs, and what may last waits, with them lifted.
        with Deferred() as signals:
            try:
                admission.reap_keeping()
                if gate is not None:
                    with signals.lifted():
                        admission.gate(gate, deadline)
                if consume:
                    admission.take(taken, deadline)
                else:
                    shared.reactor.unload()
                return shared.start(task, taken, lends=self._lend)
            except BaseException:
                admission.give_all_back(taken, unheard=True)
                raise

    def _worker_side(
        self, env: Optional[Env], preexec_fn: Optional[PreexecFn]
    ) -> tuple[dict[str, Optional[str]], Optional[PreexecFn]]:
        check_optional_callable("preexec_fn", preexec_fn)
        changes = self._env if env is None else check_env(env)
        chosen = self._preexec_fn if preexec_fn is None else preexec_fn
        if self._makeflags and "MAKEFLAGS" not in changes:
            from ._announcing import Announcing

            chosen = Announcing(self._shared, self._makeflags, chosen)
        return changes, chosen

    def _is_plain(self) -> bool:
        """Say whether nothing is to be done before a submission by itself."""
        return not (self._env or self._preexec_fn or self._sleep_fn or self._makeflags)

    def map(
        self,
        fn: Callable[..., T],
        argses: Optional[Iterable[Iterable[Any]]] = None,
        kwargses: Optional[Iterable[Mapping[str, Any]]] = None,
        *,
        env: Optional[Env] = None,
        preexec_fn: Optional[PreexecFn] = None,
        sleep_fn: Optional[SleepFn] = None,
        timeout: Optional[float] = None,
        chunksize: Union[int, Literal["auto"]] = 1,
        buffersize: Optional[int] = None,
    ) -> Iterator[T]:
        """
        Call fn once for each element of the inputs; yield the results in order.

        Work is submitted as the results are iterated over. Leaving the iteration early neither
        cancels nor waits: slots come back at the next reclaim or exit.

        Args:
            fn: What to call.
            argses: The positional arguments of each call, an iterable each.
            kwargses: The keyword arguments of each call, a mapping each. With both, as many as
                ``argses``.
            env: See ``submit``.
            preexec_fn: See ``submit``; called once for each chunk.
            sleep_fn: See ``submit``.
            timeout: How many seconds from this call until the iterator raises TimeoutError.
            chunksize: So many calls go to one worker together; or "auto" for batches that follow
                from how long the calls take, about 0.2 seconds each, and the results of single
                calls: a failure, or a worker's death, is that of one call.
            buffersize: None to collect the inputs now; else at most so many submissions (calls,
                with "auto") are outstanding, and inputs are read only as needed: infinite ones
                work.

        Raises:
            TypeError, ValueError: A malformed argument.
            concurrent.futures.TimeoutError: From the iterator, once the timeout is over.
            CallbackRaised: From the iterator, as from ``submit``; the next call goes on.
        """
        # Here, as who only submits needs none of it: not its memory in each forked process either.
        from ._batches import Batches
        from ._inputs import Inputs
        from ._map import Plan, Results, Run, check_buffersize, check_size

        check_callable("fn", fn)
        check_optional_callable("sleep_fn", sleep_fn)
        env_found, preexec_found = self._worker_side(env, preexec_fn)
        self._shared.refuse_closed()
        plan = Plan(
            env_found,
            preexec_found,
            self._sleep_fn if sleep_fn is None else sleep_fn,
            self._lend,
            deadline_of(timeout),
        )
        size = check_size(chunksize)
        check_buffersize(buffersize)
        inputs = Inputs(argses, kwargses, lazy=buffersize is not None)
        if size == 1 and self._may_queue(plan):
            from ._map_queue import QueueRun

            return Results.of(QueueRun(self, fn, inputs, buffersize, plan.deadline))
        batches = Batches(fn, inputs, size, buffersize, bare=preexec_found is None)
        return Results.of(Run(self._shared, plan, batches))

    def _may_queue(self, plan: Plan) -> bool:
        shared = self._shared
        # The handle's defaults count, too: a submission may override them with nothing.
        given = plan.env or plan.preexec_fn or plan.sleep_fn
        if shared.tasks is not None or given or not self._is_plain():
            return False
        with deferred(), shared.reactor.lock:
            return not current_slot(shared.slots).attach(shared.slots)

    def replace(
        self,
        *,
        env: Any = ...,
        preexec_fn: Any = ...,
        sleep_fn: Any = ...,
        lend: Any = ...,
        makeflags: Any = ...,
    ) -> Jobserver:
        """
        Return a sibling handle with other defaults, which shares the same slots.

        Args:
            env: As in the constructor; None for none; what is not named stays.
            preexec_fn: Likewise.
            sleep_fn: Likewise.
            lend: Likewise.
            makeflags: Likewise.
        """
        sibling = self.__copy__()
        sibling._set_defaults(
            self._env if env is ... else check_env(() if env is None else env),
            self._preexec_fn if preexec_fn is ... else preexec_fn,
            self._sleep_fn if sleep_fn is ... else sleep_fn,
            self._lend if lend is ... else lend,
            self._makeflags or False if makeflags is ... else makeflags,
        )
        return sibling

    def reclaim_resources(self) -> None:
        """
        Reap what has finished, return its slots and issue its callbacks, without waiting.

        Raises:
            CallbackRaised: A callback failed; call again for the rest.
            RuntimeError: The Jobserver is closed.
        """
        self._shared.refuse_closed()
        self._shared.admission.reap()

    def __enter__(self) -> Jobserver:  # noqa: PYI034  # Self came with Python 3.11
        """Open a with-block; the pool closes when the last one on any of its handles is left."""
        self._shared.enter()
        return self

    def __exit__(
        self,
        exc_type: Optional[type[BaseException]],
        exc: Optional[BaseException],
        traceback: Optional[TracebackType],
    ) -> None:
        """Reap, drain callbacks (an error in one becomes a RuntimeWarning); close, if the last."""
        self._shared.exit()

    def __copy__(self) -> Jobserver:
        """Return another handle on the same slots."""
        twin = type(self).__new__(type(self))
        twin._set_defaults(*self._defaults())
        twin._bind(self._shared)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Jobserver:
        """Return another handle on the same slots: slots cannot be doubled."""
        return self.__copy__()

    def _defaults(self) -> tuple[Any, ...]:
        makeflags = self._makeflags or False
        return self._env, self._preexec_fn, self._sleep_fn, self._lend, makeflags

    def __getstate__(self) -> tuple[Any, ...]:
        """Return what travels into a job: the slots and the defaults, no Future."""
        return self._shared, *self._defaults()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Become a handle on the slots that came along."""
        if not isinstance(state, tuple) or len(state) != 6 or not isinstance(state[0], Shared):
            raise TypeError("this is not the state of a Jobserver")
        shared, *defaults = state
        self._set_defaults(*defaults)
        self._bind(shared)

    def __repr__(self) -> str:
        return repr(self._shared)
