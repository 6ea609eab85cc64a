"""What a run cost."""

from __future__ import annotations

from flashmoe.ratchet.errors import UserError


def cost_line(seconds: float, price_per_hour: float | None) -> str:
    """The machine's time, and its cost where a price is known."""
    line = f"took {seconds:.0f} s of the machine"
    if price_per_hour is None:
        return line
    if not 0 <= price_per_hour < float("inf"):
        raise UserError(f"price-per-hour must not be negative, got {price_per_hour}")
    return f"{line}: {seconds * price_per_hour / 3600:.4f} at {price_per_hour:g} an hour"
