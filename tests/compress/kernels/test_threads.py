import threading
import time
from functools import partial
from unittest import mock

import pytest

from topq_dist.compress.kernels import threads
from topq_dist.compress.kernels.threads import run_all


def test_results_come_in_the_order_of_the_tasks() -> None:
    def task(number: int) -> tuple[int, str]:
        time.sleep(0.01 * (4 - number))
        return number, threading.current_thread().name

    results = run_all([partial(task, number) for number in range(4)])
    assert [number for number, _ in results] == [0, 1, 2, 3]
    assert results[0][1] == threading.current_thread().name
    assert all(name.startswith("topq_dist_") for _, name in results[1:])


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_error_is_raised_once_all_have_ended(failing: int) -> None:
    ended = []

    def task(number: int) -> None:
        if number == failing:
            raise ArithmeticError(str(number))
        time.sleep(0.05)
        ended.append(number)

    with pytest.raises(ArithmeticError, match=str(failing)):
        run_all([partial(task, number) for number in range(3)])
    assert sorted([*ended, failing]) == [0, 1, 2]


def test_where_no_thread_can_be_started_the_caller_does_it_all() -> None:
    with (
        mock.patch.object(threads, "_threads", []),
        mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("no more threads")),
    ):
        names = run_all([lambda: threading.current_thread().name] * 3)
    assert names == [threading.current_thread().name] * 3


def test_a_task_that_is_handed_out_twice_runs_once() -> None:
    ran: list[int] = []
    run_all([lambda: None, lambda: None])
    task = threads._Task(lambda: ran.append(1))
    threads._hand_out([task])
    # as after an interrupt in the midst of handing out
    threads._wait_for([task], interrupted=True)
    run_all([lambda: None, lambda: None])
    assert ran == [1]
