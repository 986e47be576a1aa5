"""``python -m npmerge`` is the command ``npmerge``."""

import signal
import sys


def run() -> int:
    """The command; what interrupts it before it has begun ends it without a word.

    Returns:
        Its exit status.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from npmerge.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(run())
