"""`island completion`: the script that a shell reads."""

from __future__ import annotations

import click

from island_fast.cli.help import verb
from island_fast.cli.options import add_common_options
from island_fast.cli.run import Run

__all__ = ["completion"]


@verb("Print the completion script for a shell")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@add_common_options
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script by which a shell completes verbs, options, files and names of snapshots.

    Names of snapshots come from a repository in a
    directory; one in Swift is not asked. bash must be 4.4 or newer.

    \b
    Example:
      eval "$(island completion bash)"        # in ~/.bashrc
      eval "$(island completion zsh)"         # in ~/.zshrc, after compinit
      island completion fish | source         # in ~/.config/fish/config.fish
    """  # noqa: D301
    from island_fast.cli.shell_completion import script  # here: no other verb needs it

    text = script(shell, context.find_root().command)
    context.ensure_object(Run).answer({"shell": shell, "script": text}, text.rstrip("\n"), text.rstrip("\n"))
