"""Writes docs/features.md and docs/api.md from the code: run after a change of either.

python docs/generate.py [--check]
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path

import flashmoe
from flashmoe.backends import BACKENDS
from flashmoe.spec.problem import DTYPE_BYTES, MAX_HEAD_DIM

DOCS = Path(__file__).resolve().parent
# What a user may ask for beyond full and causal attention: the name in Problem.features, what it is
# called here, and who else has it, forward and backward.
FEATURES = (
    ("window", "`window_size`", "2, 3, 4", "no"),
    ("softcap", "`softcap`", "2, 3, 4", "no"),
    ("alibi", "`alibi_slopes`", "2", "as a mask"),
    ("sink", "attention sinks", "4", "no"),
    ("mask", "`attn_mask`", "no", "yes"),
    ("dropout", "`dropout_p`", "2", "yes"),
    ("head_dim_v", "v of another head_dim than q and k", "3, 4", "yes"),
    ("packed", "packed sequences", "2, 3, 4", "`varlen_attn`"),
    ("cache", "KV cache with lengths", "2, 3, 4", "no"),
    ("paged", "paged KV cache", "2, 3, 4", "no"),
)
ON = {
    "cuda": "GPU (Hopper; Ampere and Ada forward)",
    "decode": "GPU (few queries, or a cache)",
    "triton": "GPU (Triton)",
    "cpu": "CPU",
    "blocked": "anywhere, in torch operations",
}


def features() -> str:
    backends = list(ON)
    lines = [
        "# Features",
        "",
        f"Every backend below computes {', '.join(DTYPE_BYTES)} (`cuda` and `decode`: the 16-bit "
        f"ones), head_dim up to {MAX_HEAD_DIM} (padded to a multiple of 8), full and causal "
        "attention of any two lengths, grouped heads (GQA, MQA), any strides, and softmax_lse with "
        "its gradient. "
        "`backend=` names one; without it the fastest that can is taken. Where v has another "
        "head_dim than q, `decode`, `cuda` but for Hopper's forward, and `triton`'s backward pad.",
        "",
        f"| | {' | '.join(f'`{name}`' for name in backends)} | flash-attn | SDPA |",
        f"|:--|{':--|' * len(backends)}:--|:--|",
        f"| runs on | {' | '.join(ON[name] for name in backends)} | GPU | anywhere |",
    ]
    for direction, label in (("fwd", "forward"), ("bwd", "backward")):
        has = [("yes" if direction in BACKENDS[n].features else "no") for n in backends]
        lines.append(f"| {label} | {' | '.join(has)} | 2, 3, 4 | yes |")
    for feature, label, flash_attn, sdpa in FEATURES:
        cells = []
        for name in backends:
            ways = [
                word
                for direction, word in (("fwd", "forward"), ("bwd", "backward"))
                if feature in BACKENDS[name].features.get(direction, ())
            ]
            cells.append(" and ".join(ways) or "no")
        lines.append(f"| {label} | {' | '.join(cells)} | {flash_attn} | {sdpa} |")
    lines += [
        "",
        "The column of flash-attn names the generations that have a feature (FlashAttention-2, -3 "
        "and -4). What no backend has raises `NotImplementedError`, naming the argument.",
        "",
    ]
    return "\n".join(lines)


def api() -> str:
    lines = [
        "# API",
        "",
        f"flashmoe {flashmoe.__version__}. Everything here is in the package `flashmoe`.",
        "",
    ]
    for name in sorted(flashmoe.__all__, key=lambda n: (inspect.isclass(getattr(flashmoe, n)), n)):
        value = getattr(flashmoe, name)
        lines += [f"## {name}", "", "```python"]
        if inspect.isclass(value):
            fields = inspect.signature(value).parameters.values()
            lines += [f"class {name}:", *(f"    {field}" for field in fields)]
        else:
            signature = inspect.signature(value)
            lines += [f"def {name}(", *(f"    {p}," for p in signature.parameters.values())]
            lines += [f") -> {signature.return_annotation}"]
        lines += ["```", "", "```text", inspect.getdoc(value) or "", "```", ""]
        methods = inspect.getmembers(value, inspect.isroutine) if inspect.isclass(value) else []
        for method, function in methods:
            if not method.startswith("_") and inspect.getdoc(function):
                lines += [
                    f"* `{name}.{method}`: {(inspect.getdoc(function) or '').splitlines()[0]}"
                ]
        if lines[-1] != "":
            lines.append("")
    # Annotations are strings here; defaults are quoted as the formatter quotes.
    text = re.sub(r": '([^'\n]*)'", r": \1", "\n".join(lines))
    return re.sub(r"= '([^'\n]*)'", r'= "\1"', text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing: 1 when they differ")
    check = parser.parse_args().check
    differ = False
    for path, text in ((DOCS / "features.md", features()), (DOCS / "api.md", api())):
        differ |= not path.exists() or path.read_text(encoding="utf-8") != text
        if not check:
            path.write_text(text, encoding="utf-8")
    return int(check and differ)


if __name__ == "__main__":
    sys.exit(main())
