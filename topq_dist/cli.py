"""The `topq` command: topq serve, topq status, topq health, topq advise.

Free of torch until a server starts or steps are measured. Exit codes: 0; 1 where something failed,
2 where an option is wrong, each with one line that says why; 130 where it was interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

from topq_dist._version import __version__
from topq_dist.ps import without_extra

# without click there is nobody else to print it
_HELP = """\
Usage: topq serve | status | health | advise [OPTIONS]

  The parameter server of topq_dist: run one, say how its run is doing, or
  whether it takes calls. And what a training step would take under each
  exchange.

  {problem}."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # gRPC's core would log each broken connection to stderr; what matters is reported as an error
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        return _run(arguments)
    except ModuleNotFoundError as error:
        problem = without_extra(error)
        if problem is error:
            raise
        return _do_without(sys.argv[1:] if arguments is None else arguments, problem)
    finally:
        if arguments is None:
            # the process ends: another signal, or the next key, is to change neither how nor why
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)


def _run(arguments: Sequence[str] | None) -> int:
    import click

    from topq_dist.advice.command import advise
    from topq_dist.ps.cli.commands import topq

    topq.add_command(advise)
    try:
        code = topq.main(arguments, prog_name="topq", standalone_mode=False)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        who = context.command_path if context is not None else "topq"
        print(f"{who}: error: {' '.join(error.format_message().split())}", file=sys.stderr)
        return error.exit_code
    except click.Abort:
        print("topq: interrupted", file=sys.stderr)
        return 130
    return code if isinstance(code, int) else 0


def _do_without(arguments: Sequence[str], problem: ModuleNotFoundError) -> int:
    """Answer what can be answered without the packages of the extra."""
    if list(arguments) == ["--version"]:
        print(f"topq, version {__version__}")
        return 0
    if list(arguments) in (["--help"], ["-h"]):
        print(_HELP.format(problem=problem))
        return 0
    print(f"topq: error: {problem}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
