"""Files of weights: read, told apart, planned, merged and written."""
