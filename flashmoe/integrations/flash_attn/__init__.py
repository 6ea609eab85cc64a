"""flash-attn's module names: `install()`, and `import flash_attn` of any library gets flashmoe."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType
from typing import Any

# What libraries compare: new enough for all that they ask, and what flashmoe's functions follow.
VERSIONS = {"flash_attn": "2.8.3", "flash_attn_interface": "3.0.0"}
_DISTRIBUTIONS = {"flash_attn": "flash-attn", "flash_attn_interface": "flash-attn-3"}

_HERE = __name__
_FA3 = (f"{_HERE}.fa3", f"{_HERE}.fa3_pair")
# Whose names each module has; nobody's: a package of others.
_MODULES: dict[str, tuple[str, ...]] = {
    "flash_attn": (f"{_HERE}.fa2",),
    "flash_attn.flash_attn_interface": (f"{_HERE}.fa2",),
    "flash_attn.bert_padding": (f"{_HERE}.bert_padding",),
    "flash_attn.layers": (),
    "flash_attn.layers.rotary": (f"{_HERE}.rotary",),
    "flash_attn.ops": (),
    "flash_attn.ops.triton": (),
    "flash_attn.ops.triton.rotary": (f"{_HERE}.rotary",),
    "flash_attn_2_cuda": (f"{_HERE}.raw",),
    "flash_attn_interface": _FA3,
    "flash_attn_3": (),
    "flash_attn_3.flash_attn_interface": _FA3,
}
_EXTENSION = "flash_attn_2_cuda"
_PACKAGES = {name.rpartition(".")[0] for name in _MODULES} - {""}


def install(replace: bool = False) -> tuple[str, ...]:
    """Make `flash_attn` (FlashAttention-2's names, with bert_padding and rotary embeddings) and
    `flash_attn_interface` (FlashAttention-3's) importable and, for importlib.metadata, installed;
    flash_attn_2_cuda, the compiled extension's functions, with the former, the package flash_attn_3
    with the latter.

    One that is really installed stays as it is unless `replace`. Call it before the libraries that
    look for flash-attn are imported, as many look once. Returns the names that flashmoe answers to.
    """
    names = tuple(name for name in VERSIONS if replace or not _is_installed(name))
    uninstall()
    for name in [*sys.modules]:
        if _distributed_as(name) in names:
            _hidden[name] = sys.modules.pop(name)
    sys.meta_path.insert(0, _Finder(names))
    importlib.invalidate_caches()
    return names


def uninstall() -> None:
    """Undo `install`. What a library has imported before stays with it."""
    sys.meta_path[:] = [x for x in sys.meta_path if not isinstance(x, _Finder)]
    for name, module in [*sys.modules.items()]:
        if _is_ours(module):
            del sys.modules[name]
    sys.modules.update(_hidden)
    _hidden.clear()
    importlib.invalidate_caches()


_hidden: dict[str, ModuleType] = {}


def _distributed_as(name: str) -> str:
    """The top-level module that module `name` comes with."""
    top = name.partition(".")[0]
    return {_EXTENSION: "flash_attn", "flash_attn_3": "flash_attn_interface"}.get(top, top)


def _is_ours(module: ModuleType) -> bool:
    return isinstance(getattr(getattr(module, "__spec__", None), "loader", None), _Loader)


def _is_installed(name: str) -> bool:
    """Whether there is one that is not ours."""
    if name in sys.modules and not _is_ours(sys.modules[name]):
        return True
    finders = (x for x in sys.meta_path if not isinstance(x, _Finder))
    return any(hasattr(x, "find_spec") and x.find_spec(name, None) for x in finders)


class _Loader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        for source in _MODULES[name]:
            ours = importlib.import_module(source)
            for exported in ours.__all__:
                setattr(module, exported, getattr(ours, exported))
        if name in VERSIONS:
            module.__version__ = VERSIONS[name]  # type: ignore[attr-defined]

        def absent(attribute: str) -> Any:
            raise AttributeError(
                f"{name}.{attribute} is not supported: {name} is flashmoe "
                "(flashmoe.integrations.flash_attn.install())"
            )

        module.__getattr__ = absent  # type: ignore[method-assign]
        if name == "flash_attn":  # as the real one imports it
            importlib.import_module("flash_attn.flash_attn_interface")
        if name == "flash_attn.flash_attn_interface":
            module.flash_attn_gpu = importlib.import_module(_EXTENSION)  # type: ignore[attr-defined]


class _Finder(MetaPathFinder):
    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _MODULES or _distributed_as(fullname) not in self._names:
            return None
        is_package = fullname in _PACKAGES
        return ModuleSpec(fullname, _Loader(), origin=__file__, is_package=is_package)

    def find_distributions(self, context: Any = DistributionFinder.Context()) -> Iterator[Any]:  # noqa: B008
        for name in self._names:
            asked = context.name
            if asked is None or _normal(asked) == _normal(_DISTRIBUTIONS[name]):
                yield _Installed(name)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class _Installed(Distribution):
    """What importlib.metadata says of flash-attn."""

    def __init__(self, module: str) -> None:
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {_DISTRIBUTIONS[module]}\n"
            f"Version: {VERSIONS[module]}\nSummary: flashmoe by flash-attn's names\n",
            "top_level.txt": f"{module}\n",
        }

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(__file__).parent.joinpath(path)
