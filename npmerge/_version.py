"""The version, also where the package is not installed but run from a checkout."""

__version__ = "0.1.0"
