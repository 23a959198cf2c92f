"""Why a model is not right: faults, tried one after another until one explains what is off."""
