"""Random draws that depend on the request's seed and the position drawn for, and on nothing else.

A generator that runs on from token to token draws otherwise when tokens are drafted, verified or drawn in batches. One
that is set anew for every position repeats itself however the work was cut. Pure Python.
"""

MASK = (1 << 64) - 1


def mixed(number: int) -> int:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & MASK
    return number ^ (number >> 31)


def key(seed: int, position: int) -> int:
    """The generator's seed, 63 bits, for the token at `position` of a request with `seed`."""
    return mixed(mixed(seed & MASK) + (position + 1) * 0x9E3779B97F4A7C15 & MASK) >> 1
