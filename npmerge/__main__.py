"""``python -m npmerge`` is the command ``npmerge``."""

import sys

from npmerge.cli import main

sys.exit(main())
