# SPDX-License-Identifier: Apache-2.0
# Copyright The jobserver authors
"""Looking again before going to sleep: who does, and how soon who does it in vain leaves it."""

from __future__ import annotations

import threading
from typing import Optional

from jobserver._spin import _MANY, _MOST, Spin


class Look:
    """Finds something from the ``nth`` time on; never if that is None."""

    def __init__(self, nth: Optional[int] = None) -> None:
        self.nth = nth
        self.count = 0

    def __call__(self) -> Optional[str]:
        self.count += 1
        return "found" if self.nth is not None and self.count >= self.nth else None


def passes(spin: Spin) -> int:
    """Return how many waits go by before one of them looks; that one finds something at once."""
    count = 0
    look = Look(1)
    while spin.until(look) is None:
        count += 1
        assert count <= _MANY
    assert look.count == 1
    return count


def in_vain(spin: Spin) -> None:
    """Have the next wait that spins at all be in vain."""
    look = Look()
    for _ in range(_MANY + 1):
        assert spin.until(look) is None
        if look.count:
            return
    raise AssertionError("no wait spins any more")


def test_what_is_there_is_found_by_one_look() -> None:
    """Who spins looks before anything else, and no more once it has found something."""
    look = Look(1)

    assert Spin().until(look) == "found"
    assert look.count == 1


def test_what_comes_a_little_later_is_found() -> None:
    """Who spins looks again when there is nothing; some spinning in a row gets to a third look."""
    spin = Spin()
    for _ in range(100):
        look = Look(3)
        if spin.until(look) == "found":
            assert look.count == 3
            return
        passes(spin)
    raise AssertionError("not even two looks were made in a hundred times")


def test_spinning_in_vain_is_left_for_ever_longer() -> None:
    """After each spinning in vain at least twice as many waits are left alone, up to a bound."""
    spin = Spin()
    for vain in range(20):
        in_vain(spin)
        left = spin._left

        # It was others who kept the processor, or else one more time in vain.
        assert left == _MANY or left >= min(2 ** (vain + 1) - 1, _MOST)
        if left == _MANY:
            return  # nothing was counted then
    assert spin._left == _MOST


def test_success_brings_spinning_back() -> None:
    """Each time that something was found halves how many waits a failure has left alone."""
    spin = Spin()
    spin._penalty = _MOST
    for _ in range(_MOST.bit_length()):
        assert passes(spin) == 0

    assert spin._penalty == 0


def test_left_alone_waits_do_not_look() -> None:
    """A wait that is left alone calls nothing, and the one after the last of them spins again."""
    spin = Spin()
    in_vain(spin)
    left = spin._left

    assert passes(spin) == left


def test_a_process_with_threads_does_not_spin() -> None:
    """Where another thread may want the interpreter nobody spins, and that is held against none."""
    spin, look = Spin(), Look(1)
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert spin.until(look) is None
        assert look.count == 0
    finally:
        end.set()
        thread.join()

    assert spin.until(look) == "found"
