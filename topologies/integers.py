"""Whole-number facts behind the graphs: logarithms, factors, primes.

Never through floating logarithms: int(math.log(243, 3)) is 4, int(math.log(1000, 10)) is 2.
"""

import math


def ceil_log2(n: int) -> int:
    """Return the least e with 2**e >= n, for n >= 1."""
    return (n - 1).bit_length()


def ceil_log(n: int, base: int) -> int:
    """Return the least e with base**e >= n, for n >= 1 and base >= 2."""
    exponent, power = 0, 1
    while power < n:
        power *= base
        exponent += 1
    return exponent


def digits(n: int, base: int) -> list[tuple[int, int]]:
    """Return (digit, exponent) of the non-zero digits of n in ``base``, highest exponent first."""
    found, exponent = [], 0
    while n:
        n, digit = divmod(n, base)
        if digit:
            found.append((digit, exponent))
        exponent += 1
    return found[::-1]


def small_factors(n: int, largest: int) -> tuple[list[int], int]:
    """Divide out of n the factors largest, largest - 1, .., 2, each as often as it goes.

    Returns:
        The factors in ascending order, and what is left of n: 1 if no prime factor of n exceeds
        ``largest``.
    """
    factors = []
    for factor in range(largest, 1, -1):
        while n % factor == 0:
            factors.append(factor)
            n //= factor
    return factors[::-1], n


def is_power_of_two(n: int) -> bool:
    """Say whether n is 1, 2, 4, 8, .."""
    return n >= 1 and n & (n - 1) == 0


def is_prime(n: int) -> bool:
    """Say whether n is prime, by trial division."""
    return n >= 2 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))


def largest_prime_factor(n: int) -> int:
    """Return the largest prime that divides n; 1 for n = 1."""
    divisor, largest = 2, 1
    while divisor * divisor <= n:
        if n % divisor == 0:
            largest, n = divisor, n // divisor
        else:
            divisor += 1
    return max(largest, n)


def squarest_rows(n: int) -> int:
    """Return the largest divisor of n that is at most sqrt(n): the rows of the squarest grid."""
    return next(rows for rows in range(math.isqrt(n), 0, -1) if n % rows == 0)
