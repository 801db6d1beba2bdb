"""Builds Outrider's container images: the base, the pause image, and one for every step plugin.

Standard library only: it runs before anything of Outrider is installed.
"""
