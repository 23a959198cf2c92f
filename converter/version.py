"""The name and the version of the tool, in one place."""

TOOL = "eomt-convert"
__version__ = "0.1.0"
