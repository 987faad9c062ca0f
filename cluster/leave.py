"""`python -m tandem.cluster.leave PID`: a Ray pod's preStop hook. Drains the Tandem workers below PID, and waits.

In a pod PID is 1: whatever runs in the container.

Without it the pod's end begins with its raylet's, and Ray ends an actor within a second of that.
"""

from __future__ import annotations

import contextlib
import sys

import psutil

_TITLES = ("ray::PrefillActor", "ray::DecodeActor")  # what Ray calls their processes


def main() -> None:
    """Until the last one has ended: who calls this has a deadline, the pod's terminationGracePeriodSeconds."""
    workers = [process for process in psutil.Process(int(sys.argv[1])).children(recursive=True) if is_worker(process)]
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.terminate()
    psutil.wait_procs(workers)


def is_worker(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:  # it ended, or is none of ours
        return False
    return bool(command) and command[0].startswith(_TITLES)


if __name__ == "__main__":
    main()
