"""The machine code of every kernel in a built extension, counted by cuobjdump; no GPU needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from flashmoe.ratchet.errors import UserError
from flashmoe.ratchet.measuring.programs import captured

# Counted by the first part of the name: HMMA.16816.F32 is HMMA.
INSTRUCTIONS = ("HGMMA", "HMMA", "MUFU", "LDL", "STL")
# What is known of a kernel, in this order.
COLUMNS = ("registers", "stack", "shared", "code", *INSTRUCTIONS)
# Either an architecture, or a kernel of the last one.
_KERNEL = re.compile(r"^arch = (sm_\w+)|^\s*Function : (\S+)$", re.MULTILINE)
_USAGE = re.compile(
    r"^arch = (sm_\w+)|^ *Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", re.MULTILINE
)
_LINE = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:\{\s*)?(?:@!?U?P\w+ )?([A-Z][A-Z0-9_]*)", re.MULTILINE
)
# A of a wgmma in registers, and whether B is V (MN-major).
_A_OPERAND = re.compile(r"HGMMA\.\S+ R\d+, R(\d+), gdesc\[\w+\](\.tnspB)?")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of one architecture, by its mangled name: registers and stack bytes a thread,
    bytes of shared memory that are not dynamic, bytes of code, and how many instructions of each
    kind."""

    arch: str
    name: str
    registers: int
    stack: int
    shared: int
    code: int
    instructions: dict[str, int]

    @property
    def numbers(self) -> dict[str, int]:
        """By COLUMNS."""
        return {x: self.instructions.get(x, getattr(self, x, 0)) for x in COLUMNS}

    @property
    def spills(self) -> int:
        """Loads and stores of local memory: what did not fit into registers."""
        return self.instructions["LDL"] + self.instructions["STL"]

    @property
    def key(self) -> str:
        return f"{self.arch}:{self.name}"


def find_cuobjdump() -> Path:
    """From the CUDA toolkit, else the one in Triton's package. Raises UserError without either."""
    if found := shutil.which("cuobjdump") or shutil.which("cuobjdump", path="/usr/local/cuda/bin"):
        return Path(found)
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if path.exists():
            return path
    raise UserError("cuobjdump was not found: it comes with the CUDA toolkit and with triton")


def kernels(extension: Path) -> list[Kernel]:
    """Every kernel compiled into `extension`, by architecture and name."""
    usage = parse_usage(_dump(extension, "-res-usage"))
    counted = parse_code(_dump(extension, "-sass"))
    if set(usage) != set(counted):
        odd = sorted(set(usage) ^ set(counted))[0]
        raise UserError(f"cuobjdump tells usage or code, but not both, of {odd}")
    found = [Kernel(*key, *usage[key], *counted[key]) for key in usage]
    return sorted(found, key=lambda kernel: kernel.key)


def compiler(extension: Path) -> str:
    """The version of CUDA that the extension was built with, as it tells itself."""
    match = re.search(rb'"cuda_version": "([\d.]*)"', extension.read_bytes())
    if match is None:
        raise UserError(f"{extension} is not flashmoe's extension: it tells no cuda_version")
    return match[1].decode()


def shared_operands(code: Path) -> dict[str, list[int]]:
    """By kernel that keeps Q in registers: the registers that Q and P share, as the operands of the
    wgmma that begin with them, in an extension or a cubin. Q outlives P, so there must be none."""
    found: dict[str, list[int]] = {}
    for part in _dump(code, "-sass").split("Function : ")[1:]:
        operands = _A_OPERAND.findall(part)
        Q, P = ({int(r) for r, v in operands if bool(v) == is_V} for is_V in (False, True))
        if Q:
            found[part.split(maxsplit=1)[0]] = sorted(Q & P)
    return found


def _dump(extension: Path, what: str) -> str:
    done = captured([str(find_cuobjdump()), what, str(extension)])
    if done.returncode:
        raise UserError(f"cuobjdump {what} {extension}: {done.stderr.strip() or 'failed'}")
    return done.stdout


def parse_usage(text: str) -> dict[tuple[str, str], tuple[int, int, int]]:
    """Registers, stack and shared memory by (arch, name), from cuobjdump -res-usage."""
    found, arch = {}, ""
    for of, name, *numbers in _USAGE.findall(text):
        arch = of or arch
        if name:
            registers, stack, shared = map(int, numbers)
            found[arch, name] = (registers, stack, shared)
    return found


def parse_code(text: str) -> dict[tuple[str, str], tuple[int, dict[str, int]]]:
    """Bytes of code and counted instructions by (arch, name), from cuobjdump -sass."""
    found, arch = {}, ""
    _, *parts = _KERNEL.split(text)
    for of, name, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        arch = of or arch
        if name:
            lines = _LINE.findall(body)
            counts = Counter(instruction for _, instruction in lines)
            # Each instruction has 16 bytes.
            last = int(lines[-1][0], 16) if lines else 0
            found[arch, name] = (last + 16, {key: counts[key] for key in INSTRUCTIONS})
    return found


def demangled(names: list[str]) -> dict[str, str]:
    """As C++ writes them, where binutils can tell; a compiler brings those."""
    tool = shutil.which("c++filt")
    if tool is None:
        return {name: name for name in names}
    done = captured([tool, "--no-params"], told="\n".join(names))
    return dict(zip(names, done.stdout.splitlines(), strict=True))
