"""The definition of each op in plain torch: slow, obvious, right."""
