"""Arguments of the command ``influence``, and what is done with them."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_framework.cli.new_plugin import new_plugin
from influence_framework.cli.plugins import as_json, overview
from influence_framework.errors import InfluenceError, InvalidInputError
from influence_framework.loading import core_version
from influence_framework.registry import default_registry

if TYPE_CHECKING:
    from influence_framework.reporting import Page

PAGE, REPORT = "influence-demo.html", "influence-report.html"
FAILURE = 2
NONCONFORMING = 1
INTERRUPTED = 130
CUT_OFF = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Its arguments; those of the process where left out.

    Returns:
        0; 1 where a check of the conformance kit fails; 2 where something is wrong that the user can put
        right, which is said on standard error; 130 where interrupted; 1 where nobody reads what it prints.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show λ shows a question mark instead of ending the command.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    arguments = _parser().parse_args(argv)
    status = 0
    try:
        if arguments.command == "plugins":
            _plugins(arguments)
        elif arguments.command == "check":
            status = _check(arguments)
        elif arguments.command == "new-plugin":
            _new_plugin(arguments)
        elif arguments.command == "run":
            _run(arguments)
        elif arguments.command == "top":
            _top(arguments)
        elif arguments.command == "report":
            _report(arguments)
        else:
            _demo(arguments)
        sys.stdout.flush()
    except InfluenceError as error:
        print(f"influence: {error}", file=sys.stderr)
        return FAILURE
    except KeyboardInterrupt:
        print("influence: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader, such as head, has seen enough; the interpreter must not try to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_OFF
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="influence",
        description="Which training points pushed a PyTorch model towards or away from a prediction.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {core_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    plugins = commands.add_parser(
        "plugins",
        help="list the installed solvers, curvature sources and executors",
        description=(
            "List the installed solvers, curvature sources and executors, and the plugins that do not work."
        ),
    )
    plugins.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="list options with their defaults, and what each method needs and is made for",
    )
    plugins.add_argument(
        "--tracebacks", action="store_true", help="show in full where each plugin that failed did so"
    )
    plugins.add_argument("--json", action="store_true", help="print all of it as JSON")

    run = commands.add_parser(
        "run",
        help="compute the scores that a config file asks for",
        description=(
            "Fit a model and score training points by what a TOML file says, into a folder where a run that "
            "was killed can go on. Everything in the file is checked before anything is computed."
        ),
    )
    run.add_argument("config", type=Path, metavar="CONFIG", help="the file, such as config.toml")
    run.add_argument(
        "--resume", action="store_true", help="go on where a run that was stopped or killed has left the store"
    )
    run.add_argument("--no-progress", action="store_true", help="show no progress bars")

    best = commands.add_parser(
        "top",
        help="print the most influential points of a store",
        description="Print the training points with the largest and the smallest scores in a store.",
    )
    best.add_argument("store", type=Path, metavar="STORE", help="the folder that influence run has written")
    best.add_argument(
        "--test", metavar="ID", help="identifier of the test point: its position, if it has no other"
    )
    best.add_argument(
        "-k", type=_count, default=10, metavar="N", help="how many helpful and how many harmful (default: 10)"
    )

    _add_report(commands)

    create = commands.add_parser(
        "new-plugin",
        help="write a plugin of your own to start from",
        description=(
            "Write a package with a working solver, its tests and the entry point by which it is found. "
            "Replace the solver by your own method."
        ),
    )
    create.add_argument("name", metavar="NAME", help="of the solver, such as my_method")
    create.add_argument(
        "--directory",
        type=Path,
        default=Path(),
        metavar="D",
        help="where the folder of the package goes (default: here)",
    )

    check = commands.add_parser(
        "check",
        help="test whether a solver, curvature source, preconditioner or executor does what its protocol asks",
        description=(
            "Make every check of the conformance kit on a method with its default options, and show them as a "
            "table. Exit status: 0 where all pass, 1 where one fails, 2 where NAME is none."
        ),
    )
    check.add_argument("name", metavar="NAME", help="as listed by: influence plugins")
    check.add_argument(
        "--kind",
        choices=["solver", "source", "preconditioner", "executor"],
        help="what to check it as (default: what it is registered as)",
    )

    demo = commands.add_parser(
        "demo",
        help="find flipped labels in a small data set and write a page about it",
        description=(
            "Train a small net on scikit-learn's digits with 10 %% of the training labels flipped, score every "
            "training image by its influence, count the flipped labels that the scores find, and write one "
            "self-contained HTML page. Needs: pip install 'influence-framework[demo]'"
        ),
    )
    demo.add_argument(
        "--solver", default="cg", metavar="NAME", help="how the curvature is inverted (default: cg)"
    )
    demo.add_argument(
        "--source",
        default="gauss_newton",
        metavar="NAME",
        help="which curvature: gauss_newton, hessian, empirical_fisher (default: gauss_newton)",
    )
    demo.add_argument(
        "--regularization",
        type=float,
        metavar="F",
        help="λ of (C + λI)⁻¹ (default: 0.02; 0.2 for the hessian, which has negative eigenvalues)",
    )
    demo.add_argument(
        "--output", type=Path, default=Path(PAGE), metavar="PATH", help=f"where the page goes (default: {PAGE})"
    )
    demo.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of data, flipped labels and net (default: 0)"
    )
    return parser


def _add_report(commands: Any) -> None:
    page = commands.add_parser(
        "report",
        help="write a page of HTML about a store",
        description=(
            "Write one self-contained page of HTML: for every test point the training points that helped and "
            "harmed it most, rankings, and how the scores were made. A store holds scores and identifiers; "
            "--config, or --train and --test, say where pictures, texts or rows come from. "
            "Needs: pip install 'influence-framework[report]'"
        ),
    )
    page.add_argument("store", type=Path, metavar="STORE", help="the folder that influence run has written")
    page.add_argument(
        "--config",
        type=Path,
        metavar="CONFIG",
        help="the file that made the store: shows what its loaders yield",
    )
    page.add_argument(
        "--train",
        metavar="M:A",
        help="import path of the training points: pictures, texts, rows, a loader, or Points",
    )
    page.add_argument("--test", metavar="M:A", help="import path of the test points")
    page.add_argument("--decode", metavar="M:A", help="import path of a function from a token id to its text")
    page.add_argument(
        "--self-influence", type=Path, metavar="STORE", help="a store of self-influences, to rank by them too"
    )
    page.add_argument(
        "-k", type=_count, default=6, metavar="N", help="training points on each side (default: 6)"
    )
    page.add_argument("--title", metavar="TEXT", default="Influence of training points", help="of the page")
    page.add_argument(
        "--output",
        type=Path,
        default=Path(REPORT),
        metavar="PATH",
        help=f"where the page goes (default: {REPORT})",
    )


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {count}")
    return count


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**63:
        raise argparse.ArgumentTypeError(f"must lie in [0, 2⁶³), got {seed}")
    return seed


def _plugins(arguments: argparse.Namespace) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if arguments.json:
        print(as_json(default_registry))
        return
    text = overview(default_registry, verbose=arguments.verbose, tracebacks=arguments.tracebacks, width=width)
    print(text)


def _new_plugin(arguments: argparse.Namespace) -> None:
    folder = new_plugin(arguments.name, arguments.directory)
    place, with_tests = shlex.quote(str(folder)), shlex.quote(f"{folder}[test]")
    steps = (f"pip install --editable {with_tests}", f"influence check {arguments.name}", f"pytest {place}")
    print("\n  ".join((f"Wrote {folder}. Next:", *steps)))


def _run(arguments: argparse.Namespace) -> None:
    # Imported here, so that the other commands start sooner.
    from influence_framework.cli.run import run

    outcome = run(arguments.config, resume=arguments.resume, progress=not arguments.no_progress)
    if outcome is not None:
        print(outcome)


def _top(arguments: argparse.Namespace) -> None:
    from influence_framework.cli.top import top

    print(top(arguments.store, arguments.test, arguments.k))


def _report(arguments: argparse.Namespace) -> None:
    # Imported here, so that the other commands start sooner.
    from influence_framework.cli.report import write

    page, path = write(
        arguments.store,
        _writable(arguments.output, REPORT),
        config=arguments.config,
        train=arguments.train,
        test=arguments.test,
        decode=arguments.decode,
        self_influence=arguments.self_influence,
        count=arguments.k,
        title=arguments.title,
    )
    print(_wrote(page, path) + ".")


def _wrote(page: Page, path: Path) -> str:
    return f"Wrote {path} ({len(page.html.encode()) / 1000:.0f} kB)"


def _check(arguments: argparse.Namespace) -> int:
    # Imported here, so that the other commands start sooner.
    from influence_framework.cli.check import check

    report = check(arguments.name, arguments.kind, default_registry)
    print(report)
    return 0 if report.passed else NONCONFORMING


def _demo(arguments: argparse.Namespace) -> None:
    # Imported here, so that the other commands work without the extra.
    from influence_framework.cli import demo, demo_page, demo_text

    start = time.perf_counter()
    output = _writable(arguments.output, PAGE)
    result = demo.run(
        demo.Settings(arguments.solver, arguments.source, arguments.regularization, arguments.seed),
        progress=True,
    )
    for message in result.warnings:
        print(f"warning: {message}", file=sys.stderr)
    print(demo_text.report(result))
    page = demo_page.page(result)
    print(f"\n{_wrote(page, page.save(output))} after {time.perf_counter() - start:.1f} s.")


def _writable(path: Path, name: str) -> Path:
    """The absolute path of the page, called ``name`` in a folder, checked before anything is computed."""
    path = path.expanduser().absolute()
    if path.is_dir():
        path /= name
    if not path.parent.is_dir():
        raise InvalidInputError(f"Cannot write {path}: the folder {path.parent} does not exist.")
    return path


if __name__ == "__main__":
    sys.exit(main())
