"""A model held against evidence: what was checked, how close it came, and what is wrong."""
