"""What there is at a site's ``data-path``: python -m fedpm_flwr.tasks PATH."""

import sys

from .examples import DataError
from .site import describe

if len(sys.argv) != 2:
    sys.exit("one argument: the absolute path of a .npz file or of a folder of images")
try:
    print(describe(sys.argv[1]))
except DataError as error:
    sys.exit(str(error))
