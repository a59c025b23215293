"""``python -m driftmax``: the same as the ``driftmax`` command."""

from __future__ import annotations

import sys

from driftmax.cli import main

if __name__ == "__main__":
    sys.exit(main())
