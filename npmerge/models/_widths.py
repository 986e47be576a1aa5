"""What the networks with a width share."""


def scaled(channels: int, width: float) -> int:
    """``width`` times so many channels, at least one."""
    return max(1, round(channels * width))
