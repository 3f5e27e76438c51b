"""`python -m graphoptd`, for when the command is not on the path."""

import sys

from graphoptd.cli import main

sys.exit(main())
