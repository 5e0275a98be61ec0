"""A page about a run, or about several beside each other: did it help, what does it say now, what did it cost.

    python -m ftjax.report runs/mine                            writes runs/mine/report.html again
    python -m ftjax.report runs/one runs/two                    compares runs, in comparison.html
    python -m ftjax.report runs/sweep-* --out sweep.html

The page is one file that loads nothing. It is made of a run's config.json, metrics.jsonl, samples.jsonl and
environment.json, and of the evaluation.json that python -m ftjax.evaluate writes; a run may still be in progress.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ftjax import cli
from ftjax.errors import UserError
from ftjax.reporting import page


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "ftjax.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+", metavar="WORKDIR", help="of a run")
    parser.add_argument("--out", help="the page to write (default: report.html in the workdir of one run)")
    args = parser.parse_args(argv)
    workdirs = [Path(name) for name in args.workdirs]
    if len({workdir.resolve() for workdir in workdirs}) < len(workdirs):
        raise UserError("a workdir is given twice; name each run once")
    out = Path(args.out or (workdirs[0] / page.FILE if len(workdirs) == 1 else "comparison.html"))
    page.write(workdirs, out)
    print(f"report: {out}")
    return 0


if __name__ == "__main__":
    cli.exit_with(lambda: main(sys.argv[1:]))
