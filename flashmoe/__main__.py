"""`python -m flashmoe`: what is available here, why the rest is not, and what is tuned."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import flashmoe
from flashmoe import _extension
from flashmoe.backends import BACKENDS, jit
from flashmoe.machine.device import arch
from flashmoe.machine.terminal import lenient
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.planning import database, explain
from flashmoe.spec import options


def describe(device: torch.device) -> list[str]:
    """Lines about one device: its fingerprint, each backend, and the tuned databases."""
    here, prints = arch(device), fingerprint(device)
    head = f"{device}: {here.name}"
    if here.kind == "cuda":
        head += (
            f", compute capability {prints.capability}, {here.sm_count} SMs, "
            f"{prints.memory / 2**30:.0f} GiB, driver {prints.driver or 'unknown'}"
        )
    else:
        head += f", {prints.threads} threads"
    lines = [head]
    for name, backend in BACKENDS.items():
        reason = backend.unavailable(device)
        lines.append(f"  {name:8} {'no: ' + reason if reason else 'yes'}")
    for label, path_of in (("yours", database.user_path), ("shipped", database.shipped_path)):
        lines.append(f"  tuned ({label}): {_tuned(path_of, here.name, prints.kernels)}")
    return lines


def _tuned(path_of: Callable[[str], Path], device_name: str, kernels: str) -> str:
    """How many problems a tuned database has, and where it is."""
    try:
        path = path_of(device_name)
        entries = database.load(path)
    except OSError as error:
        return f"none: {error}"
    outdated = sum(entry.judged != kernels for entry in entries.values())
    unused = f" ({outdated} of other kernels, which are not used)" if outdated else ""
    return f"{len(entries)} problems{unused}, {path}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flashmoe",
        description="Print what is available here and why the rest is not.",
        epilog="See also: python -m flashmoe.autotune, python -m flashmoe.ratchet. "
        "Exit code: 0; 2 for bad usage.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("tiles", help="the tiles that are compiled in", allow_abbrev=False)
    explained = commands.add_parser(
        "explain", help="why a problem runs what it runs", allow_abbrev=False
    )
    options.add_options(explained)
    explained.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    with lenient():
        given = parser.parse_args(arguments)
        if given.command == "explain":
            return _explain(parser, given)
        return _list_tiles() if given.command == "tiles" else _describe()


def _describe() -> int:
    info = _extension.load()
    cuda = f"CUDA {info.cuda_version} kernels for sm_{', sm_'.join(info.cuda_archs)}"
    print(f"flashmoe {flashmoe.__version__}, torch {torch.__version__}")
    print(f"built with: cpu kernel, {cuda if info.cuda_archs else 'no CUDA kernels'}")
    for kernel, instances in _instances(info).items():
        print(f"  {kernel:8} {_summary(instances)}")
    reason = jit.unavailable()
    print(f"other sm90 tiles are compiled here: {'no: ' + reason if reason else jit.compiler()}")
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    for device in [*devices, torch.device("cpu")]:
        print("\n".join(describe(device)))
    return 0


def _instances(info: _extension.BuildInfo) -> dict[str, _extension.Instances]:
    """Those of each kernel."""
    found: dict[str, _extension.Instances] = {}
    for table in (info.instances, info.backward_instances, info.decode_instances):
        for key, tiles in table.items():
            found.setdefault(key[0], {})[key] = tiles
    return found


def _summary(instances: _extension.Instances) -> str:
    tiles = {(head_dim, tile) for (_, head_dim, _), held in instances.items() for tile in held}
    text = f"{len(tiles)} tiles for head_dim {_listed({head_dim for head_dim, _ in tiles})}"
    extra = {d for _, d, variant in instances if variant.names}
    names = {name: None for _, _, variant in instances for name in variant.names}
    return f"{text}; some at {_listed(extra)} with {', '.join(names)}" if names else text


def _listed(values: set[int]) -> str:
    return ", ".join(map(str, sorted(values)))


def _list_tiles() -> int:
    for instances in _instances(_extension.load()).values():
        alike: dict[tuple[str, int, str], list[tuple[str, ...]]] = {}
        for (kernel, head_dim, variant), tiles in instances.items():
            shapes = ", ".join(str(tile).partition(":")[2] for tile in tiles)
            alike.setdefault((kernel, head_dim, shapes), []).append(variant.names)
        for (kernel, head_dim, shapes), variants in sorted(alike.items()):
            print(f"{kernel} head_dim {head_dim}{_of_variants(variants)}: {shapes}")
    return 0


def _of_variants(variants: list[tuple[str, ...]]) -> str:
    names = {name: None for variant in variants for name in variant}
    if not names:
        return ""
    if len(variants) == 2 ** len(names) - 1 > 1:  # it decides at run time
        return f", any of {', '.join(names)}"
    return f", {', '.join('+'.join(variant) or 'plain' for variant in variants)}"


def _explain(parser: argparse.ArgumentParser, given: argparse.Namespace) -> int:
    try:
        device = torch.device(given.device)
        for problem in options.problems_of(options.given_options(given), device.type):
            print("\n".join(explain.lines(problem, device)))
    except (ValueError, NotImplementedError, RuntimeError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
