"""A user's own reward function, as `train --reward tests.rewards:NAME` takes it."""


def odd_letters(prompt: str, response: str, answer: str) -> float:
    """The share of characters with an odd code point."""
    return sum(ord(letter) % 2 for letter in response) / max(len(response), 1)


def broken(prompt: str, response: str, answer: str) -> float:
    """Fails on every second response."""
    return float(answer[len(response) % 2 * 99])


NUMBER = 3
