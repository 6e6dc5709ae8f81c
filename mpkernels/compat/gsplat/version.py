"""The version of gsplat whose interface this is."""

__version__ = "1.5.3"
