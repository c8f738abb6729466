"""Many accounts are not each looked at for a choice; what is chosen, and told of it, is the same as if they were.

Two pools live the same life: one looks at each account every time, the other keeps them on shelves.
"""

import random
from collections.abc import Collection
from typing import Any

import pytest

from codex_proxy.accounts.account import Account
from codex_proxy.accounts.pool import Lease, Pool, Want
from codex_proxy.accounts.scheduler import STRATEGIES, Ask, Weighted, make_strategy
from codex_proxy.accounts.store import Credential, Problem, Scan
from codex_proxy.accounts.tokens import Identity
from codex_proxy.clock import ManualClock
from codex_proxy.config import Settings
from codex_proxy.errors import PoolError, ProxyError, RequestError, Verdict
from codex_proxy.trace import Decision
from tests.accounts.making import DAY, NOW, Middle, credential, failure

MODELS = ("gpt-5.5", "gpt-5-mini", "spark", "unlisted")
FAMILIES = ("codex_x", "codex_y")


class Wandering(Weighted):
    """As `weighted`, but conversations do not stay where they are: their account is compared with the others."""

    name = "wandering"

    def stays(self, ask: Ask, now: float) -> str | None:
        return None


class Twins:
    """A pool that looks at each account, and one that does not."""

    VERDICTS = tuple(Verdict)

    def __init__(self, name: str, rng: random.Random, clock: ManualClock) -> None:
        self.rng = rng
        self.clock = clock
        strategies = [Wandering() if name == Wandering.name else make_strategy(name) for _ in range(2)]
        self.pools = [Pool(clock, rng=Middle(), strategy=strategy) for strategy in strategies]
        self.pools[0].few, self.pools[1].few = 1_000_000, 0
        self.leases: list[tuple[Lease, Lease]] = []
        self.users: dict[str, dict[str, Any]] = {}
        self.heard: dict[str, dict[str, str]] = {}
        """What each account's answers said last."""
        self.settings: dict[str, Any] = {"strategy": name}
        self.steps = 0

    # -- what may happen ------------------------------------------------------------------

    def a_file(self) -> dict[str, Any]:
        """Return what a file may say of an account."""
        rng = self.rng
        some: dict[str, Any] = {
            "ends": rng.choice([None, NOW + 10 * DAY, self.clock.now() + rng.uniform(-60, 9_000)])
        }
        if rng.random() < 0.3:
            some["priority"] = rng.choice([0, 0, 1, -1])
        if rng.random() < 0.4:
            some["weight"] = rng.choice([0.0, 1.0, 2.0, 5.0, 0.1, 1 / 3, 1e-30, 1e200])
        if rng.random() < 0.2:
            some["max_concurrency"] = rng.choice([0, 1, 2])
        if rng.random() < 0.15:
            some["models_allowed"] = rng.choice([("gpt-5*",), ("spark",), ("*",)])
        if rng.random() < 0.1:
            some["models_denied"] = ("*mini*",)
        if rng.random() < 0.05:
            some["disabled"] = True
        if rng.random() < 0.1:
            some["refresh"] = ""
        if rng.random() < 0.3:
            some["identity_of"] = rng.randrange(3)
        return some

    def load(self, problems: list[Problem] | None = None) -> None:
        """Have both pools follow the same files."""
        for pool in self.pools:
            pool.apply(Scan([made(user, said) for user, said in self.users.items()], problems or []))

    def come(self, count: int) -> None:
        for _ in range(count):
            self.users[f"u{len(self.users)}-{self.rng.randrange(10**6)}"] = self.a_file()
        self.load()

    def both(self, alias: str) -> list[Account]:
        found = [pool.by_alias(alias) for pool in self.pools]
        assert all(found), alias
        return [one for one in found if one is not None]

    def any_alias(self) -> str:
        return self.rng.choice([one.alias for one in self.pools[0]])

    def step(self) -> None:
        """Let something happen to both."""
        self.steps += 1
        deeds = (
            (30, self.turn), (14, self.end), (10, self.hear), (6, self.wait), (4, self.learn), (2, self.fail_late),
            (2, self.models), (1, self.change_file), (1, self.owner), (1, self.login), (1, self.settle_in),
        )  # fmt: skip
        self.rng.choices([deed for _, deed in deeds], [weight for weight, _ in deeds])[0]()

    def want(self) -> tuple[Want, set[str]]:
        rng = self.rng
        want = Want(
            rng.choice([*MODELS[:1] * 4, *MODELS, ""]),
            session=rng.choice([None, None, f"talk {rng.randrange(12)}"]),
            tokens=rng.choice([0, 100, 20_000, 200_000]),
            is_opening=rng.random() < 0.1,
            compacted=(rng.choice(["known", "lost"]),) if rng.random() < 0.05 else (),
            encrypted=(f"thought {rng.randrange(5)}",) if rng.random() < 0.1 else (),
        )
        aliases = [one.key for one in self.pools[0]]
        exclude = set(rng.sample(aliases, min(len(aliases), rng.choice([0, 0, 0, 1, 3]))))
        return want, exclude

    def turn(self) -> None:
        self.ask(*self.want())

    def ask(self, want: Want, exclude: set[str]) -> None:
        """Ask both for an account, and compare what they say."""
        outcomes = [asked(pool, want, exclude) for pool in self.pools]
        assert told(outcomes[0]) == told(outcomes[1]), f"after {self.steps} steps"
        one, other = outcomes
        if isinstance(one, Lease) and isinstance(other, Lease):
            if self.rng.random() < 0.5:
                one.ok()
                other.ok()
            self.leases.append((one, other))

    def end(self) -> None:
        if not self.leases:
            return
        pair = self.leases.pop(self.rng.randrange(len(self.leases)))
        verdict = self.rng.choice(self.VERDICTS) if self.rng.random() < 0.3 else None
        more: dict[str, Any] = {}
        if verdict is Verdict.EXHAUSTED:
            more["resets_at"] = self.rng.choice([None, self.clock.now() + self.rng.uniform(1, 20_000)])
            more["limit_family"] = self.rng.choice([None, None, *FAMILIES])
        elif verdict is not None and self.rng.random() < 0.5:
            more["retry_after"] = self.rng.choice([0.5, 30.0, 4_000.0])
        for lease in pair:
            if verdict is not None:
                lease.failed(failure(verdict, **more))
            else:
                lease.ok()
            lease.release()

    def fail_late(self) -> None:
        if self.leases:
            verdict, seconds = self.rng.choice(self.VERDICTS), self.rng.choice([None, 5.0, 900.0])
            for lease in self.rng.choice(self.leases):
                lease.failed(failure(verdict, retry_after=seconds))

    def hear(self) -> None:
        rng, now = self.rng, self.clock.now()
        family = rng.choice(["codex"] * 5 + ["codex-x"])
        headers = {"x-codex-plan-type": rng.choice(["plus"] * 6 + ["free", "pro"])}
        for place, minutes, longest in (("primary", 300, 18_000), ("secondary", 10_080, 7 * DAY)):
            if rng.random() < 0.85:
                used = rng.choice([rng.randrange(101), rng.randrange(101), 0, 100])
                headers[f"x-{family}-{place}-used-percent"] = str(used)
                if rng.random() < 0.9:
                    headers[f"x-{family}-{place}-window-minutes"] = str(minutes)
                if rng.random() < 0.9:
                    # Also as of a window that nothing has begun, or that began a moment ago.
                    ends = rng.choice([rng.uniform(1, longest)] * 4 + [longest, longest - 30])
                    headers[f"x-{family}-{place}-reset-at"] = str(int(now + ends))
        alias = self.any_alias()
        if rng.random() < 0.4 and alias in self.heard:
            # Most answers say what the one before them said.
            headers = self.heard[alias]
        self.heard[alias] = headers
        asked_at = now - rng.choice([0, 0, 5, 300])
        for one, pool in zip(self.both(alias), self.pools, strict=True):
            pool.read_headers(one, headers, asked=asked_at)

    def wait(self) -> None:
        seconds = self.rng.choice([0.05, 1.0, 1.0, 11.0, 70.0, 700.0, 5_000.0, 2 * DAY])
        if self.rng.random() < 0.03:
            seconds = -self.rng.choice([0.01, 30.0, 9_000.0])
        self.clock._now += seconds
        self.clock._monotonic += abs(seconds)

    def learn(self) -> None:
        for _ in range(self.rng.randrange(1, 6)):
            cost = self.rng.choice([self.rng.lognormvariate(9.5, 1.2), 100.0, 3e6, 0.0])
            for one, pool in zip(self.both(self.any_alias()), self.pools, strict=True):
                pool.spent(one, cost)

    def models(self) -> None:
        slugs = self.rng.choice([MODELS[:3], MODELS[:2], MODELS[:1]])
        for one, pool in zip(self.both(self.any_alias()), self.pools, strict=True):
            pool.set_models(one, [{"slug": slug} for slug in slugs])

    def change_file(self) -> None:
        rng = self.rng
        match rng.randrange(4):
            case 0 if len(self.users) > 2:
                del self.users[rng.choice(list(self.users))]
            case 1:
                self.come(1)
            case _:
                user = rng.choice(list(self.users))
                self.users[user] = self.a_file()
        self.load()

    def owner(self) -> None:
        rng = self.rng
        if rng.random() < 0.5:
            self.settings["max_concurrency"] = rng.choice([0, 0, 1, 3])
        if rng.random() < 0.1:
            self.settings["strategy"] = rng.choice(list(STRATEGIES))
        alias = self.any_alias()
        for one, pool in zip(self.both(alias), self.pools, strict=True):
            if self.settings["strategy"] in STRATEGIES:
                pool.apply_settings(Settings(**self.settings))
            pool.reset(one)

    def login(self) -> None:
        deed = self.rng.randrange(5)
        alias, history = self.any_alias(), self.rng.random() < 0.5
        for one, pool in zip(self.both(alias), self.pools, strict=True):
            match deed:
                case 0:
                    pool.login_lost(one, "refused")
                case 1:
                    pool.reject(one)
                case 2:
                    pool.refreshed(one)
                case 3:
                    pool.relieve(one, self.rng.choice(["codex"]))
                case _:
                    pool.entitle(one)
            pool.wrote(one, "known" if history else "thought 1", is_history=history)

    def settle_in(self) -> None:
        for pool in self.pools:
            pool.accounts()
        assert [one.state for one in self.pools[0]] == [one.state for one in self.pools[1]]
        want, exclude = self.want()
        assert len({pool.has_other(want, exclude) for pool in self.pools}) == 1


def made(user: str, said: dict[str, Any]) -> Credential:
    more = dict(said)
    workspace = more.pop("identity_of", None)
    if workspace is not None:
        more["identity"] = Identity(f"user-{user}", f"team-{workspace}")
    return credential(user, **more)


def asked(pool: Pool, want: Want, exclude: Collection[str]) -> Lease | ProxyError:
    try:
        return pool.pick(want, exclude)
    except (PoolError, RequestError) as exc:
        return exc


def told(outcome: Lease | ProxyError) -> list[Any]:
    """Return all that a choice tells, also that there was none."""
    if isinstance(outcome, Lease):
        return ["lease", outcome.has_moved, *of(outcome.decision)]
    found: list[Any] = [type(outcome).__name__, outcome.message]
    if isinstance(outcome, PoolError):
        found += [
            outcome.is_for_history,
            getattr(outcome, "retry_after", None),
            getattr(outcome, "patience", None),
        ]
        if isinstance(outcome.decision, Decision):
            found += of(outcome.decision)
    return found


def of(decision: Decision) -> list[Any]:
    return [
        decision.alias,
        decision.rule,
        decision.strategy,
        decision.at,
        decision.compared,
        list(decision.candidates),
        list(decision.excluded),
        decision.counts,
    ]


@pytest.mark.parametrize("name", [*STRATEGIES, Wandering.name])
@pytest.mark.parametrize("seed", range(10))
def test_many_are_chosen_from_as_if_each_were_looked_at(name: str, seed: int) -> None:
    rng = random.Random(f"{name} {seed}")
    twins = Twins(name, rng, ManualClock(NOW))
    twins.come(rng.choice([1, 2, 5, 12, 40]))
    for _ in range(250):
        twins.step()


@pytest.mark.parametrize("seed", range(8))
def test_in_bad_times_the_same_is_told_of_those_who_cannot_serve(seed: int) -> None:
    """Few accounts that fail most of the time: when the first is back is what matters."""
    rng = random.Random(f"bad times {seed}")
    twins = Twins("round-robin", rng, ManualClock(NOW))
    twins.come(rng.choice([1, 2, 3, 6]))
    twins.VERDICTS = (Verdict.EXHAUSTED, Verdict.LIMITED, Verdict.SERVER, Verdict.MODEL, Verdict.UNENTITLED)
    for _ in range(150):
        for _ in range(rng.randrange(1, 5)):
            twins.turn()
        rng.choice([twins.fail_late, twins.fail_late, twins.end, twins.hear])()
        for _ in range(4):
            twins.turn()
        rng.choice([twins.wait, twins.end, twins.settle_in])()


def alike(rng: random.Random, used: int, spread: float) -> dict[str, str]:
    """Return the numbers of one of many accounts that are nearly alike."""
    return {
        "x-codex-plan-type": "plus" if used % 3 else "free",
        "x-codex-primary-used-percent": str(used),
        "x-codex-primary-window-minutes": "300",
        "x-codex-primary-reset-at": str(NOW + 9_000 + rng.uniform(0, spread)),
        "x-codex-secondary-used-percent": str(used + 30),
        "x-codex-secondary-window-minutes": "10080",
        "x-codex-secondary-reset-at": str(NOW + 3 * DAY + rng.uniform(0, spread)),
    }


@pytest.mark.parametrize("spread", [0.0, 60.0, 3_000.0])
@pytest.mark.parametrize("seed", range(4))
def test_of_many_that_are_nearly_alike_the_best_is_chosen(seed: int, spread: float) -> None:
    """Learning lifts and lowers all scores with every turn, by more than they differ."""
    rng = random.Random(f"alike {seed} {spread}")
    twins = Twins("horizon", rng, ManualClock(NOW))
    twins.users = {f"u{number}": {"ends": None} for number in range(80)}
    twins.load()
    used = {alias: rng.choice([20, 20, 21]) for alias in twins.users}

    def hear(alias: str) -> None:
        headers = alike(rng, used[alias], spread)
        for one, pool in zip(twins.both(alias), twins.pools, strict=True):
            pool.read_headers(one, headers)

    for alias in used:
        hear(alias)
    uncounted: list[tuple[str, float]] = []
    for _ in range(150):
        want = Want("gpt-5.5", tokens=9_000, session=rng.choice([None, f"talk {rng.randrange(9)}"]))
        twins.ask(want, set())
        for alias, cost in uncounted:
            for one, pool in zip(twins.both(alias), twins.pools, strict=True):
                pool.spent(one, cost)
            if rng.random() < 0.3:
                used[alias] += 1
                hear(alias)
        uncounted.clear()
        for _ in range(rng.randrange(4)):
            if twins.leases and rng.random() < 0.9:
                pair = twins.leases.pop(rng.randrange(len(twins.leases)))
                for lease in pair:
                    lease.ok()
                    lease.release()
                # What it cost is known later, after another one was chosen.
                uncounted.append((pair[0].account.alias, rng.lognormvariate(9.3, 1.0)))
        twins.clock.advance(rng.choice([0.01, 0.5, 4.0, 40.0]))


@pytest.mark.parametrize("seed", range(5))
def test_the_account_of_a_conversation_keeps_what_it_is_owed_when_it_is_asked_among_better_ones(
    seed: int,
) -> None:
    rng = random.Random(f"guests {seed}")
    twins = Twins(Wandering.name, rng, ManualClock(NOW))
    weights = {"a": 1.0, "b": 3.0, "c": 2.0, "d": 5.0}
    twins.users = {user: {"ends": None, "weight": weight} for user, weight in weights.items()}
    for user in "bcd":
        twins.users[user]["priority"] = 1
    twins.load()
    better = {one.key for one in twins.both("a")}
    for _ in range(80):
        # Now the better one cannot serve, now it can, and conversations have lived with the others.
        want = Want("gpt-5.5", session=f"talk {rng.randrange(6)}")
        twins.ask(want, better if rng.random() < 0.6 else set())
        for lease in twins.leases.pop():
            lease.ok()
            lease.release()


@pytest.mark.parametrize("few", [0, 100])
def test_a_window_that_is_told_again_to_have_not_begun_counts_as_such_again(few: int) -> None:
    """The same words, later than a turn of its own: they mean that the turn has not begun it."""
    clock = ManualClock(NOW)
    pool = Pool(clock, rng=Middle(), strategy=make_strategy("horizon"))
    pool.few = few
    pool.apply(Scan([credential("a")], []))
    one = next(iter(pool))
    untouched = {
        "x-codex-primary-used-percent": "0",
        "x-codex-primary-window-minutes": "10080",
        "x-codex-primary-reset-at": str(NOW + 7 * DAY),
    }

    def start() -> float:
        lease = pool.pick(Want("gpt-5.5"))
        lease.release()
        return dict(lease.decision.candidates[0].parts)["start"]

    for later, has_begun in ((0, False), (2, True), (5, False), (8, False)):
        clock.advance(NOW + later - clock.now())
        if later != 2:
            pool.read_headers(one, untouched)
        else:
            pool.spent(one, 10.0)
        assert (start() == 0.0) is has_begun
