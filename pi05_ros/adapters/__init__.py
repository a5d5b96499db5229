"""Other policies behind the `Policy` protocol."""
