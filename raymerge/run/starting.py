"""Start Ray in the background while a command still reads its recipe and plans."""

import threading

_starting: list[threading.Thread] = []


def start() -> None:
    """Begin to connect to Ray and to warm its workers up; errors are met again by whoever waits."""
    if not _starting:
        _starting.append(threading.Thread(target=_start, daemon=True))
        _starting[0].start()


def wait() -> None:
    """Return when a start that was begun has ended."""
    for thread in _starting:
        thread.join()


def _start() -> None:
    from raymerge.errors import RayMergeError
    from raymerge.run import cluster

    try:
        cluster.connect()
        cluster.warm_up()
    except RayMergeError:
        return
