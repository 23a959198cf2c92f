"""Fetching from the Hugging Face Hub: access, downloads, and what they are the sources of."""
