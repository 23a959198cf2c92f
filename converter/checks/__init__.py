"""A model compared with evidence: what was checked, how close it came, and what is wrong."""
