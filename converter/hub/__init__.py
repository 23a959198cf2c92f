"""Fetching from the Hugging Face Hub: access, downloads, and the sources of a conversion."""
