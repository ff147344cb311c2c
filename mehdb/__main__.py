"""The `mehdb` command, and `python -m mehdb`."""

import signal
import sys
from typing import Final

INTERRUPTED: Final = 128 + signal.SIGINT  # what a shell says of a command that Ctrl-C ended


def main() -> None:
    """Run the command line. For a node, signals count from the first moment on, not only when all is loaded."""
    if sys.argv[1:2] == ["serve"]:
        # A container's first process has no default handlers: without one, SIGTERM would be passed over meanwhile.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # there is nothing to drain yet
    try:
        from mehdb import cli  # only here: it takes some tenths of a second

        cli.main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
