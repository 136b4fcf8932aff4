"""Names in annotations of megatron-core's fused MLP, which is never built."""


class FusibleOperation:
    """An operation."""


class Sequential:
    """Operations in turn."""
