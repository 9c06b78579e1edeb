"""What our processes log: their own lines from INFO on, others' from WARNING on; others' INFO is a line a request."""

import logging
import sys

__all__ = ["set_up_logging"]


def set_up_logging() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("turbotriton").setLevel(logging.INFO)
