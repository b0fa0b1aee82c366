"""Scans in flight in one worker: turns beside others and alone, one at the model, none too late."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

from pipelines.turns import Turns


def started(target: object) -> threading.Thread:
    thread = threading.Thread(target=target)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_turns_beside_each_other_overlap_and_one_alone_waits_for_them() -> None:
    turns, order = Turns(), []
    both, leave = threading.Barrier(3), threading.Event()

    def beside() -> None:
        with turns.together("a"):
            both.wait(10)  # passes only with both inside
            leave.wait(10)
            order.append("beside")

    def alone() -> None:
        with turns.alone("b"):
            order.append("alone")

    threads = [started(beside), started(beside)]
    both.wait(10)
    threads.append(started(alone))
    time.sleep(0.1)
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["beside", "beside", "alone"]


def test_who_comes_while_one_wants_to_be_alone_waits_behind_it() -> None:
    turns, order = Turns(), []
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with turns.together("a"):
            inside.set()
            leave.wait(10)

    def alone() -> None:
        with turns.alone("b"):
            order.append("alone")

    def late() -> None:
        with turns.together("c"):
            order.append("late")

    threads = [started(first)]
    inside.wait(10)
    threads.append(started(alone))
    time.sleep(0.1)
    threads.append(started(late))
    time.sleep(0.1)
    assert order == []
    leave.set()
    for thread in threads:
        thread.join(10)
    assert order == ["alone", "late"]


def test_waiting_for_the_model_is_not_held_against_a_scan() -> None:
    late: list[str] = []
    turns = Turns(0.6, late.extend)
    got = threading.Event()

    def waits() -> None:
        with turns.together("waits"), turns.model():
            got.set()

    with turns.together("holds"):
        with turns.model():
            thread = started(waits)
            time.sleep(0.4)
        assert got.wait(10)
        thread.join(10)
    assert late == []


def test_a_scan_above_its_deadline_is_named() -> None:
    late: list[str] = []
    said = threading.Event()

    def on_late(scan_ids: list[str]) -> None:
        late.extend(scan_ids)
        said.set()
        threading.Event().wait()  # a real one ends the process

    turns = Turns(0.2, on_late)
    with turns.together("quick"):
        pass
    with turns.together("slow"):
        assert said.wait(10)
    assert late == ["slow"]


def test_a_process_that_never_lets_go_of_pythons_lock_is_ended() -> None:
    program = (
        "import ctypes, time\n"
        "from pipelines import turns\n"
        "turns.GRACE = 0.5\n"
        "ours = turns.Turns(0.5, print)\n"
        "with ours.together('a'):\n"
        "    time.sleep(0.3)\n"
        "    ctypes.PyDLL(None).sleep(100)\n"  # holds the lock, as some C code does
    )
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == 1
