"""``python -m tunesmith``: the same as the ``tunesmith`` command."""

import sys

from tunesmith.cli import main

if __name__ == "__main__":
    sys.exit(main())
