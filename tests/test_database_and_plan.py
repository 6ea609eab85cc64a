"""The tuned database (nothing is ever lost) and the plan that reads it."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import re

import pytest
import torch

import flashmoe
from flashmoe.backends import BACKENDS
from flashmoe.machine.device import Arch, arch, slug
from flashmoe.measure.fingerprint import fingerprint
from flashmoe.planning import database
from flashmoe.planning.plan import Plan, make_plan, reload_databases, repeatable
from flashmoe.spec.mask import CAUSAL, Mask
from flashmoe.spec.problem import Problem
from flashmoe.tiles import Tile

CPU = torch.device("cpu")
PROBLEM = Problem(1, 8, 8, 1024, 1024, 64, "float32")


@pytest.fixture
def user_database(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CACHE_DIR", str(tmp_path))
    reload_databases()
    flashmoe.api.forget_plans()
    yield database.user_path(arch(CPU).name)
    reload_databases()
    flashmoe.api.forget_plans()


def entry(tile="cpu:48x160", backend="cpu", problem=PROBLEM):
    return database.Entry(
        problem=problem,
        backend=backend,
        tile=tile,
        default="cpu:64x128",
        samples={"cpu:48x160": (1e-3, 1.1e-3), "default": (2e-3, 2.1e-3)},
        speedup_default=(2.0, 1.9, 2.1),
        fingerprint=fingerprint(CPU).to_json(),
        command="python -m flashmoe.autotune",
        judged=fingerprint(CPU).kernels,
    )


def text_of(bucket, **changes):
    """A database of one entry, some of whose fields are other JSON."""
    data = {**entry().to_json(), **changes}
    return json.dumps({"schema": database.SCHEMA, "entries": {bucket: data}})


def test_entries_survive_the_file(user_database):
    database.update(user_database, {PROBLEM.bucket: entry()})
    assert database.load(user_database) == {PROBLEM.bucket: entry()}


def test_missing_file_is_empty(user_database):
    assert database.load(user_database) == {}


@pytest.mark.parametrize(
    "text",
    [
        *(
            b"",
            b"{",
            b"[]",
            b'{"schema": 0}',
            b'{"schema": 1, "entries": {"x": {}}}',
            b'{"\xff": 1}',
        ),
        b"[" * 100_000,
        *(
            text_of(PROBLEM.bucket, **change).encode()
            for change in (
                {"tile": 5},
                {"backend": []},
                {"judged": None},
                {"problem": {**PROBLEM.to_json(), "batch": 10**400}},
                {"over_default": {"cpu:64x64": 10**400}},
                {"group": 5},
            )
        ),
    ],
    ids=lambda text: text[:20] + text[-20:],
)
def test_damaged_file_is_set_aside_and_named(user_database, text):
    user_database.parent.mkdir(parents=True)
    user_database.write_bytes(text)
    with pytest.warns(database.DamagedDatabase, match=str(user_database)):
        assert database.load(user_database) == {}
    (aside,) = user_database.parent.glob("*.damaged-*")
    assert aside.read_bytes() == text
    assert not user_database.exists()


@pytest.mark.parametrize("mended", [True, False])
def test_what_another_process_mended_or_moved_meanwhile_stays(user_database, monkeypatch, mended):
    """Two meet a damaged file: by the time the second has the lock, the first has been there."""
    user_database.parent.mkdir(parents=True)
    user_database.write_text("{")
    good = {PROBLEM.bucket: entry()}
    lock = database._lock

    def locked(path):
        path.write_text(database.text_of(good)) if mended else path.unlink()
        return lock(path)

    monkeypatch.setattr(database, "_lock", locked)
    assert database.load(user_database) == (good if mended else {})
    assert not list(user_database.parent.glob("*.damaged-*"))


def test_a_newer_flashmoes_file_is_left_alone(user_database):
    user_database.parent.mkdir(parents=True)
    text = '{"schema": 99, "entries": {}}'
    user_database.write_text(text)
    with pytest.warns(database.NewerDatabase, match=str(user_database)):
        assert database.load(user_database) == {}
    with pytest.raises(database.NewerDatabase, match=str(user_database)):
        database.update(user_database, {PROBLEM.bucket: entry()})
    assert user_database.read_text() == text


def test_a_call_does_not_need_a_readable_database(user_database, monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(database, "load", unreadable)
    with pytest.warns(UserWarning, match=r"could not be read .*Permission denied"):
        assert make_plan(PROBLEM, CPU).source == "heuristic"


def test_between_buckets_only_what_passed_every_check_counts():
    here = entry()
    over = {"cpu:64x64": 0.8, "cpu:32x32": 0.7, "sdpa": 0.9}
    here = dataclasses.replace(here, over_default=over)
    assert here.lookup() == over
    assert dataclasses.replace(here, verified=("cpu:64x64",)).lookup() == {
        "cpu:64x64": 0.8,
        "sdpa": 0.9,
    }


def test_update_keeps_other_entries(user_database):
    other = Problem(1, 8, 8, 64, 64, 64, "float32")
    database.update(user_database, {PROBLEM.bucket: entry()})
    database.update(user_database, {other.bucket: entry(problem=other)})
    assert set(database.load(user_database)) == {PROBLEM.bucket, other.bucket}
    assert json.loads(user_database.read_text())["schema"] == database.SCHEMA


def _write(path, worker):
    for number in range(10):
        problem = Problem(1, 8, 8, 64, 64, 8 * (1 + worker * 10 + number) % 256 or 256, "float32")
        database.update(path, {f"{worker}-{number}": entry(problem=problem)})


def test_concurrent_writers_lose_nothing(user_database):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(user_database, n)) for n in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(database.load(user_database)) == 30


def test_plan_prefers_the_user_database(user_database):
    assert make_plan(PROBLEM, CPU).source == "heuristic"
    database.update(user_database, {PROBLEM.bucket: entry()})
    reload_databases()
    plan = make_plan(PROBLEM, CPU)
    assert (plan.backend, str(plan.tile), plan.source) == (
        "cpu",
        "cpu:48x160-stages1-warps1",
        "user database",
    )
    neighbour = Problem(1, 8, 8, 2048, 2048, 64, "float32")
    assert make_plan(neighbour, CPU).source == "heuristic"


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ({"tile": "sm80:128x64", "backend": "cuda"}, r"sm80:128x64\S* of the .*: needs a CUDA dev"),
        ({"backend": "gone"}, r"cpu:48x160\S* of the user database: no such backend"),
        ({"tile": ""}, "cpu of the user database: it needs a tile"),
        ({"tile": "cpu:5000x64"}, r"cpu:5000x64\S* of the user database: .*block_m"),
        ({"backend": "sdpa"}, "of the user database: backend 'sdpa' has no tiles"),
    ],
)
def test_plan_ignores_what_cannot_run_and_tells_why(user_database, bad, why):
    database.update(user_database, {PROBLEM.bucket: entry(**bad)})
    source = make_plan(PROBLEM, CPU).source
    assert re.fullmatch(f"heuristic: .*{why}.*", source), source


def test_what_a_search_kept_is_the_default_of_today(user_database, monkeypatch):
    kept = entry(backend=database.DEFAULT, tile="")
    assert kept.kept
    database.update(user_database, {PROBLEM.bucket: kept})
    for today in (Tile("cpu", 16, 16), Tile("cpu", 32, 64)):
        monkeypatch.setattr(BACKENDS["cpu"], "default_tile", lambda *_, today=today: today)
        assert make_plan(PROBLEM, CPU) == Plan("cpu", today, "user database")
    monkeypatch.setattr(flashmoe.planning.plan, "_cpu_decodes", lambda _: True)
    assert make_plan(PROBLEM, CPU).backend == "sdpa"
    assert make_plan(PROBLEM, CPU, need_lse=True).backend == "cpu"
    lse = dataclasses.replace(kept, default="sdpa", tile_with_lse="cpu:48x160")
    database.update(user_database, {PROBLEM.bucket: lse})
    reload_databases()
    assert str(make_plan(PROBLEM, CPU, need_lse=True).tile) == "cpu:48x160-stages1-warps1"
    assert make_plan(PROBLEM, CPU).backend == "sdpa"


@pytest.mark.parametrize(
    ("won", "default", "backend", "tile"),
    [
        (("cpu", "cpu:64x128"), "cpu:64x128", database.DEFAULT, ""),
        (("sdpa", ""), "sdpa", database.DEFAULT, ""),
        (("sdpa", ""), "", "sdpa", ""),
        (("cpu", "cpu:48x160"), "cpu:64x128", "cpu", "cpu:48x160"),
    ],
)
@pytest.mark.parametrize("schema", [1, 2, 3])
def test_what_earlier_schemas_kept_by_its_tile_is_the_default(schema, won, default, backend, tile):
    old = entry(backend=won[0], tile=won[1]).to_json() | {"default": default}
    del old["judged"]
    (read,) = database.parse(json.dumps({"schema": schema, "entries": {"x": old}})).values()
    assert (read.backend, read.tile) == (backend, tile)
    assert read.judged == fingerprint(CPU).kernels


def test_an_entry_of_other_kernels_overrides_no_default(user_database):
    old = dataclasses.replace(entry(), judged="another hash")
    neighbours = {**tuned(512, {"cpu:64x64": 0.5}), **tuned(2048, {"cpu:64x64": 0.5})}
    outdated = {k: dataclasses.replace(e, judged="another hash") for k, e in neighbours.items()}
    database.update(user_database, {PROBLEM.bucket: old, **outdated})
    plan = make_plan(PROBLEM, CPU)
    assert plan.tile == BACKENDS["cpu"].default_tile(PROBLEM, arch(CPU))
    assert plan.source == "heuristic: the entry of the user database is of other kernels"
    # Between two of these kernels it is as if there were none.
    database.update(user_database, neighbours)
    reload_databases()
    assert make_plan(PROBLEM, CPU).source.startswith("user database, between ")
    # Judged again, it counts.
    database.update(user_database, {PROBLEM.bucket: entry()})
    reload_databases()
    assert make_plan(PROBLEM, CPU).source == "user database"


def test_only_what_there_is_is_written():
    bare = database.Entry(PROBLEM, database.DEFAULT, "", "sdpa", judged="x")
    assert bare.to_json() == {
        "problem": PROBLEM.to_json(),
        "backend": "default",
        "tile": "",
        "default": "sdpa",
        "judged": "x",
    }
    assert database.Entry.from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("changes", "tile"),
    [
        ({"tile": "cpu:48x160"}, "cpu:48x160"),
        ({"backend": "default", "tile": "", "default": "cpu:64x128"}, "cpu:64x128"),
        (
            {"backend": "default", "tile": "", "default": "sdpa", "tile_with_lse": "cpu:8x8"},
            "cpu:8x8",
        ),
        ({"backend": "sdpa", "tile": "", "tile_with_lse": "cpu:8x8"}, "cpu:8x8"),
        ({"backend": "sdpa", "tile": ""}, ""),
    ],
)
def test_the_best_tile_of_an_entry(changes, tile):
    assert dataclasses.replace(entry(), **changes).best_tile == tile


def test_plan_skips_an_entry_of_an_unknown_kind_and_says_so(user_database):
    database.update(user_database, {PROBLEM.bucket: entry(tile="sm250:64x64-warps9000")})
    reload_databases()
    with pytest.warns(
        database.DamagedDatabase, match=r"user database: entry .* tile must look like"
    ):
        assert make_plan(PROBLEM, CPU).source == "heuristic"


def test_sdpa_plan_is_used_and_never_asked_for_lse(user_database):
    database.update(user_database, {PROBLEM.bucket: entry(backend="sdpa", tile="")})
    reload_databases()
    assert make_plan(PROBLEM, CPU).backend == "sdpa"
    assert make_plan(PROBLEM, CPU, need_lse=True).backend == "cpu"
    q, k, v = (torch.randn(1, 1024, 8, 64, requires_grad=True) for _ in range(3))
    out, lse, _ = flashmoe.flash_attn_func(q, k, v, return_attn_probs=True)
    assert lse.shape == (1, 8, 1024)
    torch.testing.assert_close(flashmoe.flash_attn_func(q.detach(), k.detach(), v.detach()), out)


def on_amx(monkeypatch, has_it):
    """On a CPU that has AMX, or not, whatever runs the test."""
    here = dataclasses.replace(arch(CPU), amx=has_it)
    monkeypatch.setattr(flashmoe.planning.plan, "arch", lambda device: here)


@pytest.mark.parametrize(
    ("changes", "backend"),
    [
        ({"seqlen_q": 1}, "sdpa"),
        ({"seqlen_q": 2}, "sdpa"),
        ({"seqlen_q": 3}, "cpu"),
        ({"seqlen_q": 2, "head_dim": 128}, "cpu"),
        ({"seqlen_q": 1, "head_dim": 72, "seqlen_kv": 1024}, "sdpa"),
        ({"seqlen_q": 1, "head_dim": 72, "seqlen_kv": 1025}, "cpu"),
        ({"seqlen_q": 1, "seqlen_kv": 16}, "cpu"),
        ({"seqlen_q": 1, "heads_kv": 4}, "cpu"),
        ({"seqlen_q": 1, "dtype": "bfloat16"}, "cpu"),
        # Whose mask SDPA aligns otherwise.
        ({"seqlen_q": 1, "mask": CAUSAL}, "sdpa"),
    ],
)
def test_a_query_or_two_on_a_cpu_go_to_sdpa(user_database, changes, backend, monkeypatch):
    on_amx(monkeypatch, False)
    problem = dataclasses.replace(PROBLEM, **changes)
    assert make_plan(problem, CPU).backend == backend
    assert make_plan(problem, CPU, need_lse=True).backend == "cpu"
    assert make_plan(problem, CPU).source == "heuristic"


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({}, "sdpa"),
        ({"dtype": "bfloat16"}, "cuda"),
        ({"dtype": "bfloat16", "seqlen_q": 15}, "decode"),
        ({"dtype": "bfloat16", "seqlen_q": 16}, "cuda"),
        ({"direction": "bwd"}, "cuda"),
    ],
)
def test_what_an_untuned_problem_tries_first_on_a_gpu(changes, first):
    ampere = Arch("cuda", "NVIDIA A100", (8, 0), 108, 166912)
    problem = dataclasses.replace(PROBLEM, **changes)
    assert flashmoe.planning.plan._preference(problem, ampere)[0] == first


def test_slug():
    assert slug("NVIDIA H200") == "nvidia-h200"
    assert slug("AMD EPYC 7R13 (rev. 1)") == "amd-epyc-7r13-rev-1"


def test_fingerprint_says_what_differs():
    mine = fingerprint(CPU)
    assert mine.differences(mine.to_json(), ("device", "torch", "kernels")) == []
    other = {**mine.to_json(), "torch": "1.0"}
    (difference,) = mine.differences(other, ("device", "torch"))
    assert difference.startswith("torch: ")
    assert "'1.0' there" in difference


def tuned(seqlen, ratios, **changes):
    problem = dataclasses.replace(PROBLEM, seqlen_q=seqlen, seqlen_kv=seqlen, **changes)
    return {problem.bucket: dataclasses.replace(entry(problem=problem), over_default=ratios)}


@pytest.mark.parametrize(
    ("below", "above", "expected"),
    [
        # The tile that is best on its worse side, among those measured on both.
        ({"cpu:48x160": 0.5, "cpu:64x64": 0.8}, {"cpu:64x64": 0.9, "cpu:96x96": 0.4}, "cpu:64x64"),
        ({"cpu:48x160": 0.9, "cpu:64x64": 0.8}, {"cpu:64x64": 0.95, "cpu:48x160": 0.7}, "48x160"),
        # Never one that was measured on one side only, nor one that lost on a side.
        ({"cpu:48x160": 0.5}, {"cpu:64x64": 0.5}, None),
        ({"cpu:48x160": 0.5}, {"cpu:48x160": 1.01}, None),
        ({"sdpa": 0.5}, {"sdpa": 0.5}, "sdpa"),
    ],
)
def test_between_buckets_a_tile_measured_on_both_sides_or_the_default(
    user_database, below, above, expected
):
    database.update(user_database, {**tuned(512, below), **tuned(2048, above)})
    plan = make_plan(PROBLEM, CPU)
    if expected is None:
        assert plan.source == "heuristic"
    else:
        assert expected in str(plan.tile or plan.backend)
        assert plan.source.startswith("user database, between ")
        assert "q512" in plan.source
        assert "q2048" in plan.source
    if expected == "sdpa":
        assert make_plan(PROBLEM, CPU, need_lse=True).backend == "cpu"


def test_nothing_is_extrapolated_and_other_kinds_are_no_neighbours(user_database):
    ratios = {"cpu:64x64": 0.5}
    database.update(user_database, {**tuned(256, ratios), **tuned(512, ratios)})
    assert make_plan(PROBLEM, CPU).source == "heuristic"
    database.update(user_database, tuned(4096, ratios, mask=CAUSAL))
    database.update(user_database, tuned(4096, ratios, head_dim=128))
    reload_databases()
    assert make_plan(PROBLEM, CPU).source == "heuristic"
    database.update(user_database, tuned(4096, ratios))
    reload_databases()
    # The nearest on either side.
    assert "q512" in make_plan(PROBLEM, CPU).source


def test_a_database_of_the_first_schema_is_read(user_database):
    old = entry().to_json()
    del old["judged"]  # the fingerprint says it
    user_database.parent.mkdir(parents=True)
    user_database.write_text(json.dumps({"schema": 1, "entries": {PROBLEM.bucket: old}}))
    assert database.load(user_database) == {PROBLEM.bucket: entry()}


def test_deterministic_gradients_are_not_those_of_a_backend_that_adds_in_any_order():
    cpu = torch.device("cpu")
    problem = dataclasses.replace(PROBLEM, direction="bwd")
    good = make_plan(problem, cpu)
    assert repeatable(good, problem, cpu) is good
    chosen = repeatable(Plan("cuda", None, "test"), problem, cpu)
    assert BACKENDS[chosen.backend].repeats(chosen.tile, problem)
    assert chosen.source == "deterministic"


def test_deterministic_gradients_that_nobody_has_are_refused(monkeypatch):
    cpu = torch.device("cpu")
    problem = dataclasses.replace(PROBLEM, direction="bwd")
    for backend in BACKENDS.values():
        monkeypatch.setattr(backend, "repeats", lambda tile, problem: False)
    with pytest.raises(ValueError, match=r"deterministic must be False for bwd .*got True"):
        repeatable(Plan("cuda", None, "test"), problem, cpu)


@pytest.mark.parametrize("amx", [True, False])
def test_bfloat16_goes_to_torch_where_only_torch_has_its_instructions(
    user_database, amx, monkeypatch
):
    on_amx(monkeypatch, amx)
    for dtype in ("bfloat16", "float16", "float32"):
        problem = Problem(1, 4, 4, 300, 300, 64, dtype)
        assert make_plan(problem, CPU).backend == ("sdpa" if amx and dtype == "bfloat16" else "cpu")
        assert make_plan(problem, CPU, need_lse=True).backend == "cpu"
        for changes in ({"direction": "bwd"}, {"mask": Mask(20, 0)}):
            assert make_plan(dataclasses.replace(problem, **changes), CPU).backend == "cpu"
