"""The version of this program, as its processes say it: what is installed may be another by the time they are asked."""

__all__ = ["VERSION"]

VERSION = "0.1.0"
