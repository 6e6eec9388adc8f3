"""`python -m lvtrain …` is `python lvtrain/main.py …`."""

import sys

from lvtrain.main import main

if __name__ == "__main__":
    sys.exit(main())
