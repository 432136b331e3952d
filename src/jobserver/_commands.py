# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""The part of Jobserver that is about work other than jobs: this process's own, and commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ContextManager, Optional

from ._check import Env, check_env, deadline_of
from ._holding import Holding
from ._slots._announce import ChildEnv, check_style

if TYPE_CHECKING:
    import subprocess

    from ._run import Command
    from ._shared import Shared


class Commands:
    """Methods of ``Jobserver``."""

    _shared: Shared

    def slot(self, timeout: Optional[float] = None) -> ContextManager[None]:
        """
        Hold a slot for work in this very process: in a thread, in a C library, in a test run.

        Inside the with-block this thread counts as a job: no more jobs and such threads run than
        there are slots, the slot comes back whatever kills the process, and a ``submit`` without a
        timeout lends it. In a job, the first thread to ask uses the job's own slot. A block inside
        a block of the same thread takes nothing more.

        Args:
            timeout: How many seconds to wait for a slot, as the block is entered; None for as long
                as it takes.

        Raises:
            TypeError, ValueError: A malformed argument.
            Blocked: On entering: no slot in time.
            CallbackRaised: On entering: a callback failed; no slot is held.
            RuntimeError: On entering: the Jobserver is closed.
        """
        return Holding(self._shared, timeout)

    def child_env(self, style: str = "auto", *, env: Env = ()) -> ChildEnv:
        """
        Return an environment for a command that is to take its slots from this pool.

        The command, and all that it starts, counts the slot of its caller as its own and takes
        one more for each further process. In a job that is the job's slot, so it is not to work
        meanwhile; elsewhere take one with ``slot()``. What a command that is killed had taken is
        lost until the pool is closed: ``run()`` is safe from that.

        Args:
            style: ``"fifo"`` names a path (ninja, cargo, make 4.4), ``"pipe"`` descriptors (any
                make, gcc, cargo), ``"universal"`` both in a way that all of them understand, and
                ``"auto"`` what is best for most, which is universal.
            env: Changes to ``os.environ``, see ``submit``.

        Returns:
            A dict with ``MAKEFLAGS``, for ``env`` of ``subprocess``. Its attribute ``pass_fds``
            goes with it: those descriptors are open until its ``close()``, or its end.

        Raises:
            TypeError, ValueError: A malformed argument.
            RuntimeError: The Jobserver is closed.
            OSError: No descriptor is left.
        """
        changes, style = check_env(env), check_style(style)
        self._shared.refuse_closed()
        slots = self._shared.slots
        return ChildEnv(slots.shared_pipe(), slots.slots, style, changes)

    def popen_kwargs(self, style: str = "auto", *, env: Env = ()) -> dict[str, Any]:
        """
        Return ``env`` and ``pass_fds`` for ``subprocess.Popen`` or ``subprocess.run``.

        As in ``subprocess.run(["make"], **js.popen_kwargs())``; see ``child_env``.
        """
        found = self.child_env(style, env=env)
        # Who holds the one holds the other: the descriptors are open as long as `env` is in use.
        return {"env": found, "pass_fds": found.pass_fds}

    def run(
        self,
        args: Command,
        *,
        style: str = "auto",
        input: Any = None,  # noqa: A002  # subprocess.run's own name for it
        capture_output: bool = False,
        timeout: Optional[float] = None,
        check: bool = False,
        **popen_kwargs: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """
        Run a command on a slot, in the manner of ``subprocess.run``, and wait for it.

        The command gets a FIFO of its own to take further slots from, as many as are free, so that
        make, ninja, cargo and what they start share the slots. Whatever it loses, keeps or makes
        up is private to it: with its end all its slots are back. Meanwhile jobs are reaped, and
        their callbacks issued; an error in one of those becomes a RuntimeWarning.

        Where this thread holds a slot, as in a job, the command runs on that. If this process is
        killed, its slots come back though the command may run on.

        Args:
            args: The command, as for ``subprocess.run``.
            style: See ``child_env``.
            input: What to write to its standard input; text in text mode, else bytes.
            capture_output: Return what it writes.
            timeout: How many seconds from now to wait for a slot and for the end of the command,
                which is then killed.
            check: Raise an exception if the exit status is not 0.
            popen_kwargs: What else ``subprocess.Popen`` takes.

        Raises:
            Blocked: No slot in time; nothing has started.
            CallbackRaised: A callback failed before the command was started; call again.
            subprocess.TimeoutExpired: The command was killed; has what it wrote until then.
            subprocess.CalledProcessError: With ``check``, for an exit status that is not 0.
            OSError: The command cannot be started.
            TypeError, ValueError: A malformed argument.
            RuntimeError: The Jobserver is closed.
        """
        from subprocess import PIPE

        from ._run import run

        deadline, style = deadline_of(timeout), check_style(style)
        if input is not None:
            if popen_kwargs.get("stdin") is not None:
                raise ValueError("stdin and input may not both be used")
            popen_kwargs["stdin"] = PIPE
        if capture_output:
            if popen_kwargs.get("stdout") is not None or popen_kwargs.get("stderr") is not None:
                raise ValueError("stdout and stderr may not be used with capture_output")
            popen_kwargs["stdout"] = popen_kwargs["stderr"] = PIPE
        return run(
            self._shared,
            args,
            style,
            timeout,
            deadline,
            input,
            check=check,
            popen=popen_kwargs,
        )
