"""The version, named here and nowhere else: the build, the extension and the CLI read this file."""

__version__ = "0.1.0"
