"""What tokens cost in money, and how much of its FLOP/s a machine uses. Pure."""


def utilisation(tokens_per_second: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation, 0 to 1: the share of `peak` FLOP/s that products with
    weights use. Attention and padding are not counted."""
    return tokens_per_second * flops_per_token / peak


def cost_per_million(
    price_per_hour: float | None, tokens_per_second: float
) -> float | None:
    """The price of a million tokens, in the currency of `price_per_hour`, which is of
    all machines together; None without a price or a speed."""
    if price_per_hour is None or not tokens_per_second:
        return None
    return price_per_hour / 3600 / tokens_per_second * 1e6
