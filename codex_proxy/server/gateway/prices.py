"""Prices: what counts, an owner's own, and history priced again."""

from typing import TYPE_CHECKING, Any

import msgspec

from codex_proxy.errors import RequestError
from codex_proxy.server.gateway.amounts import dollars
from codex_proxy.server.gateway.desk import Call, Desk, millis, moment
from codex_proxy.server.gateway.shapes import (
    Moved,
    NewPrice,
    Nothing,
    OwnPrice,
    Price,
    PriceList,
    PriceQuery,
    Rates,
    Rerated,
    Rerating,
)

if TYPE_CHECKING:
    from codex_proxy.ledger import prices as ledger_prices


async def list_prices(desk: Desk, call: Call[PriceQuery, Nothing]) -> PriceList:
    """Return the prices that count, and the owner's own."""
    book = desk.pricing.book
    at = int(desk.clock.now() * 1000) if call.query.at is None else millis(call.query.at)
    wanted = call.query.model
    name = book.name_of(wanted) if wanted else None
    found = [one for one in book.all_at(at) if not wanted or one.model == name]
    own = sorted(book.own, key=lambda one: -one.id)
    return PriceList(
        prices=[_price_shape(desk, one) for one in found],
        own=[_own_shape(one) for one in own if not wanted or one.model in (wanted, name)],
    )


async def set_price(desk: Desk, call: Call[Nothing, NewPrice]) -> OwnPrice:
    """Set a price of one's own; it takes the place of all that the package says of its model."""
    body = call.body
    said = {
        name: value
        for name, value in msgspec.to_builtins(body).items()
        if value is not None and name not in ("model", "tier", "effective_from")
    }
    if body.long is not None:
        said["long"] = {name: value for name, value in said["long"].items() if value is not None}
    since = None if body.effective_from is None else millis(body.effective_from)
    return _own_shape(await desk.pricing.set(body.model, body.tier, since, said, actor=call.actor))


async def end_price(desk: Desk, call: Call[Nothing, Nothing]) -> OwnPrice:
    """End a price of one's own; the package's counts again."""
    number = call.name
    if not (number.isascii() and number.isdigit() and len(number) <= 15):
        raise RequestError(f"there is no price {number[:100]!r}", status=404, code="price_not_found")
    return _own_shape(await desk.pricing.end(int(number), actor=call.actor))


async def rerate(desk: Desk, call: Call[Nothing, Rerating]) -> Rerated:
    """Price requests again by what counts for their time now; the difference is booked."""
    body = call.body
    done = await desk.pricing.rerate(
        since=millis(body.since),
        until=None if body.until is None else millis(body.until),
        model=body.model,
        reason=body.reason,
        actor=call.actor,
        is_dry=body.dry_run,
    )
    return Rerated(
        dry_run=body.dry_run,
        turns=done.turns,
        changed=done.changed,
        unpriced=done.unpriced,
        before=dollars(done.before),
        after=dollars(done.after),
        shortfall=dollars(done.shortfall),
        moved=[
            Moved(user_id=user, user=desk.name_of_user(user), amount=dollars(amount))
            for user, amount in sorted(done.moved.items())
        ],
    )


def _price_shape(desk: Desk, price: "ledger_prices.Price") -> Price:
    source, _, rest = price.id.partition("/")
    is_own = source == "own"
    return Price(
        id=price.id,
        own_id=rest if is_own else None,
        model=price.model,
        aliases=desk.pricing.book.aliases_of(price.model),
        tier=price.tier,
        source="own" if is_own else "package",
        effective_from=moment(price.since) if price.since else None,
        **_rates(price.short),
        long=None if price.long is None else Rates(**_rates(price.long)),
        long_above=price.long_above,
        reads=price.most_read,
        writes=price.most_written,
    )


def _own_shape(own: "ledger_prices.OwnPrice") -> OwnPrice:
    price = own.price
    return OwnPrice(
        id=str(own.id),
        model=own.model,
        tier=own.tier,
        effective_from=moment(own.since),
        price=None if price is None else Rates(**_rates(price.short)),
        long=None if price is None or price.long is None else Rates(**_rates(price.long)),
    )


def _rates(rates: "ledger_prices.Rates") -> dict[str, Any]:
    return {
        "input": dollars(rates.input),
        "cached": dollars(rates.cached),
        "cache_write": dollars(rates.cache_write),
        "output": dollars(rates.output),
    }
