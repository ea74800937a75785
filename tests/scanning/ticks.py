"""Whether other threads of Python run meanwhile."""

import threading
import time


def ticks_beside(work):
    """How often another thread came to run within the work, its first and last fifth apart."""
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(0.0005):
            ticks.append(time.perf_counter())

    ticker = threading.Thread(target=tick)
    ticker.start()
    begin = time.perf_counter()
    work()
    end = time.perf_counter()
    done.set()
    ticker.join()
    margin = (end - begin) / 5
    return sum(begin + margin < moment < end - margin for moment in ticks)
