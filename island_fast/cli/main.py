"""The command `island`: the group of verbs, and one command line from words to exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from island_fast import __version__
from island_fast.cli.adopt import adopt
from island_fast.cli.completion import completion
from island_fast.cli.config import read_config
from island_fast.cli.copy import copy
from island_fast.cli.delete import delete
from island_fast.cli.diff import diff
from island_fast.cli.help import OUTPUT, VerbGroup, option
from island_fast.cli.info import info
from island_fast.cli.keep import keep
from island_fast.cli.list import list_
from island_fast.cli.map import map_
from island_fast.cli.options import add_common_options
from island_fast.cli.restore import restore
from island_fast.cli.retain import retain
from island_fast.cli.run import Run, run_to_exit_code
from island_fast.cli.show import show_
from island_fast.cli.snapshot import snapshot
from island_fast.cli.sweep import sweep
from island_fast.cli.unpin import unpin
from island_fast.cli.usage import usage
from island_fast.cli.verify import verify

__all__ = ["island", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (by default this process's) and return its exit code. Never raises."""
    words = [*(sys.argv[1:] if argv is None else argv)]

    def work(run: Run) -> None:
        if instruction := os.environ.get("_ISLAND_COMPLETE"):
            from island_fast.cli.shell_completion import complete

            complete(island, run, instruction)
            return
        run.help_asked = not {"-h", "--help"}.isdisjoint(words)
        with island.make_context("island", words or ["--help"], obj=run) as context:
            island.invoke(context)

    return run_to_exit_code(work, json_asked="--json" in words, to_the_end=argv is None)


def _print_version(context: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not context.resilient_parsing:
        from island_fast._diff import HASH_KERNEL

        text = f"island {__version__}, digests by {HASH_KERNEL}"
        answer = {"version": __version__, "hash_kernel": HASH_KERNEL}
        context.ensure_object(Run).answer(answer, text, brief=__version__)
        context.exit()


@click.group(
    cls=VerbGroup,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    subcommand_metavar="VERB [ARGS]...",
)
@add_common_options
@option(OUTPUT, "--version", is_flag=True, expose_value=False, callback=_print_version,
        help="Print the version, and what computes digests.")  # fmt: skip
@click.pass_context
def island(context: click.Context) -> None:
    """Incremental snapshots of qcow2 volumes, in a directory or OpenStack Swift.

    Only blocks that changed since the volume's previous snapshot are read and stored. Each snapshot can be
    restored and deleted by itself, in any order. 'island VERB --help' explains a verb.

    \b
    Example:
      export ISLAND_REPOSITORY=/srv/snapshots    # or swift://volumes/host7
      island snapshot disk.qcow2
      island list
      island restore disk@latest restored.qcow2

    \b
    Environment:
      ISLAND_REPOSITORY      the repository, if -r names none
      ISLAND_COMPRESSION     compression of what is sent: zstd or none
      ISLAND_WORKERS         how many worker threads to use at most
      ISLAND_LIMIT_UPLOAD    rates of --limit-upload and --limit-download,
      ISLAND_LIMIT_DOWNLOAD  such as 10M
      ISLAND_KEEP_LAST, ...  values of --keep-last and the other rules of retain
      ISLAND_CONFIG          configuration file, for what is not set here;
                             see 'man island-config'
                             [default: ~/.config/island/config.toml]
      ISLAND_STATE           folder of local state: locks and caches
      ISLAND_TRUST_SIZES=1   read what claims more memory than there is for it
      ISLAND_DEBUG=1         show the traceback of an error
      ST_AUTH ST_USER ST_KEY, OS_* or OS_CLOUD
                             credentials for Swift
      ISLAND_TO_ST_AUTH, ..., ISLAND_TO_OS_*
                             those for 'copy --to', if they differ

    \b
    Exit codes:
      0  done
      1  failed
      2  wrong usage
      3  not found: a file, repository, container, volume or snapshot
      4  refused for safety: continuing could lose or mix data
      5  the store cannot be reached, or refuses access
      6  damaged data
      130, 143, 129
         interrupted by Ctrl-C, SIGTERM or SIGHUP
    """  # noqa: D301
    # Every login asks for the completion script: a broken file must not spoil that.
    run = context.ensure_object(Run)
    try:
        values = {} if context.invoked_subcommand == "completion" else read_config()
    except click.UsageError:
        if not run.help_asked:
            raise
        values = {}
    run.location = run.location or values.get("repository")
    context.default_map = values


island.add_verbs("Take and restore", snapshot, restore, copy)
island.add_verbs("Look at snapshots and images", list_, show_, diff, usage, info, map_)
island.add_verbs("Keep and clean up", retain, keep, delete, sweep, unpin)
island.add_verbs("Maintain the repository", verify, adopt, completion)
