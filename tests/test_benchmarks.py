"""The tables of benchmarks/ run on small problems, and say what they found."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sota_libraries
import torch
from support import load_benchmark

from flashmoe import Problem
from flashmoe.measure.inputs import make_inputs

Load = Callable[[str], ModuleType]
PROBLEM = Problem(1, 2, 2, 16, 16, 16, "float32")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    return lambda name: load_benchmark(name, monkeypatch)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str
) -> dict[str, Any]:
    """What a script writes of its own small run on the CPU."""
    output = folder / "table.json"
    shrink = ("--shrink", "256", "--device", "cpu", "--rounds", "1")
    monkeypatch.setattr(sys, "argv", ["x.py", *shrink, "--output", str(output), *options])
    assert module.main() == 0
    document: dict[str, Any] = json.loads(output.read_text())
    assert document["wrong"] == []
    assert {"command", "fingerprint", "limits", "timing"} <= set(document)
    assert all(row["samples"]["ours"] for row in document["rows"])
    assert all(x > 0 for row in document["rows"] for s in row["samples"].values() for x in s)
    return document


def lines(document: dict[str, Any]) -> list[str]:
    return [verdict["line"] for verdict in document["verdicts"]]


@pytest.mark.filterwarnings("ignore")
def test_terms(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    terms = load("terms")
    of_each = {spec.section: spec for spec in terms.SPECS}
    monkeypatch.setattr(terms, "SPECS", tuple(of_each.values()))
    # FlexAttention without a compiler takes its time.
    peers = {name: peer for name, peer in terms.PEERS.items() if name != "flex"}
    monkeypatch.setattr(terms, "PEERS", peers)
    document = run(terms, monkeypatch, tmp_path)
    assert [row["section"] for row in document["rows"]] == [s for s in of_each for _ in "fb"]
    assert len(document["verdicts"]) == 2 * len(terms.JUDGED)
    sink = next(row for row in document["rows"] if row["section"] == "sink")
    assert {"ours", "ours, plain"} <= set(sink["samples"])
    assert "has no sink" in sink["failed"]["cuDNN"]


@pytest.mark.filterwarnings("ignore")
def test_masks(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    masks = load("masks")
    document = run(masks, monkeypatch, tmp_path)
    assert len(document["rows"]) == 2 * len(masks.MASKS)
    assert masks.api.is_slower_under is not masks._always


def test_flex_attention_has_the_terms(load: Load) -> None:
    """Sinks by its lse, masks of keys, a bias, ALiBi and softcap under a window."""
    terms, sides, tables = load("terms"), load("sides"), load("tables")
    for section, bias in (("sink", ""), ("padding", ""), ("bias", "of heads"), ("alibi", "")):
        wanted = (s for s in terms.SPECS if (s.section, s.bias) == (section, bias))
        spec = next(wanted)
        problem = tables.shrunk(spec.problem, 256)
        inputs = terms.inputs_of(spec, problem, torch.device("cpu"))
        calls, failed, wrong = sides.against(inputs, ("flex",))
        assert (set(calls), failed, wrong) == ({"ours", "flex"}, {}, "")


def test_floors_of_terms(load: Load) -> None:
    """By counting: products of two head dimensions, and keys that a mask keeps."""
    terms, tables = load("terms"), load("tables")
    limits = tables.Limits(1.0, math.inf)
    for spec in terms.SPECS:
        for direction in ("fwd", "bwd"):
            problem = tables.shrunk(replace(spec.problem, direction=direction), 256)
            inputs = terms.inputs_of(spec, problem, torch.device("cpu"))
            found = terms.floor_of(spec, problem, inputs, limits)
            n, d, dv = problem.seqlen_q, problem.head_dim, spec.head_dim_v or problem.head_dim
            seen = ~problem.mask.hides(torch.arange(n)[:, None], torch.arange(n), n, n)
            mask = inputs.call.terms.attn_mask
            if mask is not None and mask.dtype == torch.bool:
                seen = seen & mask
            pairs = int(seen.expand(problem.batch, problem.heads_q, n, n).sum())
            each = 2 * (d + dv) if direction == "fwd" else 2 * (3 * d + 2 * dv)
            assert found == pytest.approx(pairs * each), spec


def test_packed(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    packed = load("packed")
    monkeypatch.setattr(packed, "EQUAL", packed.EQUAL[:2])
    document = run(packed, monkeypatch, tmp_path)
    sections = [row["section"] for row in document["rows"]]
    assert {name: sections.count(name) for name in packed.SECTIONS} == {
        "equal": 4,
        "mixed": 4,
        "short": 2,
        "empty": 1,
        "chunks": 2,
    }
    assert {"ours", "ours, dense"} <= set(document["rows"][0]["samples"])
    (empty,) = (row for row in document["rows"] if row["section"] == "empty")
    counts = {tuple(each[:2]): each[2] for each in empty["problem"]["lengths"]}
    assert counts[0, 0] >= packed.EMPTY


def test_mixed_lengths(load: Load) -> None:
    packed = load("packed")
    lengths = packed.log_normal(34, 34472)
    assert (len(lengths), sum(lengths)) == (34, 34472)
    assert min(lengths) > 0
    assert max(lengths) > 4 * sorted(lengths)[17]


def test_decode(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decode = load("decode")
    document = run(decode, monkeypatch, tmp_path)
    assert len(document["rows"]) == len(decode.SPECS) + len(decode.PAGED)
    for page_size in decode.PAGE_SIZES:
        assert f"ours, pages of {page_size}" in document["rows"][-1]["samples"]
        assert f"pages of {page_size}: share of the contiguous cache's speed" in lines(document)
    monkeypatch.setattr(sys, "argv", ["x.py", "--device", "cpu", "--only", "tiles"])
    with pytest.raises(SystemExit):
        decode.main()


@pytest.mark.parametrize("page_size", [1, 7, 16, 64])
def test_a_cache_has_the_keys_of_the_dense_call(load: Load, page_size: int) -> None:
    decode, sides = load("decode"), load("sides")
    dense = make_inputs(Problem(3, 4, 2, 2, 37, 16, "float32", decode.CAUSAL), torch.device("cpu"))
    expected = sides.timed(sides.ours(dense), dense)()
    for inputs in (decode.in_cache(dense), decode.in_cache(dense, page_size)):
        assert sides.judged(inputs, decode.of_cache(inputs)()) == ""
        torch.testing.assert_close(decode.of_cache(inputs)(), expected)


def test_windows(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    windows = load("windows")
    monkeypatch.setattr(windows, "SPECS", windows.SPECS[:3])
    document = run(windows, monkeypatch, tmp_path)
    assert len(document["rows"]) == 6
    assert all("ours, causal" in row["samples"] for row in document["rows"])
    assert len(document["verdicts"]) == 4


def test_defaults(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    defaults = load("defaults")
    assert len(defaults.TABLE) == len(defaults.FOUND)
    assert len(defaults.NINE) == len(defaults._LISTED)
    monkeypatch.setattr(defaults, "ROWS", defaults.ROWS[:2])
    document = run(defaults, monkeypatch, tmp_path)
    assert len(document["rows"]) == len(defaults.TABLE) + len(defaults.NINE) + 2
    assert len(document["verdicts"]) == 6


def test_training(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    training = load("training")
    monkeypatch.setattr(training, "STEPS", training.STEPS[:2])
    monkeypatch.setattr(training, "SPECS", training.SPECS[:2])
    document = run(training, monkeypatch, tmp_path)
    sections = [row["section"] for row in document["rows"]]
    assert {name: sections.count(name) for name in training.SECTIONS} == {
        "rows": 18,
        "step": 2,
        "gqa": 2,
        "windows": 1,
        "memory": 0,
    }
    assert all(
        "ours, deterministic" in row["samples"]
        for row in document["rows"]
        if row["section"] == "rows"
    )
    # Each way point is of some rows, and memory is a GPU's.
    by_line = {v["line"]: v for v in document["verdicts"]}
    assert all(v["value"] is not None for line, v in by_line.items() if "way point" in line)
    memory = [v for line, v in by_line.items() if "extra memory" in line]
    assert len(memory) == len(training.PATHS) * len(training.MEMORY)
    assert all(v["met"] is None for v in memory)


def test_overhead(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    document = run(load("overhead"), monkeypatch, tmp_path)
    assert [row["section"] for row in document["rows"]] == ["forward", "cache", "step"]
    assert len(document["verdicts"]) == 6


@pytest.mark.filterwarnings("ignore")
def test_models(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    models = load("models")
    for name in ("cuDNN", "FA4"):  # GPUs' own, which take their time to fail
        monkeypatch.delitem(models.SIDES, name)
    document = run(models, monkeypatch, tmp_path)
    assert [row["label"].split(",")[0] for row in document["rows"]] == ["gpt2", "llama"]
    for config in models.CONFIGS:
        losses = document[f"losses of {config.kind}"]
        # The same weights and tokens: what attends makes no difference.
        assert losses["ours"] == pytest.approx(losses["SDPA"], rel=1e-2)


def test_models_learn_by_attention(load: Load) -> None:
    """The second half of a sequence is its first, and four tokens follow each one."""
    models = load("models")
    config = models.CONFIGS[0].shrunk(16)
    data = models.chains(config, 50, torch.device("cpu"))
    assert data.shape == (50, config.seqlen + 1)
    half = config.seqlen // 2 + 1
    assert torch.equal(data[:, half:], data[:, : config.seqlen + 1 - half])
    followers: dict[int, set[int]] = {}
    for row in data[:, :half].tolist():
        for a, b in itertools.pairwise(row):
            followers.setdefault(a, set()).add(b)
    assert max(map(len, followers.values())) == 4


@pytest.mark.filterwarnings("ignore")
def test_serving(load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    document = run(load("serving"), monkeypatch, tmp_path)
    equal, speed = document["verdicts"]
    assert equal["met"] is True
    assert speed["value"] > 0
    assert set(document["rows"][0]["samples"]) == {"ours", "SDPA"}


def a_table(tables: ModuleType, folder: Path, **more: Any) -> Any:
    options = {"device": "cpu", "shrink": 1, "rounds": 2, "seconds": 60.0, "only": []}
    options |= {"without": [], "output": folder / "table.json"}
    return tables.Table(argparse.Namespace(**(options | more)))


def test_verdicts(load: Load, tmp_path: Path) -> None:
    tables = load("tables")
    table = a_table(tables, tmp_path)

    def row(ours: float, peer: float) -> Any:
        samples = {"ours": (ours,) * 3, "peer": (peer,) * 3}
        return tables.Row("section", f"{ours}", 1.0, samples)

    fast, slow = row(1.0, 2.0), row(4.0, 2.0)
    table.each("both", [fast, slow], tables.over_peers, at_least=1.0)
    table.each("one is missing", [fast, None], tables.over_peers, at_least=1.0)
    table.each("slow, and one is missing", [slow, None], tables.over_peers, at_least=1.0)
    table.each("none", [None], tables.over_peers, at_least=1.0)
    table.each("at most", [fast, slow], lambda r: r.seconds(), at_most=4.0)
    table.mean("mean", [fast, slow], tables.over_peers, at_least=1.0)
    table.one("unknown", None, at_most=1.0)
    found = {v.line: (v.value, v.met) for v in table.verdicts}
    assert found == {
        "both": (0.5, False),
        "one is missing": (2.0, None),
        "slow, and one is missing": (0.5, False),
        "none": (None, None),
        "at most": (4.0, True),
        "mean": (pytest.approx(1.0), True),
        "unknown": (None, None),
    }
    assert "section, 4.0 0.500" in str(table.verdicts[0])
    assert "not measured" in str(table.verdicts[-1])
    assert len(json.loads((tmp_path / "table.json").read_text())["verdicts"]) == 7


def test_peers_that_are_listed_count_where_they_did_not_run(load: Load, tmp_path: Path) -> None:
    tables = load("tables")
    samples = {"ours": (2.0,), "ours, other": (0.1,), "FA4": (1.0,)}
    row = tables.Row("s", "l", 1.0, samples, listed={"FA4": 0.1, "FA3": 0.4})
    assert row.peers == {"FA4": 1.0, "FA3": 0.4}
    assert (row.best_peer, tables.over_peers(row)) == ("FA4", 0.5)
    without = replace(row, samples={"ours": (2.0,)})
    assert (without.best_peer, tables.over_peers(without)) == ("FA3", 1.25)
    alone = replace(without, listed={})
    assert (alone.best_peer, tables.over_peers(alone)) == ("", math.inf)


def test_a_row_that_is_wrong_or_raises_is_told_and_the_others_go_on(
    load: Load, tmp_path: Path
) -> None:
    tables = load("tables")
    table = a_table(tables, tmp_path)

    @tables.measures  # type: ignore[untyped-decorator]
    def row(table: Any, section: str, problem: Problem, fault: str) -> Any:
        if fault == "raises":
            raise RuntimeError("out of\nmemory")
        return table.row(section, problem, {"ours": lambda: None}, wrong=fault)

    found = [row(table, "s", PROBLEM, fault) for fault in ("raises", "off by 3", "")]
    assert [x is None for x in found] == [True, True, False]
    assert table.finish() == 1
    raised, wrong = json.loads((tmp_path / "table.json").read_text())["wrong"]
    assert raised.endswith("out of memory")
    assert wrong.endswith("off by 3")


def test_no_row_begins_when_time_is_up(load: Load, tmp_path: Path) -> None:
    tables = load("tables")
    table = a_table(tables, tmp_path, seconds=-1.0)

    @tables.measures  # type: ignore[untyped-decorator]
    def row(table: Any, section: str, problem: Problem) -> Any:
        raise AssertionError("it began")

    assert row(table, "s", PROBLEM) is None
    assert table.finish() == 0


def test_other_results_are_no_peer(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = load("sides")
    inputs = make_inputs(replace(PROBLEM, direction="bwd"), torch.device("cpu"))
    right = sides.PEERS["FA2"]
    off = sides.Peer(lambda inputs: lambda q, k, v: right.make(inputs)(q, k, v) * 1.1, True)
    monkeypatch.setattr(sides, "PEERS", {"right": right, "off": off})
    calls, failed, wrong = sides.against(inputs, ("right", "off"))
    assert (set(calls), wrong) == ({"ours", "right"}, "")
    assert "differs from ours" in failed["off"]


@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
@pytest.mark.parametrize("values", [16, 8])
def test_wrong_results_of_ours_are_found(load: Load, name: str, values: int) -> None:
    """By the library's reference, and by the one for values of another head_dim."""
    sides = load("sides")
    inputs = make_inputs(replace(PROBLEM, direction="bwd"), torch.device("cpu"))
    v, dout = (x[..., :values].contiguous() for x in (inputs.call.v, inputs.dout))
    inputs = replace(inputs, call=inputs.call._replace(v=v), dout=dout)
    found = dict(zip(sides.NAMES, sides.timed(sides.ours(inputs), inputs)(), strict=True))
    assert sides.judged(inputs, tuple(found.values())) == ""
    found[name] = found[name] * 1.01
    assert sides.judged(inputs, tuple(found.values())).startswith(f"{name} is off")


def test_the_problems_of_the_backwards_check(
    load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backward = load("hopper/backward")
    monkeypatch.setattr(sys, "argv", ["backward.py", "--dry", "--random", "50"])
    backward.main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(backward.ROWS) + 50
    assert {" causal" in line for line in said} == {True, False}


def test_a_sample_of_flash_attentions_own_tests(tmp_path: Path) -> None:
    own = Path(__file__).parent / "gpu" / "flash_attn_own.py"
    theirs, output = tmp_path / "test_theirs.py", tmp_path / "found.json"
    theirs.write_text(
        "import pytest, torch\n"
        "from flash_attn import flash_attn_func\n"
        "@pytest.mark.parametrize('n', range(40))\n"
        "def test_it(n):\n"
        "    if n % 4 == 1: pytest.skip('by itself')\n"
        "    if n % 4 == 2: raise NotImplementedError('qv')\n"
        "    q = torch.randn(1, 5, 2, 16)\n"
        "    assert flash_attn_func(q, q, q).shape == q.shape and n % 4 != 3\n"
    )
    command = [sys.executable, str(own), str(theirs), "--count", "24", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    found = json.loads(output.read_text())
    assert (done.returncode, found["collected"]) == (1, 40), done.stderr
    assert sum(found["outcomes"].values()) == 24
    assert set(found["outcomes"]) == {"passed", "skipped", "refused", "failed"}
    assert len(found["failures"]) == found["outcomes"]["failed"]
    assert found["verdicts"][0]["met"] is False


class TestAcceptance:
    @staticmethod
    def entry(load: Load, monkeypatch: pytest.MonkeyPatch, *parts: Any) -> Any:
        module = load("acceptance_gpu")
        monkeypatch.setattr(module, "PARTS", parts)
        return module

    @staticmethod
    def part(module: Any, name: str, code: str, **more: Any) -> Any:
        options = {"topic": "terms", "worth": 1, "seconds": 30.0} | more
        return module.Part(name, command=(sys.executable, "-c", code), **options)

    def test_every_part_names_what_exists(self, load: Load) -> None:
        module = load("acceptance_gpu")
        names = [part.name for part in module.PARTS]
        assert len(set(names)) == len(names)
        for part in module.PARTS:
            for word in part.command:
                if word.startswith(("tests/", "benchmarks/")):
                    assert (module.ROOT / word).exists(), word
        assert set(module.TOPICS) >= {"defaults", "window", "training", "serving", "terms", "tools"}

    def test_parts_by_topic_and_worth(self, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
        module = load("acceptance_gpu")
        parts = [
            self.part(module, "late", "", worth=3),
            self.part(module, "early", ""),
            self.part(module, "other", "", topic="window"),
        ]
        monkeypatch.setattr(module, "PARTS", parts)
        assert [p.name for p in module.chosen((), (), None)] == ["early", "other", "late"]
        assert [p.name for p in module.chosen(("terms",), (), None)] == ["early", "late"]
        assert [p.name for p in module.chosen((), ("late",), None)] == ["late"]
        with pytest.raises(SystemExit, match="nobody"):
            module.chosen((), ("nobody",), None)

    def test_a_run_keeps_what_each_part_found(
        self,
        load: Load,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        module = load("acceptance_gpu")
        write = (
            "import json, sys; p = sys.argv[sys.argv.index('--output') + 1];"
            "v = [{'met': False, 'line': 'too slow', 'value': 1, 'bound': 2}];"
            "open(p, 'w').write(json.dumps({'verdicts': v}))"
        )
        parts = [
            self.part(module, "table", write, is_table=True),
            self.part(module, "fails", "print('why it failed'); raise SystemExit(3)"),
            self.part(module, "hangs", "import time; time.sleep(100)", seconds=1.0),
            self.part(module, "keeps", "open(r'{}/kept.json', 'w').write('[1]')"),
            self.part(module, "long", "raise AssertionError", seconds=1e9),
            self.part(module, "lacks", "raise AssertionError", needs=("no_such_module",)),
        ]
        monkeypatch.setattr(module, "PARTS", parts)
        monkeypatch.setattr(sys, "argv", ["x.py", "--output", str(tmp_path)])
        assert module.main() == 1
        whole = json.loads((tmp_path / "acceptance.json").read_text())
        codes = {part["name"]: part["code"] for part in whole["parts"]}
        assert codes == {"table": 0, "fails": 3, "hangs": "ended after 1 s", "keeps": 0}
        assert whole["parts"][0]["document"]["verdicts"][0]["line"] == "too slow"
        assert whole["files"] == {"kept.json": "[1]"}
        assert "why it failed" in (tmp_path / "acceptance.log").read_text()
        said = capsys.readouterr().out
        assert "not met: too slow" in said
        assert "--parts long" in said
        assert "needs no_such_module" in said
        assert sorted(x.name for x in tmp_path.iterdir()) == ["acceptance.json", "acceptance.log"]


@pytest.mark.filterwarnings("ignore")
def test_libraries_that_are_installed_are_peers(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stand-ins for them, with gradients, in every section that they know."""
    sota_libraries.install(monkeypatch)
    terms, packed = load("terms"), load("packed")
    sections = ("softcap", "values", "plain")
    of_each = {spec.section: spec for spec in terms.SPECS if spec.section in sections}
    monkeypatch.setattr(terms, "SPECS", tuple(of_each.values()))
    rows = run(terms, monkeypatch, tmp_path, "--without", "flex")["rows"]
    assert all("FA4" in row["samples"] for row in rows), [row["failed"] for row in rows]
    assert {row["section"] for row in rows if "FA3" in row["samples"]} >= {"softcap", "plain"}
    rows = run(packed, monkeypatch, tmp_path, "--only", "mixed", "chunks")["rows"]
    assert all({"FA3", "FA4"} <= {*row["samples"]} for row in rows), [r["failed"] for r in rows]


def test_training_on_a_cpu_beside_torch(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module, output = load("cpu_training"), tmp_path / "table.json"
    options = ("--shrink", "64", "--rounds", "1", "--threads", "1", "--tiles")
    monkeypatch.setattr(sys, "argv", ["x.py", *options, "--output", str(output)])
    module.main()
    document = json.loads(output.read_text(encoding="utf-8"))
    assert len(document["rows"]) == len(module.ROWS)
    names = {"ours", "torch", *map(str, module.TILES)}
    assert all(set(row["backward_ms"]) == names for row in document["rows"])
    assert all(ms > 0 for row in document["rows"] for ms in row["step_ms"].values())
