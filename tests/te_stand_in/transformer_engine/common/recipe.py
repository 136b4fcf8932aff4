"""FP8 recipes: megatron-core derives from one; none is ever made."""


class DelayedScaling:
    """Not made: nothing here runs in FP8."""
