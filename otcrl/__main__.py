"""`python -m otcrl`, which launchers such as torchrun start."""

import sys

from otcrl.cli import main

sys.exit(main())
