"""The time of a core that functions take, so that ratios hold on a busy machine."""

import gc
import time


def cpu_seconds(function, *arguments):
    """(seconds of this process's CPU time, what the function returned).

    Without garbage collection, as `timeit` has it: one that the tests before have made due takes as long as the
    function itself.
    """
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        result = function(*arguments)
        return time.process_time() - began, result
    finally:
        gc.enable()
