"""Context parallelism for prefix groups: where rows live, which keys travel, and the exchange itself."""
