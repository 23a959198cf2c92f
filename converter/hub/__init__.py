"""The Hugging Face Hub, both ways: what is fetched, and what is published."""
