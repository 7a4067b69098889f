"""The version of what is running, which an installation of another one beside it does not change."""

__all__ = ["__version__"]

__version__ = "0.1.0"
