"""Files of weights: read, recognised, planned, merged and written."""
