"""The tuner's arguments: what there is, what it means, and what is refused."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from flashmoe.autotune.search.sampler import SAMPLERS
from flashmoe.machine.device import arch, named
from flashmoe.spec.options import DEFAULTS, add_options, whole

PROG = "flashmoe.autotune"
DONE, NOTHING_MEASURED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
_BACKENDS_WITH_TILES = ("cuda", "decode", "triton", "cpu")

_DESCRIPTION = """\
Find the fastest correct tile for attention problems on this machine and store it where
flash_attn_func looks. Without a problem option a default suite is tuned, forward, training and
decode, or with --direction that part of it; any other problem option tunes that one problem, in
which the others default as told below. What is stored for this device, torch and kernels is
measured again and kept unless something beats it. The same command again goes on where an
interrupted one stopped."""


def _defaults_text(device_type: str) -> str:
    given = " ".join(f"--{k.replace('_', '-')} {v}" for k, v in DEFAULTS[device_type].items())
    return f"  on {device_type}: {given}"


_EPILOG = f"""\
defaults of problem options, once one is given:
{_defaults_text("cpu")}
{_defaults_text("cuda")}
  --kv-heads as --heads, --seqlen-kv as --seqlen, --no-causal, --layout dense, --direction fwd

other commands (each has --help):
  show     what is tuned here
  export   write the tuned database to a file
  import   take over a file that export wrote
  apply    write winners into the list of tiles that are compiled in

exit codes:
    0  done: at least one problem has a result
    1  nothing could be measured, every candidate was wrong, or results could not be written
    2  bad usage
  130  interrupted; what was finished by then is stored and reported
"""


class UsageError(Exception):
    """An argument that names itself, what it got and what is allowed."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


@contextlib.contextmanager
def usable(wanted: str, path: Path) -> Iterator[None]:
    """Says of a path that cannot be read or written what was `wanted`."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{wanted}, got {str(path)!r}: {error.strerror}") from None


def warn(text: str) -> None:
    print(f"{PROG}: warning: {text}", file=sys.stderr)


def _seed(text: str) -> int:
    with contextlib.suppress(ValueError):
        if 0 <= (number := int(text)) < 2**32:
            return number
    raise argparse.ArgumentTypeError(f"must be an integer from 0 to 2**32 - 1, got {text!r}")


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < float("inf"):
            return number
    raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text!r}")


def _workers(text: str) -> int:
    """How many; 0 stands for auto."""
    return 0 if text == "auto" else whole(text)


def _study(text: str) -> str:
    if text and len(text) <= 100 and "/" not in text and "#" not in text:
        return text
    raise argparse.ArgumentTypeError(
        f"must be a name of at most 100 characters without / and #, got {text!r}"
    )


def parser() -> Parser:
    made = Parser(
        prog=f"python -m {PROG}",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    problem = made.add_argument_group("problem")
    add_options(problem)
    problem.add_argument(
        "--shapes",
        type=Path,
        metavar="FILE",
        help="tune the problems that flashmoe.record_problems(FILE) wrote, instead",
    )
    search = made.add_argument_group("search")
    search.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU)")
    search.add_argument(
        "--backend", choices=_BACKENDS_WITH_TILES, help="search this one's tiles only"
    )
    search.add_argument("--trials", type=whole, metavar="N", help="tiles tried per problem")
    search.add_argument(
        "--budget",
        type=_seconds,
        default=100.0,
        metavar="SECONDS",
        help="for all problems together, compilation included (default: %(default)g)",
    )
    search.add_argument(
        "--sampler",
        choices=SAMPLERS,
        help="who chooses the tiles (default: brute where all fit the time, else model)",
    )
    search.add_argument("--seed", type=_seed, default=0, metavar="N", help="(default: 0)")
    search.add_argument(
        "--force", action="store_true", help="search what is stored already, too, from scratch"
    )
    search.add_argument(
        "--calibrate",
        action="store_true",
        help="measure, instead, what predictions of time for untuned problems rest on: two minutes",
    )
    search.add_argument(
        "--dry-run",
        action="store_true",
        help="tell the space and an estimate of the time; nothing is searched or stored",
    )
    share = made.add_argument_group("trials and workers")
    share.add_argument(
        "--storage",
        metavar="WHERE",
        help="a journal file, postgresql://, mysql://, sqlite:/// or grpc://HOST:PORT "
        "(default: a journal file beside the tuned database)",
    )
    share.add_argument(
        "--study",
        type=_study,
        default="flashmoe",
        metavar="NAME",
        help="workers with the same storage and study share their trials (default: %(default)s)",
    )
    share.add_argument(
        "--workers",
        type=_workers,
        default=1,
        metavar="auto|N",
        help="GPUs of this host that search together, a process each (default: 1)",
    )
    output = made.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        default=Path("tuning"),
        metavar="DIR",
        help="folder of suggestions.md and report.html (default: tuning)",
    )
    output.add_argument("--json", action="store_true", help="one JSON document on stdout")
    output.add_argument("--debug", action="store_true", help="tracebacks with errors")
    return made


def command_parser(name: str, description: str, *, of_device: bool = True) -> Parser:
    """Of a command beside tuning; `of_device`: about what is stored for one device model."""
    made = Parser(prog=f"python -m {PROG} {name}", description=description, allow_abbrev=False)
    if of_device:
        made.add_argument("--device", metavar="DEVICE", help="cpu, cuda or cuda:N (default: a GPU)")
        made.add_argument(
            "--model", metavar="NAME", help="a device model that is not here, by name"
        )
    made.add_argument("--debug", action="store_true", help="tracebacks with errors")
    return made


def device_name(args: argparse.Namespace) -> str:
    """The device model that --model or --device names. Raises UsageError."""
    return args.model or arch(device(args.device, None)).name


def device(text: str | None, backend: str | None) -> torch.device:
    """The device that --device names. Raises UsageError."""
    if text is None:
        text = "cuda" if torch.cuda.is_available() and backend != "cpu" else "cpu"
    try:
        return named(text)
    except ValueError as error:
        raise UsageError(str(error)) from None


def worker_devices(count: int, first: torch.device) -> list[torch.device]:
    """The devices of `count` workers (0: as many as there are GPUs of the model of `first`), which
    is among them. Raises UsageError."""
    if first.type == "cpu":
        if count > 1:
            raise UsageError(f"--workers must be 1 on a CPU, got {count}")
        return [first]
    name = torch.cuda.get_device_name(first)
    alike = [
        torch.device("cuda", index)
        for index in range(torch.cuda.device_count())
        if torch.cuda.get_device_name(index) == name
    ]
    alike.sort(key=lambda other: other != first)
    if count > len(alike):
        raise UsageError(f"--workers must be at most {len(alike)}, the {name}s here, got {count}")
    return alike[: count or len(alike)]
