"""Entry point of `python -m bench.host`."""

import sys

from bench.host.host import main

sys.exit(main())
