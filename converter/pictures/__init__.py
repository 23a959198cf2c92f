"""Pictures in: segments out, and how good they are."""
