"""`python -m vpt_fast.cli`."""

from vpt_fast.cli.app import main

main()
