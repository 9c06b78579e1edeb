"""`python -m turbotriton` is the command `turbotriton`."""

import sys

from turbotriton.cli.main import main

sys.exit(main())
