"""The `topq` command: topq serve, topq status, topq health.

Free of torch until a server starts. Exit codes: 0; 1 where something failed, 2 where an option is
wrong, each with one line that says why; 130 where it was interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # gRPC's core would log each broken connection to stderr; what matters is reported as an error
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        import click

        from topq_dist.ps.cli.commands import topq
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("topq_dist"):
            raise
        print(f"topq: error: {error}: install topq-dist[ps]", file=sys.stderr)
        return 1
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


if __name__ == "__main__":
    sys.exit(main())
