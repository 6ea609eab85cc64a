"""Starts the GPU machine when work is queued, and stops it when it has been idle.

Run by .github/workflows/wake.yml as a script with only the standard library:
`python3 -I ratchet/ci/machine.py (wake|tend) [--dry-run]`. All that is particular to a provider is
in PROVIDERS: the commands that start, stop and ask, of its own command-line tool.

wake starts it when work is queued; tend does so, too, and else stops it when it has been idle.

GPU_PROVIDER, GPU_MACHINE and GPU_ZONE (for aws, its region) name the machine; GH_TOKEN,
GITHUB_API_URL and GITHUB_REPOSITORY are as GitHub's runners have them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

WORKFLOWS = ("gpu-ratchet.yml", "baseline.yml")
# What counts as work that needs the machine. One that is `waiting` for an approval does not: it may
# never get it.
_ACTIVE = ("queued", "in_progress", "requested", "pending")


# Commands with {machine} and {zone}; `ask` prints RUNNING, in whatever case, when the machine runs.
PROVIDERS = {
    "gcloud": {
        "start": "gcloud compute instances start {machine} --zone {zone} --quiet",
        "stop": "gcloud compute instances stop {machine} --zone {zone} --quiet",
        "ask": "gcloud compute instances describe {machine} --zone {zone} --format value(status)",
    },
    "aws": {
        "start": "aws ec2 start-instances --instance-ids {machine} --region {zone}",
        "stop": "aws ec2 stop-instances --instance-ids {machine} --region {zone}",
        "ask": "aws ec2 describe-instances --instance-ids {machine} --region {zone} --output text "
        "--query Reservations[0].Instances[0].State.Name",
    },
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, slots=True)
class Work:
    """`active`: runs that need the machine now; `last`: when the latest of all ended."""

    active: int
    last: datetime | None


def decide(action: str, running: bool, work: Work, now: datetime, idle: timedelta) -> str:
    """`start`, `stop`, or why neither."""
    if work.active:
        return f"{work.active} runs need the machine, which runs already" if running else "start"
    if action == "wake":
        return "no work is queued"
    if not running:
        return "the machine is stopped already"
    if work.last is not None and now - work.last < idle:
        return f"idle since {work.last:%H:%M} UTC, for less than {idle.seconds // 60} minutes"
    return "stop"


def work_of(get: Callable[[str, Mapping[str, str]], Any]) -> Work:
    """From GitHub's lists of runs."""
    active, ends = 0, []
    for workflow in WORKFLOWS:
        listed = get(f"actions/workflows/{workflow}/runs", {"per_page": "50"})
        for run in listed["workflow_runs"]:
            if run["status"] in _ACTIVE:
                active += 1
            elif run["status"] == "completed":
                ends.append(datetime.fromisoformat(run["updated_at"].replace("Z", "+00:00")))
    return Work(active, max(ends, default=None))


def get_json(path: str, query: Mapping[str, str]) -> Any:
    api = os.environ.get("GITHUB_API_URL") or "https://api.github.com"
    url = f"{api}/repos/{os.environ['GITHUB_REPOSITORY']}/{path}?{urllib.parse.urlencode(query)}"
    headers = {"Authorization": f"Bearer {os.environ['GH_TOKEN']}"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return json.load(answer)


def commands(provider: str, machine: str, zone: str) -> dict[str, list[str]]:
    """What to run for each action. Raises ValueError naming what is not set or not a name."""
    if provider not in PROVIDERS:
        raise ValueError(f"GPU_PROVIDER must be one of {', '.join(PROVIDERS)}, got {provider!r}")
    for name, value in (("GPU_MACHINE", machine), ("GPU_ZONE", zone)):
        if not _NAME.fullmatch(value):
            raise ValueError(f"{name} must be letters, digits, dots and dashes, got {value!r}")
    return {
        action: [part.format(machine=machine, zone=zone) for part in template.split()]
        for action, template in PROVIDERS[provider].items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit codes: 0 done, or nothing to do; 1 the provider's tool failed; 2 bad usage.",
    )
    parser.add_argument("action", choices=("wake", "tend"))
    parser.add_argument("--idle-minutes", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    arguments = parser.parse_args(argv)
    environment = [os.environ.get(f"GPU_{x}", "") for x in ("PROVIDER", "MACHINE", "ZONE")]
    try:
        table = commands(*environment)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.dry_run:
        running = False
        print("would ask:", *table["ask"])
    else:
        asked = subprocess.run(table["ask"], capture_output=True, encoding="utf-8", check=False)
        if asked.returncode:
            print(asked.stderr, file=sys.stderr)
            return 1
        running = asked.stdout.strip().upper() == "RUNNING"
    idle = timedelta(minutes=arguments.idle_minutes)
    told = decide(arguments.action, running, work_of(get_json), datetime.now(timezone.utc), idle)
    if told not in table:
        print(f"nothing to do: {told}")
        return 0
    print("would run:" if arguments.dry_run else "$", *table[told], flush=True)
    return 0 if arguments.dry_run else subprocess.run(table[told], check=False).returncode and 1


if __name__ == "__main__":
    sys.exit(main())
