"""The command line of the bench."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from island_fast.bench.peers.versions import PEERS
from island_fast.cli.run import Run, run_to_exit_code
from island_fast.errors import IslandError, UsageError

__all__ = ["main"]

_WIDTH = 130


def _peers(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """The peers that are named, in the order of the help."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: there are {', '.join(PEERS)}")
    return [name for name in PEERS if name in names]


def _tell(text: str) -> None:
    """Show one line of progress: the last one only, on a terminal; "" takes it away there."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--quick", is_flag=True, help="Small volumes and few pairs: under a minute.")
@click.option("--swift", is_flag=True, help="Also what needs a Swift: one of its own, by the package swift.")
@click.option("--peers", metavar="NAMES", default=",".join(PEERS), show_default=True, callback=_peers,
              help="What to compare with; one that is not installed is named and left out.")  # fmt: skip
@click.option("--work", metavar="TEXT", default="", help="Only the works that have TEXT in their names.")
@click.option("--json", "json_file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="Write all that was measured, with machine, versions and parameters.")  # fmt: skip
@click.option("--plot", "plot_file", metavar="FILE.png", type=click.Path(path_type=Path, dir_okay=False),
              help="Draw the ratios.")  # fmt: skip
@click.option("--compare", "baseline_file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="Say what is worse than in FILE, which --json wrote, by more than the spread; "
              "then the exit code is 1.")  # fmt: skip
@click.pass_obj
def bench(
    run: Run,
    quick: bool,
    swift: bool,
    peers: list[str],
    work: str,
    json_file: Path | None,
    plot_file: Path | None,
    baseline_file: Path | None,
) -> None:
    """Measure island against what people would use instead: alternating pairs on the same data.

    It makes its own volumes in TMPDIR, which needs 40 GiB (1 GiB with --quick), and removes them.

    \b
    Example:
      python -m island_fast.bench --quick
      python -m island_fast.bench --json new.json --plot new.png --compare benchmarks/baseline.json
    """  # noqa: D301
    from rich.console import Console  # here: all of it takes a while, and --help needs none

    from island_fast.bench import plot, table
    from island_fast.bench.cases.all_cases import ALL
    from island_fast.bench.compare import check_alike, worse
    from island_fast.bench.report import load
    from island_fast.bench.runner import Plan, chosen, measure

    baseline = load(baseline_file) if baseline_file else None
    if baseline:
        check_alike(quick, baseline)
    if plot_file:
        plot.check()
    for path in (json_file, plot_file):
        if path and not os.access(path.parent, os.W_OK):
            raise UsageError(f"{path} cannot be written; its folder has to be there, and to be yours")
    report = measure(Plan(peers, chosen(ALL, work), quick, swift), _tell)
    _tell("")
    console = Console()
    table.draw(report, console if console.is_terminal else Console(width=_WIDTH))
    if json_file:
        json_file.write_text(report.as_json())
    if plot_file:
        plot.draw(report, plot_file)
    found = list(worse(report, baseline)) if baseline else []
    found = [f"worse than {baseline_file}: {'; '.join(found)}"] if found else []
    found += [f"{one.name} failed: {one.reason}" for one in report.left_out if one.failed]
    if found:
        raise IslandError("; ".join(found))


def main() -> int:
    """Run the bench as this process's command line says; returns the exit code."""

    def work(run: Run) -> None:
        with bench.make_context("python -m island_fast.bench", sys.argv[1:], obj=run) as context:
            bench.invoke(context)

    return run_to_exit_code(work, to_the_end=True)


if __name__ == "__main__":
    sys.exit(main())
