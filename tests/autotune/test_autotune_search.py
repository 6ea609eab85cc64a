from __future__ import annotations

import pytest
from autotune_simulated import DEFAULT, GRID, SimulatedBench, bowl
from optuna.storages import BaseStorage, InMemoryStorage

from flashmoe.autotune.running.candidate import Candidate
from flashmoe.autotune.search.race import AnchorFailed
from flashmoe.autotune.search.record import Record
from flashmoe.autotune.search.search import CONTENDERS, Walk
from flashmoe.autotune.search.space import Space
from flashmoe.autotune.search.storage import open_study
from flashmoe.autotune.search.trials import Search, Trial
from flashmoe.autotune.search.typical import Typical
from flashmoe.measure.timing import Measurement
from flashmoe.tiles import Tile, grid

BEST = Tile("cpu", 192, 256)
ANCHOR = Candidate.of_tile(DEFAULT)
LARGE = grid(
    "triton",
    block_m=(32, 64, 128, 256),
    block_n=(32, 64, 128, 256),
    num_stages=(1, 2, 3, 4),
    num_warps=(2, 4, 8),
)


def run(bench: SimulatedBench, tiles: list[Tile] = GRID, **options: object) -> Search:
    space = Space(tiles)
    arguments = {"seconds": 60.0, "seed": 0, "record": record(space), **options}
    return Walk(space, bench, ANCHOR, [DEFAULT], **arguments).run()  # type: ignore[arg-type]


def record(space: Space, storage: BaseStorage | None = None) -> Record:
    study = open_study(storage or InMemoryStorage(), "study", {})
    return Record(study, space)


@pytest.mark.parametrize("seed", range(10))
def test_small_space_is_searched_whole_and_the_best_leads(seed: int) -> None:
    found = run(SimulatedBench(bowl(BEST), noise=0.005, seed=seed), seed=seed)
    assert found.sampler == "brute"
    assert found.space == len(GRID)
    assert {trial.tile for trial in found.trials} == set(GRID)
    assert found.contenders[0].tile == BEST


@pytest.mark.parametrize("seed", range(10))
def test_large_space_is_sampled_within_the_trials(seed: int) -> None:
    best = Tile("triton", 128, 64, 3, 8)
    true = bowl(best)
    bench = SimulatedBench(true, noise=0.005, seed=seed)
    anchor = Candidate.of_tile(LARGE[0])
    space = Space(LARGE)
    walk = Walk(space, bench, anchor, [LARGE[0]], record(space), seconds=60, trials=48, seed=seed)
    found = walk.run()
    assert found.sampler == "model"
    assert len(found.trials) == len(bench.prepared) <= 48
    # A quarter of the tiles finds one that is within two steps of the best.
    assert true(found.contenders[0]) <= true(Candidate.of_tile(best)) * 1.061


def test_seeds_repeat_and_matter() -> None:
    def order(seed: int) -> list[Tile]:
        found = run(SimulatedBench(bowl(BEST)), seed=seed, trials=12)
        return [trial.tile for trial in found.trials]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_wrong_and_failing_tiles_are_named_and_never_timed() -> None:
    wrong, failing = str(BEST), str(Tile("cpu", 192, 128))
    bench = SimulatedBench(bowl(BEST), wrong={wrong: "off by 1"}, failing={failing: "no memory"})
    found = run(bench)
    told = {str(trial.tile): (trial.status, trial.reason) for trial in found.trials}
    assert told[wrong] == ("wrong", "off by 1")
    assert told[failing] == ("failed", "no memory")
    assert wrong not in bench.timed
    assert failing not in bench.timed
    assert not {wrong, failing} & {str(candidate) for candidate in found.contenders}


def test_a_tile_that_breaks_while_timed_is_out() -> None:
    bench = SimulatedBench(bowl(BEST), broken_at={str(BEST): "RuntimeError: launch failed"})
    found = run(bench)
    (trial,) = [trial for trial in found.trials if trial.tile == BEST]
    assert (trial.status, trial.ratio) == ("failed", None)
    assert Candidate.of_tile(BEST) not in found.contenders


def test_an_anchor_that_breaks_ends_the_search() -> None:
    bench = SimulatedBench(bowl(BEST), broken_at={str(DEFAULT): "RuntimeError: gone"})
    with pytest.raises(AnchorFailed, match="gone"):
        run(bench)


def test_every_tile_is_checked_once_before_it_is_timed() -> None:
    bench = SimulatedBench(bowl(BEST))
    run(bench, tiles=[DEFAULT, *LARGE], trials=30)
    assert len(bench.prepared) == len(set(bench.prepared)) == 30
    assert set(bench.timed) == set(bench.prepared)


@pytest.mark.parametrize("seconds", [0.5, 2.0, 10.0])
def test_the_budget_is_kept(seconds: float) -> None:
    bench = SimulatedBench(bowl(BEST, floor=0.01), prepare_seconds=0.1)
    found = run(bench, seconds=seconds)
    # Past the deadline only the round in flight is finished: a warm-up and a round of a batch.
    assert bench.clock <= seconds + 2 * 7 * 0.02 + 0.1
    assert 1 <= len(found.trials) <= len(GRID)


class SlowOnce(SimulatedBench):
    """The tile that is prepared as number `slow` takes half of a minute."""

    def __init__(self, slow: int) -> None:
        super().__init__(bowl(BEST), prepare_seconds=0.1)
        self.slow = slow

    def prepare(self, candidate: Candidate) -> Measurement:
        self.prepare_seconds = 30.0 if len(self.prepared) == self.slow else 0.1
        return super().prepare(candidate)


@pytest.mark.parametrize("slow", [0, 1, 4, 20])
def test_one_slow_compilation_ends_no_search(slow: int) -> None:
    bench = SlowOnce(slow)
    found = run(bench, seconds=45.0, sampler="brute")
    assert len(bench.prepared) == len(found.trials) == len(GRID)
    assert found.ended == "all tiles tried"


def test_what_was_slow_for_once_counts_for_nothing() -> None:
    took = Typical()
    assert not took
    assert took.seconds == 0.0
    for seconds in (30.0, 1.0, 1.2, 25.0):
        took.add(seconds)
    assert took.seconds == 1.2
    for _ in range(10):
        took.add(5.0)
    assert took.seconds == 5.0


def test_one_slow_look_ends_no_search() -> None:
    class Slow(SimulatedBench):
        def measure(self, candidates, **options):  # type: ignore[no-untyped-def]
            if len(self.prepared) == 12:
                self.clock, self.prepared = self.clock + 42.0, [*self.prepared, "slow once"]
            return super().measure(candidates, **options)

    alike = bowl(BEST, step=0.001)
    found = run(Slow(alike, prepare_seconds=0.1), seconds=60.0, sampler="brute")
    assert len(found.trials) == len(GRID)


def test_a_space_that_does_not_fit_the_time_is_sampled() -> None:
    found = run(SimulatedBench(bowl(BEST, floor=0.01), prepare_seconds=0.5), seconds=10.0)
    assert found.sampler == "model"
    assert len(found.trials) < len(GRID)


def test_effort_goes_to_contenders() -> None:
    bench = SimulatedBench(bowl(BEST, step=0.04), noise=0.03)
    found = run(bench)
    last = max(found.trials, key=lambda trial: trial.ratio.value if trial.ratio else 0.0)
    assert bench.timed[str(found.contenders[0])] >= 2 * bench.timed[str(last.tile)]
    assert len(found.contenders) <= CONTENDERS
    assert last.tile not in [candidate.tile for candidate in found.contenders]


def test_progress_is_told() -> None:
    seen: list[tuple[int, int]] = []

    def watch(trials: list[Trial], total: int) -> None:
        seen.append((len(trials), total))

    run(SimulatedBench(bowl(BEST)), watch=watch)
    assert seen[0] == (0, len(GRID))
    assert seen[-1] == (len(GRID), len(GRID))
    assert [count for count, _ in seen] == sorted(count for count, _ in seen)


def test_what_is_compiled_is_timed_before_what_is_not() -> None:
    class Stuck(SimulatedBench):
        """The tile that is asked for second compiles until 5 s."""

        def precompile(self, candidates):  # type: ignore[no-untyped-def]
            for candidate in candidates:
                self.submitted.append(str(candidate))
                self.compiled_at[str(candidate)] = 5.0 if len(self.submitted) == 2 else self.clock

    bench = Stuck(bowl(BEST), compiles_ahead=True)
    run(bench)
    assert bench.prepared.index(bench.submitted[1]) >= 17


def test_every_compiler_has_work() -> None:
    bench = SimulatedBench(bowl(BEST), compiles_ahead=True)
    bench.compilers = 15
    most = 0

    def waiting(candidate: Candidate) -> float:
        nonlocal most
        most = max(most, len(bench.submitted) - len(bench.prepared))
        return bowl(BEST)(candidate)

    bench.seconds = waiting
    run(bench)
    assert most >= 15
