"""The start of the program: `gligen-xl`, or `python -m gligen_xl.cli` under torchrun and accelerate."""

import sys

from ..train.signals import begin_program

begin_program(sys.argv[1:])  # before the imports, which take a while

from .main import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
