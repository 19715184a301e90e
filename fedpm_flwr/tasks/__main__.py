"""What there is at a site's ``data-path``: python -m fedpm_flwr.tasks PATH."""

import os
import sys

from .examples import DataError
from .site import describe

if len(sys.argv) != 2:
    sys.exit("one argument: the path of a .npz file or of a folder of images")
try:
    print(describe(os.path.abspath(sys.argv[1])))
except DataError as error:
    sys.exit(str(error))
