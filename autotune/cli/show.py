"""`show`, `export` and `import`: what is tuned here, and moving it between machines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from flashmoe.autotune.cli.arguments import DONE, UsageError, command_parser, device_name, usable
from flashmoe.autotune.report.texts import duration, ratio
from flashmoe.measure.fingerprint import kernel_hash
from flashmoe.measure.stats import Interval
from flashmoe.planning import database

_WIDTH = 200


def show(words: Sequence[str]) -> int:
    """A table of what is stored for a device, yours before what is shipped."""
    parser = command_parser(
        "show", "Show what is tuned for a device: your results, then shipped ones."
    )
    parser.add_argument("--json", action="store_true", help="the entries as JSON, without samples")
    args = parser.parse_args(words)
    name = device_name(args)
    rows = [
        (source, entry)
        for source, path in (
            ("yours", database.user_path(name)),
            ("shipped", database.shipped_path(name)),
        )
        for _, entry in sorted(database.load(path).items())
    ]
    if args.json:
        told = [{"source": source, **entry.to_json()} for source, entry in rows]
        entries = [{key: x for key, x in one.items() if key != "samples"} for one in told]
        print(json.dumps({"device": name, "entries": entries}, indent=1))
        return DONE
    table = Table(title=f"{name}: {len(rows)} problems", title_justify="left")
    for column in ("problem", "bucket", "runs", "runner-up", "time", "over default", "over SDPA"):
        table.add_column(column, overflow="fold")
    table.add_column("from")
    kernels = [kernel_hash(kind) for kind in ("cpu", "cuda")]
    for source, entry in rows:
        table.add_row(
            entry.problem.label,
            entry.problem.bucket,
            f"the default, {entry.default} then" if entry.kept else entry.tile or entry.backend,
            entry.runner_up or "-",
            duration(entry.seconds[0]) if entry.seconds else "-",
            ratio(entry.speedup_default and Interval(*entry.speedup_default)),
            ratio(entry.speedup_sdpa and Interval(*entry.speedup_sdpa)),
            source if entry.judged in kernels else f"{source}, of other kernels: not used",
        )
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)
    print(f"database: {database.user_path(name)}")
    return DONE


def export(words: Sequence[str]) -> int:
    """The user's database of a device as one file, or on stdout."""
    parser = command_parser("export", "Write your tuned database of a device to a file.")
    parser.add_argument("file", type=Path, help="the file to write; - for stdout")
    args = parser.parse_args(words)
    name = device_name(args)
    entries = database.load(database.user_path(name))
    if not entries:
        raise UsageError(f"nothing is tuned for {name} in {database.user_path(name)}")
    text = database.text_of(entries)
    if str(args.file) == "-":
        print(text, end="")
        return DONE
    with usable("file must be one that can be written", args.file):
        args.file.write_text(text, encoding="utf-8")
    print(f"{len(entries)} problems of {name} written to {args.file}")
    return DONE


def import_(words: Sequence[str]) -> int:
    """Entries of a file into the user's database of the device they were measured on."""
    parser = command_parser(
        "import",
        "Take over a file that export wrote, into the database of the device model it "
        "was measured on. What is stored already stays, unless --replace.",
        of_device=False,
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--replace", action="store_true", help="prefer the file's results")
    args = parser.parse_args(words)
    try:
        with usable("file must be one that can be read", args.file):
            text = args.file.read_text(encoding="utf-8")
        entries = database.parse(text)
    except (ValueError, database.NewerDatabase) as error:
        raise UsageError(f"file must be one that export wrote, got {args.file}: {error}") from None
    devices: dict[str, dict[str, database.Entry]] = {}
    for bucket, entry in entries.items():
        name = str(entry.fingerprint.get("device", ""))
        if not name:
            raise UsageError(
                f"file must say where it was measured, {bucket} in {args.file} does not"
            )
        devices.setdefault(name, {})[bucket] = entry
    for name, found in devices.items():
        path = database.user_path(name)
        try:
            added = database.update(path, found, replace=args.replace)
        except database.NewerDatabase as error:
            raise RuntimeError(f"{error}: nothing was taken over") from None
        kept = len(found) - added
        print(f"{name}: {added} problems taken over, {kept} kept as they were, in {path}")
    return DONE
