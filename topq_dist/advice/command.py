"""`topq advise`: what a training step would take under each method, on this link or a given one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from traceback import extract_tb
from typing import TYPE_CHECKING, Any

import click

from topq_dist.ps.cli.option_types import Parsed, parse_size
from topq_dist.ps.cli.options import option

if TYPE_CHECKING:
    from topq_dist.advice.engine import Training
    from topq_dist.advice.report import Advice

_PACKAGE = Path(__file__).parents[1]
_NUMBER = r"\s*([0-9]*\.?[0-9]+)\s*"
_RATE = re.compile(rf"{_NUMBER}([kmg]?)bit(?:/s)?\s*", re.IGNORECASE)
_TIME = re.compile(rf"{_NUMBER}(us|ms|s)\s*")
_RATES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_TIMES = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_rate(text: str) -> float:
    """Return the bits a second of "100mbit" or "2.5 Gbit/s"; raises ValueError."""
    match = _RATE.fullmatch(text)
    if match is None or not float(match[1]):
        raise ValueError(f"{text!r}: expected a rate above zero, such as 100mbit or 2.5gbit")
    return float(match[1]) * _RATES[match[2].lower()]


def parse_time(text: str) -> float:
    """Return the seconds of "250us", "1.5ms" or "2s"; raises ValueError."""
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r}: expected a time, such as 250us, 1.5ms or 2s")
    return float(match[1]) * _TIMES[match[2]]


@click.command(short_help="Predict a step under each method, and recommend one.")
@option(
    "--model",
    metavar="MODULE:FACTORY",
    help="What FACTORY() of MODULE returns: a bare model, a function that returns the loss of a"
    " model on the next batch, and, if it is not to be AdamW, the optimizer.",
)
@option(
    "--parameters",
    type=Parsed("N", parse_size),
    help="In place of a model: gradients of the shapes of a GPT with so many, as 124M.",
)
@option(
    "--bandwidth",
    type=Parsed("RATE", parse_rate),
    help="Of each host's link, as 100mbit; under torchrun it is measured.",
)
@option(
    "--latency",
    type=Parsed("TIME", parse_time),
    help="One way, between two hosts, beside --bandwidth.  [default: 0ms]",
)
@option("--world-size", type=click.IntRange(min=2), help="Ranks beside --bandwidth.  [default: 2]")
@option(
    "--compute",
    type=Parsed("TIME", parse_time),
    help="A step that exchanges nothing, where it is known; measured where left out, and 0 with"
    " --parameters.",
)
@option("--q", multiple=True, type=float, help="Of top-Q; may be given several times.")
@option("--value-format", multiple=True, help="Of top-Q; may be given several times.")
@option("--every", type=click.IntRange(min=2), default=5, show_default=True, help="Local steps.")
@option(
    "--budget",
    type=Parsed("TIME", parse_time),
    default="60s",
    show_default=True,
    help="About how long methods are measured.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, on one line.")
def advise(**given: Any) -> None:
    """Predict a training step under dense, fp16, PowerSGD, top-Q and local steps; recommend one.

    Under torchrun it measures the link between the ranks:

    torchrun ... --no-python topq advise --model train:factory

    Alone it takes one that is given:

    topq advise --parameters 124M --bandwidth 100mbit --latency 1ms --world-size 8

    Each method really steps the model, on a link without delay; docs/advise.md says how a step is
    predicted from that, and what is not known.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    _check(given, ranks)
    training = _training(given)
    advice = _advised(given, training, ranks)
    if ranks == 1 or os.environ["RANK"] == "0":
        click.echo(advice.as_json() if given["as_json"] else advice.text())


def _check(given: dict[str, Any], ranks: int) -> None:
    if (given["model"] is None) == (given["parameters"] is None):
        raise click.UsageError("expected one of --model and --parameters")
    if ranks == 1 and given["bandwidth"] is None:
        raise click.UsageError("no link to measure: expected torchrun, or --bandwidth")
    for name in ("bandwidth", "latency", "world_size"):
        if ranks > 1 and given[name] is not None:
            spelt = name.replace("_", "-")
            raise click.UsageError(f"--{spelt} under torchrun: expected none, it is measured")


def _training(given: dict[str, Any]) -> Training:
    from topq_dist.advice.engine import Training

    if given["parameters"] is not None:
        import torch

        from topq_dist.advice.synthetic import GptShapes

        try:
            shapes = GptShapes(given["parameters"])
        except ValueError as error:
            raise click.UsageError(f"--{error}") from error
        except RuntimeError as error:
            # torch's own word for no memory
            raise click.ClickException(
                f"--parameters={given['parameters']}: expected a model that this machine has memory"
                " for"
            ) from error
        optimizer: Any = torch.optim.SGD(shapes.parameters(), lr=1e-3)
        return Training(model=shapes, loss=lambda model: model(), optimizer=optimizer)
    made = _factory(given["model"])()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise click.UsageError(
            f"--model {given['model']} returned a {type(made).__name__}: expected (model, loss) or"
            " (model, loss, optimizer)"
        )
    if len(made) == 3:
        model, loss, optimizer = made
    else:
        import torch

        model, loss = made
        optimizer = torch.optim.AdamW(model.parameters())
    return Training(model=model, loss=loss, optimizer=optimizer)


def _factory(spec: str) -> Callable[[], Any]:
    module_name, _, name = spec.partition(":")
    # as python -m has it
    sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise click.UsageError(f"--model {spec}: expected MODULE:FACTORY; {error}") from error
    if not callable(factory):
        raise click.UsageError(f"--model {spec}: expected something to call")
    found: Callable[[], Any] = factory
    return found


def _advised(given: dict[str, Any], training: Training, ranks: int) -> Advice:
    from topq_dist.advice import advise as library
    from topq_dist.exchange.agreement import ExchangeError

    chosen: dict[str, Any] = {
        "qs": given["q"] or library.DEFAULT_QS,
        "value_formats": given["value_format"] or library.DEFAULT_VALUE_FORMATS,
        "compute_s": 0.0 if given["parameters"] and given["compute"] is None else given["compute"],
    }
    alone: dict[str, Any] = {
        "bandwidth_bits_per_s": given["bandwidth"],
        "latency_s": given["latency"],
        "world_size": given["world_size"],
    }
    try:
        with nullcontext() if ranks == 1 else _torchrun_group(training):
            return library.advise(
                training.model,
                training.loss,
                training.optimizer,
                every=given["every"],
                budget_s=given["budget"],
                progress=_tell,
                **chosen,
                **(alone if ranks == 1 else {}),
            )
    except (TypeError, ValueError, ExchangeError) as error:
        if Path(extract_tb(error.__traceback__)[-1].filename).is_relative_to(_PACKAGE):
            raise click.ClickException(str(error)) from error
        # of the user's own code, whose lines are what helps
        raise


@contextmanager
def _torchrun_group(training: Training) -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("nccl" if training.device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _tell(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"measuring {line}", err=True)
