"""The command line of the bench: `python -m island_fast.bench`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from island_fast.bench.peers.all_peers import PEERS
from island_fast.cli.run import Run, run_to_exit_code
from island_fast.errors import IslandError, UsageError

__all__ = ["main"]

_WIDTH = 130


def _parse_peers(context: click.Context, parameter: click.Parameter, value: str) -> list[str]:
    """Return the peers that `value` names, in the order of the help."""
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in PEERS]
    if unknown:
        raise click.BadParameter(f"unknown: {', '.join(unknown)}; use any of {', '.join(PEERS)}")
    return [name for name in PEERS if name in names]


def _show_progress(text: str) -> None:
    """Show one line of progress. On a terminal it replaces the line before, and "" clears it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--quick", is_flag=True, help="Use small volumes and few pairs: about a minute.")
@click.option(
    "--swift",
    is_flag=True,
    help="Also run the cases that need Swift: starts one on this machine (needs the package swift).",
)
@click.option("--peers", metavar="NAMES", default=",".join(PEERS), show_default=True, callback=_parse_peers,
              help="Tools to compare with. A tool that is not installed is listed as left out.")  # fmt: skip
@click.option("--work", metavar="TEXT", default="", help="Run only the cases with TEXT in their names.")
@click.option("--json", "json_file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="Write all results as JSON, with the machine, versions and parameters.")  # fmt: skip
@click.option("--plot", "plot_file", metavar="FILE.png", type=click.Path(path_type=Path, dir_okay=False),
              help="Draw a chart of the ratios.")  # fmt: skip
@click.option("--compare", "baseline_file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
              help="List what is worse than in FILE (written by --json): ratios by more than their spread, "
              "counts by more than 0.1 %. If anything is, the exit code is 1.")  # fmt: skip
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
    """Compare the speed of island with other tools: both run on the same data, in turn.

    It makes the volumes in TMPDIR, which needs 40 GiB of free space (1 GiB with --quick), and removes them.

    \b
    Examples:
      python -m island_fast.bench --quick
      python -m island_fast.bench --json new.json --plot new.png --compare benchmarks/baseline.json
    """  # noqa: D301
    from rich.console import Console  # here, because these imports take a while and --help needs none

    from island_fast.bench import plot, table
    from island_fast.bench.cases.all_cases import ALL_CASES
    from island_fast.bench.compare import check_same_scale, find_regressions
    from island_fast.bench.report import load_report
    from island_fast.bench.runner import Plan, measure, select_cases

    baseline = load_report(baseline_file) if baseline_file else None
    if baseline:
        check_same_scale(quick, baseline)
    if plot_file:
        plot.require_matplotlib()
    for path in (json_file, plot_file):
        if path and not os.access(path.parent, os.W_OK):
            raise UsageError(f"cannot write {path}; its folder must exist and be writable")
    report = measure(Plan(peers, select_cases(ALL_CASES, work), quick, swift), _show_progress)
    _show_progress("")
    console = Console()
    table.print_report(report, console if console.is_terminal else Console(width=_WIDTH))
    if json_file:
        json_file.write_text(report.to_json())
    if plot_file:
        plot.draw(report, plot_file)
    found = list(find_regressions(report, baseline)) if baseline else []
    found = [f"worse than {baseline_file}: {'; '.join(found)}"] if found else []
    found += [f"{one.name} failed: {one.reason}" for one in report.left_out if one.failed]
    if found:
        raise IslandError("; ".join(found))


def main() -> int:
    """Run the bench with the arguments of this process, and return the exit code."""

    def work(run: Run) -> None:
        with bench.make_context("python -m island_fast.bench", sys.argv[1:], obj=run) as context:
            bench.invoke(context)

    return run_to_exit_code(work, to_the_end=True)


if __name__ == "__main__":
    sys.exit(main())
