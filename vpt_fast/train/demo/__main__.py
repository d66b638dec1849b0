"""`python -m vpt_fast.train.demo`."""

import sys

from vpt_fast.train.demo.demo import main

sys.exit(main())
