"""Commands whose help is in groups, and which know the flags of other programs."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from vpt_fast.cli.common import fail
from vpt_fast.cli.usage.groups import GROUPS, OTHERS
from vpt_fast.cli.usage.spellings import respelled

_WHOLE = "\N{NON-BREAKING HYPHEN}"


class Command(TyperCommand):
    """Command of `vpt-fast`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words after the command's name."""
        own = {name for option in self.params for name in (*option.opts, *option.secondary_opts)}
        try:
            args = respelled(args, {*own, "--help"})
        except ValueError as error:
            fail(error, 2)
        return super().parse_args(ctx, args)

    def get_help(self, ctx: Any) -> str:
        """Return the help, in which names such as hf-hub:user/name are not divided at hyphens."""
        return super().get_help(ctx).replace(_WHOLE, "-")

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words after the command's name in the line of its usage."""
        arguments = [one for one in self.get_params(ctx) if one.param_type_name == "argument"]
        return [
            "[OPTIONS]",
            *(str(one.metavar) if one.required else f"[{one.metavar}]" for one in arguments),
        ]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then options by their `rich_help_panel`, in two columns of text."""
        groups: dict[str, list[tuple[str, str]]] = {name: [] for name in GROUPS}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx)
            if record is not None:
                is_argument = option.param_type_name == "argument"
                group = GROUPS[0] if is_argument else getattr(option, "rich_help_panel", None)
                groups[group or OTHERS].append(record)
        for name, records in groups.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl([(key, text.replace("-", _WHOLE)) for key, text in records])
