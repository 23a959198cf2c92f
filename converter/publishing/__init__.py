"""A converted model on the Hugging Face Hub: pushed with its card, or all of the catalogue's."""
