"""The decoder: one transformer that reads flags, over the op table."""
