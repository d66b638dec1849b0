"""`vpt-fast`, also as `python -m vpt_fast`."""

from __future__ import annotations

import sys

from vpt_fast.extras import MissingExtraError, require_extra


def main() -> None:
    """Run the command line; the entry point of `vpt-fast`."""
    try:
        require_extra("train")
    except MissingExtraError as error:
        print(f"vpt-fast: error: {error}", file=sys.stderr)
        sys.exit(2)
    from vpt_fast.cli.app import main as run

    run()


if __name__ == "__main__":
    main()
