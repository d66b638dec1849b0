"""`python -m vpt_fast.cli`, as `python -m vpt_fast`."""

from vpt_fast.__main__ import main

main()
