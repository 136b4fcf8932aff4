"""Benchmarks: prefix groups against repeated prefixes, and against the `prefix-grouper` package where it is installed.

Every benchmark first checks that what it compares is equal, and gives no speed-up otherwise.
"""
